"""Text tokenizers in the layouts that language models have, and strings that are hard to read."""

import json
import random
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.trainers import BpeTrainer

from multimodal.tokenizers.text import ChatFormat, TextTokenizer

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def bytes_after(*splits: Any) -> Any:
    words = pre.ByteLevel(add_prefix_space=False, use_regex=not splits)
    if splits and isinstance(splits[0], pre.Digits):  # as SmolLM2
        words = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre.Sequence([*splits, words]) if splits else words


def regex(expression: str) -> Any:
    return pre.Split(Regex(expression), "isolated")


def made_as(layout: str, texts: list[str]) -> Tokenizer:
    alphabet = pre.ByteLevel.alphabet()
    if layout == "llama 2":  # spaces are a letter, and what is no token is bytes
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        # Bytes are tokens of the vocabulary, not control tokens: they are trained as letters.
        trainer = BpeTrainer(vocab_size=700, special_tokens=[*CONTROL, *BYTES], show_progress=False)
        made.train_from_iterator(texts, trainer)
        stored = json.loads(made.to_str())
        stored["added_tokens"] = [t for t in stored["added_tokens"] if t["content"] in CONTROL]
        return Tokenizer.from_str(json.dumps(stored))
    made = Tokenizer(models.BPE(ignore_merges=layout == "llama 3"))
    made.pre_tokenizer = {
        "gpt 2": bytes_after(),
        "smollm 2": bytes_after(pre.Digits(individual_digits=True)),
        "qwen": bytes_after(regex(QWEN)),
        "llama 3": bytes_after(regex(LLAMA3)),
    }[layout]
    if layout == "qwen":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    return made


def that_talks(text: TextTokenizer) -> TextTokenizer:
    """The same tokens, with a chat template. Token 40 ends a turn: any one will do."""
    letters = Tokenizer.from_str(text.to_json())
    end = letters.decode([40])
    letters.add_special_tokens([end])
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    chat = ChatFormat(template + "{{ 'assistant:' }}", end)
    return TextTokenizer.from_json(letters.to_str(), chat)


def hostile_strings(count: int) -> list[str]:
    """Strings of letters, spaces, control characters, combining marks, emoji, rare planes."""
    rng = random.Random(0)
    parts = [
        *"abcXYZ 0159 \t\n\r\x00\x7f\u00a0\u200b\u200d\ufeff\u0301ßİıſ", "  ", "2024", "don't",
        "'LL", "猫", "🐈‍⬛", "👩‍👩‍👧", "\U0001f1e9\U0001f1ea", "𝔘𝔫𝔦", "नमस्ते", "مرحبا", "\ue000",
        "\U0010ffff", "▁", "Ġ", "<0x0A>", "[INST]", "<eos>", *CONTROL,
    ]  # fmt: skip
    return ["".join(rng.choices(parts, k=rng.randint(0, 12))) for _ in range(count)]
