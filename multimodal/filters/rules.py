"""A folder of rules, one YAML file each. Each decision of a rule has its name and its reason.

    # insults.yaml
    when: [prompt, reply]          # what it looks at; by default both
    words: [idiot, fool]           # one of: words, pattern, personal, characters, scripts,
                                   # languages, json_schema, image, onnx
    action: refuse                 # or mask: what was found becomes [insults]
    reason: insults are not answered
    answer: I would rather not.    # of a refused chat; by default nothing

``words``: whole words, in any case. ``pattern``: a regular expression. ``personal``: some of email,
phone, card, iban, ip. ``characters``: [least, most]. ``scripts``: those that letters may be of, as
LATIN. ``languages``: those of texts that are long enough to tell, as en (filters/languages.py).
``json_schema``: that of the whole text, which has to be JSON (filters/json_schema.py).
``onnx``: a classifier of images (filters/classifier.py). ``image``: ``FILE.py:FUNCTION``, FILE in
this folder, which takes a PIL image and returns a reason to refuse it, or nothing.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from multimodal.files import UnreadableFile, local_path, read_yaml
from multimodal.filters.classifier import Classifier, ClassifierFile
from multimodal.filters.json_schema import JsonSchema
from multimodal.filters.languages import check_languages, is_another
from multimodal.filters.personal import KINDS, find_personal
from multimodal.plugins import from_file
from multimodal.schemas import construct

UNIT_SIGNS = {"\N{MICRO SIGN}", "\N{OHM SIGN}"}  # their normal form is a Greek letter
# How the names of letters begin that are of no script, or of several.
SHARED_LETTERS = {"MODIFIER", "KATAKANA-HIRAGANA", "IDEOGRAPHIC", "VERTICAL", "MASU"}
When = Literal["prompt", "reply"]
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class RuleFile:
    """What a file may say. See the text of this module."""

    reason: str
    when: tuple[When, ...] = ("prompt", "reply")
    action: Literal["refuse", "mask"] = "refuse"
    answer: str = ""
    words: tuple[str, ...] | None = None
    pattern: str | None = None
    personal: tuple[str, ...] | None = None
    characters: tuple[int, ...] | None = None
    scripts: tuple[str, ...] | None = None
    languages: tuple[str, ...] | None = None
    json_schema: Mapping[str, Any] | None = None
    image: str | None = None
    onnx: ClassifierFile | None = None


@dataclass(frozen=True)
class Decision:
    """What a rule did. rule: its name."""

    rule: str
    action: str
    reason: str
    answer: str = ""


@dataclass(frozen=True)
class Rule:
    """A rule by name, checked.

    Raises:
        ValueError: for a rule that says too little, too much, or what cannot be.
    """

    name: str
    file: RuleFile
    look: Callable[[Image.Image], str | None] | None = None

    def __post_init__(self) -> None:
        maskable = ("words", "pattern", "personal")
        whole = ("characters", "scripts", "languages", "json_schema", "image", "onnx")
        kinds = (*maskable, *whole)
        given = [kind for kind in kinds if getattr(self.file, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"gives {', '.join(given) or 'nothing'}: expected one of {', '.join(kinds)}"
            )
        if self.file.action == "mask" and given[0] not in maskable:
            raise ValueError(f"action mask: {given[0]} has nothing to mask, only refuse")
        if unknown := set(self.file.personal or ()) - set(KINDS):
            raise ValueError(
                f"personal: {sorted(unknown)} unknown, expected some of {', '.join(KINDS)}"
            )
        if self.file.languages is not None:
            check_languages(self.file.languages)
        limits = self.file.characters
        if limits is not None and (len(limits) != 2 or not 0 <= limits[0] <= limits[1]):
            raise ValueError(f"characters: {list(limits)}, expected [least, most]")
        if not self.file.reason.strip() or not self.file.when:
            raise ValueError("reason and when must not be empty")
        if given[0] == "words" and not all(word.strip() for word in self.file.words or ("",)):
            raise ValueError("words: is empty, or has an empty word")
        _ = self._pattern, self.schema  # raises for one that is wrong

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        if self.file.words is not None:
            words = "|".join(re.escape(word.strip()) for word in self.file.words)
            return re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
        try:
            return None if self.file.pattern is None else re.compile(self.file.pattern)
        except re.error as error:
            raise ValueError(f"pattern: {error}") from error

    @cached_property
    def schema(self) -> JsonSchema | None:
        """What a text has to follow as a whole."""
        return None if self.file.json_schema is None else JsonSchema(self.file.json_schema)

    def found(self, text: str) -> list[Span]:
        """Where a text breaks the rule. A text that breaks it as a whole: all of it.

        A rule with a ``schema`` is asked for the ``problem`` of a text instead.
        """
        file = self.file
        if self._pattern is not None:
            return [found.span() for found in self._pattern.finditer(text) if found[0]]
        if file.personal is not None:
            return [(start, end) for start, end, _ in find_personal(text, file.personal)]
        wrong = False
        if file.characters is not None:
            wrong = not file.characters[0] <= len(text.strip()) <= file.characters[1]
        if file.scripts is not None:
            wrong = not scripts_of(text) <= {script.upper() for script in file.scripts}
        if file.languages is not None:
            wrong = is_another(text, file.languages)
        return [(0, len(text))] if wrong else []


class Filters:
    """The rules of a folder, in the order of their names."""

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self.rules = sorted(rules, key=lambda rule: rule.name)

    @classmethod
    def read(cls, folder: str | Path) -> "Filters":
        """Read a folder.

        Raises:
            ValueError: for a file that is no rule, by its name.
        """
        folder, rules = local_path(folder), []
        if not folder.is_dir():
            raise ValueError(f"{folder}: no folder of rules")
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
            try:
                values = read_yaml(path)
                if not isinstance(values, dict):
                    raise ValueError("expected the fields of a rule")
                file = construct(RuleFile, values)
                look: Callable[[Image.Image], str | None] | None = None
                if file.onnx:
                    look = Classifier(file.onnx, folder)
                elif file.image:
                    look = from_file(str(folder / file.image), "rule", (), "FUNCTION")
                rules.append(Rule(path.stem, file, look))
            except UnreadableFile:
                raise
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        if not rules:
            raise ValueError(f"{folder}: holds no rule (NAME.yaml)")
        return cls(rules)

    def has(self, when: When) -> bool:
        """Whether there is a rule about prompts, or about replies."""
        return any(when in rule.file.when for rule in self.rules)

    def text(self, text: str, when: When) -> tuple[str, list[Decision]]:
        """The text with what is masked, and the decisions. One that refuses is the last."""
        decisions = []
        for rule in self._rules(when):
            if rule.schema is not None and (problem := rule.schema.problem(text)):
                decisions.append(self._decision(rule, f"{rule.file.reason}: {problem}"))
                break
            spans = [] if rule.look is not None else rule.found(text)
            if not spans:
                continue
            decisions.append(self._decision(rule, rule.file.reason))
            if rule.file.action == "refuse":
                break
            text = masked(text, spans, f"[{rule.name}]")
        return text, decisions

    def image(self, image: Image.Image, when: When) -> list[Decision]:
        """The first rule that refuses an image. An error of a user's function refuses, too."""
        for rule in self._rules(when):
            if rule.look is None:
                continue
            try:
                reason = rule.look(image)
            except Exception as error:  # whatever a user's function raises
                reason = f"the rule failed: {error!r:.200}"
            if reason:
                return [self._decision(rule, str(reason))]
        return []

    def _rules(self, when: When) -> Iterator[Rule]:
        return (rule for rule in self.rules if when in rule.file.when)

    @staticmethod
    def _decision(rule: Rule, reason: str) -> Decision:
        return Decision(rule.name, rule.file.action, reason, rule.file.answer)


def refusal(decisions: Sequence[Decision]) -> Decision | None:
    """The decision that refuses, if any does."""
    return next((each for each in decisions if each.action == "refuse"), None)


def masked(text: str, spans: Sequence[Span], by: str) -> str:
    """The text with spans replaced. Those that overlap become one."""
    parts, end = [], 0
    for start, stop in sorted(spans):
        if start >= end:
            parts += [text[end:start], by]
        end = max(end, stop)
    return "".join([*parts, text[end:]])


def scripts_of(text: str) -> set[str]:
    """The scripts of the letters of a text: LATIN, CYRILLIC, CJK, ...

    A form of a letter, as a full-width one, has the script of the letter. Signs of units, and
    letters that several scripts share, as the Japanese marks of repetition, have none.
    """
    letters = {letter for letter in text if letter.isalpha()} - UNIT_SIGNS
    plain = "".join(unicodedata.normalize("NFKC", letter) for letter in letters)
    names = (unicodedata.name(letter, "UNKNOWN") for letter in plain if letter.isalpha())
    return {name.split()[0] for name in names} - SHARED_LETTERS
