"""Where weights come from and what may be done with them: they take it along wherever they go.

A folder with weights has ``LICENSE`` (the licences of everything they were made of) and
``sources.json`` (the data and the models). Whoever loads weights has both, and whoever saves them
writes both. So fine-tuning, export and joining of tokenizers keep them.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal.files import atomic_folder, parse_json, read_text

RULE = "\n" + "-" * 80 + "\n\n"  # between two licences
# What a model folder has only if there is something in it: its terms, and how the model talks.
OPTIONAL = (
    "LICENSE", "sources.json", "image_tokenizer/LICENSE", "image_tokenizer/sources.json",
    "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
Source = dict[str, Any]


@dataclass(frozen=True)
class Provenance:
    """The licences and sources of weights.

    Attributes:
        licenses: texts, none of them twice.
        sources: ``{"kind": "data" or "model", "name", "license", ...}``, none of them twice.
    """

    licenses: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()

    def __add__(self, other: "Provenance") -> "Provenance":
        return Provenance(
            (*self.licenses, *(each for each in other.licenses if each not in self.licenses)),
            (*self.sources, *(each for each in other.sources if each not in self.sources)),
        )

    @property
    def license_name(self) -> str:
        """The first paragraph of each licence, in one line."""
        return " / ".join(" ".join(text.split("\n\n")[0].split()) for text in self.licenses)

    def of_model(self, name: str, fingerprint: str = "") -> "Provenance":
        """Of what is made of a model: all that the model was made of, and the model itself.

        Args:
            fingerprint: of a model of this package.
        """
        about = {"fingerprint": fingerprint} if fingerprint else {}
        source = {"kind": "model", "name": name, **about, "license": self.license_name}
        return self + Provenance(sources=(source,))

    @classmethod
    def read(cls, folder: Path) -> "Provenance":
        """What a folder says. An image tokenizer inside a model folder has what the model has.

        Raises:
            ValueError: if one of the files cannot be read.
        """
        names = ("LICENSE", "sources.json")
        texts = {name: read_text(folder / name) for name in names if (folder / name).is_file()}
        here = cls.of_texts(texts, folder)
        # The weights of a model are not there where its image tokenizer alone was downloaded.
        if folder.name == "image_tokenizer" and (folder.parent / "config.json").is_file():
            return cls.read(folder.parent) + here
        return here

    @classmethod
    def of_texts(cls, texts: Mapping[str, str], place: Path) -> "Provenance":
        """The reverse of ``texts``.

        Args:
            place: where they are, for errors.

        Raises:
            ValueError: for a text that is not of this form.
        """
        licenses = [text.strip() for text in texts.get("LICENSE", "").split(RULE)]
        try:
            stored = parse_json(texts.get("sources.json", '{"sources": []}'))
            sources = tuple(dict(each) for each in stored["sources"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{place / 'sources.json'}: expected an object with a list of sources"
            ) from error
        return cls(tuple(text for text in licenses if text), sources)

    def texts(self) -> dict[str, str]:
        """The texts of LICENSE and of sources.json, each if there is something in it."""
        texts = {}
        if self.licenses:
            texts["LICENSE"] = RULE.join(f"{text}\n" for text in self.licenses)
        if self.sources:
            sources = json.dumps({"sources": self.sources}, ensure_ascii=False, indent=1)
            texts["sources.json"] = sources + "\n"
        return texts

    def write(self, folder: Path) -> None:
        """Write LICENSE and sources.json, each if there is something in it."""
        for name, text in self.texts().items():
            (folder / name).write_text(text, "utf-8")

    def lines(self) -> list[str]:
        """One line a source: its kind, its name, and what else is known."""
        shown = []
        for source in self.sources:
            others = [
                f"{name} {_shown(value)}"
                for name, value in source.items()
                if name not in ("kind", "name", "license")
            ]
            license = f"license: {source.get('license') or 'none is given'}"
            facts = "; ".join([*others, license])
            shown.append(f"{source.get('kind', 'data')} {source.get('name', '?')} ({facts})")
        return shown

    def section(self) -> str:
        """The part of a card that names sources and licences."""
        rows = "\n".join(f"- {line}" for line in self.lines()) or "- not known"
        terms = "the terms in LICENSE hold" if self.licenses else "no LICENSE was passed on"
        rule = f"Weights follow the licences of their data: {terms}."
        return f"## Data and licence\n\n{rows}\n\n{rule}\n"


@contextmanager
def model_folder(folder: Path) -> Iterator[Path]:
    """``atomic_folder`` for a model. Of another model that was there OPTIONAL goes, too.

    In a folder without a model these are files of the user, and stay.
    """
    with atomic_folder(folder) as part:
        yield part
        replaces = (folder / "heads.safetensors").exists()
        stale = [name for name in OPTIONAL if replaces and not (part / name).exists()]
    for name in stale:
        (folder / name).unlink(missing_ok=True)


def run_card(title: str, provenance: Provenance, steps: int, numbers: dict[str, float]) -> str:
    """The card of a training run: data, steps, numbers, and what it started from."""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(numbers.items()))
    measured = f"| measure | value |\n|---|---|\n{rows}\n" if rows else "Nothing was measured.\n"
    return (
        f"# {title}\n\nTrained by the multimodal toolkit for {steps:,} steps.\n\n"
        f"{provenance.section()}\n## Numbers of its last validation\n\n{measured}"
    )


def _shown(value: Any) -> str:
    return f"{value:,}" if type(value) is int else str(value)
