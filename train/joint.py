"""Joint pretraining: language modelling, alignment and mask-and-reconstruct in one forward pass."""

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from multimodal.eval.captioning import score_captions
from multimodal.eval.scenes import score_scene_captions
from multimodal.generation import caption_pixels, decode_images, draw_masked
from multimodal.images import Fit, to_image
from multimodal.model import Multimodal, load
from multimodal.objectives import ObjectivesConfig
from multimodal.scenes import Scene
from multimodal.sequences import Packed, pack
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.tokenizers.text import TextTokenizer
from multimodal.train.data import Examples, choose_caption, stable_number
from multimodal.train.schedule import TrainedByAdamW, can_compile


class JointModule(TrainedByAdamW):
    """Args:
    size: a name of the table of sizes (tiny, starter, base, large, 1b, 7b).
    text_tokenizer: file of a trained BPE; image_tokenizer: folder of a trained image tokenizer.
    objectives: weights and shares of the losses.
    row_length: tokens in a packed row; at least the longest sequence.
    learning_rate, weight_decay, warmup_steps: AdamW, linear warm-up, cosine to zero.
    captions_in_validation, drawings_in_validation: how many to write with the real sampler.
    compile: torch.compile of the transformer (needs a C++ compiler on a CPU).
    """

    def __init__(
        self,
        text_tokenizer: str,
        image_tokenizer: str,
        size: str = "starter",
        objectives: ObjectivesConfig = ObjectivesConfig(),  # noqa: B008 (frozen)
        row_length: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        captions_in_validation: int = 200,
        drawings_in_validation: int = 8,
        compile: bool = False,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_steps)
        self.model = Multimodal.new(
            size,
            TextTokenizer.load(text_tokenizer),
            load_image_tokenizer(image_tokenizer),
            objectives,
        )
        self.row_length = row_length
        self.captions_in_validation = captions_in_validation
        self.drawings_in_validation = drawings_in_validation
        if compile and can_compile():
            self.model.transformer.compile()

    @property
    def preprocessing(self) -> tuple[int, Fit]:
        config = self.model.image_tokenizer.config
        return config.image_size, config.fit

    def init_from(self, folder: str) -> None:
        """Start from the weights of a model folder of the same sizes and tokenizers."""
        source = load(folder)
        if source.config.transformer != self.model.config.transformer:
            raise ValueError(f"{folder}: its sizes are not those of this run")
        if source.image_tokenizer.fingerprint != self.model.image_tokenizer.fingerprint:
            raise ValueError(f"{folder}: its image tokenizer is not the one of this run")
        if source.text_tokenizer.to_json() != self.model.text_tokenizer.to_json():
            raise ValueError(f"{folder}: its text tokenizer is not the one of this run")
        self.model.load_state_dict(source.state_dict())

    def pack(self, batch: Examples) -> tuple[Packed, Tensor, Tensor]:
        """The rows of a batch, and what tells equal images and equal captions apart from others.

        Returns the rows, image_ids: int64[B], and text_ids: int64[B], -1 where the text is dropped.
        """
        codes = rearrange(self.model.image_tokenizer.encode(batch.pixels()), "b h w -> b (h w)")
        samples = zip(batch.keys, batch.records, batch.seeds, strict=True)
        texts = [choose_caption(*sample) for sample in samples]
        sequences = self.model.pair_sequences(codes, texts, batch.seeds)
        packed = pack(sequences, self.row_length, self.model.vocabulary.pad, row_multiple=4)
        image_ids = torch.tensor([stable_number(key) for key in batch.keys])
        null = self.model.vocabulary.null
        text_ids = torch.tensor([
            -1 if sequence.ids[1] == null else stable_number(text)
            for sequence, text in zip(sequences[len(texts) :], texts, strict=True)
        ])  # fmt: skip
        self.tokens = int((packed.documents > 0).sum())
        return packed.to(self.device), image_ids.to(self.device), text_ids.to(self.device)

    def step(self, batch: Examples, stage: str) -> Tensor:
        packed, image_ids, text_ids = self.pack(batch)
        total, parts = self.model(packed, image_ids, text_ids)
        parts["packing"] = torch.tensor(packed.efficiency)
        self.log_dict(
            {f"{stage}/{name}": value.detach() for name, value in parts.items()},
            batch_size=len(batch),
            sync_dist=stage == "val",
        )
        loss: Tensor = total
        return loss

    def training_step(self, batch: Examples, batch_idx: int) -> Tensor:
        loss = self.step(batch, "train")
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    # --- validation ---------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.captions: dict[str, str] = {}
        self.references: dict[str, list[str]] = {}
        self.scenes: dict[str, Scene] = {}
        self.prompts: list[str] = []

    def validation_step(self, batch: Examples, batch_idx: int) -> None:
        self.step(batch, "val")
        wanted = self.captions_in_validation - len(self.captions)
        if wanted > 0:
            found = caption_pixels(self.model, batch.pixels()[:wanted])
            self.captions |= dict(zip(batch.keys, found, strict=False))
            for key, record in zip(batch.keys[:wanted], batch.records, strict=False):
                self.references[key] = record.get("captions", [])
                if "scene" in record:
                    self.scenes[key] = Scene.from_json(record["scene"])
        if len(self.prompts) < self.drawings_in_validation:
            firsts = [r["captions"][0] for r in batch.records if r.get("captions")]
            self.prompts = (self.prompts + firsts)[: self.drawings_in_validation]

    def on_validation_epoch_end(self) -> None:
        folder = self._samples_folder()
        step = f"step-{self.global_step:06d}"
        if self.captions:
            self.log("val/CIDEr", score_captions(self.captions, self.references)["CIDEr"])
            if set(self.scenes) == set(self.captions):
                facts = score_scene_captions(self.captions, self.scenes)
                self.log_dict({f"val/scene_{name}": value for name, value in facts.items()})
            lines = [
                f"{key}\t{caption}\t| {' | '.join(self.references[key])}"
                for key, caption in self.captions.items()
            ]
            if folder:
                (folder / f"{step}.txt").write_text("\n".join(lines) + "\n")
        if self.prompts and folder:
            from torchvision.utils import make_grid

            images = decode_images(self.model, draw_masked(self.model, self.prompts))
            to_image(make_grid(images, nrow=4)).save(folder / f"{step}.png")
            (folder / "prompts.txt").write_text("\n".join(self.prompts) + "\n")

    def _samples_folder(self) -> Path | None:
        if not (self.trainer.log_dir and self.trainer.is_global_zero):
            return None
        folder = Path(self.trainer.log_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def predict_step(self, batch: Examples, batch_idx: int) -> list[dict[str, str]]:
        captions = caption_pixels(self.model, batch.pixels())
        return [{"key": k, "caption": c} for k, c in zip(batch.keys, captions, strict=True)]

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def export(self, folder: str) -> None:
        self.model.save(folder)
