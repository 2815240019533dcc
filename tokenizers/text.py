"""Text to ids and back: byte-level BPE by Hugging Face ``tokenizers``.

A tokenizer that is trained here has no special tokens. Every id stands for bytes, and decoding
restores every string. A tokenizer from elsewhere may have control tokens and a normalizer. The text
of a user never becomes a control token.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


class TextTokenizer:
    """A trained BPE. ``text_tokenizer.json`` of a model folder is its file."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        stored = json.loads(tokenizer.to_str())
        for token in stored.get("added_tokens") or []:
            token["special"] = True  # unmarked control tokens would be matched in a text
        self._tokenizer = Tokenizer.from_str(json.dumps(stored))
        self._tokenizer.encode_special_tokens = True  # encode control tokens as plain text

    def __repr__(self) -> str:
        return f"TextTokenizer({len(self)} tokens)"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle with ``encode_special_tokens``, which the library's own pickle loses."""
        return TextTokenizer.from_json, (self.to_json(),)

    @classmethod
    def from_json(cls, text: str) -> "TextTokenizer":
        """The reverse of ``to_json``."""
        return cls(Tokenizer.from_str(text))

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> "TextTokenizer":
        """Learn a BPE.

        Args:
            texts: the training texts.
            vocabulary_size: largest number of tokens, at least 256.

        Raises:
            ValueError: for a vocabulary that cannot hold all 256 bytes.
        """
        if vocabulary_size < 256:
            raise ValueError(
                f"vocabulary_size={vocabulary_size}: byte-level BPE needs at least 256"
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((_valid(text) for text in texts), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> "TextTokenizer":
        """Read the file, or the ``tokenizer.json`` of a Hugging Face folder.

        Raises:
            ValueError: if there is no such file, or it is no text tokenizer.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{path}: no such file; train one with: multimodal tokenizer text")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the Rust side raises plain Exception
            raise ValueError(f"{path}: not a text tokenizer: {error}") from error

    def save(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(path))

    def to_json(self) -> str:
        """The tokenizer in Hugging Face's format."""
        return str(self._tokenizer.to_str())

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def vocabulary(self) -> dict[str, int]:
        """The id of every token, by the token as the file writes it."""
        return dict(self._tokenizer.get_vocab())

    def encode(self, text: str) -> list[int]:
        """Text to ids in [0, len(self)). A lone surrogate becomes "?", as UTF-8 has none."""
        return list(self._tokenizer.encode(_valid(text), add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids in [0, len(self)) to text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
