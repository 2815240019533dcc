"""Every option of using a model: name, type, default, range and help, in one place.

Python signatures, command-line parsers and prompt files are made of these fields. Nothing here
imports torch, so that ``--help`` stays fast.
"""

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict, TypeVar

from multimodal.memory import says_what_to_lower
from multimodal.schemas import check_fields

Method = Literal["causal", "masked"]
Schedule = Literal["constant", "rising"]
COLDEST = 1e-20  # a temperature: below it logits overflow
MAX_BEAMS, MAX_CANDIDATES, MAX_STEPS = 1024, 10_000, 10_000
Options = TypeVar("Options", bound="Sampling")
MethodT = TypeVar("MethodT", bound=Callable[..., Any])


def option(default: Any, help: str, metavar: str | None = None) -> Any:
    """A dataclass field with the text that ``--help`` shows."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


def check(valid: bool, name: str, value: object, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name}={value!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from its logits, and the seed of everything random.

    top_p is nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751). min_p is of Nguyen et al.
    2024 (arXiv:2407.01082).
    """

    temperature: float = option(0.0, "divides the logits; 0 takes the most likely token")
    top_k: int = option(0, "sample from the K most likely tokens; 0 means all", "K")
    top_p: float = option(
        1.0, "sample from the fewest tokens that have this share of the probability; 1 means all"
    )
    min_p: float = option(
        0.0, "sample tokens at least P times as likely as the most likely one; 0 means all", "P"
    )
    seed: int = option(0, "seed of all random numbers")

    def __post_init__(self) -> None:
        check_fields(self)
        chosen = self.temperature == 0 or self.temperature >= COLDEST
        cold = f"0 (the most likely token) or a number from {COLDEST:g} on"
        check(chosen, "temperature", self.temperature, cold)
        check(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "a share in (0, 1]")
        check(0 <= self.min_p <= 1, "min_p", self.min_p, "a share in [0, 1]")
        check(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass(frozen=True, kw_only=True)
class TextOptions(Sampling):
    """How a text is written.

    repetition_penalty is that of CTRL (Keskar et al. 2019, arXiv:1909.05858): logits of tokens that
    the text already has are divided by it where positive, multiplied where negative.
    """

    max_tokens: int = option(64, "the longest text, in tokens", "N")
    stop: tuple[str, ...] = option((), "end before this text", "TEXT")
    repetition_penalty: float = option(1.0, "more than 1: fewer repeated words", "X")
    beams: int = option(1, "beam search with N beams; needs temperature 0", "N")
    length_penalty: float = option(
        0.5, "beam search divides log probabilities by the length to the power of this", "X"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        strings = not isinstance(self.stop, str) and all(
            text and isinstance(text, str) for text in self.stop
        )
        check(strings, "stop", self.stop, "a list of texts, none of them empty")
        object.__setattr__(self, "stop", tuple(self.stop))
        finite = 0 < self.repetition_penalty < float("inf")
        check(finite, "repetition_penalty", self.repetition_penalty, "more than 0 (1: none)")
        check(1 <= self.beams <= MAX_BEAMS, "beams", self.beams, f"1 to {MAX_BEAMS:,}")
        within = abs(self.length_penalty) <= 100
        check(within, "length_penalty", self.length_penalty, "-100 to 100")
        if self.beams > 1 and (self.temperature or self.repetition_penalty != 1):
            raise ValueError(
                f"beams={self.beams}: beam search looks for the most likely text, so it takes no "
                "temperature and no repetition_penalty"
            )
        if self.beams > 1 and self.stop:
            raise ValueError(f"beams={self.beams} and stop: give one of the two")


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(TextOptions):
    """How a caption is written."""

    candidates: int = option(
        1, "write N and keep the one nearest to the image; needs a temperature", "N"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        enough = self.candidates == 1 or (self.candidates > 1 and self.temperature > 0)
        expected = f"1, or up to {MAX_CANDIDATES:,} and a temperature above 0"
        check(enough and self.candidates <= MAX_CANDIDATES, "candidates", self.candidates, expected)


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(TextOptions):
    """How a question is answered."""

    max_tokens: int = option(32, "the longest answer, in tokens", "N")


@dataclass(frozen=True, kw_only=True)
class EditOptions(Sampling):
    """How a part of an image is drawn anew.

    Guidance is u + scale * (c - u) on the logits with (c) and without (u) the text
    (classifier-free guidance, Ho & Salimans 2022, arXiv:2207.12598). The rising schedule is that of
    Muse (Chang et al. 2023, arXiv:2301.00704).
    """

    # At temperature 1 shapes are spoilt. At 0.6 photos are blank.
    temperature: float = option(0.8, "divides the logits; 0 takes the most likely code")
    steps: int = option(12, "steps of masked drawing; fewer is faster", "N")
    guidance_scale: float = option(
        3.0, "how closely to follow the text: u + SCALE * (c - u); 1 is no guidance", "SCALE"
    )
    guidance_schedule: Schedule = option(
        "constant", "rising: the scale goes from 1 to 2 * SCALE - 1 over the drawing"
    )
    negative: str | None = option(None, "a text that the image should not fit", "TEXT")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.steps <= MAX_STEPS, "steps", self.steps, f"1 to {MAX_STEPS:,}")
        finite = 0 <= self.guidance_scale < float("inf")
        check(finite, "guidance_scale", self.guidance_scale, "a number from 0 on")
        if self.negative is not None and self.guidance_scale == 1:
            raise ValueError(
                "a negative text works by guidance: give a guidance_scale other than 1"
            )


@dataclass(frozen=True, kw_only=True)
class DrawOptions(EditOptions):
    """How an image is drawn from a text.

    With candidates=N the model draws N images and scores the text as a caption of each. It keeps
    the image with the highest score. (DALL-E, Ramesh et al. 2021, arXiv:2102.12092, uses another
    model for that.)
    """

    method: Method = option("causal", "causal: one code after the other; masked: many at a time")
    candidates: int = option(
        1, "draw N images for each text, keep the one that the text fits best", "N"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        within = 1 <= self.candidates <= MAX_CANDIDATES
        check(within, "candidates", self.candidates, f"1 to {MAX_CANDIDATES:,}")


# The same names and types for type checkers, as keyword arguments (tests/test_options.py).


class SamplingArguments(TypedDict, total=False):
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int


class TextArguments(SamplingArguments, total=False):
    max_tokens: int
    stop: tuple[str, ...] | list[str]
    repetition_penalty: float
    beams: int
    length_penalty: float


class CaptionArguments(TextArguments, total=False):
    candidates: int


class EditArguments(SamplingArguments, total=False):
    steps: int
    guidance_scale: float
    guidance_schedule: Schedule
    negative: str | None


class DrawArguments(EditArguments, total=False):
    method: Method
    candidates: int


# What other libraries call our options. Several: the first that the method has.
NAMES_ELSEWHERE = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "num_beams": "beams",
    "beam_size": "beams",
    "do_sample": "temperature",
    "temp": "temperature",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "num_return_sequences": "candidates",
    "best_of": "candidates",
    "frequency_penalty": "repetition_penalty",
    "presence_penalty": "repetition_penalty",
    "generator": "seed",
    "random_state": "seed",
    "guidance": "guidance_scale",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "num_inference_steps": "steps",
    "num_steps": "steps",
    "negative_prompt": "negative",
    "num_images_per_prompt": "n",
    "num_images": "n",
}


def _ours(name: str, names: Sequence[str]) -> str:
    """Our name of an option that another library names so, or that is close to it."""
    ours = NAMES_ELSEWHERE.get(name.lower(), "")
    if ours in names or ours == "n":
        return ours
    return next(iter(difflib.get_close_matches(name.lower(), names, n=1)), "")


def make_options(cls: type[Options], given: Mapping[str, Any]) -> Options:
    """An options object of keyword arguments. None stands for the default.

    Raises:
        ValueError: for a name that is no option, or a value of the wrong type or range.
    """
    names = [item.name for item in fields(cls)]
    if unknown := sorted(set(given) - set(names)):
        meant = [f"{name} is {ours} here" for name in unknown if (ours := _ours(name, names))]
        hint = f" ({'; '.join(meant)})" if meant else ""
        raise ValueError(f"no option {', '.join(unknown)}{hint}; there are {', '.join(names)}")
    try:
        return cls(**{name: value for name, value in given.items() if value is not None})
    except TypeError as error:  # a comparison with a value of another type
        raise ValueError(f"options {dict(given)}: {error}") from error


class _AsWritten:
    """An annotation as it is written: without quotes, its names as they are."""

    def __init__(self, annotation: Any) -> None:
        self.annotation = annotation

    def __repr__(self) -> str:
        return str(self.annotation)


def shows_types(method: MethodT) -> MethodT:
    """A method for people: errors of memory say what to lower, and ``help()`` shows its types.

    Annotations are strings, and are shown without quotes.
    """
    signature = inspect.signature(method)
    method = says_what_to_lower(method)

    def written(annotation: Any) -> Any:
        return _AsWritten(annotation) if isinstance(annotation, str) else annotation

    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            item.replace(annotation=written(item.annotation))
            for item in signature.parameters.values()
        ],
        return_annotation=written(signature.return_annotation),
    )
    return method


def takes_options(cls: type[Sampling]) -> Callable[[MethodT], MethodT]:
    """Show the fields of an options class in a method that takes ``**options``.

    So ``help()`` and editors list names, types, defaults and what each option does.
    """

    def decorate(method: MethodT) -> MethodT:
        method = shows_types(method)
        signature, hints = inspect.signature(method), typing.get_type_hints(cls)
        given = [
            item
            for item in signature.parameters.values()
            if item.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        shown = [
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=item.default,
                annotation=hints[item.name],
            )
            for item in fields(cls)
        ]
        method.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*given, *shown]
        )
        lines = [f"{item.name}: {item.metadata['help']}." for item in fields(cls)]
        if method.__doc__ and "options: see" in method.__doc__:
            before, _, after = method.__doc__.partition(f"options: see {cls.__name__}.")
            method.__doc__ = before + "\n            ".join(lines) + after
        return method

    return decorate
