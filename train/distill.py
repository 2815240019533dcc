"""Distillation through the Lightning CLI: a student learns from the data and from a teacher, or a
language model that learns to see is held to what it said of texts before.
"""

from dataclasses import fields, replace
from typing import Any

import torch

from multimodal.adapters.lora import without_adapter
from multimodal.devices import moved
from multimodal.model.checkpoint import ModelParts
from multimodal.model.distillation import Teaching
from multimodal.model.sequences import OBJECTIVES, Packed
from multimodal.model.training_batch import TrainingBatch
from multimodal.train.cost import training_flops
from multimodal.train.examples import Examples
from multimodal.train.joint import JointModule
from multimodal.train.sharding import unsharded

ABOUT_IDS = ("text_size", "layout", "reads", "draws", "templates")  # of the configs, to be equal


class DistillModule(JointModule):
    """Learns each target from a mixture of the data and of what a larger model says of it.

    The teacher reads the same rows as the student, so it teaches texts and images, known and masked
    ones. It is not trained, not kept in checkpoints, and not used in validation. Alignment is
    learned from the data alone.

    Args:
        teacher: a model with the same text tokenizer and the same codes, of any size: a folder, or
            its name on the Hub.
        temperature: at which teacher and student are compared. Above 1 unlikely tokens count more.
        teacher_weight: from 0 (the data alone) to 1.
        joint: the arguments of JointModule.
    """

    def __init__(
        self,
        teacher: str,
        temperature: float = 2.0,
        teacher_weight: float = 0.5,
        **joint: Any,
    ) -> None:
        super().__init__(**joint)
        if not 0 < temperature < float("inf") or not 0 <= teacher_weight <= 1:
            raise ValueError(
                f"temperature={temperature}, teacher_weight={teacher_weight}: expected more than "
                "0, and 0 to 1"
            )
        self.teacher_name, self.temperature = teacher, temperature
        self.teacher_weight = teacher_weight
        self._teachers: list[ModelParts] = []  # in a list, so that it is no part of this module
        self.expected_teacher: str | None = None  # the fingerprint that a checkpoint names

    def on_fit_start(self) -> None:
        self._teachers = [self._load_teacher()]
        self._check_teacher()
        super().on_fit_start()

    def _check_teacher(self) -> None:
        for teacher in self._teachers:
            if self.expected_teacher not in (None, teacher.fingerprint):
                raise ValueError(
                    f"{self.teacher_name}: the run that is resumed had another teacher, "
                    f"{self.expected_teacher}; this is {teacher.fingerprint}"
                )

    def _load_teacher(self) -> ModelParts:
        """Raises ``ValueError`` if it cannot teach this student."""
        name = self.teacher_name
        teacher = ModelParts.load(name, str(self.device))
        if teacher.text_tokenizer.to_json() != self.model.text_tokenizer.to_json():
            raise ValueError(f"{name}: the teacher's text tokenizer is not that of this run")
        if teacher.image_tokenizer.codes_fingerprint != self.image_tokenizer.codes_fingerprint:
            raise ValueError(f"{name}: the teacher's image tokenizer is not that of this run")
        ours, theirs = self.network.config, teacher.config
        for field in ABOUT_IDS:
            if getattr(ours, field) != getattr(theirs, field):
                raise ValueError(
                    f"{name}: {field} of the teacher is {getattr(theirs, field)}, and "
                    f"{getattr(ours, field)} of this run: it would read other sequences"
                )
        limit = theirs.transformer.max_position_embeddings
        if self.builder.row_length > limit:
            raise ValueError(
                f"row_length={self.builder.row_length}: the teacher reads {limit} tokens at most"
            )
        teacher.network.requires_grad_(False)
        teacher.network.attention_backend = self.network.attention_backend
        self.note_source(name, teacher.fingerprint, teacher.provenance)
        return teacher

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        for teacher in self._teachers:
            checkpoint["teacher"] = teacher.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.expected_teacher = checkpoint.get("teacher")
        self._check_teacher()  # with FSDP2 it is loaded after on_fit_start

    def pack(self, batch: Examples) -> TrainingBatch:
        packed = super().pack(batch)
        if not self.training or not self.teacher_weight:
            return packed
        (teacher,) = self._teachers
        network = teacher.network
        with torch.no_grad():
            hidden = network.hidden(packed.packed).flatten(0, 1)
        self.flops += training_flops(network.config.transformer, self.host_rows) / 3
        head, weights = network.transformer.head, dict.fromkeys(OBJECTIVES, self.teacher_weight)
        teaching = Teaching(hidden, head, self.temperature, weights)
        return replace(packed, teaching=teaching)


class KeepWordsModule(JointModule):
    """Keeps the words of a language model, while new rows and an adapter learn to see.

    Of plain texts (the objective ``text``) it learns what the language model says without its
    adapter, not the data: the loss at each token is the KL divergence from that. New ids have no
    place in texts, so they lose theirs. This is learning without forgetting (Li and Hoiem 2016,
    arXiv:1606.09282). Any texts will do, best those that it wrote itself.

    Args:
        joint: the arguments of JointModule, with ``lora`` and its ``new_rows``. The weight of the
            objective ``text`` says how firmly the words are held.
    """

    def __init__(self, **joint: Any) -> None:
        super().__init__(**joint)
        if self.lora is None or not self.lora.new_rows:
            raise ValueError("KeepWordsModule: give lora with new_rows; it is left out to compare")

    def pack(self, batch: Examples) -> TrainingBatch:
        packed = super().pack(batch)
        return (
            packed if not self.training else replace(packed, teaching=self._taught(packed.packed))
        )

    def _taught(self, rows: Packed) -> Teaching:
        """What the language model says of the rows that have plain texts."""
        network, text = self.network, OBJECTIVES.index("text")
        numbers = (self.host_rows.objectives == text).any(1).nonzero()[:, 0]
        numbers = moved(numbers, rows.ids.device)
        tables = [field.name for field in fields(rows) if field.name != "states"]
        some = replace(rows, **{name: getattr(rows, name)[numbers] for name in tables})
        mode = network.training
        network.eval()  # without dropout
        with torch.no_grad(), unsharded(network), without_adapter(network.transformer):
            states = network.hidden(some)
        network.train(mode)
        share = len(numbers) / len(rows.ids)
        self.flops += share * training_flops(network.config.transformer, self.host_rows) / 3
        hidden = states.new_zeros(*rows.ids.shape, states.shape[-1])
        hidden = hidden.index_copy(0, numbers, states).flatten(0, 1)
        words = network.transformer.head[: network.vocabulary.text_size].detach()
        return Teaching(hidden, words, 1.0, {"text": 1.0})
