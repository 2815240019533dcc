"""A caption by vLLM, of a folder from ``multimodal export hf``. Not run by our tests: it needs a
GPU, and vLLM.

    pip install vllm
    python examples/vllm_caption.py EXPORTED CODE CODE ...
"""

import sys

from vllm import LLM, SamplingParams

folder, *codes = sys.argv[1:]
prompt = "<bos><boi>" + "".join(f"<|image:{code}|>" for code in codes) + "<eoi>"
llm = LLM(folder, tokenizer=folder)
(reply,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=64))
print(reply.outputs[0].text.strip())
