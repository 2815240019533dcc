"""LoRA of PEFT on a folder from ``multimodal export hf``: it is a stock language model.

pip install peft
python examples/peft_lora.py EXPORTED OUT "a caption" CODE CODE ...
"""

import shutil
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, out, caption, *codes = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
prompt = "<bos><boi>" + "".join(f"<|image:{code}|>" for code in codes) + "<eoi>"
ids = tokenizer(prompt + f" {caption}<eos>", return_tensors="pt")["input_ids"]
labels = ids.clone()
labels[:, : len(tokenizer(prompt)["input_ids"])] = -100  # only the caption is learned
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for step in range(10):
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
model.merge_and_unload().save_pretrained(out)  # the stock class again
tokenizer.save_pretrained(out)
# What `multimodal import OUT MODEL` needs to make it a model of the toolkit again.
shutil.copytree(f"{folder}/image_tokenizer", f"{out}/image_tokenizer")
