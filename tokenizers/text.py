"""Text to ids and back: byte-level BPE by Hugging Face ``tokenizers``.

A tokenizer that is trained here has no special tokens. Every id stands for bytes, and decoding
restores every string. A tokenizer from elsewhere may have control tokens and a normalizer. The text
of a user never becomes a control token.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
# How a text is split before BPE, where transformers reads it off a GGUF file rightly.
GGUF_SPLITS = ("default", "gpt-2", "smollm", "qwen2")


@dataclass(frozen=True)
class ChatFormat:
    """How the language model that a tokenizer belongs to was taught to talk.

    Attributes:
        template: Jinja, as Hugging Face writes it.
        end: the token that ends a turn.
        begin: the token that begins a text, if there is one.
    """

    template: str
    end: str
    begin: str = ""


class TextTokenizer:
    """A trained BPE. ``text_tokenizer.json`` of a model folder is its file.

    Attributes:
        chat: how to talk to the language model that it belongs to. None: it was not taught to.
    """

    def __init__(self, tokenizer: Tokenizer, chat: ChatFormat | None = None) -> None:
        self.chat = chat
        stored = json.loads(tokenizer.to_str())
        for token in stored.get("added_tokens") or []:
            token["special"] = True  # unmarked control tokens would be matched in a text
        self._tokenizer = Tokenizer.from_str(json.dumps(stored))
        self._tokenizer.encode_special_tokens = True  # encode control tokens as plain text

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle with ``encode_special_tokens``, which the library's own pickle loses."""
        return TextTokenizer.from_json, (self.to_json(), self.chat)

    @classmethod
    def from_json(cls, text: str, chat: ChatFormat | None = None) -> "TextTokenizer":
        """The reverse of ``to_json``."""
        return cls(Tokenizer.from_str(text), chat)

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
        """Read the file, the ``tokenizer.json`` of a Hugging Face folder, or that in a GGUF file.

        Raises:
            ValueError: if there is no such file, or it is no text tokenizer.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{path}: no such file; train one with: multimodal tokenizer text")
        try:
            if path.suffix == ".gguf":
                return cls(*_read_gguf(path))
            return cls(Tokenizer.from_file(str(path)), _chat_beside(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise ValueError(f"{path}: not a text tokenizer: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the file, and beside it how to talk to the model, as Hugging Face does."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(path))
        if self.chat is not None:
            (path.parent / TEMPLATE).write_text(self.chat.template, "utf-8")
            tokens = {"eos_token": self.chat.end, "bos_token": self.chat.begin}
            config = json.dumps({k: v for k, v in tokens.items() if v}, indent=1)
            (path.parent / CONFIG).write_text(config + "\n", "utf-8")

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


def _chat_beside(path: Path) -> ChatFormat | None:
    """The chat format in the files beside a tokenizer's."""
    template, config = path.parent / TEMPLATE, dict[str, Any]()
    if (path.parent / CONFIG).is_file():
        config = json.loads((path.parent / CONFIG).read_text("utf-8"))
    found = template.read_text("utf-8") if template.is_file() else config.get("chat_template")
    end, begin = (_content(config.get(f"{name}_token")) for name in ("eos", "bos"))
    return ChatFormat(found, end, begin) if isinstance(found, str) and end else None


def _content(token: object) -> str:
    """A token as tokenizer_config.json writes it: a string, or an object with its content."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _read_gguf(path: Path) -> tuple[Tokenizer, ChatFormat | None]:
    """The tokenizer of a GGUF file, as transformers converts it."""
    try:
        import gguf
        import transformers
    except ImportError as error:
        raise ValueError(f"GGUF needs: pip install multimodal[gguf] ({error})") from error
    reader = gguf.GGUFReader(path)
    field = reader.get_field("tokenizer.ggml.pre")
    splits = field.contents() if field else "default"
    if splits not in GGUF_SPLITS:
        raise ValueError(
            f"it splits texts as {splits!r} does, which GGUF does not describe; give the "
            "tokenizer.json of the model that it was made of"
        )
    found = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    end = found.eos_token
    if (turn := reader.get_field("tokenizer.ggml.eot_token_id")) is not None:
        end = found.convert_ids_to_tokens(int(turn.contents()))
    chat = None
    if isinstance(found.chat_template, str) and end:
        chat = ChatFormat(found.chat_template, end, found.bos_token or "")
    stored = json.loads(found.backend_tokenizer.to_str())
    # transformers adds an <unk> where there is none.
    listed = reader.get_field("tokenizer.ggml.tokens")
    count = len(listed.data) if listed is not None else 0
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["id"] < count]
    return Tokenizer.from_str(json.dumps(stored)), chat


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
