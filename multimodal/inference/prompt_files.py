"""Prompts that are kept as files: the words around a question, and how it is answered.

A file NAME.yaml has ``version`` and ``about``. It may have ``template``, ``choices``, and any
option of ``AnswerOptions`` that differs from its default. The files of multimodal/prompt_library
are always there. A folder of one's own adds to them, and its files come before those of the same
name. ``NAME@VERSION`` asks for that version and no other.
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from multimodal.files import UnreadableFile, local_path, read_yaml
from multimodal.model.templates import Templates
from multimodal.options import AnswerOptions, Sampling, make_options

MAX_PROMPT = 2**16  # bytes of a file
LIBRARY = Path(__file__).parent.parent / "prompt_library"


@dataclass(frozen=True)
class Prompt:
    """A prompt for questions.

    Args:
        name, version, about: which prompt this is and what it is for. The version rises with each
            change.
        template: holds ``{text}`` once. None: the model's own template of questions.
        choices: the answer is the most likely one of these. Empty: it is free.
        options: the options of ``AnswerOptions`` that the file gives.
    """

    name: str
    version: int
    about: str
    template: str | None = None
    choices: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        kinds = {"version": int, "about": str, "template": str | None}
        for name, kind in kinds.items():
            check_type(name, getattr(self, name), kind)
        texts = (("choices", self.choices), ("stop", self.options.get("stop", ())))
        for name, value in texts:
            if not isinstance(value, list | tuple) or not all(
                isinstance(text, str) and text for text in value
            ):
                raise ValueError(f"{name} is {reprlib.repr(value)}, expected a list of texts")
        object.__setattr__(self, "choices", tuple(self.choices))
        if self.template is not None:
            Templates(question=self.template)
        if self.version < 1 or len(self.choices) == 1:
            raise ValueError("version is at least 1, choices none or two")
        for item in fields(AnswerOptions):
            if item.name in self.options and item.name != "stop":
                number = isinstance(item.default, float)
                expected = float | int if number else type(item.default)
                check_type(item.name, self.options[item.name], expected)
        self.answer_options()

    def fill(self, text: str, templates: Templates) -> str:
        """The question in its words.

        Args:
            templates: the model's own.

        Raises:
            ValueError: for an empty question.
        """
        words = templates if self.template is None else Templates(question=self.template)
        return words.ask(text)

    def answer_options(self, **given: Any) -> AnswerOptions:
        """The options of an answer: those given, then those of the file, then the defaults.

        A beam search looks for the most likely text. So where beams are given, the sampling of the
        file is left out.
        """
        options = dict(self.options)
        if given.get("beams", 1) > 1:
            names = [item.name for item in fields(Sampling)] + ["repetition_penalty"]
            options = {name: value for name, value in options.items() if name not in names}
        return make_options(AnswerOptions, {**options, **given})

    def to_json(self) -> dict[str, Any]:
        """All fields in one object, as a file has them."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        del own["options"]
        options = self.answer_options()
        return {**own, **{item.name: getattr(options, item.name) for item in fields(options)}}

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def check_type(name: str, value: object, kind: Any) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
            f"{name} is {reprlib.repr(value)}, expected {getattr(kind, '__name__', kind)}"
        )


def read_prompt(path: Path) -> Prompt:
    """Read a prompt file.

    Raises:
        ValueError: names the file, and what is wrong with it.
    """
    try:
        content = read_yaml(path, MAX_PROMPT)
        if not isinstance(content, Mapping):
            raise ValueError("not a mapping of fields")
        own = [item.name for item in fields(Prompt) if item.name not in ("name", "options")]
        known = {*own, *(item.name for item in fields(AnswerOptions))}
        if unknown := set(content) - known:
            names = sorted(str(name)[:80] for name in unknown)
            raise ValueError(f"unknown {names}; known are {sorted(known)}")
        if missing := {"version", "about"} - set(content):
            raise ValueError(f"{' and '.join(sorted(missing))} missing")
        options = {name: value for name, value in content.items() if name not in own}
        values = {name: content[name] for name in own if name in content}
        return Prompt(path.stem, **values, options=options)
    except UnreadableFile as error:
        raise ValueError(f"{path}: not a prompt: {error.reason}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a prompt: {' '.join(str(error).split())[:300]}") from error


def prompt_files(folder: str | Path | None = None) -> dict[str, Path]:
    """The file of each name: those of the library, replaced by those of a folder."""
    if folder is not None and not local_path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder of prompts")
    folders: Sequence[Path] = [LIBRARY, *([] if folder is None else [Path(folder)])]
    return {path.stem: path for each in folders for path in sorted(each.glob("*.yaml"))}


def find_prompt(name: str, folder: str | Path | None = None) -> Prompt:
    """The prompt of a name, or of ``NAME@VERSION``.

    Raises:
        ValueError: if there is none.
    """
    stem, _, version = name.partition("@")
    files = prompt_files(folder)
    if stem not in files:
        raise ValueError(f"no prompt {stem!r}; there are {', '.join(sorted(files))}")
    prompt = read_prompt(files[stem])
    if version and version != str(prompt.version):
        raise ValueError(f"{files[stem]}: is version {prompt.version}, not {version}")
    return prompt
