"""A caption by transformers and onnxruntime alone.

The folders are from ``multimodal export hf`` and ``multimodal export onnx``.

    python examples/transformers_caption.py EXPORTED ONNX PHOTO
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, onnx, photo = sys.argv[1:]
about = json.loads(Path(onnx, "image_tokenizer.json").read_text("utf-8"))
image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
crop, pad = partial(ImageOps.fit, image), partial(ImageOps.pad, image, color="#7f7f7f")
shaped = {"squash": image.resize, "crop": crop, "letterbox": pad}[about["fit"]]
pixels = np.asarray(shaped((about["image_size"],) * 2, Image.Resampling.BICUBIC), np.float32)
images = pixels.transpose(2, 0, 1)[None] / 127.5 - 1
(all_codes,) = InferenceSession(f"{onnx}/encode.onnx").run(None, {"images": images})

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
codes, first = [], 0
for level in about["levels"]:
    after = first + level["grid"] ** 2 * level["groups"]
    if level["name"] in model.config.image_levels["reads"]:
        codes += all_codes[0, first:after].tolist()
    first = after
prompt = "<bos><boi>" + "".join(f"<|image:{code}|>" for code in codes) + "<eoi>"
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
bos, eos = model.config.bos_token_id, model.config.eos_token_id
no_texts = [i for i in range(bos, model.config.vocab_size) if i != eos]  # codes, and specials
output = model.generate(**inputs, max_new_tokens=64, suppress_tokens=no_texts)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
