"""Prompts that are kept as files: the words around a text, and how it is answered.

A file NAME.yaml has ``version`` and ``about``, and of the fields of ``Prompt`` those that differ.
Those of multimodal/prompt_library come along; a folder of one's own adds to them, and its files
come before those of the same name. ``name@version`` asks for that version of it and no other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Unpack

import yaml

from multimodal.inference.sampling import Sampling, SamplingOptions
from multimodal.model.templates import Templates

LIBRARY = Path(__file__).parent.parent / "prompt_library"


@dataclass(frozen=True)
class Prompt:
    """Args:
    name, version, about: which one this is, and what it is for; the version rises with each change.
    template: holds ``{text}``, once; by default the model's own template of questions.
    temperature, top_p: see multimodal.inference.sampling.Sampling; max_tokens: the longest answer.
    choices: answer with the likeliest of these; stop: end before one of these.
    """

    name: str
    version: int
    about: str
    template: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 32
    choices: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kinds = {"version": int, "about": str, "template": str | None, "temperature": float | int,
                 "top_p": float | int, "max_tokens": int}  # fmt: skip
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}, expected {getattr(kind, '__name__', kind)}")
        for name in ("choices", "stop"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(
                isinstance(one, str) and one for one in value
            ):
                raise ValueError(f"{name} is {value!r}, expected a list of texts")
            object.__setattr__(self, name, tuple(value))
        if self.template is not None:
            Templates(question=self.template)
        if self.version < 1 or self.max_tokens < 1 or len(self.choices) == 1:
            raise ValueError("version and max_tokens are at least 1, choices none or two")

    def fill(self, text: str, templates: Templates) -> str:
        """The text in its words; templates: the model's own. Errors: ``ValueError`` if empty."""
        words = templates if self.template is None else Templates(question=self.template)
        return words.ask(text)

    def sampling(self, **given: Unpack[SamplingOptions]) -> Sampling:
        """How tokens are chosen, but for what is given; a search takes the likeliest."""
        if given.get("beams", 1) > 1:
            return Sampling(**given)
        return Sampling(**{"temperature": self.temperature, "top_p": self.top_p, **given})  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def read_prompt(path: Path) -> Prompt:
    """Errors: ``ValueError`` that names the file, for anything that is no prompt."""
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
        if not isinstance(found, Mapping):
            raise ValueError("not a mapping of fields")
        known = {one.name for one in fields(Prompt)} - {"name"}
        if unknown := set(found) - known:
            raise ValueError(f"unknown {sorted(map(str, unknown))}; known are {sorted(known)}")
        values: dict[str, Any] = dict(found)
        if missing := {"version", "about"} - set(values):
            raise ValueError(f"{' and '.join(sorted(missing))} missing")
        return Prompt(path.stem, **values)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a prompt: {' '.join(str(error).split())}") from error


def prompt_files(folder: str | Path | None = None) -> dict[str, Path]:
    """The file of each name: those of the library, and before them those of a folder."""
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder of prompts")
    folders = [LIBRARY, *([] if folder is None else [Path(folder)])]
    return {path.stem: path for one in folders for path in sorted(one.glob("*.yaml"))}


def find_prompt(name: str, folder: str | Path | None = None) -> Prompt:
    """The prompt of a name, or of ``name@version``. Errors: ``ValueError`` if there is none."""
    stem, _, version = name.partition("@")
    files = prompt_files(folder)
    if stem not in files:
        raise ValueError(f"no prompt {stem!r}; there are {', '.join(sorted(files))}")
    prompt = read_prompt(files[stem])
    if version and version != str(prompt.version):
        raise ValueError(f"{files[stem]}: is version {prompt.version}, not {version}")
    return prompt
