"""Training the level of meaning: finite scalar quantization of a trained projection of features.

k-means needs no training (``multimodal tokenizer meaning``) and is the usual way. This one learns
which directions of the features the codes keep: those from which a small network can rebuild all.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from multimodal.data.images import Fit
from multimodal.files import atomic_folder, write_json
from multimodal.hub.names import part_of
from multimodal.tokenizers.encoder import Encoder
from multimodal.tokenizers.image import ImageTokenizer, load_image_tokenizer
from multimodal.tokenizers.meaning import Meaning, MeaningConfig, round_to_half
from multimodal.tokenizers.quantizers.quantizer import CodebookUsage, distributed
from multimodal.train.examples import Examples
from multimodal.train.optim import MuonModule
from multimodal.train.run.progress import in_bar

REPORT = "report.json"


class MeaningModule(MuonModule):
    """Trains the projection of a frozen encoder's features, and a network that rebuilds them.

    The loss is the share of the variance of the features that is lost, as in the report of
    ``multimodal tokenizer meaning``. The projection starts as the principal components of the first
    batch. The network that rebuilds is not exported.

    Shapes: B images, h w the grid, D features, C channels, G groups.

    Args:
        encoder: timm:MODEL, open_clip:MODEL or with =FILE, as in ``multimodal tokenizer meaning``.
        stages: feature maps of the encoder, side by side. By default its final features.
        image_size: pixels of a side. By default that of the weights.
        fit: how other images are made square.
        grid: positions per side. By default the encoder's.
        groups: G, codes at each position.
        levels: how many values each channel of a group has. Their product is the codebook size.
        width: of the network that rebuilds the features.
        half: round the encoder's weights to half precision: a folder of half the size.
        learning_rate, weight_decay, warmup_steps: Muon's. Linear warm-up, cosine to zero.
    """

    best_by = "val/variance_lost:min"
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        encoder: str,
        stages: tuple[int, ...] = (),
        image_size: int = 0,
        fit: Fit = "squash",
        grid: int = 0,
        groups: int = 2,
        levels: tuple[int, ...] = (8, 5, 5, 5),
        width: int = 512,
        half: bool = False,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 20,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_steps)
        network = Encoder(encoder, stages)
        if half:
            round_to_half(network)
        size = image_size or network.image_size
        config = MeaningConfig(
            encoder=network.name,
            stages=stages,
            image_size=size,
            fit=fit,
            grid=grid or network.grid(size),
            groups=groups,
            form="fsq",
            fsq_levels=levels,
        )
        self.meaning = Meaning(config, network)
        features = network.channels
        self.projection = nn.Linear(features, config.channels)
        self.rebuild = nn.Sequential(
            nn.Linear(config.channels, width), nn.GELU(), nn.Linear(width, features)
        )
        # Mean and standard deviation of the features of the first batch. 0: there was none yet.
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.zeros(()))
        self.new_projection = True
        self.has_started = False  # what the scale says, once it is set: no step waits for a GPU
        self.usage = self._usage()

    @property
    def preprocessing(self) -> tuple[int, Fit]:
        return self.meaning.config.image_size, self.meaning.config.fit

    @property
    def expected_codes(self) -> None:
        """None: it needs pixels."""

    @property
    def heads(self) -> list[nn.Module]:
        return [self.rebuild]

    def _usage(self) -> list[CodebookUsage]:
        config = self.meaning.config
        return [CodebookUsage(config.codebook_size) for _ in range(config.groups)]

    @torch.no_grad()
    def _start(self, features: Tensor | None) -> None:
        """Measure the features of the first rank, or wait for its next batch if it has none.

        A new projection becomes that onto their principal components. Each component gets a
        standard deviation of 1.
        """
        if not self.scale:
            if features is not None:
                self._measure(features.float().flatten(0, -2))
            if distributed():
                for tensor in (*self.projection.parameters(), self.mean, self.scale):
                    dist.broadcast(tensor, 0)
        self.has_started = bool(self.scale)

    def _measure(self, flat: Tensor) -> None:
        config = self.meaning.config
        mean = flat.mean(0)
        self.mean.copy_(mean)
        self.scale.copy_((flat - mean).square().mean().sqrt().clamp(min=1e-6))
        if self.new_projection:
            count = config.channels
            if len(flat) < count:
                raise ValueError(f"{len(flat)} positions in a batch: {count} channels need as many")
            _, strengths, directions = torch.linalg.svd(flat - mean, full_matrices=False)
            deviations = strengths[:count].clamp(min=1e-6) / max(1, len(flat) - 1) ** 0.5
            # Dealt to the groups, so that each gets strong and weak components.
            order = torch.arange(count).view(-1, config.groups).T.flatten()
            weight = (directions[:count] / deviations[:, None])[order]
            self.projection.weight.copy_(weight)
            self.projection.bias.copy_(-(weight @ mean))

    def step(self, batch: Examples) -> tuple[Tensor, Tensor]:
        """The share of the variance that is lost, float32[], and codes: int64[I, h, w, G].

        Without images, or before the first rank had any, nothing is lost and there are no codes.
        """
        features = self.meaning.features(batch.pixels()) if len(batch.images) else None
        if not self.has_started:
            self._start(features)
        if features is None or not self.has_started:  # other ranks wait for its gradients
            zero = self.mean.new_zeros(())
            lost = zero + sum(0 * p.sum() for p in self.parameters() if p.requires_grad)
            return lost, zero.new_zeros(0, 1, 1, self.meaning.config.groups, dtype=torch.int64)
        fsq = self.meaning.fsq
        assert fsq is not None, "its form is fsq"
        parts = self.projection(features).chunk(self.meaning.config.groups, -1)
        quantized = [fsq(part) for part in parts]
        rebuilt = self.rebuild(torch.cat([group.vectors for group in quantized], -1))
        lost = F.mse_loss(rebuilt.float(), (features.float() - self.mean) / self.scale)
        return lost, torch.stack([group.codes for group in quantized], -1)

    def training_step(self, batch: Examples, batch_idx: int) -> Tensor:
        lost, codes = self.step(batch)
        self.tokens = codes.numel()
        if len(codes):
            self.log(
                "train/variance_lost",
                lost.detach(),
                prog_bar=in_bar(self.trainer),
                batch_size=len(codes),
            )
        return lost

    def on_validation_epoch_start(self) -> None:
        self.usage = self._usage()

    def validation_step(self, batch: Examples, batch_idx: int) -> None:
        lost, codes = self.step(batch)
        self.log("val/variance_lost", lost, batch_size=len(codes), sync_dist=True)
        for group, usage in enumerate(self.usage):
            usage.update(codes[..., group])

    def on_validation_epoch_end(self) -> None:
        for group, usage in enumerate(self.usage):
            usage.add_other_ranks(self.device)
            self.log(f"val/codebook_used/{group}", usage.used)
            self.log(f"val/codebook_perplexity/{group}", usage.perplexity)
            if message := usage.collapse_warning():
                rank_zero_warn(f"group {group}: {message}")

    def init_from(self, folder: str) -> None:
        """Start from the projection of a level of meaning of the same configuration.

        Raises:
            ValueError: if the folder has another configuration.
        """
        source = load_image_tokenizer(part_of(folder, "image_tokenizer")).meaning
        if source is None or source.config != self.meaning.config:
            raise ValueError(f"{folder}: has no level of meaning like that of this run")
        with torch.no_grad():
            self.projection.weight.copy_(source.components.T)
            self.projection.bias.copy_(-(source.center @ source.components))
        self.new_projection = False

    def export(self, folder: str | Path) -> None:
        """Write the tokenizer folder. Only the first rank writes."""
        if not self.writes_files:
            return
        with torch.no_grad():
            weight, bias = self.projection.weight.float().cpu(), self.projection.bias.float().cpu()
            self.meaning.components.copy_(weight.T)
            # The smallest point that the projection maps to 0.
            self.meaning.center.copy_(torch.linalg.lstsq(weight, -bias[:, None]).solution[:, 0])
        metrics = {} if self._trainer is None else self._trainer.callback_metrics
        tokenizer = ImageTokenizer(self.meaning)
        tokenizer.provenance = self.provenance()
        with atomic_folder(Path(folder)) as part:
            tokenizer.save(part)
            (part / "README.md").write_text(self.card("A level of meaning"), "utf-8")
            write_json(part / REPORT, report_of(metrics, self.meaning.config.groups))


def report_of(metrics: dict[str, Any], groups: int) -> dict[str, Any]:
    """What the last validation measured, for JSON. Empty if there was none."""
    if "val/variance_lost" not in metrics:
        return {}
    return {
        "variance_lost": float(metrics["val/variance_lost"]),
        "groups": [
            {
                "used": float(metrics[f"val/codebook_used/{group}"]),
                "perplexity": float(metrics[f"val/codebook_perplexity/{group}"]),
            }
            for group in range(groups)
        ],
    }
