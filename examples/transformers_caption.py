"""A caption by transformers alone, of a folder from ``multimodal export hf``.

The codes of the image come from the toolkit, or from ``multimodal export onnx`` in onnxruntime.

    python examples/transformers_caption.py EXPORTED PHOTO
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from multimodal.data.images import fit_image, open_image, to_tensor
from multimodal.tokenizers.image import load_image_tokenizer

folder, photo = sys.argv[1:]
images = load_image_tokenizer(f"{folder}/image_tokenizer")
pixels = to_tensor(fit_image(open_image(photo), images.image_size, images.fit))[None]

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
codes = images.encode(pixels, model.config.image_levels["reads"])[0].tolist()
prompt = "<bos><boi>" + "".join(f"<|image:{code}|>" for code in codes) + "<eoi>"
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
