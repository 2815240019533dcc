"""Text to ids and back: byte-level BPE by Hugging Face ``tokenizers``.

A tokenizer that is trained here has no special tokens. Every id stands for bytes, and decoding
restores every string. A tokenizer from elsewhere may have control tokens and a normalizer. The text
of a user never becomes a control token.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from multimodal.files import open_file, parse_json, read_text
from multimodal.tokenizers.chat import ROLES, ChatFormat
from multimodal.tokenizers.gguf import gguf_alone
from multimodal.tokenizers.weights import read_config_file

MAX_FILE = 2**28  # bytes of a tokenizer: that of 250,000 tokens has 2**24
MAX_TEMPLATE = 2**20  # bytes
# Where Hugging Face keeps a template. Ours is in the JSON: only JSON and weights are shared.
TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
GENERATION = "generation_config.json"
ENDS = "end_tokens"  # in the CONFIG of a folder of ours
NORMALIZER = "multimodal.normalizer"  # in a GGUF file of ours: NFC or none
# How a text is split before BPE, where transformers reads it off a GGUF file rightly.
GGUF_SPLITS = ("gpt-2", "smollm", "qwen2", "llama-bpe")


class TextTokenizer:
    """A trained BPE. ``text_tokenizer.json`` of a model folder is its file.

    Attributes:
        chat: how to talk to the language model that it belongs to. None: it was not taught to.
        ends: tokens that end a text of that language model.
    """

    def __init__(
        self, tokenizer: Tokenizer, chat: ChatFormat | None = None, ends: Iterable[str] = ()
    ) -> None:
        self.chat, self.ends = chat, tuple(ends)
        stored = json.loads(tokenizer.to_str())
        added = stored.get("added_tokens") or []
        self._plain = frozenset(token["id"] for token in added if not token["special"])
        for token in added:
            token["special"] = True  # unmarked control tokens would be matched in a text
        stored |= {"truncation": None, "padding": None}  # a text has the ids that it has
        self._tokenizer = Tokenizer.from_str(json.dumps(stored))
        self._tokenizer.encode_special_tokens = True  # encode control tokens as plain text

    def __repr__(self) -> str:
        return f"TextTokenizer({len(self)} tokens)"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle with ``encode_special_tokens``, which the library's own pickle loses."""
        return TextTokenizer.from_json, (self.to_json(), self.chat, self.ends)

    @classmethod
    def from_json(
        cls, text: str, chat: ChatFormat | None = None, ends: Iterable[str] = ()
    ) -> "TextTokenizer":
        """The reverse of ``to_json``.

        Raises:
            ValueError: for anything else, and for ids that are not 0, 1, 2, ...
        """
        check_safe(parse_json(text))
        try:
            made = cls(Tokenizer.from_str(text), chat, ends)
            made.decode(made.encode("a b"))
        except BaseException as error:
            # The library raises plain Exception, and its panics are no Exception at all.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(" ".join(str(error).split())) from error
        return made

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
        if not path.exists():
            raise ValueError(f"{path}: no such file; train one with: multimodal tokenizer text")
        is_gguf = path.suffix == ".gguf"
        open_file(path).close()  # a regular file
        text, beside = ("", None) if is_gguf else (read_text(path, MAX_FILE), _read_beside(path))
        try:
            if beside is None:
                return cls.from_json(*_read_gguf(path))
            made = cls.from_json(text, beside.chat)
            names = {number: token for token, number in made.controls().items()}
            listed = (*beside.ends, *(names.get(number, "") for number in beside.end_ids))
            made.ends = tuple(dict.fromkeys(token for token in listed if token))
            return made
        except Exception as error:  # the readers of GGUF raise what comes
            raise ValueError(f"{path}: not a text tokenizer: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the file, and beside it how to talk to the model, as Hugging Face does."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._plain:
            stored = json.loads(self.to_json())
            path.write_text(json.dumps(stored, ensure_ascii=False, indent=2), "utf-8")
        else:
            self._tokenizer.save(str(path))
        config: dict[str, Any] = {}
        if self.chat is not None:
            tokens = {"eos_token": self.chat.end, "bos_token": self.chat.begin}
            config = {"chat_template": self.chat.template, **{k: v for k, v in tokens.items() if v}}
        if self.ends:
            config[ENDS] = list(self.ends)
        if config:
            text = json.dumps(config, ensure_ascii=False, indent=1)
            (path.parent / CONFIG).write_text(text + "\n", "utf-8")

    def to_json(self) -> str:
        """The tokenizer in Hugging Face's format."""
        text = str(self._tokenizer.to_str())
        if not self._plain:
            return text
        stored = json.loads(text)
        for token in stored["added_tokens"]:
            token["special"] = token["id"] not in self._plain
        return json.dumps(stored, ensure_ascii=False)

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def vocabulary(self) -> dict[str, int]:
        """The id of every token, by the token as the file writes it."""
        return dict(self._tokenizer.get_vocab())

    @property
    def turn_end(self) -> int | None:
        """The id that ends a turn of a model that was taught to talk."""
        return None if self.chat is None else self._tokenizer.token_to_id(self.chat.end)

    @property
    def end_ids(self) -> list[int]:
        """The ids that end a text of the language model, and a turn of it."""
        found = [self.turn_end, *map(self._tokenizer.token_to_id, self.ends)]
        return list(dict.fromkeys(number for number in found if number is not None))

    def controls(self) -> dict[str, int]:
        """The ids of the control tokens, which no text becomes."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items()}

    def encode(self, text: str) -> list[int]:
        """Text to ids in [0, len(self)). A lone surrogate becomes "?", as UTF-8 has none."""
        return list(self._tokenizer.encode(_valid(text), add_special_tokens=False).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation in the model's chat template, up to where it answers.

        Args:
            messages: ``role`` (system, user or assistant) and ``content`` of each.

        Raises:
            ValueError: if the model was not taught to talk, or its template refuses the messages.
        """
        return [number for piece in self.chat_pieces(messages) for number in piece]

    def chat_pieces(self, messages: Sequence[Mapping[str, str]]) -> list[list[int]]:
        """The same in pieces, each up to the first control token behind a message.

        The pieces of a longer conversation begin with those of its beginning but the last one.
        """
        if self.chat is None:
            raise ValueError("this model has no chat template")
        for number, message in enumerate(messages):
            if not all(isinstance(message.get(name), str) for name in ("role", "content")):
                raise ValueError(f"message {number}: expected role and content, both texts")
            if message["role"] not in ROLES:
                raise ValueError(f"message {number}: role is none of {', '.join(ROLES)}")
        controls, pieces, text = self.controls(), [list[int]()], ""
        splits = re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))))
        ends = False  # the next control token ends a piece
        for piece in self.chat.render(messages):
            if piece.said:
                text, ends = text + piece.text, True
                continue
            start = 0
            for token in splits.finditer(piece.text) if controls else ():
                text += piece.text[start : token.start()]
                pieces[-1] += [*self.encode(text), controls[token[0]]]
                text, start = "", token.end()
                if ends:
                    pieces.append([])
                    ends = False
            text += piece.text[start:]
        pieces[-1] += self.encode(text)
        return [piece for piece in pieces if piece]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids in [0, len(self)) to text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


class _Beside(NamedTuple):
    """What the files beside a tokenizer's say. end_ids: those of generation_config.json."""

    chat: ChatFormat | None
    ends: tuple[str, ...]
    end_ids: tuple[int, ...]


def _read_beside(path: Path) -> _Beside:
    """Raises ``ValueError`` for other files."""
    config, generation = (
        read_config_file(path.parent / name) if (path.parent / name).exists() else {}
        for name in (CONFIG, GENERATION)
    )
    found = config.get("chat_template")
    if isinstance(found, list):  # of several
        found = next((each.get("template") for each in found if _is_default(each)), None)
    if (path.parent / TEMPLATE).exists():
        found = read_text(path.parent / TEMPLATE, MAX_TEMPLATE)
    end, begin = (_content(config.get(f"{name}_token")) for name in ("eos", "bos"))
    chat = ChatFormat(found, end, begin) if isinstance(found, str) and end else None
    if isinstance(listed := config.get(ENDS), list):  # a folder of ours
        return _Beside(chat, tuple(token for token in listed if isinstance(token, str)), ())
    ids = generation.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    ends = (end,) if end and chat is None else ()
    return _Beside(chat, ends, tuple(number for number in ids if type(number) is int))


def _is_default(template: object) -> bool:
    return isinstance(template, dict) and template.get("name") == "default"


def _content(token: object) -> str:
    """A token as tokenizer_config.json writes it: a string, or an object with its content."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _read_gguf(path: Path) -> tuple[str, ChatFormat | None, tuple[str, ...]]:
    """The tokenizer of a GGUF file, as transformers converts it, with its chat and its ends."""
    with gguf_alone(path) as alone:
        import gguf
        import transformers

        reader = gguf.GGUFReader(path)
        has_pieces = _field(reader, "tokenizer.ggml.model") == "llama"  # those of SentencePiece
        splits = _field(reader, "tokenizer.ggml.pre")
        if not has_pieces and splits not in GGUF_SPLITS:
            raise ValueError(
                f"it splits texts as {splits or 'default'!r} does, which GGUF does not describe; "
                "give the tokenizer.json of the model that it was made of"
            )
        found = transformers.AutoTokenizer.from_pretrained(**alone)
    end = last = found.eos_token
    if (turn := _field(reader, "tokenizer.ggml.eot_token_id")) is not None:
        end = found.convert_ids_to_tokens(int(turn))
    chat = None
    if isinstance(found.chat_template, str) and end:
        chat = ChatFormat(found.chat_template, end, found.bos_token or "")
    stored = json.loads(found.backend_tokenizer.to_str())
    if splits == "llama-bpe":  # of Llama 3: a word that is a token is that token
        stored["model"]["ignore_merges"] = True
    # GGUF describes no normalizer, and those of Qwen have one.
    normal = _field(reader, NORMALIZER) or ("NFC" if splits == "qwen2" else "none")
    if has_pieces:  # transformers adds no space before a text that begins with one
        spaced = _field(reader, "tokenizer.ggml.add_space_prefix") is not False
        steps = [{"type": "Prepend", "prepend": "▁"}] if spaced else []
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        stored["normalizer"] = {"type": "Sequence", "normalizers": [*steps, replace]}
        stored["pre_tokenizer"] = None
    elif normal == "NFC":
        stored["normalizer"] = {"type": "NFC"}
    # transformers adds an <unk> where there is none.
    listed = reader.get_field("tokenizer.ggml.tokens")
    count = len(listed.data) if listed is not None else 0
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["id"] < count]
    return json.dumps(stored), chat, (last,) if last and (chat is None or last != end) else ()


def _field(reader: Any, name: str) -> Any:
    """What a GGUF file says, or None."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def check_safe(stored: Any) -> None:
    """Refuse what makes the library panic, or take memory without end, before it sees it.

    Args:
        stored: the content of a file in Hugging Face's format.

    Raises:
        ValueError: names the field.
    """
    if not isinstance(stored, Mapping) or not isinstance(stored.get("model"), Mapping):
        raise ValueError("model: expected an object")
    model, added = stored["model"], stored.get("added_tokens") or []
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, Mapping | list) or not isinstance(added, list):
        raise ValueError("model.vocab, added_tokens: expected an object, and a list")
    # The library's table reaches up to the largest id. Ours is a range of the network's ids.
    ids = list(vocabulary.values()) if isinstance(vocabulary, Mapping) else range(len(vocabulary))
    ids = [*ids, *(token.get("id") if isinstance(token, Mapping) else None for token in added)]
    if not all(type(number) is int for number in ids):
        raise ValueError("model.vocab, added_tokens: expected a whole number for each token")
    distinct = set(ids)
    if distinct != set(range(len(distinct))):
        raise ValueError(
            f"ids from {min(ids)} to {max(ids)} for {len(distinct)} tokens: expected 0, 1, 2, ... "
            "without a gap"
        )
    if model.get("continuing_subword_prefix"):
        raise ValueError("model.continuing_subword_prefix: a BPE of bytes has none")
    _check_charsmaps(stored.get("normalizer"))


def _check_charsmaps(normalizer: Any) -> None:
    """The table of SentencePiece's normalizer: the length of a trie, then so many bytes of it."""
    waiting = [normalizer]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, Mapping):
            continue
        if isinstance(part.get("normalizers"), list):
            waiting += part["normalizers"]
        if part.get("type") == "Precompiled":
            try:
                table = base64.b64decode(part.get("precompiled_charsmap") or "", validate=True)
            except (binascii.Error, TypeError, ValueError) as error:
                raise ValueError(f"normalizer.precompiled_charsmap: {error}") from error
            size = int.from_bytes(table[:4], "little")
            if len(table) < 4 or size % 4 or size > len(table) - 4:
                raise ValueError("normalizer.precompiled_charsmap: its trie is not whole")


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
