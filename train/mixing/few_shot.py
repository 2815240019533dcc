"""Few-shot documents, made of pairs: examples in a prompt help only a model that has seen such.

Some images of a folder and their texts, and one more, become a document in the layout of few-shot
prompts (``after_examples`` in model/batches.py; as in Flamingo, Alayrac et al. 2022,
arXiv:2204.14198). If all texts of the data are alike, examples say nothing that the weights do not
say, and a model learns to ignore them. So a share of the documents is restyled: all their texts are
written in a style that only the examples show (as in symbol tuning, Wei et al. 2023,
arXiv:2305.08298).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from multimodal.model.batches import FEW_SHOT, BatchBuilder
from multimodal.model.lessons import descriptions_of

STREAM = 4  # of the random numbers of a sample: others decide its captions, masks and questions
TEXT_TOKENS = 32  # that a row has at least for each text: a caption of two dozen words
NEARBY = 1000  # examples are from so many samples after the last one: most are in the same shard
CASES: tuple[Callable[[str], str], ...] = (str, str.upper, str.lower, str.title)
BETWEEN_WORDS = (" ", " ", "-", "_", " / ", ", ")
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
AROUND = (("", ""), ("{}: ", ""), ("", " {}"), ("{} ", " {}"), ("[{}] ", ""), ("<", ">"))


@dataclass(frozen=True)
class FewShot:
    """Which training samples become few-shot documents.

    Args:
        share: of the samples with a caption that become the end of a document.
        examples: at most so many images with a text before that end. From one on, at random.
        restyled: the share of the documents whose texts are written in a style of their own: other
            cases, other signs between words, the words backwards, invented words around them.

    Raises:
        ValueError: for a share that is none, or no examples.
    """

    share: float = 0.0
    examples: int = 4
    restyled: float = 0.5

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 0 <= self.restyled <= 1 and self.examples >= 1):
            raise ValueError(
                f"few_shot: share={self.share}, examples={self.examples}, restyled="
                f"{self.restyled}: expected shares from 0 to 1, and at least one example"
            )

    def check(self, builder: BatchBuilder | None) -> None:
        """Raises ``ValueError`` if a run cannot learn from such documents."""
        if builder is None:
            raise ValueError("data.few_shot teaches a network to read texts: leave it out here")
        images = self.examples + 1
        needed = 1 + images * (len(builder.read) + 2)
        whole = needed + images * TEXT_TOKENS
        if builder.row_length < whole:
            raise ValueError(
                f"row_length={builder.row_length}: few-shot documents of {images} images have "
                f"{needed} tokens and their texts: raise it to {whole} or more, or lower "
                "data.few_shot.examples"
            )

    def document(
        self,
        example: dict[str, Any],
        number: int,
        count: int,
        read: Callable[[int], dict[str, Any]],
    ) -> dict[str, Any]:
        """A few-shot document that ends with this example, or the example itself.

        Its seed decides, whatever samples are read beside it.

        Args:
            example: a sample of ``ShardDataset``.
            number: that of the sample in its folder.
            count: the samples of the folder.
            read: gives another sample of the folder by its number. It raises ``ValueError`` for one
                that cannot be used, which is passed over.
        """
        rng = np.random.default_rng([example["seed"], STREAM])
        if rng.random() >= self.share or not _is_pair(example):
            return example
        wanted, caption = int(rng.integers(1, self.examples + 1)), int(rng.integers(1 << 16))
        style = Style.random(rng) if rng.random() < self.restyled else Style()
        others = min(NEARBY, count - 1)
        shots = [example]
        for offset in rng.choice(others, min(2 * wanted, others), replace=False):
            try:
                other = read((number + 1 + int(offset)) % count)
            except ValueError:
                continue
            if _is_pair(other):
                shots.insert(0, other)
            if len(shots) > wanted:
                break
        if len(shots) == 1:
            return example
        parts: list[str | None] = []
        for shot in shots:
            texts = descriptions_of(shot["record"])
            parts += [None, style(texts[caption % len(texts)].strip())]
        return {
            **example,
            "images": [image for shot in shots for image in shot["images"]],
            "document": parts,
            "record": {FEW_SHOT: True},
        }


def _is_pair(example: dict[str, Any]) -> bool:
    """Whether an example is an image with captions, and nothing that is compared."""
    record = example["record"]
    return not (example["document"] or "preferences" in record) and bool(descriptions_of(record))


@dataclass(frozen=True)
class Style:
    """How a text is written. By default as it is.

    Args:
        case: turns it into another case.
        between: stands between its words.
        backwards: whether its last word comes first.
        before, after: stand around it.
    """

    case: Callable[[str], str] = str
    between: str = " "
    backwards: bool = False
    before: str = ""
    after: str = ""

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Style":
        before, after = AROUND[rng.integers(len(AROUND))]
        word = invented_word(rng)
        return cls(
            CASES[rng.integers(len(CASES))],
            BETWEEN_WORDS[rng.integers(len(BETWEEN_WORDS))],
            bool(rng.random() < 0.2),
            before.format(word),
            after.format(word),
        )

    def __call__(self, text: str) -> str:
        words = text.split()
        words = words[::-1] if self.backwards else words
        return f"{self.before}{self.case(self.between.join(words))}{self.after}"


def invented_word(rng: np.random.Generator) -> str:
    """Two or three syllables that mean nothing, such as "zuko"."""
    syllables = rng.integers(2, 4)
    pairs = [(CONSONANTS[rng.integers(14)], VOWELS[rng.integers(5)]) for _ in range(syllables)]
    return "".join(consonant + vowel for consonant, vowel in pairs)
