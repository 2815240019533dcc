"""What reward training lets the network make of a sample: captions, an answer, or a drawing.

Each is a ``Task``: it says what of a sample is completed, makes the completions, and judges them.

Shapes: S samples, k completions of each (a group), n codes of an image.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from multimodal.data.shards import Shards
from multimodal.eval.metrics.scene_captions import has_scene
from multimodal.inference.codec import UNKNOWN
from multimodal.inference.drawing import draw_codes
from multimodal.inference.text import generate_ids, text_ends
from multimodal.model.batches import BatchBuilder
from multimodal.model.checkpoint import ModelParts
from multimodal.model.lessons import descriptions_of, questions_of
from multimodal.model.sequences import Ids, describe_prompt
from multimodal.model.training_batch import TrainingSample
from multimodal.options import DrawOptions, TextOptions
from multimodal.train.rewards.judges import Judge, completed, find_judge, text_to_draw
from multimodal.train.rewards.rewards import Reward, WrittenText, find_reward

Kind = Literal["captions", "answers", "drawings"]
Made = Sequence[list[list[int]]]  # of each sample, of each completion: ids


@dataclass(frozen=True)
class Prompt:
    """What the network completes.

    Attributes:
        sample: whose image it is.
        text: a question about the image, or the text of a drawing. Empty for a caption.
        ids: of the text as it stands in a sequence, with the words around a question.
        answer: that is expected.
    """

    sample: TrainingSample
    text: str = ""
    ids: tuple[int, ...] = ()
    answer: str = ""


class Task(ABC):
    """What is made, and how it is judged.

    Args:
        model: makes it.
        builder: of its training batches.
        rewards: their names.
        count: k.
        max_tokens: of a text, with its end.
        temperature: at which the k are sampled.

    Raises:
        ValueError: for a task that the model cannot do.
    """

    needs = ""  # what a sample has to have, in words

    def __init__(
        self,
        model: ModelParts,
        builder: BatchBuilder,
        rewards: Sequence[str],
        count: int,
        max_tokens: int,
        temperature: float,
    ) -> None:
        self.model, self.builder, self.names = model, builder, tuple(rewards)
        self.count, self.max_tokens, self.temperature = count, max_tokens, temperature
        if "scenes" in rewards:
            self.needs += " and a scene"

    def prompt(self, sample: TrainingSample) -> Prompt | None:
        """What of a sample is completed, by its seed. None: it has nothing, or it is too long."""
        if sample.document or ("scenes" in self.names and not has_scene(sample.record)):
            return None
        prompt = self._prompt(sample)
        fits = prompt is not None and self.length(prompt.ids) <= self.builder.row_length
        return prompt if fits else None

    @abstractmethod
    def _prompt(self, sample: TrainingSample) -> Prompt | None:
        """The same, for a sample of one image, however long."""

    @abstractmethod
    def length(self, ids: Sequence[int] = ()) -> int:
        """Tokens of the longest sequence that training reads; ids: of a prompt."""

    @abstractmethod
    def make(self, prompts: Sequence[Prompt], greedy: bool = False) -> Made:
        """Complete each of S prompts k times, or once, by the likeliest tokens."""

    @abstractmethod
    def find_rewards(self, shards: Sequence[Shards]) -> None:
        """Find the rewards; shards: the training data. Raises ``ValueError`` if there is none."""

    @abstractmethod
    def judge(self, prompts: Sequence[Prompt], made: Made) -> dict[str, Sequence[float]]:
        """The rewards of all completions, one after the other, by the name of the reward."""


class Texts(Task):
    """Texts about images. Its subclasses say which."""

    kind: Literal["captions", "answers"]

    def length(self, ids: Sequence[int] = ()) -> int:
        return 2 + len(self.builder.read) + self.count * (len(ids) + self.max_tokens)

    def make(self, prompts: Sequence[Prompt], greedy: bool = False) -> Made:
        options = TextOptions(
            temperature=0.0 if greedy else self.temperature, max_tokens=self.max_tokens
        )
        return write_texts(
            self.model,
            [prompt.sample.codes[0][self.builder.read] for prompt in prompts],
            [prompt.sample.seed for prompt in prompts],
            1 if greedy else self.count,
            options,
            [prompt.ids for prompt in prompts],
        )

    def find_rewards(self, shards: Sequence[Shards]) -> None:
        self.rewards: dict[str, Reward] = {
            name: find_reward(name, self.model, shards, self.kind) for name in self.names
        }

    def judge(self, prompts: Sequence[Prompt], made: Made) -> dict[str, Sequence[float]]:
        decode, ends = self.model.text_tokenizer.decode, text_ends(self.model)
        written = [
            WrittenText(
                decode([token for token in ids if token not in ends]).strip(),
                ids[-1] in ends,
                prompt.sample.record,
                prompt.sample.codes[0],
                prompt.sample.source,
                prompt.text,
                prompt.answer,
            )
            for prompt, texts in zip(prompts, made, strict=True)
            for ids in texts
        ]
        return {name: reward(written) for name, reward in self.rewards.items()}


class Captions(Texts):
    kind = "captions"
    needs = "a caption"

    def _prompt(self, sample: TrainingSample) -> Prompt | None:
        return Prompt(sample) if descriptions_of(sample.record) else None


class Answers(Texts):
    kind = "answers"
    needs = "a question with its answer"

    def _prompt(self, sample: TrainingSample) -> Prompt | None:
        questions = questions_of(sample.record, self.builder.templates)
        if not questions:
            return None
        number = int(np.random.default_rng([sample.seed, 5]).integers(len(questions)))
        asked, question, answer = questions[number]
        return Prompt(sample, question, tuple(self.builder.encode(asked)), answer)


class Drawings(Task):
    """Drawings of captions, code by code and without guidance: as likely as the network says."""

    needs = "an image that is drawn (data.drawn) with a caption to draw after"

    def __init__(self, model: ModelParts, *arguments: Any) -> None:
        super().__init__(model, *arguments)
        if not model.image_tokenizer.can_draw:
            raise ValueError("of=drawings: the image tokenizer of this run has no decoder")

    def _prompt(self, sample: TrainingSample) -> Prompt | None:
        if not sample.drawn:
            return None
        text = text_to_draw(sample.record, "scenes" in self.names, sample.seed)
        return Prompt(sample, text, tuple(self.builder.encode(text.strip()))) if text else None

    def length(self, ids: Sequence[int] = ()) -> int:
        return 3 + len(ids) + len(self.builder.drawn)

    def make(self, prompts: Sequence[Prompt], greedy: bool = False) -> Made:
        count = 1 if greedy else self.count
        options = DrawOptions(temperature=0.0 if greedy else self.temperature, guidance_scale=1.0)
        texts = [prompt.text for prompt in prompts for _ in range(count)]
        numbers = _numbers([prompt.sample.seed for prompt in prompts], count)
        codes = draw_codes(self.model, texts, options, numbers=numbers)[:, self.builder.drawn]
        ids = (codes + self.model.vocabulary.image_start).tolist()
        return _groups(ids, count)

    def find_rewards(self, shards: Sequence[Shards]) -> None:
        self.judges: dict[str, Judge] = {name: find_judge(name, self.model) for name in self.names}

    def judge(self, prompts: Sequence[Prompt], made: Made) -> dict[str, Sequence[float]]:
        drawn = torch.tensor([ids for group in made for ids in group], dtype=torch.int64)
        codes = torch.full((len(drawn), self.model.codes_per_image), UNKNOWN)
        codes[:, self.builder.drawn] = drawn - self.model.vocabulary.image_start
        codes = completed(self.model, codes)
        own = [prompt for prompt, group in zip(prompts, made, strict=True) for _ in group]
        texts, records = [prompt.text for prompt in own], [prompt.sample.record for prompt in own]
        return {name: judge(texts, codes, records) for name, judge in self.judges.items()}


TASKS: Mapping[Kind, type[Task]] = {"captions": Captions, "answers": Answers, "drawings": Drawings}


def reward_weights(reward: Mapping[str, float] | str) -> dict[str, float]:
    """The weights of rewards by their names. A name alone has the weight 1.

    Raises:
        ValueError: for no name, or weights that are not numbers, or all 0.
    """
    weights = {reward: 1.0} if isinstance(reward, str) else dict(reward)
    if not any(weights.values()) or not np.isfinite(list(weights.values())).all():
        raise ValueError(f"reward={weights}: expected names with their weights, not all of them 0")
    return weights


def short_name(reward: str) -> str:
    """The name of a reward in the log: ``FILE.py:FUNCTION`` without its folders."""
    return Path(reward).name


def write_texts(
    model: ModelParts,
    codes: Sequence[Ids],
    seeds: Sequence[int],
    count: int,
    options: TextOptions,
    prompts: Sequence[Sequence[int]] | None = None,
) -> list[list[list[int]]]:
    """Write texts about each image: ids with what ended them, if it came within ``max_tokens``.

    Args:
        codes: of S images those that are read, int64[n] each.
        seeds: S numbers. The random numbers of an image's texts depend on its seed.
        count: k.
        prompts: of S images the ids of a question behind each. None: captions are written.
    """
    if not len(codes):
        return []
    behind: Sequence[Sequence[int]] = [()] * len(codes) if prompts is None else prompts
    begun = [
        [*describe_prompt(model.vocabulary, image), *prompt]
        for image, prompt in zip(codes, behind, strict=True)
        for _ in range(count)
    ]
    return _groups(
        generate_ids(model, begun, options, _numbers(seeds, count), with_ends=True), count
    )


def _numbers(seeds: Sequence[int], count: int) -> list[int]:
    """Of each completion a number that its random numbers depend on."""
    return [seed * count + number for seed in seeds for number in range(count)]


def _groups(ids: list[list[int]], count: int) -> list[list[list[int]]]:
    return [ids[start : start + count] for start in range(0, len(ids), count)]
