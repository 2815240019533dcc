"""Whether a language model that learned to see has kept its words.

    python benchmarks/language_model.py BEFORE AFTER --text wikitext2_valid.txt \
        [--tokens 100000] [--out docs/language_model.json] [--page docs/language_model.md]

BEFORE is what the model was: a folder of Hugging Face or a GGUF file. AFTER is the model folder of
a run of smollm2_photos.yaml. Both are read by transformers, AFTER from its export, so that nothing
of this package computes what is compared.

Measured is the perplexity of a text (pieces of 512 tokens, each by itself), once with the rows that
AFTER has more in its softmax and once without, and the answers to ten prompts: greedy, at most 80
tokens. Also by how much the logits of this package differ from those of transformers, in float32,
and how long the training took, from the logs beside AFTER.
"""

import argparse
import html
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from multimodal.export.hf import export_hf
from multimodal.model.layers.attention import attention_mask
from multimodal.model.layers.transformer import Transformer
from multimodal.model.stock import read_stock

PIECE, LONGEST = 512, 80
WATTS, ESTIMATE = 5, "CPU seconds x 5 W"  # as multimodal/energy.py estimates where it cannot read
PROMPTS = {
    "summarise": "Summarise in one sentence: The town built a new bridge because the old one was "
    "too narrow for buses. It took three years, cost more than planned, and opened in May.",
    "translate": "Translate to French: The cat sleeps on the chair.",
    "limerick": "Write a limerick about a dog.",
    "code": "Complete this Python function:\n\ndef is_even(number):\n",
    "sentiment": "Review: I loved it. Sentiment: positive\nReview: A waste of time. Sentiment: "
    "negative\nReview: The best film of the year. Sentiment:",
    "fact": "What is the capital of Italy?",
    "list": "Name three fruits.",
    "sum": "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "rewrite": "Rewrite politely: Give me the report now.",
    "explain": "Explain to a child why the sky is blue.",
}


def opened(source: str) -> tuple[Any, Any]:
    """The tokenizer and the model of transformers, in float32."""
    path = Path(source)
    where = {"pretrained_model_name_or_path": source}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return tokenizer, model.eval()


@torch.inference_mode()
def perplexities(model: Any, ids: torch.Tensor, text_size: int) -> tuple[float, float]:
    """Of a text: exp of the mean cross-entropy of its tokens, without the first of each piece.

    Returns:
        Among all ids, and among the first text_size.
    """
    totals, count = torch.zeros(2, dtype=torch.float64), 0
    for piece in ids.split(PIECE):
        if len(piece) > 1:
            logits = model(piece[None]).logits[0, :-1].double()
            for number, size in enumerate((None, text_size)):
                loss = torch.nn.functional.cross_entropy(
                    logits[:, :size], piece[1:], reduction="sum"
                )
                totals[number] += loss
            count += len(piece) - 1
    among_all, among_texts = (totals / count).exp().tolist()
    return among_all, among_texts


@torch.inference_mode()
def reply(tokenizer: Any, model: Any, prompt: str) -> str:
    """What the model answers in a chat."""
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


@torch.inference_mode()
def logits_differ_by(source: str, model: Any, ids: torch.Tensor) -> float:
    """The largest difference between our logits and those of transformers."""
    sizes, weights = read_stock(source)
    ours = Transformer(sizes)
    ours.load_stock_state_dict({name: weight.float() for name, weight in weights.items()})
    documents = torch.ones_like(ids[None])
    mask = attention_mask(documents, torch.zeros_like(documents))
    logits = ours.logits(ours(ids[None], documents.cumsum(1) - 1, mask))
    return float((logits - model(ids[None]).logits).abs().max())


def training_of(model: Path) -> dict[str, Any] | None:
    """The steps of the run that wrote a model folder, and the hours for which its cores computed:
    a run that was halted for a while is not charged for it. None: its logs do not say.
    """
    logs = [json.loads(file.read_text("utf-8")) for file in model.parent.glob("logs/energy*.json")]
    if not logs or not all(ESTIMATE in log["how"] for log in logs):
        return None
    processor_hours = sum(log["watt_hours"] for log in logs) / WATTS
    steps = max(log["to_step"] for log in logs)
    return {"steps": steps, "processor_hours": round(processor_hours, 2)}


def measured(source: str, text: str, tokens: int, text_size: int | None = None) -> dict[str, Any]:
    tokenizer, model = opened(source)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0][:tokens]
    text_size = model.config.vocab_size if text_size is None else text_size
    among_all, among_texts = perplexities(model, ids, text_size)
    return {
        "tokens": len(ids),
        "text_size": text_size,
        "perplexity": among_all,
        "perplexity_among_texts": among_texts,
        "logits_differ_by": logits_differ_by(source, model, ids[:PIECE]),
        "replies": {name: reply(tokenizer, model, prompt) for name, prompt in PROMPTS.items()},
    }


def page(found: dict[str, Any]) -> str:
    """The replies side by side, below the perplexities."""
    before, after = found["before"], found["after"]
    lines = [
        "# Ten prompts, before and after",
        "",
        "What a language model answers before it learned to see, and after it, by its export in",
        "transformers: greedy, at most 80 tokens, chosen by nobody. `benchmarks/language_model.py`",
        "wrote this page ([how it was trained](training/language_models.md)).",
        "",
        f"| perplexity of `{found['text']}`, {before['tokens']:,} tokens | before | after |",
        "|---|---|---|",
        *(
            f"| {name} | {before[key]:.2f} | {after[key]:.2f} |"
            for name, key in (
                ("among all ids, new ones too", "perplexity"),
                ("among the ids of texts", "perplexity_among_texts"),
            )
        ),
        "",
        f"The logits of this package differ from those of transformers by at most "
        f"{max(found[when]['logits_differ_by'] for when in ('before', 'after')):.0e}.",
        "",
    ]
    lines += ["| prompt | before | after |", "|---|---|---|"]
    for name, prompt in PROMPTS.items():
        cells = [prompt, before["replies"][name], after["replies"][name]]
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    return "\n".join([*lines, ""])


def cell(text: str) -> str:
    """A text in a table of Markdown, as it is."""
    for character in "\\`*_[]|#":
        text = text.replace(character, f"\\{character}")
    return html.escape(text, quote=False).replace("\n", "<br>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", help="a folder of Hugging Face, or a GGUF file")
    parser.add_argument("after", help="a model folder")
    parser.add_argument("--text", type=Path, required=True, help="of which the perplexity is")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the text, at most")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    parser.add_argument("--page", type=Path, help="write the replies as Markdown")
    options = parser.parse_args()
    text = options.text.read_text("utf-8")
    before = measured(options.before, text, options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        export_hf(Path(options.after), Path(folder) / "stock")
        stock = str(Path(folder) / "stock")
        after = measured(stock, text, options.tokens, before["text_size"])
    worse = after["perplexity"] / before["perplexity"] - 1
    found = {
        "text": options.text.name,
        "piece": PIECE,
        "training": training_of(Path(options.after)),
        "before": before,
        "after": after,
        "perplexity_worse_by": worse,
        "same_replies": sum(before["replies"][name] == after["replies"][name] for name in PROMPTS),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if options.page is not None:
        options.page.write_text(page(found), "utf-8")
    print(json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    main()
