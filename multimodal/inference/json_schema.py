"""Text that follows a JSON schema, token by token, by llguidance (the extra ``json``).

Shapes: V vocabulary.
"""

import json
import re
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.model.checkpoint import ModelParts

SPACE = "\u2581"  # how a BPE with byte_fallback writes a space


@cache
def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level BPE stands for (Radford et al. 2019, GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): b for n, b in enumerate(others)}


def _of_byte_level(token: str) -> bytes:
    byte_of = _byte_of()
    if all(character in byte_of for character in token):
        return bytes(byte_of[character] for character in token)
    return token.encode()  # a token that was added as a whole


def _of_byte_fallback(token: str) -> bytes:
    if single := re.fullmatch("<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(single[1])
    return token.replace(SPACE, " ").encode()


def token_bytes(model: ModelParts) -> list[bytes]:
    """The bytes of every id. Ids that are no text have none.

    Raises:
        ValueError: for a text tokenizer that is neither a byte-level BPE nor one with byte_fallback
            (Llama 2, Gemma).
    """
    tokens, tokenizer = [b""] * model.vocabulary.size, model.text_tokenizer
    vocabulary = tokenizer.vocabulary()
    # How a tokenizer writes a line break shows which of the two it is.
    for newline, bytes_of in (("\u010a", _of_byte_level), ("<0x0A>", _of_byte_fallback)):
        if newline in vocabulary and tokenizer.decode([vocabulary[newline]]) == "\n":
            for token, number in vocabulary.items():
                tokens[number] = bytes_of(token)
            return tokens
    raise ValueError(
        "a JSON schema needs a text tokenizer that can write every byte: byte-level BPE, or BPE "
        "with byte_fallback"
    )


class SchemaTokenizer:
    """A text tokenizer as llguidance takes it: all schemas of a model share it.

    Raises:
        ValueError: if llguidance is missing, or for a text tokenizer that it cannot follow.
    """

    def __init__(self, model: ModelParts) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise ValueError("a JSON schema needs llguidance: pip install llguidance") from error
        tokenizer = _TokenizerForLlguidance(model)
        self.begins_with_space = tokenizer.begins_with_space
        self.tokens = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(tokenizer), n_vocab=model.vocabulary.size
        )


class _TokenizerForLlguidance:
    """The attributes that llguidance expects of a tokenizer."""

    def __init__(self, model: ModelParts) -> None:
        vocabulary = model.vocabulary
        self.eos_token_id, self.bos_token_id = vocabulary.eos, vocabulary.bos
        self.tokens = token_bytes(model)
        self.special_token_ids = list(range(vocabulary.text_size, vocabulary.size))
        self._encode = model.text_tokenizer.encode
        # Such a tokenizer puts a space before each text, so a model has learned to begin with one.
        self.begins_with_space = self.tokens[self._encode("a")[0]].startswith(b" ")
        self._before = "\x02" if self.begins_with_space else ""  # never one token with a letter

    def __call__(self, text: str) -> list[int]:
        """The ids of a text that goes on: without the space that begins one."""
        return self._encode(self._before + text)[len(self._encode(self._before)) :]


class BadSchema(ValueError):
    """A schema that is not valid, or that cannot be followed. Names no file."""


class Schema:
    """A JSON schema for the texts of a model.

    Args:
        tokenizer: of the model. Made anew by default, which goes over the whole vocabulary.

    Raises:
        BadSchema: if the schema is not valid, or cannot be followed.
        ValueError: see ``SchemaTokenizer``.
    """

    def __init__(
        self, model: ModelParts, schema: dict[str, Any], tokenizer: SchemaTokenizer | None = None
    ) -> None:
        tokenizer = tokenizer or SchemaTokenizer(model)
        import llguidance

        self._llguidance, self._tokenizer = llguidance, tokenizer.tokens
        try:
            self._grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_flexible": False}
            )
        except RecursionError as error:
            raise BadSchema("not a JSON schema: nested too deep") from error
        except (TypeError, ValueError) as error:
            raise BadSchema(f"not a JSON schema: {' '.join(str(error).split())[:300]}") from error
        if tokenizer.begins_with_space:
            grammar = json.loads(self._grammar)
            spaced = {"name": "spaced", "lark_grammar": 'start: " "? @json_schema'}
            self._grammar = json.dumps({**grammar, "grammars": [spaced, *grammar["grammars"]]})
        self.start()  # so that errors of the schema are raised here

    def start(self) -> "SchemaState":
        """The state of a text that has not begun."""
        matcher = self._llguidance.LLMatcher(self._tokenizer, self._grammar)
        if matcher.is_error():
            raise BadSchema(f"the JSON schema cannot be followed: {matcher.get_error()}")
        return SchemaState(matcher)


class SchemaState:
    """How far one text has come in its schema."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, like: Tensor) -> Tensor:
        """bool[V']: which of the first V' ids may come next. <eos> is among them where it may end.

        Args:
            like: a tensor of length V', on the device of the result.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[: len(like)]
        return torch.from_numpy(mask.astype(np.bool_)).to(like.device)

    def read(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise ValueError(
                f"the schema does not allow token {token}: {self._matcher.get_error()}"
            )

    @property
    def done(self) -> bool:
        """Whether the text is complete as it stands."""
        return bool(self._matcher.is_accepting())
