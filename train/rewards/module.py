"""Reward training: the network writes or draws, and what was rewarded more becomes likelier.

Self-critical sequence training (Rennie et al. 2017, arXiv:1612.00563), and with the settings that
are named so GRPO (Shao et al. 2024, arXiv:2402.03300). What the network makes of one sample is a
group. The joint loss goes on beside it, so that nothing else is forgotten.

Shapes: S samples, k completions of each.
"""

from collections.abc import Container, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.data.documents import document_of
from multimodal.data.shards import Shards
from multimodal.distributed import mean_over_ranks
from multimodal.inference.text import text_ends
from multimodal.model.objectives import PolicyConfig
from multimodal.model.training_batch import TrainingBatch, TrainingSample, Written
from multimodal.train.distill import KeepWordsModule
from multimodal.train.examples import Examples
from multimodal.train.preflight import SAMPLES
from multimodal.train.reference import ReferencedModule
from multimodal.train.rewards.advantages import Baseline, ScaleRewards, advantages_of, scaled
from multimodal.train.rewards.tasks import TASKS, Kind, Made, Prompt, reward_weights, short_name
from multimodal.train.sharding import unsharded

# What a validation measures of a reward. The joint loss may rise while rewards do.
BEST_BY = {"cider": "val/CIDEr:max", "exact": "val/answer_accuracy:max"}


class RewardModule(ReferencedModule):
    """Rewards what the network writes about images, or draws of texts.

    Start it from a model that can do so already (``--init_from``). In each step it makes some of
    each sample, without dropout. Their tokens are learned beside those of the data: texts are
    branches beside the captions of the data, so an image is read once for all.

    Args:
        reward: a name, or several with their weights, {cider: 1, alignment: 0.2}.
            Of captions ``cider`` (CIDEr-D, with the end of the caption as a word), ``alignment``
            (the cosine of the model's own embeddings), ``scenes`` (which claims about a synthetic
            scene are true, and how many of its objects are named). Of answers ``exact`` (whether it
            is that of the data). Of drawings ``alignment``, ``scenes`` (which named objects of a
            synthetic scene are drawn). Of all ``FILE.py:FUNCTION``, a function
            (texts: list[str], records: list[dict]) -> list[float], of drawings (texts, images:
            list[PIL.Image.Image], records). A text without an end is an empty one for all but
            ``cider``.
        of: what is made and rewarded: ``captions``, ``answers`` or ``drawings``.
        captions_written: how many captions, answers or drawings of each sample in each step.
        temperature: at which they are made. Below 1 they are nearer to the greedy ones. A model
            that was trained with label smoothing writes a wrong word often at 1.
        baseline: what each is compared with, the mean of the ``others`` of its sample, that of the
            whole ``group``, or the ``greedy`` one.
        scale_rewards: what advantages are divided by: their root mean square in the ``batch``, the
            standard deviation of the rewards in each ``group`` as in GRPO, or nothing (``none``).
            With the first two rewards may have any scale.
        beta: of the KL divergence to the reference, the weights that the run starts from.
        lm_weight: of the joint loss, that of JointModule.
        max_tokens: of a written text, with its end.
        joint: the arguments of JointModule.
    """

    def __init__(
        self,
        reward: dict[str, float] | str = "cider",
        of: Kind = "captions",
        captions_written: int = 5,
        temperature: float = 1.0,
        baseline: Baseline = "others",
        scale_rewards: ScaleRewards = "batch",
        beta: float = 0.0,
        lm_weight: float = 0.2,
        max_tokens: int = 24,
        **joint: Any,
    ) -> None:
        super().__init__(**joint)
        least = 1 if baseline == "greedy" and scale_rewards != "group" else 2
        if captions_written < least or temperature <= 0 or lm_weight < 0 or max_tokens < 2:
            raise ValueError(
                f"captions_written={captions_written}, temperature={temperature}, lm_weight="
                f"{lm_weight}, max_tokens={max_tokens}: expected at least {least}, more than 0, at "
                "least 0 and 2"
            )
        self.policy = PolicyConfig(temperature, beta, lm_weight, of == "drawings")
        self.weights = reward_weights(reward)
        self.baseline, self.scale_rewards = baseline, scale_rewards
        self.task = TASKS[of](
            self.model, self.builder, list(self.weights), captions_written, max_tokens, temperature
        )
        needed, length = self.task.length(), self.builder.row_length
        if length < needed:
            what = f"a drawing of {len(self.builder.drawn)} codes needs {needed}, and its text"
            if of != "drawings":
                what = (
                    f"an image of {len(self.builder.read)} codes and {captions_written} {of} of "
                    f"{max_tokens} tokens need {needed}, and a text of the data"
                )
            raise ValueError(f"row_length={length}: {what} some more")
        if beta:
            self.keep_reference()
        self.best_by = next((BEST_BY[name] for name in self.weights if name in BEST_BY), "last")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        shards = data.shards(data.train_split)
        self.task.find_rewards(shards)
        if not self.trainer.ckpt_path:
            self._check_prompts(shards, data.drawn_folders)

    def _check_prompts(self, folders: Sequence[Shards], drawn: Container[Path]) -> None:
        """Raises ``ValueError`` if nothing can be made of the first samples."""
        codes = np.zeros((1, self.builder.layout.codes_per_image), np.int64)
        for folder in folders:
            is_drawn = folder.folder in drawn
            for sample in islice(folder, SAMPLES):
                try:
                    document, record = document_of(sample), sample.record
                except ValueError:
                    continue  # check_data has counted it
                example = TrainingSample(sample.key, record, codes, 0, document, drawn=is_drawn)
                if self.task.prompt(example) is not None:
                    return
        raise ValueError(
            f"none of the first {SAMPLES} samples of each folder has {self.task.needs} that fits "
            f"row_length={self.builder.row_length}, so nothing could be rewarded by "
            f"{', '.join(self.weights)}"
        )

    def build(self, batch: Examples) -> TrainingBatch:
        if not self.training:
            return super().build(batch)
        return self.builder.build(self.write(self.samples(batch)), policy=self.policy)

    def pack(self, batch: Examples) -> TrainingBatch:
        packed = super().pack(batch)
        if packed.policy is None or not self.policy.beta:
            return packed
        with self.as_reference() as network:
            hidden = network.hidden(packed.packed).flatten(0, 1)
            head = network.transformer.head
            reference = packed.policy.log_probabilities(hidden, head)
        self.flops *= 4 / 3  # the forward pass of the reference
        return replace(packed, policy=replace(packed.policy, reference=reference))

    def write(self, samples: Sequence[TrainingSample]) -> list[TrainingSample]:
        """The samples with what the network made of them, and its advantages."""
        found = [self.task.prompt(sample) for sample in samples]
        prompts = [prompt for prompt in found if prompt is not None]
        greedy = None
        self.network.eval()
        try:
            with unsharded(self.network):
                made = self.task.make(prompts)
                rewards = self.judge(prompts, made)
                if self.baseline == "greedy" or self.is_logged:
                    greedy = self.judge(prompts, self.task.make(prompts, greedy=True))["reward"]
        finally:
            self.network.train()
        self._log_written(made, rewards, greedy)
        total = rewards["reward"]
        advantages = advantages_of(total, self.baseline, greedy)
        values = scaled(advantages, total, self.scale_rewards).tolist()
        written = {
            id(prompt.sample): [
                Written(ids, advantage, prompt.ids)
                for ids, advantage in zip(group, of_group, strict=True)
            ]
            for prompt, group, of_group in zip(prompts, made, values, strict=True)
        }
        return [replace(sample, written=written.get(id(sample), ())) for sample in samples]

    def judge(self, prompts: Sequence[Prompt], made: Made) -> dict[str, Tensor]:
        """Their weighted sum as ``reward``, and if there are several each: float32[S, k]."""
        shape = (len(prompts), len(made[0]) if made else self.task.count)

        def tensor(values: Sequence[float]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.float32, device=self.device).view(shape)

        judged = self.task.judge(prompts, made) if prompts else {}
        rewards = {name: tensor(judged.get(name, ())) for name in self.weights}
        total = torch.stack([w * rewards[name] for name, w in self.weights.items()]).sum(0)
        named = {f"reward/{short_name(name)}": each for name, each in rewards.items()}
        return {"reward": total, **(named if len(named) > 1 else {})}

    def _log_written(self, made: Made, rewards: dict[str, Tensor], greedy: Tensor | None) -> None:
        all_ids = [tuple(ids) for group in made for ids in group]
        count, ends = max(1, len(all_ids)), text_ends(self.model)
        values = {name: float(each.sum()) / count for name, each in rewards.items()}
        values["written_distinct"] = len(set(all_ids)) / count
        if not self.policy.drawings:
            values["written_tokens"] = sum(map(len, all_ids)) / count
            values["written_unended"] = sum(ids[-1] not in ends for ids in all_ids) / count
        if greedy is not None:
            values["reward_greedy"] = float(greedy.sum()) / max(1, len(greedy))
        parts = {name: torch.tensor(value, device=self.device) for name, value in values.items()}
        means = mean_over_ranks(parts)
        self.log_dict({f"train/{name}": value for name, value in means.items()})


class KeepWordsRewardModule(KeepWordsModule, RewardModule):
    """Rewards what a language model writes of images, and keeps its words as KeepWordsModule does.

    The weight of the objective ``text`` is one within the joint loss: ``lm_weight`` multiplies it.

    Args:
        joint: the arguments of RewardModule, with ``lora`` and its ``new_rows``.
    """
