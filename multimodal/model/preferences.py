"""What a sample prefers: of two texts about its image, or of two images for a text, the better one.

A record has ``preferences``, see docs/formats/samples.md. Training takes one of them a step, by the
seed of the sample. Its completions are branches of one sequence, so the prompt is read once:

    texts       <bos> <boi> i i i, the trunk; then for each text   <eoi> p p t t <eos>
    drawings    <bos> p p, the trunk;         then for each image  <boi> i i i <eoi>

What is compared are the log-probabilities of t t <eos>, and of i i i <eoi>. The joint losses beside
learn the sample's own texts. If it has none, they learn its chosen completion.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from multimodal.model.batches import ROW_MULTIPLE, BatchBuilder
from multimodal.model.lessons import answer_text, descriptions_of, exchanges_of
from multimodal.model.preference_loss import (
    CHOSEN,
    KINDS,
    MISMATCHED,
    REJECTED,
    Completions,
    PreferenceConfig,
)
from multimodal.model.sequences import (
    NO_LOSS,
    Ids,
    TokenSequence,
    describe_prompt,
    image_tokens,
    pack,
)
from multimodal.model.training_batch import TrainingSample

PREFERENCES = "preferences"  # the field of a record
Completion: TypeAlias = str | int  # a text, or the number of an image of the sample


@dataclass(frozen=True)
class Preference:
    """One entry of the preferences of a record.

    Attributes:
        prompt: a question about the image, empty for a caption; or the text of the drawings.
        completions: the chosen one and the rejected one, or a single one with its label.
        roles: CHOSEN or REJECTED, for each.
    """

    prompt: str
    completions: tuple[Completion, ...]
    roles: tuple[int, ...]

    @property
    def is_drawing(self) -> bool:
        return isinstance(self.completions[0], int)

    @property
    def chosen(self) -> Completion | None:
        return next((c for c, r in zip(self.completions, self.roles, strict=True) if not r), None)


def preferences_of(record: Mapping[str, Any], images: int) -> list[Preference]:
    """The preferences of a record.

    Args:
        images: how many images its sample has.

    Raises:
        ValueError: for an entry that compares nothing, and why.
    """
    entries = record.get(PREFERENCES, [])
    if not isinstance(entries, list):
        raise ValueError("preferences are not a list")
    return [_preference(entry, images) for entry in entries]


def _preference(entry: Any, images: int) -> Preference:
    if not isinstance(entry, dict):
        raise ValueError("a preference is not an object")
    prompt = entry.get("prompt", "")
    if not isinstance(prompt, str):
        raise ValueError("the prompt of a preference is not a string")
    if "completion" in entry:
        if not isinstance(entry.get("label"), bool):
            raise ValueError("a completion has no label: expected true or false")
        completions = [_completion(entry, "completion", images)]
        roles = [CHOSEN if entry["label"] else REJECTED]
    else:
        completions = [_completion(entry, name, images) for name in ("chosen", "rejected")]
        roles = [CHOSEN, REJECTED]
        if completions[0] == completions[1]:
            raise ValueError("the chosen and the rejected answer are equal")
    if len({type(completion) for completion in completions}) > 1:
        raise ValueError("a text is compared with an image")
    if isinstance(completions[0], int) and not prompt.strip():
        raise ValueError("a preference of drawings has no prompt")
    return Preference(prompt.strip(), tuple(completions), tuple(roles))


def _completion(entry: Mapping[str, Any], name: str, images: int) -> Completion:
    value = entry.get(name)
    if isinstance(value, dict):
        number = value.get("image")
        if not (isinstance(number, str) and number.isdecimal() and int(number) < images):
            raise ValueError(f"its {name} image is {number!r}, and it has {images} images")
        return int(number)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"no {name} answer: a preference needs a text or an image")
    return value.strip()


def check_preferences(
    check: Callable[[str, dict[str, Any]], object],
    paired: bool,
    key: str,
    record: dict[str, Any],
) -> None:
    """Raises ``ValueError`` for a sample that preference training cannot use.

    Args:
        check: for samples without preferences.
        paired: whether a completion that stands alone is of no use.
    """
    if PREFERENCES not in record:
        check(key, record)
        return
    content = _content(record)
    images = sum("image" in part for part in content) if content else 1
    try:
        preferences = preferences_of(record, images)
        if not preferences:
            raise ValueError("its preferences are empty")
        for preference in preferences:
            if paired and len(preference.completions) == 1:
                raise ValueError("a completion with a label, and only kto learns from one alone")
            if preference.is_drawing != bool(content):
                raise ValueError("drawings need a content that lists their images, texts none")
    except ValueError as error:
        raise ValueError(f"sample {key}: {error}") from error


def _content(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The parts of a document. Empty if the record has none, or another field of that name."""
    content = record.get("content")
    if not isinstance(content, list) or not all(
        isinstance(part, dict) and {*part} in ({"image"}, {"text"}) for part in content
    ):
        return []
    return content


@dataclass(frozen=True)
class _Compared:
    """The ids of a preference: trunk and branches, and how many of the ids at the end of each
    branch are the completion. The last id of a branch is predicted, and not read."""

    is_drawing: bool
    trunk: list[int]
    prefix: list[int]
    completions: list[list[int]]
    roles: list[int]

    @property
    def length(self) -> int:
        """Of its sequence."""
        ends = sum(len(ids) - 1 for ids in self.completions)
        return len(self.trunk) + len(self.completions) * len(self.prefix) + ends


@dataclass(frozen=True)
class PreferenceBuilder:
    """Makes of samples what is compared, and the samples that the joint losses learn.

    Args:
        builder: of the joint batch.
        config: what is learned of the completions.
        joint_weight: of the joint losses.
    """

    builder: BatchBuilder
    config: PreferenceConfig
    joint_weight: float

    def of(self, sample: TrainingSample) -> Preference | None:
        """The preference that a sample trains in this step. None: it has none."""
        preferences = preferences_of(sample.record, len(sample.codes))
        if not preferences:
            return None
        return preferences[int(np.random.default_rng([sample.seed, 4]).integers(len(preferences)))]

    def joint_sample(self, sample: TrainingSample, preference: Preference | None) -> TrainingSample:
        """What the joint losses learn of a sample."""
        if preference is None:
            return sample
        chosen, prompt = preference.chosen, preference.prompt
        if preference.is_drawing:
            if not isinstance(chosen, int):
                return replace(sample, document=(prompt,), codes=sample.codes[:0])
            codes = sample.codes[chosen : chosen + 1]
            return replace(sample, document=(), codes=codes, record={"captions": [prompt]})
        record = sample.record
        if descriptions_of(record) or exchanges_of(record, self.builder.templates):
            return sample
        if not isinstance(chosen, str):
            return replace(sample, document=(None,))  # its image alone
        learned = {"qa": [[prompt, chosen]]} if prompt else {"captions": [chosen]}
        return replace(sample, record={**record, **learned})

    def length(self, sample: TrainingSample, preference: Preference) -> int:
        """Tokens of the sequence that compares."""
        return self._compared(sample, preference).length

    def build(
        self, samples: Sequence[TrainingSample], preferences: Sequence[Preference | None]
    ) -> tuple[Completions, list[int]]:
        """The completions of samples, and the numbers of the samples that do not fit a row."""
        compared = {
            number: self._compared(sample, preference)
            for number, (sample, preference) in enumerate(zip(samples, preferences, strict=True))
            if preference is not None
        }
        room = self.builder.row_length
        long = [number for number, each in compared.items() if each.length > room]
        fitting = [each for number, each in compared.items() if number not in long]
        if self.config.variant == "kto":
            fitting += self._mismatched(fitting)
        return self._packed(fitting), long

    def _compared(self, sample: TrainingSample, preference: Preference) -> _Compared:
        vocabulary, encode = self.builder.vocabulary, self.builder.encode
        prompt, roles = preference.prompt, list(preference.roles)
        if preference.is_drawing:
            images = [
                image_tokens(vocabulary, sample.codes[int(number)][self.builder.drawn])
                for number in preference.completions
            ]
            trunk = [vocabulary.bos, *encode(prompt)]
            return _Compared(True, trunk, [vocabulary.boi], [ids[1:] for ids in images], roles)
        *trunk, eoi = describe_prompt(vocabulary, sample.codes[0][self.builder.read])
        texts = [str(text) for text in preference.completions]
        prefix = [eoi]
        if prompt:
            prefix += encode(self.builder.templates.ask(prompt))
            texts = [answer_text(text) for text in texts]
        completions = [[*encode(text), vocabulary.eos] for text in texts]
        return _Compared(False, trunk, prefix, completions, roles)

    def _mismatched(self, compared: Sequence[_Compared]) -> list[_Compared]:
        """For each prompt the completions of the one before it of its kind, if they fit a row."""
        found: list[_Compared] = []
        for kind, name in enumerate(KINDS):
            own = [each for each in compared if each.is_drawing == kind]
            pairs = zip(own[-1:] + own[:-1], own, strict=True)
            others = [
                replace(each, completions=other.completions, roles=[MISMATCHED] * len(other.roles))
                for other, each in pairs
                if other is not each
            ]
            others = [each for each in others if each.length <= self.builder.row_length]
            if own and not others:
                warnings.warn(
                    f"kto: the {name} of a batch have no completion of another prompt to compare "
                    "with, and their kl is taken as 0: give each rank more samples at once "
                    "(data.global_batch_size)",
                    stacklevel=2,
                )
            found += others
        return found

    def _packed(self, compared: Sequence[_Compared]) -> Completions:
        sequences = [_branched(each) for each in compared]
        pad, length = self.builder.vocabulary.pad, self.builder.row_length
        of_pad, zero, none = (np.array([value]) for value in (pad, 0, NO_LOSS))
        empty = TokenSequence(of_pad, zero, none, zero, zero, zero)
        packed = pack(sequences or [empty], length, pad, ROW_MULTIPLE)
        positions, lengths = [np.zeros(0, np.int64)], list[int]()
        for each, start in zip(compared, packed.states.tolist(), strict=False):
            for ids in each.completions:
                start += len(each.prefix) - 1
                positions.append(np.arange(start, start + len(ids)))
                lengths.append(len(ids))
                start += len(ids)
        roles = [role for each in compared for role in each.roles]
        kinds = [int(each.is_drawing) for each in compared for _ in each.roles]
        return Completions(
            packed,
            torch.from_numpy(np.concatenate(positions)),
            torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
            torch.tensor(roles, dtype=torch.int64),
            torch.tensor(kinds, dtype=torch.int64),
            self.config,
            self.joint_weight,
        )


def _branched(compared: _Compared) -> TokenSequence:
    """The sequence of a preference. Its state is where the first branch begins."""
    branches = [[*compared.prefix, *ids] for ids in compared.completions]
    trunk = len(compared.trunk)
    ids = np.array([*compared.trunk, *(i for branch in branches for i in branch[:-1])], np.int64)
    targets: Ids = np.array([0] * trunk + [i for branch in branches for i in branch[1:]], np.int64)
    lengths = [len(branch) - 1 for branch in branches]
    positions = [np.arange(trunk), *(trunk + np.arange(length) for length in lengths)]
    return TokenSequence(
        ids,
        targets,
        np.full(len(ids), NO_LOSS),
        np.zeros_like(ids),
        np.repeat(np.arange(1 + len(branches)), [trunk, *lengths]),
        np.concatenate(positions),
        state=trunk,
    )
