"""Training an image tokenizer: reconstruct the pixels, and keep what captions speak of."""

from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from multimodal.data.images import Fit, to_image
from multimodal.eval.metrics.features import RANDOM, Features
from multimodal.model.checkpoint import written_beside
from multimodal.tokenizers.image import (
    ImageTokenizerConfig,
    VQTokenizer,
    load_image_tokenizer,
)
from multimodal.tokenizers.quantizer import CodebookUsage
from multimodal.tokenizers.text import TextTokenizer
from multimodal.train.auxiliary_losses import (
    Distillation,
    PatchDiscriminator,
    adversarial_losses,
)
from multimodal.train.examples import Examples
from multimodal.train.lessons import texts_about
from multimodal.train.optim import MuonModule, can_compile
from multimodal.train.semantic import CaptionTargets, SemanticLoss

PIXELS = ("mse", "l1", "perceptual")
USE_EVERY = 100  # training steps after which the use of the codebook is logged


class ImageTokenizerModule(MuonModule):
    """Args:
    tokenizer: the autoencoder and its quantizer.
    text_tokenizer: file of a trained text tokenizer, for the semantic loss.
    semantic_weight: of the semantic loss; 0 trains on pixels alone.
    teacher_weight, teacher: of codes that tell the features of a frozen network
        (train/auxiliary_losses.py): timm:MODEL or timm:MODEL=FILE.
    decoder_only: leave the codes as they are (with --init_from) and go on with the decoder alone,
        at a third of the cost; a model that was trained on these codes can take the result.
    mse_weight: of the squared errors beside the absolute ones. Squares get a decoder going; but
        where codes leave an edge open, the least squares are a blur, the least absolute errors an
        edge. So 0 for decoder_only.
    perceptual_weight, perceptual_features: of the distance between features of a frozen network
        (multimodal/eval/metrics/features.py): ``random``, timm:MODEL or timm:MODEL=FILE.
    discriminator_weight: of fooling a discriminator of patches, against VQGAN's adaptive weight: at
        1 its gradient at the last layer is as large as that of the pixels.
    discriminator_start: step from which on there is a discriminator; codes should stand by then.
    learning_rate, weight_decay, warmup_steps: Muon's; linear warm-up, then a cosine to zero.
    compile: torch.compile (needs a C++ compiler on a CPU).
    """

    def __init__(
        self,
        tokenizer: ImageTokenizerConfig,
        text_tokenizer: str | None = None,
        semantic_weight: float = 0.0,
        teacher_weight: float = 0.0,
        teacher: str = "",
        decoder_only: bool = False,
        mse_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        perceptual_features: str = RANDOM,
        discriminator_weight: float = 0.0,
        discriminator_start: int = 0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 100,
        compile: bool = False,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_steps)
        self.semantic_weight = semantic_weight
        self.tokenizer = VQTokenizer(tokenizer)
        tokenizer_parts = (self.tokenizer.encoder, self.tokenizer.quantizer)
        self.frozen = tokenizer_parts if decoder_only else ()
        for part in self.frozen:
            part.requires_grad_(False).eval()
        self.mse_weight = mse_weight
        self.perceptual_weight = perceptual_weight
        self.features = Features(perceptual_features) if perceptual_weight else None
        if min(mse_weight, perceptual_weight, discriminator_weight, discriminator_start) < 0:
            raise ValueError(
                f"mse_weight={mse_weight}, perceptual_weight={perceptual_weight}, "
                f"discriminator_weight={discriminator_weight}, "
                f"discriminator_start={discriminator_start}: expected 0 or more"
            )
        self.discriminator_weight = discriminator_weight
        self.discriminator_start = discriminator_start
        self.discriminator = PatchDiscriminator() if discriminator_weight else None
        self.semantic: SemanticLoss | None = None
        if semantic_weight and not decoder_only:
            if text_tokenizer is None:
                raise ValueError("semantic_weight needs text_tokenizer: the file of a trained BPE")
            words = TextTokenizer.load(text_tokenizer)
            self.semantic = SemanticLoss(words, self.tokenizer.quantizer.channels)
        if teacher_weight < 0 or (teacher_weight and not teacher):
            raise ValueError(f"teacher_weight={teacher_weight} needs teacher: timm:MODEL[=FILE]")
        self.teacher_weight = teacher_weight
        self.distillation: Distillation | None = None
        if teacher_weight and not decoder_only:
            self.distillation = Distillation(teacher, self.tokenizer.quantizer.channels)
        self.compiled = self.losses
        if compile and can_compile():
            self.compiled = torch.compile(self.losses)
        self.train_use = CodebookUsage(self.tokenizer.codebook_size)
        self.val_use = CodebookUsage(self.tokenizer.codebook_size)

    def train(self, mode: bool = True) -> "ImageTokenizerModule":
        super().train(mode)
        for part in self.frozen:  # the statistics of batches would move the codes too
            part.eval()
        return self

    @property
    def preprocessing(self) -> tuple[int, Fit]:
        return self.tokenizer.config.image_size, self.tokenizer.config.fit

    @property
    def expected_codes(self) -> None:
        """It reads pixels."""

    @property
    def no_weight_decay(self) -> list[nn.Module]:
        return [self.tokenizer.quantizer]

    @property
    def heads(self) -> list[nn.Module]:
        heads = (self.semantic, self.distillation, self.discriminator)
        return [head for head in heads if head is not None]

    def on_fit_start(self) -> None:
        if self.semantic is None or self.trainer.ckpt_path:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        samples = chain.from_iterable(data.shards(data.train_split))
        self.semantic.count(
            text for sample in samples for text in texts_about(sample.key, sample.record)
        )

    def losses(
        self, images: Tensor, words: CaptionTargets | None, adversarial: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Every loss by its name, and the codes; adversarial: by the discriminator, too."""
        reconstruction, quantized = self.tokenizer(images)
        reconstruction = reconstruction.float()
        parts = {"mse": F.mse_loss(reconstruction, images)}
        parts["l1"] = F.l1_loss(reconstruction, images)
        if self.features is not None:
            parts["perceptual"] = self.features.distance(reconstruction, images).mean()
        parts |= quantized.losses
        if self.semantic is not None and words is not None:
            parts |= self.semantic(quantized.vectors, words)
        if self.distillation is not None:
            parts["teacher"] = self.distillation(quantized.vectors, images)
        if self.discriminator is not None and adversarial:
            parts |= adversarial_losses(self.discriminator, images, reconstruction)
        return parts, quantized.codes

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The weighted sum; one backward for all, as each loss moves its own side only."""
        weights = {"mse": self.mse_weight, "perceptual": self.perceptual_weight}
        weights["teacher"] = self.teacher_weight
        weights["fool"] = 0.0
        weights |= dict.fromkeys(("words", "context"), self.semantic_weight)
        total = torch.zeros(()).to(parts["mse"])
        for name, loss in parts.items():
            if weight := weights.get(name, 1.0):
                total = total + weight * loss
        if "fool" in parts:
            pixels = sum(parts[n] * weights.get(n, 1.0) for n in PIXELS if n in parts)
            adaptive = self._adaptive_weight(torch.as_tensor(pixels), parts["fool"])
            total = total + self.discriminator_weight * adaptive * parts["fool"]
        elif self.discriminator is not None:
            # Not judging yet; but where there are ranks, each weight has to get a gradient.
            total = total + sum(0 * weight.sum() for weight in self.discriminator.parameters())
        return total

    def _adaptive_weight(self, pixels: Tensor, fool: Tensor) -> Tensor:
        """How much larger the gradient of the pixels' losses is at the last layer (VQGAN)."""
        if not torch.is_grad_enabled():
            return torch.ones(()).to(fool)
        last = self.tokenizer.decoder.last_layer
        of_pixels, of_fool = (
            torch.linalg.vector_norm(torch.autograd.grad(loss, last, retain_graph=True)[0])
            for loss in (pixels, fool)
        )
        adaptive: Tensor = (of_pixels / (of_fool + 1e-6)).clamp(max=1e4).detach()
        return adaptive

    def step(self, batch: Examples) -> tuple[Tensor, dict[str, Tensor]]:
        words = None
        counts = batch.image_counts
        if not len(batch.images):  # plain texts alone: nothing to learn, and no rank may be missing
            none = torch.zeros((), device=self.device)
            total = none + sum(0 * p.sum() for p in self.parameters() if p.requires_grad)
            return total, {"mse": none, "codes": torch.zeros(0, dtype=torch.int64)}
        if self.semantic is not None:
            of = [row for row, count in enumerate(counts) for _ in range(count)]
            words = self.semantic.targets(
                [batch.keys[row] for row in of],
                [batch.records[row] for row in of],
                [batch.seeds[row] for row in of],
            )
        adversarial = self.global_step >= self.discriminator_start
        parts, codes = self.compiled(batch.pixels(), words, adversarial)
        total = self.total(parts)
        return total, {**parts, "total": total, "codes": codes}

    def training_step(self, batch: Examples, batch_idx: int) -> Tensor:
        total, parts = self.step(batch)
        self.tokens = parts["codes"].numel()
        self.train_use.update(parts.pop("codes"))
        self.log_dict({f"train/{k}": v.detach() for k, v in parts.items()}, batch_size=len(batch))
        self.log("psnr", psnr(parts["mse"].detach()), prog_bar=True, logger=False)
        if (self.global_step + 1) % USE_EVERY == 0:
            self._log_use("train", self.train_use)
            if self.train_use.has_enough_codes:
                if alarm := self.train_use.collapse_warning():
                    rank_zero_warn(f"step {self.global_step}: {alarm}")
                self.train_use = CodebookUsage(self.tokenizer.codebook_size)
        return total

    def on_validation_epoch_start(self) -> None:
        self.val_use = CodebookUsage(self.tokenizer.codebook_size)

    def validation_step(self, batch: Examples, batch_idx: int) -> None:
        _, parts = self.step(batch)
        self.val_use.update(parts.pop("codes"))
        parts["psnr"] = psnr(parts["mse"])
        self.log_dict({f"val/{k}": v for k, v in parts.items()}, batch_size=len(batch))
        if batch_idx == 0:
            self._log_pictures(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_use("val", self.val_use)

    def _log_use(self, stage: str, use: CodebookUsage) -> None:
        # Over USE_EVERY training batches, more for a large codebook, or the whole validation set.
        self.log(f"{stage}/codebook_used", use.used)
        self.log(f"{stage}/codebook_perplexity", use.perplexity)
        self.log(f"{stage}/codebook_dead", float((use.counts == 0).sum()))

    def _log_pictures(self, batch: Examples) -> None:
        """Eight fixed validation images over their reconstructions, to TensorBoard and a file."""
        from torchvision.utils import make_grid

        images = batch.pixels()[:8]
        with torch.no_grad():
            pair = torch.cat([images, self.tokenizer.decode(self.tokenizer.encode(images))])
        grid = make_grid(pair.float(), nrow=len(images))
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("val/images", grid / 2 + 0.5, self.global_step)
        log_dir = self.trainer.log_dir  # once, and on every rank: it is a broadcast
        if log_dir and self.trainer.is_global_zero:
            folder = Path(log_dir) / "pictures"
            folder.mkdir(parents=True, exist_ok=True)
            to_image(grid).save(folder / f"step-{self.global_step:06d}.png")

    def predict_step(self, batch: Examples, batch_idx: int) -> list[dict[str, Any]]:
        codes = torch.split(self.tokenizer.encode(batch.pixels()), batch.image_counts)
        return [
            {"key": key, "codes": (mine if parts else mine[0]).tolist()}
            for key, mine, parts in zip(batch.keys, codes, batch.documents, strict=True)
        ]

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def init_from(self, folder: str) -> None:
        """Start from the weights of a tokenizer folder of the same configuration.

        The head of the semantic loss, which a tokenizer folder does not hold, starts anew.
        """
        source = load_image_tokenizer(folder)
        if source.config != self.tokenizer.config:
            raise ValueError(f"{folder}: its configuration is not the one of this run")
        self.tokenizer.load_state_dict(source.state_dict())

    def export(self, folder: str) -> None:
        """Write what is published: the tokenizer without the head. The first rank does."""
        if self.trainer.is_global_zero:
            with written_beside(Path(folder)) as part:
                self.tokenizer.save(part)


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error on pixels in [-1, 1]."""
    return -10 * torch.log10(mse / 4)
