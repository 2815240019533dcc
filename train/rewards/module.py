"""Reward training: the network writes captions, and those become likelier that were rewarded more.

Self-critical sequence training (Rennie et al. 2017, arXiv:1612.00563). A caption is compared with
the mean of the others of its image, or with the greedy caption. The joint loss goes on beside it,
so that answers, search and drawings are not forgotten.

Shapes: S images, k captions of each, n codes of an image.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from multimodal.distributed import global_sum, mean_over_ranks
from multimodal.inference.text import generate_ids
from multimodal.model.batches import TrainingBatch, TrainingSample
from multimodal.model.checkpoint import ModelParts
from multimodal.model.lessons import descriptions_of
from multimodal.model.sequences import Ids, describe_prompt
from multimodal.options import TextOptions
from multimodal.train.examples import Examples
from multimodal.train.joint import JointModule
from multimodal.train.rewards.rewards import Reward, WrittenCaption, find_reward
from multimodal.train.sharding import unsharded

Captions = list[list[list[int]]]  # of each image, of each caption: ids


class RewardModule(JointModule):
    """Rewards the captions that the network writes about images with captions.

    Start it from a model that captions already (``--init_from``). In each step it writes captions,
    without dropout. Their tokens are branches beside the captions of the data, so an image is read
    once for all. Advantages count in standard deviations, so that rewards may have any scale.

    Args:
        reward: ``cider`` (CIDEr-D, with the end of the caption as a word), ``alignment`` (the
            cosine of the model's own embeddings), or ``FILE.py:FUNCTION``, a function
            (captions: list[str], records: list[dict]) -> list[float]. A caption without an end is
            an empty one for the last two.
        captions_written: of each image in each step.
        temperature: at which they are written. Below 1 they are nearer to the greedy captions. A
            model that was trained with label smoothing writes a wrong word often at 1.
        baseline: what a caption is compared with, the ``others`` of its image or the ``greedy``
            one.
        lm_weight: of the joint loss, that of JointModule.
        max_tokens: of a written caption, with its end.
        joint: the arguments of JointModule.
    """

    def __init__(
        self,
        reward: str = "cider",
        captions_written: int = 5,
        temperature: float = 1.0,
        baseline: Literal["others", "greedy"] = "others",
        lm_weight: float = 0.2,
        max_tokens: int = 24,
        **joint: Any,
    ) -> None:
        super().__init__(**joint)
        least = 2 if baseline == "others" else 1
        if captions_written < least or temperature <= 0 or lm_weight < 0 or max_tokens < 2:
            raise ValueError(
                f"captions_written={captions_written}, temperature={temperature}, lm_weight="
                f"{lm_weight}, max_tokens={max_tokens}: expected at least {least}, more than 0, at "
                "least 0 and 2"
            )
        needed = 2 + len(self.builder.read) + captions_written * max_tokens
        if self.builder.row_length < needed:
            raise ValueError(
                f"row_length={self.builder.row_length}: an image of {len(self.builder.read)} codes "
                f"and {captions_written} captions of {max_tokens} tokens need {needed}, and a "
                "caption of the data some more"
            )
        self.reward_name, self.captions_written = reward, captions_written
        self.baseline, self.lm_weight = baseline, lm_weight
        self.sampling = TextOptions(temperature=temperature, max_tokens=max_tokens)
        self.greedy = TextOptions(max_tokens=max_tokens)
        self.reward: Reward | None = None
        # The joint loss may rise while rewards do. Of other rewards no validation knows.
        self.best_by = "val/CIDEr:max" if reward == "cider" else "last"

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.reward = find_reward(self.reward_name, self.model, data.shards(data.train_split))

    def build(self, batch: Examples) -> TrainingBatch:
        if not self.training:
            return super().build(batch)
        samples = self.write(self.samples(batch))
        return self.builder.build(
            samples, joint_weight=self.lm_weight, temperature=self.sampling.temperature
        )

    def write(self, samples: Sequence[TrainingSample]) -> list[TrainingSample]:
        """The samples with captions that the network wrote, and their advantages."""
        described = [s for s in samples if not s.document and descriptions_of(s.record)]
        seeds = [sample.seed for sample in described]
        codes = [sample.codes[0][self.builder.read] for sample in described]
        greedy = None
        self.network.eval()
        try:
            with unsharded(self.network):
                captions = write_captions(
                    self.model, codes, seeds, self.captions_written, self.sampling
                )
                rewards = self.judge(described, captions)
                if self.baseline == "greedy" or self.is_logged:
                    single = write_captions(self.model, codes, seeds, 1, self.greedy)
                    greedy = self.judge(described, single)
        finally:
            self.network.train()
        self._log_written(captions, rewards, greedy)
        advantages = advantages_of(rewards, greedy if self.baseline == "greedy" else None)
        scaled: list[list[float]] = in_standard_deviations(advantages).tolist()
        written = {
            id(sample): list(zip(texts, values, strict=True))
            for sample, texts, values in zip(described, captions, scaled, strict=True)
        }
        return [replace(sample, written=written.get(id(sample), ())) for sample in samples]

    def judge(self, samples: Sequence[TrainingSample], captions: Captions) -> Tensor:
        """float32[S, k]: the rewards of captions."""
        assert self.reward is not None, "on_fit_start finds it"
        if not samples:
            return torch.zeros(0, self.captions_written, device=self.device)
        decode, eos = self.model.text_tokenizer.decode, self.network.vocabulary.eos
        written = [
            WrittenCaption(
                decode([token for token in ids if token != eos]).strip(),
                ids[-1] == eos,
                sample.record,
                sample.codes[0],
                sample.source,
            )
            for sample, texts in zip(samples, captions, strict=True)
            for ids in texts
        ]
        rewards = torch.tensor(list(self.reward(written)), dtype=torch.float32, device=self.device)
        return rewards.view(len(samples), -1)

    def _log_written(self, captions: Captions, rewards: Tensor, greedy: Tensor | None) -> None:
        texts = [tuple(ids) for each in captions for ids in each]
        count, eos = max(1, len(texts)), self.network.vocabulary.eos
        values = {
            "reward": float(rewards.sum()) / count,
            "written_tokens": sum(map(len, texts)) / count,
            "written_distinct": len(set(texts)) / count,
            "written_unended": sum(text[-1] != eos for text in texts) / count,
        }
        if greedy is not None:
            values["reward_greedy"] = float(greedy.sum()) / max(1, len(greedy))
        parts = {name: torch.tensor(value, device=self.device) for name, value in values.items()}
        means = mean_over_ranks(parts)
        self.log_dict({f"train/{name}": value for name, value in means.items()})


def write_captions(
    model: ModelParts, codes: Sequence[Ids], seeds: Sequence[int], count: int, options: TextOptions
) -> Captions:
    """Write captions of each image: ids with <eos>, if it came within ``max_tokens`` tokens.

    Args:
        codes: of S images those that are read, int64[n] each.
        seeds: S numbers. The random numbers of an image's captions depend on its seed.
        count: k.
    """
    if not len(codes):
        return []
    prompts = [describe_prompt(model.vocabulary, image) for image in codes for _ in range(count)]
    numbers = [seed * count + number for seed in seeds for number in range(count)]
    texts = generate_ids(model, prompts, options, numbers)
    end = [model.vocabulary.eos]
    texts = [ids + end if len(ids) < options.max_tokens else ids for ids in texts]
    return [texts[start : start + count] for start in range(0, len(texts), count)]


def advantages_of(rewards: Tensor, greedy: Tensor | None) -> Tensor:
    """How much better each caption is than expected: float32[S, k] -> float32[S, k].

    Args:
        greedy: float32[S, 1], the reward of the greedy captions. None: the mean of the k - 1 others
            of the image. Both are independent of the caption, so neither biases the gradient.
    """
    if greedy is not None:
        return rewards - greedy
    others = rewards.sum(1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[1] - 1)


def in_standard_deviations(advantages: Tensor) -> Tensor:
    """Advantages over their root mean square on all ranks, which may be 0: float32[S, k]."""
    count = torch.tensor(float(advantages.numel()), device=advantages.device)
    squares, total = global_sum(torch.stack([advantages.square().sum(), count]))
    return advantages / (squares / total.clamp(min=1)).sqrt().clamp(min=1e-6)
