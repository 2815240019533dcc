"""Preference training: of two answers, or of two drawings, the better one becomes likelier.

The objective is in multimodal/model/preference_loss.py: DPO, IPO or KTO. The joint losses go on
beside it, so that nothing else is forgotten.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np

from multimodal.data.documents import document_of
from multimodal.data.shards import Shards
from multimodal.model.preference_loss import PreferenceConfig, Variant
from multimodal.model.preferences import PreferenceBuilder, check_preferences
from multimodal.model.training_batch import TrainingBatch, TrainingSample
from multimodal.train.cost import training_flops
from multimodal.train.examples import Examples, Note
from multimodal.train.preflight import SAMPLES, UNUSABLE
from multimodal.train.reference import ReferencedModule


class PreferenceModule(ReferencedModule):
    """Learns from pairs of answers about images, or of drawings, which of the two is better.

    Start it from the model that is to become better (``--init_from``): its weights are the
    reference, too (ReferencedModule). Data without preferences may be mixed in: the joint losses
    learn from them.

    Args:
        variant: ``dpo``, ``ipo``, or ``kto``, which also learns from single answers that are
            labelled good or bad.
        beta: how strongly the network is held to the reference.
        desirable_weight, undesirable_weight: of good and bad answers in ``kto``.
        lm_weight: of the joint loss, that of JointModule.
        joint: the arguments of JointModule.
    """

    best_by = "val/preference:min"

    def __init__(
        self,
        variant: Variant = "dpo",
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        lm_weight: float = 0.2,
        **joint: Any,
    ) -> None:
        super().__init__(**joint)
        config = PreferenceConfig(variant, beta, desirable_weight, undesirable_weight)
        if lm_weight < 0:
            raise ValueError(f"lm_weight={lm_weight}: expected 0 or more")
        self.preferences = PreferenceBuilder(self.builder, config, lm_weight)
        self.keep_reference()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not self.trainer.ckpt_path:
            self._check_preferences(data.shards(data.train_split))

    def _check_preferences(self, folders: Sequence[Shards]) -> None:
        """Raises ``ValueError`` if the first samples have no preferences, or few that fit a row."""
        fitting, long = 0, list[str]()
        for sample in chain(*(islice(folder, SAMPLES) for folder in folders)):
            try:
                document = document_of(sample)
                images = document.count(None) if document else 1
                codes = np.zeros((images, self.builder.layout.codes_per_image), np.int64)
                example = TrainingSample(sample.key, sample.record, codes, 0, document)
                preference = self.preferences.of(example)
            except ValueError:
                continue  # check_data has counted it
            if preference is not None:
                fits = self.preferences.length(example, preference) <= self.builder.row_length
                fitting += fits
                long += [] if fits else [sample.key]
        if not fitting + len(long):
            raise ValueError(
                f"none of the first {SAMPLES} samples of each folder has preferences: multimodal "
                "prefer makes them, and docs/formats/samples.md says what they are"
            )
        if len(long) > UNUSABLE * (fitting + len(long)):
            raise ValueError(
                f"row_length={self.builder.row_length}: the preferences of {len(long)} of the "
                f"first {fitting + len(long)} samples do not fit (sample {long[0]} for one): "
                "raise it"
            )

    @property
    def check_sample(self) -> Callable[[str, dict[str, Any]], None]:
        paired = self.preferences.config.variant != "kto"
        return partial(check_preferences, super().check_sample, paired)

    def learned(self, sample: TrainingSample) -> TrainingSample:
        return self.preferences.joint_sample(sample, self.preferences.of(sample))

    def build(self, batch: Examples) -> TrainingBatch:
        samples = self.samples(batch)
        preferences = [self.preferences.of(sample) for sample in samples]
        completions, long = self.preferences.build(samples, preferences)
        self.host_completions = completions.packed
        reason = f"its preference does not fit row_length={self.builder.row_length}"
        batch.notes += [Note(batch.sources[n], batch.keys[n], reason) for n in long]
        return replace(self.joint_batch(samples), completions=completions)

    def pack(self, batch: Examples) -> TrainingBatch:
        packed = super().pack(batch)
        completions = packed.completions
        assert completions is not None
        with self.as_reference() as network:
            reference = network.log_probabilities(completions)
        self.tokens += int((self.host_completions.documents > 0).sum())
        # A third more than training: the forward pass of the reference.
        flops = training_flops(self.network.config.transformer, self.host_completions)
        self.flops += 4 / 3 * flops
        return replace(packed, completions=replace(completions, reference=reference))
