"""Text that has to follow a JSON schema, token by token, by llguidance (an extra: ``[json]``).

Shapes: V vocabulary.
"""

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from multimodal.model.network import Multimodal


@cache
def _byte_of() -> dict[str, int]:
    """What byte each character of a byte-level BPE stands for (Radford et al. 2019, GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): b for n, b in enumerate(others)}


def token_bytes(model: "Multimodal") -> list[bytes]:
    """The bytes of every id; of those that are no text, none."""
    tokens = [b""] * model.vocabulary.size
    known = _byte_of()
    for token, number in model.text_tokenizer.vocabulary().items():
        if all(character in known for character in token):
            tokens[number] = bytes(known[character] for character in token)
        else:  # a token that was added whole
            tokens[number] = token.encode()
    return tokens


class _Tokens:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, model: "Multimodal") -> None:
        v = model.vocabulary
        self.eos_token_id, self.bos_token_id = v.eos, v.bos
        self.tokens = token_bytes(model)
        self.special_token_ids = list(range(v.text_size, v.size))
        self._encode = model.text_tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class Schema:
    """A JSON schema for the texts of a model; ``follow`` makes a state for each text."""

    def __init__(self, model: "Multimodal", schema: dict[str, Any]) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise ValueError("a JSON schema needs llguidance: pip install llguidance") from error
        self._library = llguidance
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(model)), n_vocab=model.vocabulary.size
        )
        try:
            self._grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_flexible": False}
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a JSON schema: {error}") from error
        self.follow()  # what is wrong with the schema is said now

    def follow(self) -> "Following":
        matcher = self._library.LLMatcher(self._tokenizer, self._grammar)
        if matcher.is_error():
            raise ValueError(f"the JSON schema cannot be followed: {matcher.get_error()}")
        return Following(matcher)


class Following:
    """How far one text is."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, like: Tensor) -> Tensor:
        """bool[V]: the ids that may come next, <eos> where the text may end; like: float[V]"""
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
        """Whether the text is whole as it stands."""
        return bool(self._matcher.is_accepting())
