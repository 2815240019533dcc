"""What one would write in an hour: a route around transformers' generate, for captions.

    python -m benchmarks.peers.transformers_server EXPORTED PORT THREADS

EXPORTED is a folder of ``multimodal export hf``. A request is one of ``benchmarks/serving.py``: an
image in a data URI, answered as a stream of OpenAI's chunks. Requests run one after the other, as
generate takes one batch at a time.
"""

import base64
import io
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from multimodal.data.images import fit_image, to_tensor
from multimodal.tokenizers.image import load_image_tokenizer


def make_app(folder: Path) -> Starlette:
    images = load_image_tokenizer(str(folder / "image_tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    one_at_a_time = threading.Lock()

    def prompt_of(url: str) -> Any:
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
        pixels = to_tensor(fit_image(image, images.image_size, images.fit))[None]
        codes = images.encode(pixels, model.config.image_levels["reads"])[0].tolist()
        text = "<bos><boi>" + "".join(f"<|image:{code}|>" for code in codes) + "<eoi>"
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)

    def pieces(url: str, tokens: int) -> Iterator[str]:
        with one_at_a_time:
            stream = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            options = {**prompt_of(url), "max_new_tokens": tokens, "streamer": stream}
            threading.Thread(target=model.generate, kwargs=options).start()
            for text in stream:
                yield f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"
        yield "data: [DONE]\n\n"

    async def caption(request: Request) -> StreamingResponse:
        body = await request.json()
        (part,) = body["messages"][0]["content"]
        texts = pieces(part["image_url"]["url"], body["max_tokens"])
        return StreamingResponse(texts, media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/chat/completions", caption, methods=["POST"])])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    uvicorn.run(make_app(Path(sys.argv[1])), port=int(sys.argv[2]), log_level="error")
