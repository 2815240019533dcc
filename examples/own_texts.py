"""Texts that a language model writes by itself, to train on beside images: so it stays what it was.

    python examples/own_texts.py smollm2-135m-instruct.Q4_1.gguf texts.jsonl [768]
    multimodal data build texts.jsonl data/own-texts

Half begin as a chat does, and half with nothing. Being its own, they pull its words nowhere, and
what new codes would take from them is pushed back. 768 texts take seven minutes on two cores.
"""

import json
import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS, AT_ONCE = 144, 128
ROLE = re.compile(r"^(system|user|assistant)\n")
END = "<|endoftext|>"  # between documents, as SmolLM2 and Qwen have it

source, out = map(Path, sys.argv[1:3])
count = int(sys.argv[3]) if len(sys.argv) > 3 else 768
where = {"pretrained_model_name_or_path": str(source)}
if source.suffix == ".gguf":
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
tokenizer = AutoTokenizer.from_pretrained(**where)
model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).to(torch.bfloat16)
CONTROL = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
chat = tokenizer.apply_chat_template([{"role": "user", "content": "@"}], tokenize=False)

torch.manual_seed(0)
with out.open("w", encoding="utf-8") as file:
    for done in range(0, count, AT_ONCE):
        start = [chat.partition("@")[0], END][done // AT_ONCE % 2]
        now = min(AT_ONCE, count - done)
        inputs = tokenizer([start] * now, add_special_tokens=False, return_tensors="pt")
        written = model.generate(
            **inputs,
            max_new_tokens=TOKENS,
            do_sample=True,
            top_k=0,
            min_p=0.02,
            eos_token_id=tokenizer.convert_tokens_to_ids(END),  # a chat goes on after a turn
        )
        for text in tokenizer.batch_decode(written):
            # A text has no control tokens, and without them the names of roles would be words.
            turns = CONTROL.split(text.removeprefix(start))
            text = "\n".join(ROLE.sub("", turn).strip() for turn in turns if turn.strip())
            whole = re.match(r".*[.!?\n]", text, re.DOTALL)  # a text ends where a sentence does
            if whole and whole[0].strip():
                file.write(json.dumps({"text": whole[0].strip()}) + "\n")
        print(f"{done + now} of {count} texts", flush=True)
