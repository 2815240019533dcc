"""A caption by llama.cpp, of a file from ``multimodal export gguf``.

    pip install llama-cpp-python
    python examples/llama_cpp_caption.py MODEL MODEL.gguf PHOTO...

MODEL is the model folder that the file was made of: its image tokenizer gives the codes.
"""

import sys

from llama_cpp import Llama

from multimodal import load
from multimodal.inference.codec import encode_to_read, read_images
from multimodal.model.sequences import describe_prompt

folder, file, *photos = sys.argv[1:]
model = load(folder)
llama = Llama(file, n_ctx=1024, logits_all=False, verbose=False)
texts = model.vocabulary.text_size
forbidden = {i: float("-inf") for i in range(texts, model.vocabulary.size)}
del forbidden[model.vocabulary.eos]  # a caption has texts and an end, no codes
for codes in encode_to_read(model, read_images(model, photos)).tolist():
    prompt = describe_prompt(model.vocabulary, codes)
    reply = llama.create_completion(prompt, max_tokens=64, temperature=0.0, logit_bias=forbidden)
    print(reply["choices"][0]["text"].strip())
