"""Rewards of texts about images: of captions CIDEr, the model's own alignment, right objects and
true claims, of answers whether they are right, and of both a function in a file.

A text that does not end within its tokens has no end for a reward to judge. CIDEr counts the end as
a word, so such a caption misses one. To the others it is an empty text. Without this a captioner
learns to stop in the middle: "a man riding a" (Hu et al. 2023, arXiv:2305.12254).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from multimodal.data.objects import named_objects
from multimodal.data.samples import readable
from multimodal.data.shards import Shards
from multimodal.eval.metrics.answering import same_answer
from multimodal.eval.metrics.cider import CaptionSpace, similarities
from multimodal.eval.metrics.penn_treebank import ptb_tokenize
from multimodal.eval.metrics.scene_captions import claims_score
from multimodal.inference.embedding import embed_codes, embed_texts
from multimodal.model.checkpoint import ModelParts
from multimodal.model.lessons import descriptions_of
from multimodal.model.sequences import Ids
from multimodal.plugins import from_file
from multimodal.train.rewards.judges import warn_of_unaligned

END = "<eos>"  # the word for the end of a caption
REWARDS = {"captions": ("cider", "alignment", "objects", "scenes"), "answers": ("exact",)}
MAX_PICTURES = 100_000  # of each folder, the first ones: words are counted in their captions


@dataclass(frozen=True)
class WrittenText:
    """A caption, or an answer to a question, that the network wrote.

    Args:
        text: the caption or the answer.
        ended: whether the network ended it.
        record: what ``KEY.json`` holds about the image.
        codes: int64[n], of the image.
        source: the number of the folder that the image is from.
        question: that it answers. Empty for a caption.
        answer: that is expected.
    """

    text: str
    ended: bool
    record: Mapping[str, Any]
    codes: Ids
    source: int = 0
    question: str = ""
    answer: str = ""

    @property
    def judged(self) -> str:
        """The text, or an empty one if it has no end."""
        return self.text if self.ended else ""


Reward = Callable[[Sequence[WrittenText]], Sequence[float]]
TextKind = Literal["captions", "answers"]


class CiderReward:
    """CIDEr-D with the captions of the image. The end is a word of all captions.

    In how many images a word occurs is counted in each folder by itself, as a score on one data set
    does. Counted in all together, "a" and "on" would be rare words among photos as soon as there
    are as many pictures of products, and saying them would be worth more than saying what is seen.

    Args:
        captions: of each folder, of each training image. A folder may have none.
    """

    def __init__(self, captions: Sequence[Sequence[Sequence[str]]]) -> None:
        ended = [[[_ended(text) for text in each] for each in folder] for folder in captions]
        self.spaces = [CaptionSpace(folder) for folder in ended]

    def __call__(self, captions: Sequence[WrittenText]) -> list[float]:
        rewards = np.zeros(len(captions))
        for source in {caption.source for caption in captions}:
            rows = [row for row, caption in enumerate(captions) if caption.source == source]
            rewards[rows] = self._of_folder(self.spaces[source], [captions[row] for row in rows])
        values: list[float] = rewards.tolist()
        return values

    def _of_folder(
        self, space: CaptionSpace, captions: Sequence[WrittenText]
    ) -> NDArray[np.float64]:
        images = {id(caption.record): caption.record for caption in captions}
        references = {name: descriptions_of(record) for name, record in images.items()}
        texts = [_ended(text) for each in references.values() for text in each]
        owner = np.array([name for name, each in references.items() for _ in each])
        candidates = [_ended(c.text) if c.ended else ptb_tokenize(c.text) for c in captions]
        scores = similarities(space.vectors(candidates), space.vectors(texts))
        own = np.array([id(caption.record) for caption in captions])[:, None] == owner[None]
        means: NDArray[np.float64] = (scores * own).sum(1) / own.sum(1)
        return means


def _ended(caption: str) -> str:
    return f"{ptb_tokenize(caption)} {END}"


class AlignmentReward:
    """The cosine of the embeddings of the image and the caption, and -1 for an empty caption."""

    def __init__(self, model: ModelParts) -> None:
        self.model = model

    def __call__(self, captions: Sequence[WrittenText]) -> list[float]:
        codes = {id(caption.record): caption.codes for caption in captions}
        rows = {name: row for row, name in enumerate(codes)}
        images = embed_codes(self.model, torch.from_numpy(np.stack(list(codes.values()))))
        judged = [caption.judged for caption in captions]
        texts = embed_texts(self.model, [text or "?" for text in judged])
        own = images[[rows[id(caption.record)] for caption in captions]]
        cosines = (own * texts).sum(-1).tolist()
        return [cosine if text else -1.0 for text, cosine in zip(judged, cosines, strict=True)]


class FunctionReward:
    """A function of a user: (texts: list[str], records: list[dict]) -> a number for each.

    The record of an answer has its ``question`` and the expected ``answer``, too.
    """

    def __init__(
        self, function: Callable[[list[str], list[dict[str, Any]]], Sequence[float]], name: str
    ) -> None:
        self.function, self.name = function, name

    def __call__(self, written: Sequence[WrittenText]) -> list[float]:
        records = [dict(each.record) for each in written]
        for record, each in zip(records, written, strict=True):
            if each.question:
                record |= {"question": each.question, "answer": each.answer}
        values = self.function([each.judged for each in written], records)
        rewards = [float(value) for value in values]
        if len(rewards) != len(written) or not np.isfinite(rewards).all():
            raise ValueError(
                f"{self.name}: gave {len(rewards)} rewards ({rewards[:5]} ...) for {len(written)} "
                "texts: expected a finite number for each"
            )
        return rewards


def objects_reward(captions: Sequence[WrittenText]) -> list[float]:
    """The F1 of the objects that captions name, by those that their references name: in [0, 1].

    So an invented object costs (CHAIR, Rohrbach et al. 2018, arXiv:1809.02156), and one that is not
    said as well: else the best caption would name nothing.
    """
    rewards = []
    for caption in captions:
        named = named_objects(caption.judged)
        true = named_objects(" ".join(descriptions_of(caption.record)))
        both = len(named) + len(true)
        rewards.append(2 * len(named & true) / both if both else float(bool(caption.judged)))
    return rewards


def scene_reward(captions: Sequence[WrittenText]) -> list[float]:
    """Which claims of captions of scenes are true, and how complete they are: in [0, 1]."""
    return [claims_score(caption.judged, caption.record) for caption in captions]


def exact_reward(answers: Sequence[WrittenText]) -> list[float]:
    """1 for an answer that is the expected one, as VQA compares them, and 0 for any other."""
    return [float(same_answer(answer.answer, answer.judged)) for answer in answers]


def find_reward(
    name: str, model: ModelParts, shards: Sequence[Shards], of: TextKind = "captions"
) -> Reward:
    """The reward of a name.

    Args:
        name: one of REWARDS, or ``FILE.py:FUNCTION``.
        model: whose alignment it is.
        shards: the training data, a source each, whose captions CIDEr counts.
        of: what it judges.

    Raises:
        ValueError: if there is no such reward, or no caption to count in.
    """
    if name not in REWARDS[of]:
        return FunctionReward(from_file(name, f"reward of {of}", REWARDS[of], "FUNCTION"), name)
    if name == "exact":
        return exact_reward
    if name == "alignment":
        warn_of_unaligned(model, REWARDS[of])
        return AlignmentReward(model)
    if name == "objects":
        return objects_reward
    if name == "scenes":
        return scene_reward
    captions = [
        [
            described
            for sample in islice(readable(folder, lambda problem: None), MAX_PICTURES)
            if (described := descriptions_of(sample.record))
        ]
        for folder in shards
    ]
    if not any(captions):
        raise ValueError("reward: cider needs captions, and no training sample has one")
    return CiderReward(captions)
