"""A caption by a running SGLang server, of a folder from ``multimodal export hf``. Not run by our
tests: it needs a GPU, and SGLang.

    pip install "sglang[all]"
    python -m sglang.launch_server --model-path EXPORTED --port 30000
    python examples/sglang_caption.py CODE CODE ...
"""

import json
import sys
from urllib.request import Request, urlopen

prompt = "<bos><boi>" + "".join(f"<|image:{code}|>" for code in sys.argv[1:]) + "<eoi>"
body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 64}}
request = Request(
    "http://localhost:30000/generate",
    json.dumps(body).encode(),
    {"Content-Type": "application/json"},
)
print(json.load(urlopen(request))["text"].strip())
