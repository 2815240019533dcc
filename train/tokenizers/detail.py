"""Training the level of detail: reconstruct the pixels, and keep what captions describe."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from multimodal.adapters.folder import AdapterBase
from multimodal.adapters.lora import LoraConfig
from multimodal.data.images import Fit, to_image
from multimodal.eval.metrics.features import RANDOM, Features
from multimodal.files import atomic_folder
from multimodal.hub.names import part_of
from multimodal.provenance import Provenance
from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
from multimodal.tokenizers.image import ImageTokenizer, load_image_tokenizer
from multimodal.tokenizers.meaning import Meaning
from multimodal.tokenizers.quantizers.quantizer import CodebookUsage
from multimodal.tokenizers.text import TextTokenizer
from multimodal.train.adapting import LoraModule
from multimodal.train.examples import Examples
from multimodal.train.optim import can_compile
from multimodal.train.run.folder import log_folder
from multimodal.train.run.progress import in_bar
from multimodal.train.tokenizers.auxiliary_losses import (
    Distillation,
    PatchDiscriminator,
    adaptive_weight,
    adversarial_losses,
    psnr,
)
from multimodal.train.tokenizers.semantic import (
    CaptionTargets,
    SemanticLoss,
    known_texts,
    texts_about,
)

PIXELS = ("mse", "l1", "perceptual")
BatchNorm = nn.modules.batchnorm._BatchNorm
USAGE_EVERY = 100  # training steps between two logs of the codebook usage, at least


class DetailModule(LoraModule):
    """Trains an autoencoder of pixels: codes and decoder, or a decoder that reads meaning too.

    Args:
        tokenizer: the autoencoder and its quantizer.
        meaning: folder of a level of meaning, of an image tokenizer or of a model. The decoder
            reads this level beside the codes, and both levels are exported. Its encoder is frozen
            and reads every crop, so images are loaded at its size. Only with decoder_only: the
            codes do not depend on it.
        text_tokenizer: file of a trained text tokenizer, for the semantic loss.
        semantic_weight: of the semantic loss (train/tokenizers/semantic.py). 0 leaves it out.
        teacher_weight: of the loss that predicts features of a frozen network from the codes
            (train/tokenizers/auxiliary_losses.py). 0 leaves it out.
        teacher: the frozen network: timm:MODEL or timm:MODEL=FILE.
        decoder_only: keep the codes as they are (with --init_from) and train the decoder only, at a
            third of the cost. A model that was trained on these codes can use the new decoder.
        mse_weight: of the squared errors. The absolute errors have weight 1. Squared errors help
            at the start. But for edges that the codes leave open, they give a blur, and absolute
            errors give an edge. So use 0 with decoder_only.
        perceptual_weight: of the distance between features of a frozen network. 0 leaves it out.
        perceptual_features: the frozen network: ``random``, timm:MODEL or timm:MODEL=FILE
            (multimodal/eval/metrics/features.py).
        perceptual_stages: which of its feature maps are compared. By default all: from textures
            (0) to objects (-1).
        discriminator_weight: of the loss that fools the discriminator, on top of VQGAN's adaptive
            weight. At 1 its gradient at the last layer is as large as that of the pixel losses.
        discriminator_start: first step with a discriminator. The codes should be stable by then.
        learning_rate: of Muon, at the end of the warm-up.
        weight_decay: of Muon.
        warmup_steps: steps of the linear warm-up. A cosine to zero follows.
        compile: use torch.compile. On a CPU it needs a C++ compiler.
        lora: train an adapter for the tokenizer of ``--init_from``, of its decoder alone with
            decoder_only. The codebook stays.

    Raises:
        ValueError: for weights below 0, a loss without its text tokenizer or teacher, or an adapter
            with a discriminator, which is balanced at the last layer's own weights.
    """

    def __init__(
        self,
        tokenizer: VQTokenizerConfig,
        meaning: str | None = None,
        text_tokenizer: str | None = None,
        semantic_weight: float = 0.0,
        teacher_weight: float = 0.0,
        teacher: str = "",
        decoder_only: bool = False,
        mse_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        perceptual_features: str = RANDOM,
        perceptual_stages: list[int] | None = None,
        discriminator_weight: float = 0.0,
        discriminator_start: int = 0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 100,
        compile: bool = False,
        lora: LoraConfig | None = None,
    ) -> None:
        if lora is not None and (discriminator_weight or lora.bits or lora.new_rows):
            raise ValueError("lora of an image tokenizer: no discriminator_weight, bits, new_rows")
        if lora is not None and decoder_only:
            lora = replace(lora, target=lora.target or ("decoder",))
        super().__init__(learning_rate, weight_decay, warmup_steps, lora=lora)
        self.semantic_weight = semantic_weight
        self.meaning: Meaning | None = None
        if meaning:
            place = part_of(meaning, "image_tokenizer")
            self.meaning = load_image_tokenizer(place).meaning
            if self.meaning is None:
                raise ValueError(f"{meaning}: has no level of meaning")
            self.note_source(meaning, self.meaning.fingerprint, Provenance.read(place))
            if not decoder_only:
                raise ValueError("meaning is for the decoder alone: give decoder_only too")
            tokenizer = replace(
                tokenizer,
                meaning_channels=self.meaning.config.vector_channels,
                meaning_fingerprint=self.meaning.fingerprint,
            )
        self.tokenizer = VQTokenizer(tokenizer)
        # In a tuple: as a submodule, all weights would be in every checkpoint twice.
        self._levels = (ImageTokenizer(self.meaning, self.tokenizer),)
        tokenizer_parts = (self.tokenizer.encoder, self.tokenizer.quantizer)
        self.frozen: tuple[nn.Module, ...] = tokenizer_parts if decoder_only else ()
        for part in self.frozen:
            part.requires_grad_(False).eval()
        if lora is not None:  # no adapter has the statistics of batches, and the codebook stays
            norms = (m for m in self.tokenizer.modules() if isinstance(m, BatchNorm))
            self.frozen += (self.tokenizer.quantizer, *norms)
            names = lora.names(self.tokenizer)
            if decoder_only and any(name.startswith("encoder.") for name in names):
                raise ValueError(f"lora.target={lora.target}: decoder_only keeps the encoder")
        self.mse_weight, self.perceptual_weight = mse_weight, perceptual_weight
        self.features: Features | None = None
        if perceptual_weight > 0:
            self.features = Features(perceptual_features, perceptual_stages)
        if min(mse_weight, perceptual_weight, discriminator_weight, discriminator_start) < 0:
            raise ValueError(
                f"mse_weight={mse_weight}, perceptual_weight={perceptual_weight}, "
                f"discriminator_weight={discriminator_weight}, "
                f"discriminator_start={discriminator_start}: expected 0 or more"
            )
        self.discriminator_weight = discriminator_weight
        self.discriminator_start = discriminator_start
        self.discriminator = PatchDiscriminator() if discriminator_weight else None
        self.best_by = "last" if discriminator_weight else self.best_by  # its loss is no measure
        self.semantic: SemanticLoss | None = None
        if semantic_weight and not decoder_only:
            if text_tokenizer is None:
                raise ValueError("semantic_weight needs text_tokenizer: the file of a trained BPE")
            words = TextTokenizer.load(part_of(text_tokenizer, "text_tokenizer.json"))
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
        self.train_usage = CodebookUsage(self.tokenizer.codebook_size)

    def train(self, mode: bool = True) -> "DetailModule":
        super().train(mode)
        for part in self.frozen:  # in training mode, batch statistics would change the codes
            part.eval()
        return self

    @property
    def adapted(self) -> nn.Module:
        return self.tokenizer

    @property
    def levels(self) -> ImageTokenizer:
        """The image tokenizer that is exported. It shares the weights of this module."""
        return self._levels[0]

    @property
    def preprocessing(self) -> tuple[int, Fit]:
        return self.levels.image_size, self.levels.fit

    @property
    def check_sample(self) -> Callable[[str, dict[str, Any]], object] | None:
        """Raises ``ValueError`` for a sample that it cannot learn from."""
        return texts_about if self.semantic is not None else None

    @property
    def expected_codes(self) -> None:
        """None: it needs pixels."""

    @property
    def no_weight_decay(self) -> list[nn.Module]:
        return [self.tokenizer.quantizer]

    @property
    def heads(self) -> list[nn.Module]:
        heads = (self.semantic, self.distillation, self.discriminator)
        return [*super().heads, *(head for head in heads if head is not None)]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.semantic is None or self.trainer.ckpt_path:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        samples = chain.from_iterable(data.shards(data.train_split))
        self.semantic.count(text for sample in samples for text in known_texts(sample))

    def losses(
        self,
        images: Tensor,
        targets: CaptionTargets | None,
        adversarial: bool,
        meaning: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """All losses by name. Only those of the quantizer are weighted already.

        Args:
            images: float[B, 3, H, W] in [-1, 1].
            targets: of the semantic loss.
            adversarial: whether to compute the losses of the discriminator.
            meaning: float[B, h, w, C] if the decoder reads it.

        Returns:
            The losses by name, float32[] each, and the codes, int64[B, h, w].
        """
        reconstruction, quantized = self.tokenizer(images, meaning)
        reconstruction = reconstruction.float()
        parts = {"mse": F.mse_loss(reconstruction, images), "l1": F.l1_loss(reconstruction, images)}
        if self.features is not None:
            parts["perceptual"] = self.features.distance(reconstruction, images).mean()
        parts |= quantized.losses
        if self.semantic is not None and targets is not None:
            parts |= self.semantic(quantized.vectors, targets)
        if self.distillation is not None:
            parts["teacher"] = self.distillation(quantized.vectors, images)
        if self.discriminator is not None and adversarial:
            parts |= adversarial_losses(self.discriminator, images, reconstruction)
        return parts, quantized.codes

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The weighted sum of all losses.

        One backward pass serves both sides: ``fool`` has a gradient for the tokenizer only,
        ``tell`` for the discriminator only.
        """
        weights = {"mse": self.mse_weight, "perceptual": self.perceptual_weight, "fool": 0.0}
        weights["teacher"] = self.teacher_weight
        weights |= dict.fromkeys(("words", "context"), self.semantic_weight)
        total = parts["mse"].new_zeros(())
        for name, loss in parts.items():
            if weight := weights.get(name, 1.0):
                total = total + weight * loss
        if "fool" in parts:
            pixels = sum(parts[n] * weights.get(n, 1.0) for n in PIXELS if n in parts)
            last = self.tokenizer.decoder.last_layer
            adaptive = adaptive_weight(torch.as_tensor(pixels), parts["fool"], last)
            total = total + self.discriminator_weight * adaptive * parts["fool"]
        elif self.discriminator is not None:
            # Before discriminator_start. With several ranks each weight needs a gradient.
            total = total + sum(0 * weight.sum() for weight in self.discriminator.parameters())
        return total

    def step(self, batch: Examples) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and all losses and the codes by name."""
        targets = None
        if not len(batch.images):
            # Documents without images. Other ranks wait for its gradients and its codes.
            quantizer, zero = self.tokenizer.quantizer, torch.zeros((), device=self.device)
            total = zero + sum(0 * p.sum() for p in self.parameters() if p.requires_grad)
            return total, {"codes": quantizer(zero.new_zeros(0, 1, 1, quantizer.channels)).codes}
        if self.semantic is not None:
            rows = [row for row, count in enumerate(batch.image_counts) for _ in range(count)]
            targets = self.semantic.targets(
                [batch.keys[row] for row in rows],
                [batch.records[row] for row in rows],
                [batch.seeds[row] for row in rows],
            )
        adversarial = self.global_step >= self.discriminator_start
        levels, pixels = self.levels, batch.pixels()
        images, meaning = levels.detail_images(pixels), levels.meaning_vectors(pixels)
        parts, codes = self.compiled(images, targets, adversarial, meaning)
        total = self.total(parts)
        return total, {**parts, "total": total, "codes": codes}

    def training_step(self, batch: Examples, batch_idx: int) -> Tensor:
        total, parts = self.step(batch)
        self.tokens = parts["codes"].numel()
        self.train_usage.update(parts.pop("codes"))
        if parts:
            logged = {f"train/{name}": loss.detach() for name, loss in parts.items()}
            self.log_dict(logged, batch_size=len(batch.images))
            self.log("psnr", psnr(logged["train/mse"]), prog_bar=in_bar(self.trainer), logger=False)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.is_logged and (self.global_step + 1) % USAGE_EVERY < every:
            self._log_usage("train", self.train_usage)
            if self.train_usage.has_enough_codes:
                if message := self.train_usage.collapse_warning():
                    rank_zero_warn(f"step {self.global_step}: {message}")
                self.train_usage = CodebookUsage(self.tokenizer.codebook_size)
        return total

    def on_validation_epoch_start(self) -> None:
        self.val_usage = CodebookUsage(self.tokenizer.codebook_size)

    def validation_step(self, batch: Examples, batch_idx: int) -> None:
        count = len(batch.images)
        if not count:  # all ranks must log the same names in one order: here with weight 0
            blank = batch.images.new_zeros(1, *batch.images.shape[1:])
            batch = Examples([""], blank, [{"content": [{"image": ""}]}], [0], [0], [[]], [True])
        _, parts = self.step(batch)
        self.val_usage.update(parts.pop("codes")[:count])
        logged = {f"val/{k}": v for k, v in {**parts, "psnr": psnr(parts["mse"])}.items()}
        self.log_dict(logged, batch_size=count, sync_dist=True)
        if batch_idx == 0 and count:
            self._log_pictures(batch)

    def on_validation_epoch_end(self) -> None:
        self.val_usage.add_other_ranks(self.device)
        self._log_usage("val", self.val_usage)

    def _log_usage(self, stage: str, usage: CodebookUsage) -> None:
        # Of USAGE_EVERY training batches (more for a large codebook), or of all validation data.
        self.log(f"{stage}/codebook_used", usage.used)
        self.log(f"{stage}/codebook_perplexity", usage.perplexity)
        self.log(f"{stage}/codebook_dead", float((usage.counts == 0).sum()))

    def _log_pictures(self, batch: Examples) -> None:
        """Log 8 fixed validation images above their reconstructions, to TensorBoard and a file."""
        from torchvision.utils import make_grid

        levels, pixels = self.levels, batch.pixels()[:8]
        images = levels.detail_images(pixels)
        pair = torch.cat([images, levels.decode(levels.encode(pixels))])
        grid = make_grid(pair.float(), nrow=len(images))
        for logger in (each for each in self.loggers if isinstance(each, TensorBoardLogger)):
            logger.experiment.add_image("val/images", grid / 2 + 0.5, self.global_step)
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = log_folder(self.trainer) / "pictures"
            folder.mkdir(parents=True, exist_ok=True)
            to_image(grid).save(folder / f"step-{self.global_step:06d}.png")

    def predict_step(self, batch: Examples, batch_idx: int) -> list[dict[str, Any]]:
        images = self.levels.detail_images(batch.pixels())
        codes = torch.split(self.tokenizer.encode(images), batch.image_counts)
        return [
            {"key": key, "codes": (images if document else images[0]).tolist()}
            for key, images, document in zip(batch.keys, codes, batch.documents, strict=True)
        ]

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def init_from(self, folder: str) -> None:
        """Start from the weights of a tokenizer folder.

        The folder has no heads of losses, so these start untrained. If it has no meaning and this
        run has, the decoder learns to read it.

        Raises:
            ValueError: if the folder has another configuration, or no level of detail.
        """
        started_from = load_image_tokenizer(part_of(folder, "image_tokenizer"))
        source = started_from.detail
        if source is None:
            raise ValueError(f"{folder}: has no level of detail to start from")
        try:
            self.tokenizer.start_from(source)
            if self.lora is not None and self.tokenizer.fingerprint != source.fingerprint:
                raise ValueError("an adapter (lora) cannot make a decoder read meaning")
        except ValueError as error:
            raise ValueError(
                f"{folder}: its configuration is not that of this run: give the same "
                f"model.init_args.tokenizer: {error}"
            ) from error
        self.base = AdapterBase(folder, source.fingerprint)
        self.note_source(folder, started_from.fingerprint, started_from.provenance)

    def export(self, folder: str | Path) -> None:
        """Write the folder of the tokenizer, without the heads of losses, or of its adapter."""
        if self.writes_files and self.lora is not None:
            self.write_adapter(folder, self.tokenizer.state_dict())
        elif self.writes_files:
            with atomic_folder(Path(folder)) as part:
                levels = self.levels
                levels.provenance = self.provenance()
                levels.save(part)
                (part / "README.md").write_text(self.card("An image tokenizer"), "utf-8")
