"""Joint pretraining: language modelling, alignment and mask-and-reconstruct in one forward pass."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal.adapters.lora import LoraConfig
from multimodal.api import Model
from multimodal.data.images import Fit, to_image
from multimodal.distributed import gather_objects, mean_over_ranks
from multimodal.eval.metrics.answering import score_answers
from multimodal.eval.metrics.captioning import score_captions, sentence_health
from multimodal.eval.tasks.answers import SHORT_ANSWER
from multimodal.hub.names import levels_of, part_of
from multimodal.inference.codec import decode_images, encode_images
from multimodal.inference.drawing import draw_codes
from multimodal.inference.text import caption_codes, complete_prompts
from multimodal.model.checkpoint import ModelParts
from multimodal.model.layers.attention import Backend
from multimodal.model.layers.experts import ExpertsConfig
from multimodal.model.lessons import check_texts, descriptions_of, exchanges_of
from multimodal.model.objectives import ObjectivesConfig
from multimodal.model.training_batch import TrainingBatch, TrainingSample
from multimodal.provenance import Provenance
from multimodal.terminal import shown
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.tokenizers.text import TextTokenizer
from multimodal.train.adapting import AdapterModule
from multimodal.train.cost import recomputed_layers, training_flops
from multimodal.train.examples import Examples, Note
from multimodal.train.optim import can_compile, has_compiler, parameters_named
from multimodal.train.preflight import check_data
from multimodal.train.run.folder import log_folder
from multimodal.train.run.progress import in_bar
from multimodal.train.sharding import unsharded
from multimodal.train.word_rows import start_rows

IMAGES_AT_ONCE = 256  # a document may have any number of images


class JointModule(AdapterModule):
    """Trains a network on the codes of a frozen image tokenizer.

    Args:
        text_tokenizer: file of a trained BPE, or a model whose text tokenizer is taken (its folder,
            ``starter``, or ``user/name`` of the Hugging Face Hub).
        image_tokenizer: folder of a trained image tokenizer, or a model whose image tokenizer is
            taken.
        size: a named size (tiny, micro, mini, starter, base, large, 1b, 7b; with experts
            starter-moe, base-moe), or a language model to start from its weights: a Qwen3,
            Qwen3-MoE, Qwen2, Llama, SmolLM2 or Mistral of Hugging Face (its folder, or
            ``user/name``), a GGUF file, or a model folder of this package. The text tokenizer is
            then given the same, too.
        objectives: weights and shares of the losses.
        reads: the levels of the image tokenizer that captions, answers and embeddings read. By
            default those of the model that ``image_tokenizer`` names, else the first one.
        draws: the levels that a drawn image has. By default those of that model, else all. Drawing
            detail alone is cheaper.
        experts: in place of the MLPs, for each token a few of many: num_experts,
            num_experts_per_tok and more. Those of a language model, or of a model without experts
            in ``--init_from``, start as copies of its MLPs.
        question_share: the share of the samples with a caption that bring questions, too.
        captions_per_image: at most so many captions of an image in one step: its codes are read
            once for all of them. 0: all. Those that do not fit ``row_length`` are left out.
        row_length: tokens in a packed row. A text that does not fit is cut.
        dropout: the share of the embeddings, and of what each layer adds, that is set to 0 in
            training.
        label_smoothing: the share of each target of a text that the training loss spreads over all
            ids but those of codes.
        learning_rate, weight_decay, warmup_steps: Muon's. Linear warm-up, cosine to zero.
        learning_rates: other rates for parts by name.
        freeze: names of parts that are not trained, such as ``network.transformer.layers.0`` or
            ``*.mlp.*``.
        lora: train an adapter for the model of ``--init_from``, and nothing else: r, alpha,
            dropout, target, bits. The run writes ``adapter/`` in place of ``model/``. With
            ``new_rows`` codes and specials train too: for a language model in ``size``.
        recompute: keep no activations inside layers (true), or inside so many of them, and compute
            them again for the gradients. For all it takes a third more time and much less memory.
        captions_in_validation, answers_in_validation, drawings_in_validation: how many all ranks
            make together, with the options that a person gets by default. Answers have 16 tokens
            at most.
        compile: torch.compile, on a GPU layer by layer. On a CPU it needs a C++ compiler, on a GPU
            one of C.
        attention: ``sdpa`` anywhere. ``flex`` on a GPU skips masked blocks, and needs a C compiler.
    """

    def __init__(
        self,
        text_tokenizer: str,
        image_tokenizer: str,
        size: str = "starter",
        objectives: ObjectivesConfig = ObjectivesConfig(),  # noqa: B008 (frozen)
        reads: list[str] | None = None,
        draws: list[str] | None = None,
        experts: ExpertsConfig | None = None,
        question_share: float = 0.5,
        captions_per_image: int = 1,
        row_length: int = 256,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        learning_rates: dict[str, float] | None = None,
        freeze: list[str] | None = None,
        lora: LoraConfig | None = None,
        recompute: bool | int = False,
        captions_in_validation: int = 200,
        answers_in_validation: int = 200,
        drawings_in_validation: int = 8,
        compile: bool = False,
        attention: Backend = "sdpa",
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_steps, learning_rates, lora)
        # The model is what validation uses. Its parts are the module's own, so that Lightning moves
        # and saves them.
        read, drawn = levels_of(image_tokenizer)
        self.model = Model.new(
            size,
            TextTokenizer.load(part_of(text_tokenizer, "text_tokenizer.json")),
            load_image_tokenizer(part_of(image_tokenizer, "image_tokenizer")),
            objectives,
            reads or read,
            draws or drawn,
            experts,
        )
        self.network = self.model.network = self.base_network(self.model.network)
        self.rows_are_new = True  # of codes and specials
        self.image_tokenizer = self.model.image_tokenizer
        self.started_from += self.model.provenance
        if self.image_tokenizer.provenance != Provenance():
            fingerprint = self.image_tokenizer.fingerprint
            self.note_source(image_tokenizer, fingerprint, self.image_tokenizer.provenance)
        self.network.attention_backend = attention
        if freeze and lora is not None:
            raise ValueError(
                "freeze: with lora only the adapter trains; lora.target names its layers"
            )
        for name in freeze or ():
            for parameter in parameters_named(self, name):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"freeze={freeze}: nothing is left to train")
        for name in self.learning_rates if lora is None else ():
            parameters_named(self, name)  # a wrong name is an error now; with lora at the start
        layers = len(self.network.transformer.layers)
        self.network.transformer.recompute = recomputed_layers(recompute, layers)
        for name, share in (("dropout", dropout), ("label_smoothing", label_smoothing)):
            if not 0 <= share < 1:
                raise ValueError(f"{name}={share}: expected a share in [0, 1)")
        self.network.transformer.dropout = dropout
        self.network.label_smoothing = label_smoothing
        if not 0 <= question_share <= 1:
            raise ValueError(f"question_share={question_share}: expected 0 to 1")
        if captions_per_image < 0:
            raise ValueError(f"captions_per_image={captions_per_image}: expected 0 (all) or more")
        self.builder = self.model.batch_builder(row_length, question_share, captions_per_image)
        self.captions_in_validation = captions_in_validation
        self.answers_in_validation = answers_in_validation
        self.drawings_in_validation = drawings_in_validation
        if compile and can_compile():
            transformer = self.network.transformer
            transformer.compile_layers() if torch.cuda.is_available() else transformer.compile()

    def train(self, mode: bool = True) -> "JointModule":
        super().train(mode)
        self.image_tokenizer.eval()  # it is frozen
        return self

    def on_fit_start(self) -> None:
        super().on_fit_start()
        on_gpu = self.device.type == "cuda" and has_compiler()
        if self.network.attention_backend == "flex" and not on_gpu:
            raise ValueError("attention: flex needs CUDA and a C compiler; sdpa runs anywhere")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        shards = data.shards(data.train_split)
        limit = self.network.config.transformer.max_position_embeddings
        drawn, resumed = data.drawn_folders, bool(self.trainer.ckpt_path)
        check_data(self.builder, shards, drawn, limit, self.check_sample, resumed, self.learned)
        if self.lora is not None and self.lora.new_rows and self.rows_are_new and not resumed:
            start_rows(self.model, shards, self.builder.row_length)

    @property
    def preprocessing(self) -> tuple[int, Fit]:
        return self.image_tokenizer.image_size, self.image_tokenizer.fit

    @property
    def check_sample(self) -> Callable[[str, dict[str, Any]], None]:
        """Raises ``ValueError`` for a sample that it cannot learn from."""
        return partial(check_texts, self.network.config.templates)

    @property
    def expected_codes(self) -> str:
        """Fingerprint of the codes that it reads."""
        return self.image_tokenizer.codes_fingerprint

    def codes(self, batch: Examples) -> list[Tensor]:
        """The codes of each sample, on the host: int64[its images, n]."""
        codes = batch.codes
        if codes is None:
            parts = torch.split(batch.pixels(), IMAGES_AT_ONCE)
            with torch.autocast(self.device.type, enabled=False):  # as a person's image is encoded
                codes = torch.cat([encode_images(self.model, pixels) for pixels in parts]).cpu()
        return list(torch.split(codes, batch.image_counts))

    def init_from(self, folder: str) -> None:
        """Start from the weights of a model folder of the same sizes and tokenizers.

        The image decoder may be another one for the same codes. It stays that of this run. The
        image tokenizer of this run may have more levels: their embeddings start anew.
        """
        source = ModelParts.load(folder)
        ours = self.image_tokenizer.levels_fingerprints
        for level, fingerprint in source.image_tokenizer.levels_fingerprints.items():
            if ours.get(level) != fingerprint:
                raise ValueError(f"{folder}: its image tokenizer is not the one of this run")
        if source.text_tokenizer.to_json() != self.model.text_tokenizer.to_json():
            raise ValueError(f"{folder}: its text tokenizer is not the one of this run")
        try:
            self.network.take_weights(source.network)
            self.rows_are_new = False
            self.note_base(folder, source)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        self.note_source(folder, source.fingerprint, source.provenance)

    def samples(self, batch: Examples) -> list[TrainingSample]:
        """The samples of a batch with their codes."""
        fields = zip(
            batch.keys,
            batch.records,
            [images.numpy() for images in self.codes(batch)],
            batch.seeds,
            batch.documents,
            batch.drawn,
            batch.sources,
            strict=True,
        )
        return [
            TrainingSample(key, record, images, seed, document, drawn=drawn, source=source)
            for key, record, images, seed, document, drawn, source in fields
        ]

    def learned(self, sample: TrainingSample) -> TrainingSample:
        """What the joint losses learn of a sample."""
        return sample

    def build(self, batch: Examples) -> TrainingBatch:
        """The sequences of a batch."""
        return self.joint_batch(self.samples(batch))

    def joint_batch(self, samples: Sequence[TrainingSample]) -> TrainingBatch:
        """The sequences that the joint losses learn from."""
        only_draws = self.training and not self.network.config.objectives.alignment_weight
        return self.builder.build(list(map(self.learned, samples)), skip_untaught=only_draws)

    def pack(self, batch: Examples) -> TrainingBatch:
        """The rows of a batch, on the device of the network."""
        packed = self.build(batch)
        reason = f"a text is cut to fit row_length={self.builder.row_length}"
        batch.notes += [Note(batch.sources[n], batch.keys[n], reason) for n in packed.cut]
        self.tokens, self.host_rows = packed.tokens, packed.packed
        self.flops = training_flops(self.network.config.transformer, packed.packed)
        return packed.to(self.device)

    def step(self, batch: Examples, stage: str) -> Tensor:
        packed = self.pack(batch)
        total, parts = self.network(packed)
        parts["packing"] = total.new_full((), packed.tokens / packed.packed.ids.numel())
        self.log_dict(
            {f"{stage}/{name}": value for name, value in mean_over_ranks(parts).items()},
            batch_size=len(batch),
            sync_dist=stage == "val",
        )
        return total

    def training_step(self, batch: Examples, batch_idx: int) -> Tensor:
        loss = self.step(batch, "train")
        self.log("loss", loss.detach(), prog_bar=in_bar(self.trainer), logger=False)
        return loss

    # --- validation ---------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.samples_folder = self._samples_folder()
        self.captions: dict[str, str] = {}
        self.references: dict[str, list[str]] = {}
        self.prompts: list[str] = []
        self.drawn: list[Tensor] = []  # codes of the drawings
        self.answers: list[tuple[str, str, str]] = []  # prompt, expected and given answer
        ranks = self.trainer.world_size  # they share what there is to make
        self.caption_share = math.ceil(self.captions_in_validation / ranks)
        self.answer_share = math.ceil(self.answers_in_validation / ranks)

    def validation_step(self, batch: Examples, batch_idx: int) -> None:
        self.step(batch, "val")
        with unsharded(self.network):
            self._sample(batch)

    def _pairs(self, batch: Examples) -> tuple[list[int], Tensor]:
        """The rows of samples that are no documents, and their codes: int64[rows, n]."""
        codes = self.codes(batch)
        rows = [row for row, document in enumerate(batch.documents) if not document]
        none = torch.zeros(0, self.model.codes_per_image, dtype=torch.int64)
        return rows, torch.cat([none, *(codes[row] for row in rows)])

    def _sample(self, batch: Examples) -> None:
        """Caption, draw and answer until there are enough of each.

        At the end of a validation averaged weights are no longer in the network.
        """
        pairs, codes = self._pairs(batch)
        descriptions = [descriptions_of(batch.records[row]) for row in pairs]
        missing = max(0, self.caption_share - len(self.captions))
        rows = [row for row, captions in enumerate(descriptions) if captions][:missing]
        for row, caption in zip(rows, caption_codes(self.model, codes[rows]), strict=True):
            key = batch.keys[pairs[row]]
            self.captions[key], self.references[key] = caption, descriptions[row]
        prompts = [captions[0] for captions in descriptions if captions]
        prompts = prompts[: self.drawings_in_validation - len(self.prompts)]
        if prompts and self.samples_folder:
            self.drawn.append(draw_codes(self.model, prompts))
            self.prompts += prompts
        self._answer([batch.records[row] for row in pairs], codes)

    def _answer(self, records: list[dict[str, Any]], codes: Tensor) -> None:
        """Answer all questions of the first images that have any."""
        templates = self.network.config.templates
        for record, image in zip(records, codes, strict=True):
            exchanges = exchanges_of(record, templates)
            exchanges = exchanges[: self.answer_share - len(self.answers)]
            if exchanges:
                prompts, expected = zip(*exchanges, strict=True)
                repeated = image[None].expand(len(prompts), -1)
                answers = complete_prompts(self.model, repeated, prompts, SHORT_ANSWER)
                self.answers += zip(prompts, expected, answers, strict=True)

    def on_validation_epoch_end(self) -> None:
        self.captions = gather_objects(self.captions)
        self.references = gather_objects(self.references)
        self.answers = gather_objects(self.answers)
        folder, step = self.samples_folder, f"step-{self.global_step:06d}"
        if self.captions:
            cider = score_captions(self.captions, self.references)["CIDEr"]
            self.log("val/CIDEr", cider, sync_dist=True)  # the same on every rank
            health = sentence_health(list(self.captions.values()))
            self.log_dict({f"val/caption_{n}": v for n, v in health.items()}, sync_dist=True)
            lines = [
                f"{key}\t{caption}\t| {' | '.join(self.references[key])}"
                for key, caption in self.captions.items()
            ]
            if folder:
                (folder / f"{step}.txt").write_text(shown("\n".join(lines)) + "\n", "utf-8")
        if self.answers:
            scores = score_answers([(expected, given) for _, expected, given in self.answers])
            named = {f"val/answer_{name}": value for name, value in scores.items()}
            self.log_dict(named, sync_dist=True)
            lines = ["\t".join(answer) for answer in self.answers]
            if folder:
                (folder / f"{step}-answers.txt").write_text(shown("\n".join(lines)) + "\n", "utf-8")
        if self.drawn and folder and self.image_tokenizer.can_draw:
            from torchvision.utils import make_grid

            grid = make_grid(decode_images(self.model, torch.cat(self.drawn)), nrow=4)
            to_image(grid).save(folder / f"{step}.png")
            (folder / "prompts.txt").write_text(shown("\n".join(self.prompts)) + "\n", "utf-8")

    def _samples_folder(self) -> Path | None:
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        folder = log_folder(self.trainer) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def predict_step(self, batch: Examples, batch_idx: int) -> list[dict[str, str]]:
        rows, codes = self._pairs(batch)  # a document has its texts
        with unsharded(self.network):
            captions = caption_codes(self.model, codes)
        keys = [batch.keys[row] for row in rows]
        return [{"key": k, "caption": c} for k, c in zip(keys, captions, strict=True)]

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def export(self, folder: str | Path) -> None:
        """Write the folder of the model, or of its adapter. Every rank has to call."""
        if self.exports == "adapter":
            self.export_adapter(folder)
            return
        network = self.written_network()
        if network is not None:
            model = ModelParts(network, self.model.text_tokenizer, self.image_tokenizer)
            model.provenance = self.provenance()
            model.save(folder, self.card("A model of text and images"))
