"""Joint pretraining: language modelling, alignment and mask-and-reconstruct in one forward pass."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.data.images import Fit, to_image
from multimodal.data.seeds import stable_number
from multimodal.distributed import gather_objects, mean_over_ranks
from multimodal.eval.metrics.answering import score_answers
from multimodal.eval.metrics.captioning import score_captions
from multimodal.eval.metrics.scene_captions import score_scene_captions
from multimodal.inference.drawing import decode_images, draw_codes
from multimodal.inference.text import caption_codes, encode_images, text_after
from multimodal.model.attention import Backend
from multimodal.model.checkpoint import load, part_of
from multimodal.model.lessons import descriptions_of, exchanges_of
from multimodal.model.network import Multimodal
from multimodal.model.objectives import ObjectivesConfig
from multimodal.model.sequences import Packed, Sequence, pack
from multimodal.scenes.scene import Scene
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.tokenizers.text import TextTokenizer
from multimodal.train.cost import training_flops
from multimodal.train.examples import Examples
from multimodal.train.lessons import lesson_of
from multimodal.train.optim import MuonModule, can_compile, parameters_named
from multimodal.train.preflight import check_data
from multimodal.train.sharding import fsdp_modules, full_state_dict, shard, unsharded

IMAGES_AT_ONCE = 256
PIECES = 8  # rows of a document that one step reads


def window(pieces: list[Sequence], seed: int) -> list[Sequence]:
    """Of a document of more than PIECES rows, that many in a row, by the seed: others each epoch.

    A book would make a batch of any size."""
    more = len(pieces) - PIECES
    start = int(np.random.default_rng([seed, 3]).integers(more + 1)) if more > 0 else 0
    return pieces[start : start + PIECES]


class JointModule(MuonModule):
    """Args:
    size: a name of the table of sizes (tiny, mini, starter, base, large, 1b, 7b), or the folder of
        a Qwen3 of Hugging Face, to start from its weights; text_tokenizer is that folder, too.
    text_tokenizer: file of a trained BPE; image_tokenizer: folder of a trained image tokenizer;
        either may be a model (its folder, or ``starter``), whose tokenizer is taken.
    objectives: weights and shares of the losses.
    question_share: of the samples with a caption and questions, how many bring questions too.
    row_length: tokens in a packed row; at least the longest sequence.
    learning_rate, weight_decay, warmup_steps: Muon's; linear warm-up, cosine to zero.
    learning_rates: other rates for parts by name; freeze: names of parts that are not trained, such
        as ``model.transformer.layers.0`` or ``*.mlp.*``.
    recompute: keep no activations inside layers, and compute them again for the gradients: a third
        more time for much less memory.
    captions_in_validation, answers_in_validation, drawings_in_validation: how many to make with the
        real sampler.
    compile: torch.compile of the transformer (needs a C++ compiler on a CPU).
    attention: ``sdpa`` anywhere; ``flex`` on a GPU computes only what the mask lets through.
    """

    def __init__(
        self,
        text_tokenizer: str,
        image_tokenizer: str,
        size: str = "starter",
        objectives: ObjectivesConfig = ObjectivesConfig(),  # noqa: B008 (frozen)
        question_share: float = 0.5,
        row_length: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        learning_rates: dict[str, float] | None = None,
        freeze: list[str] | None = None,
        recompute: bool = False,
        captions_in_validation: int = 200,
        answers_in_validation: int = 200,
        drawings_in_validation: int = 8,
        compile: bool = False,
        attention: Backend = "sdpa",
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_steps, learning_rates)
        self.model = Multimodal.new(
            size,
            TextTokenizer.load(part_of(text_tokenizer, "text_tokenizer.json")),
            load_image_tokenizer(part_of(image_tokenizer, "image_tokenizer")),
            objectives,
        )
        self.model.attention_backend = attention
        for name in freeze or ():
            for parameter in parameters_named(self, name):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"freeze={freeze}: nothing is left to train")
        for name in self.learning_rates:
            parameters_named(self, name)  # a wrong name is said now
        self.model.transformer.recompute = recompute
        if not 0 <= question_share <= 1:
            raise ValueError(f"question_share={question_share}: expected 0 to 1")
        self.question_share = question_share
        self.row_length = row_length
        self.captions_in_validation = captions_in_validation
        self.answers_in_validation = answers_in_validation
        self.drawings_in_validation = drawings_in_validation
        if compile and can_compile():
            self.model.transformer.compile()

    def configure_model(self) -> None:
        if self.device_mesh is not None and not fsdp_modules(self.model):  # FSDP2
            shard(self.model, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        if self.model.attention_backend == "flex" and self.device.type != "cuda":
            raise ValueError("attention: flex needs a GPU (CUDA); sdpa runs anywhere")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        shards = data.shards(data.train_split)
        resumed = bool(self.trainer.ckpt_path)
        check_data(self.model, shards, self.row_length, self.question_share, resumed)

    @property
    def preprocessing(self) -> tuple[int, Fit]:
        config = self.model.image_tokenizer.config
        return config.image_size, config.fit

    @property
    def expected_codes(self) -> str:
        """Fingerprint of the codes that it reads."""
        return self.model.image_tokenizer.codes_fingerprint

    def codes(self, batch: Examples) -> Tensor:
        """int64[I, n], of all images of the batch"""
        if batch.codes is not None:
            return batch.codes
        some = torch.split(batch.pixels(), IMAGES_AT_ONCE)  # a document may have any number
        return torch.cat([encode_images(self.model, pixels) for pixels in some])

    def _divided(self, batch: Examples) -> tuple[tuple[Tensor, ...], list[int], Tensor]:
        """The codes of every sample, int64[images, n] each; the rows of those that are no
        documents; and the codes of these, int64[pairs, n]."""
        codes = self.codes(batch)
        images = torch.split(codes, batch.image_counts)
        rows = [row for row, parts in enumerate(batch.documents) if not parts]
        return images, rows, torch.cat([codes[:0], *(images[row] for row in rows)])

    def init_from(self, folder: str) -> None:
        """Start from the weights of a model folder of the same sizes and tokenizers.

        The image decoder may be another one, for the same codes: it stays that of this run.
        """
        source = load(folder)
        if source.config.transformer != self.model.config.transformer:
            raise ValueError(f"{folder}: its sizes are not those of this run")
        mine, its = self.model.image_tokenizer, source.image_tokenizer
        if its.codes_fingerprint != mine.codes_fingerprint:
            raise ValueError(f"{folder}: its image tokenizer is not the one of this run")
        if source.text_tokenizer.to_json() != self.model.text_tokenizer.to_json():
            raise ValueError(f"{folder}: its text tokenizer is not the one of this run")
        source.image_tokenizer = mine
        self.model.load_state_dict(source.state_dict())

    def pack(self, batch: Examples) -> tuple[Packed, Tensor, Tensor]:
        """The rows of a batch, and what tells equal images and equal captions apart from others.

        Returns the rows, image_ids: int64[B], and text_ids: int64[B], -1 where there is no text. A
        document is in the rows, and for alignment it is an image without a text: every rank has as
        many of each.
        """
        images, rows, pairs = self._divided(batch)
        templates = self.model.config.templates
        lessons = [
            lesson_of(batch.keys[row], batch.records[row], batch.seeds[row], templates,
                      self.question_share)
            for row in rows
        ]  # fmt: skip
        captions = [lesson.caption for lesson in lessons]
        exchanges = [lesson.exchanges for lesson in lessons]
        sequences = self.model.sequences(
            pairs,
            captions,
            [batch.seeds[row] for row in rows],
            exchanges,
            longest=self.row_length,
        )
        draws = sequences[len(rows) : 2 * len(rows)]
        for row, *both in zip(rows, sequences, draws, strict=False):
            if (longest := max(map(len, both))) > self.row_length:
                raise ValueError(
                    f"sample {batch.keys[row]} makes a sequence of {longest} tokens, more than "
                    f"row_length={self.row_length}: raise it, or cut the text"
                )
        for row, parts in enumerate(batch.documents):
            if parts:
                pieces = self.model.document(parts, images[row], longest=self.row_length)
                sequences += window(pieces, batch.seeds[row])
        goals, null = self.model.config.objectives, self.model.vocabulary.null
        if self.training and not goals.alignment_weight:
            # What no loss reads is not computed: a run that only draws costs half.
            sequences = [one for one in sequences if goals.teaches(one)] or sequences[:1]
        packed = pack(sequences, self.row_length, self.model.vocabulary.pad, row_multiple=4)
        image_ids = torch.tensor([stable_number(key) for key in batch.keys])
        text_ids = torch.full_like(image_ids, -1)
        if goals.alignment_weight:
            states = torch.zeros(2, len(batch), dtype=torch.int64)
            states[:, rows] = packed.states[: 2 * len(rows)].view(2, -1)
            packed.states = states.flatten()
        for row, sequence, text in zip(rows, draws, captions, strict=True):
            if sequence.ids[1] != null:
                text_ids[row] = stable_number(str(text))
        self.tokens = int((packed.documents > 0).sum())
        self.flops = training_flops(self.model.config.transformer, packed)
        return packed.to(self.device), image_ids.to(self.device), text_ids.to(self.device)

    def step(self, batch: Examples, stage: str) -> Tensor:
        packed, image_ids, text_ids = self.pack(batch)
        total, parts = self.model(packed, image_ids, text_ids)
        parts["packing"] = torch.tensor(packed.efficiency, device=total.device)
        self.log_dict(
            {f"{stage}/{name}": value for name, value in mean_over_ranks(parts).items()},
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
        self.answers: list[tuple[str, str, str]] = []  # prompt, expected, found

    def validation_step(self, batch: Examples, batch_idx: int) -> None:
        self.step(batch, "val")
        with unsharded(self.model):
            self._sample(batch)

    def _sample(self, batch: Examples) -> None:
        _, pairs, codes = self._divided(batch)
        described = [descriptions_of(batch.records[row]) for row in pairs]
        wanted = self.captions_in_validation - len(self.captions)
        rows = [row for row, captions in enumerate(described) if captions][: max(0, wanted)]
        found = caption_codes(self.model, codes[rows])
        for row, caption in zip(rows, found, strict=True):
            key, record = batch.keys[pairs[row]], batch.records[pairs[row]]
            self.captions[key], self.references[key] = caption, described[row]
            if "scene" in record:
                self.scenes[key] = Scene.from_json(record["scene"])
        firsts = [captions[0] for captions in described if captions]
        self.prompts = (self.prompts + firsts)[: self.drawings_in_validation]
        self._answer([batch.records[row] for row in pairs], codes)

    def _answer(self, records: list[dict[str, Any]], codes: Tensor) -> None:
        """All questions of the first images that have any."""
        templates = self.model.config.templates
        for row, record in enumerate(records):
            exchanges = exchanges_of(record, templates)
            exchanges = exchanges[: self.answers_in_validation - len(self.answers)]
            if exchanges:
                prompts, expected = zip(*exchanges, strict=True)
                image = codes[row : row + 1].expand(len(prompts), -1)
                found = text_after(self.model, image, prompts, max_tokens=16)
                self.answers += zip(prompts, expected, found, strict=True)

    def on_validation_epoch_end(self) -> None:
        self.captions = gather_objects(self.captions)
        self.references = gather_objects(self.references)
        self.scenes, self.answers = gather_objects(self.scenes), gather_objects(self.answers)
        folder = self._samples_folder()
        step = f"step-{self.global_step:06d}"
        if self.captions:
            cider = score_captions(self.captions, self.references)["CIDEr"]
            self.log("val/CIDEr", cider, sync_dist=True)  # the same on every rank
            if set(self.scenes) == set(self.captions):
                facts = score_scene_captions(self.captions, self.scenes)
                facts = {f"val/scene_{name}": value for name, value in facts.items()}
                self.log_dict(facts, sync_dist=True)
            lines = [
                f"{key}\t{caption}\t| {' | '.join(self.references[key])}"
                for key, caption in self.captions.items()
            ]
            if folder:
                (folder / f"{step}.txt").write_text("\n".join(lines) + "\n")
        if self.answers:
            scores = score_answers([(expected, found) for _, expected, found in self.answers])
            named = {f"val/answer_{name}": value for name, value in scores.items()}
            self.log_dict(named, sync_dist=True)
            lines = ["\t".join(answer) for answer in self.answers]
            if folder:
                (folder / f"{step}-answers.txt").write_text("\n".join(lines) + "\n")
        with unsharded(self.model):
            drawn = draw_codes(self.model, self.prompts) if self.prompts and folder else None
        if drawn is not None and folder:
            from torchvision.utils import make_grid

            grid = make_grid(decode_images(self.model, drawn), nrow=4)
            to_image(grid).save(folder / f"{step}.png")
            (folder / "prompts.txt").write_text("\n".join(self.prompts) + "\n")

    def _samples_folder(self) -> Path | None:
        log_dir = self.trainer.log_dir  # once, and on every rank: it is a broadcast
        if not (log_dir and self.trainer.is_global_zero):
            return None
        folder = Path(log_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def predict_step(self, batch: Examples, batch_idx: int) -> list[dict[str, str]]:
        _, rows, codes = self._divided(batch)  # a document has its texts
        with unsharded(self.model):
            captions = caption_codes(self.model, codes)
        keys = [batch.keys[row] for row in rows]
        return [{"key": k, "caption": c} for k, c in zip(keys, captions, strict=True)]

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def export(self, folder: str) -> None:
        if not fsdp_modules(self.model):
            if self.trainer.is_global_zero:
                self.model.save(folder)
            return
        weights = full_state_dict(self.model)
        if self.trainer.is_global_zero:
            plain = Multimodal(
                self.model.config, self.model.text_tokenizer, self.model.image_tokenizer
            )
            plain.load_state_dict(weights)
            plain.save(folder)
