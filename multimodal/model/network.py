"""The network: one transformer, the projections of the alignment loss, and the joint loss.

A network reads and writes ids. It knows neither text nor pixels: the two tokenizers stand beside it
in ``ModelParts`` (model/checkpoint.py).

Shapes: R rows, L tokens of a row, B image-text pairs, D width, V vocabulary, K codebook size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multimodal.distributed import global_sum, world_size
from multimodal.model.alignment import Alignment
from multimodal.model.distillation import losses_of_taught
from multimodal.model.layers.attention import Backend, attention_mask, block_mask
from multimodal.model.layers.compiled import CompiledForward
from multimodal.model.layers.experts import (
    ExpertsConfig,
    balance_loss,
    expert_use,
    router_z_loss,
    stacked,
    upcycled,
)
from multimodal.model.layers.graphs import StepGraphs
from multimodal.model.layers.quantization import quantized, with_quantized_layers
from multimodal.model.layers.transformer import Transformer, TransformerConfig, named_config
from multimodal.model.objectives import (
    ObjectivesConfig,
    token_losses,
    unknown_groups,
)
from multimodal.model.preference_loss import Completions, token_log_probabilities
from multimodal.model.sequences import NO_LOSS, Packed
from multimodal.model.stock import language_model, read_stock, refuse_exports
from multimodal.model.templates import Templates
from multimodal.model.training_batch import TrainingBatch
from multimodal.model.vocabulary import Vocabulary
from multimodal.tokenizers.levels import Layout


@dataclass(frozen=True)
class ModelConfig:
    """Everything but the weights.

    Args:
        transformer: the sizes.
        text_size: number of ids of the text tokenizer.
        layout: the levels of the image tokenizer.
        objectives: the losses and their weights.
        templates: how tasks are put in words.
        reads: the levels of an image that opens a sequence, to be described, asked about or
            embedded. Empty: the first level.
        draws: the levels of every other image: of those that are drawn. The last level, which has
            the pixels, is one of them. Empty: all levels.
    """

    transformer: TransformerConfig
    text_size: int
    layout: Layout
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    templates: Templates = field(default_factory=Templates)
    reads: tuple[str, ...] = ()
    draws: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = tuple(level.name for level in self.layout.levels)
        object.__setattr__(self, "reads", tuple(self.reads) or names[:1])
        object.__setattr__(self, "draws", tuple(self.draws) or names)
        for field_name, chosen in (("reads", self.reads), ("draws", self.draws)):
            for name in chosen:
                self.layout[name]  # an unknown name is an error now
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"{field_name}={chosen}: each level once")
        if names[-1] not in self.draws:
            raise ValueError(f"draws={self.draws}: without {names[-1]!r} there are no pixels")
        if self.transformer.vocab_size != self.vocabulary.size:
            raise ValueError(
                f"transformer.vocab_size={self.transformer.vocab_size}: text_size and layout need "
                f"{self.vocabulary.size}"
            )

    def stored(self) -> dict[str, Any]:
        """As in config.json of a model folder. Who draws all levels does not say so."""
        stored = {**asdict(self), "transformer": self.transformer.stored()}
        if len(self.draws) == len(self.layout.levels):
            del stored["draws"]
        return stored

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.text_size, self.layout.codebook_size)

    def with_bits(self, bits: Literal[8, 4] | None) -> "ModelConfig":
        """The same model with quantized matrices, or with floats (None)."""
        return replace(self, transformer=replace(self.transformer, weight_bits=bits))


class MultimodalLM(nn.Module):
    """A language model over text and image tokens. ``forward`` returns the joint training loss.

    Attributes:
        attention_backend: how training computes attention. See model/layers/attention.py.
        label_smoothing: in training, the share of each target of a text that the loss spreads over
            the ids of texts and the specials.
        compiled: the compiled forward passes of inference, if there are any.
        graphs: the CUDA graphs of decode steps, if there are any.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.vocabulary = config, config.vocabulary
        self.transformer = Transformer(config.transformer)
        objectives = config.objectives
        self.alignment = Alignment(
            config.transformer.hidden_size, objectives.alignment_dim, objectives.alignment_form
        )
        if config.transformer.weight_bits is not None:
            with_quantized_layers(self.alignment, ("image_projection", "text_projection"))
        self.attention_backend: Backend = "sdpa"
        self.label_smoothing = 0.0
        self.compiled: CompiledForward | None = None
        self.graphs: StepGraphs | None = None
        if not objectives.alignment_weight:
            # Without a loss they get no gradient, and under DDP the ranks would wait for one.
            self.alignment.requires_grad_(False)

    @classmethod
    def new(
        cls,
        size: str | Path,
        text_size: int,
        layout: Layout,
        code_vectors: Iterable[Tensor],
        objectives: ObjectivesConfig | None = None,
        reads: Sequence[str] = (),
        draws: Sequence[str] = (),
        experts: ExpertsConfig | None = None,
    ) -> "MultimodalLM":
        """A network to train.

        Args:
            size: a named size, with random weights, or a language model with its weights: a Qwen3,
                Qwen3-MoE, Qwen2, Llama, SmolLM2 or Mistral, as a folder or by its name on the Hub,
                a GGUF file, or the transformer of a model folder of ours. The embeddings of text
                ids are kept. All other rows start at their mean.
            text_size: number of ids of the text tokenizer.
            layout: the levels of the image tokenizer.
            code_vectors: for each group of each level float[codebook_size, C], the vectors that the
                image tokenizer has for its codes. Codes with similar vectors start with similar
                embeddings.
            objectives: the losses and their weights.
            reads, draws: see ``ModelConfig``.
            experts: in place of the MLPs. Those of a language model start as copies of its MLPs
                (``upcycled``).

        Raises:
            ValueError: if the language model has fewer embeddings than the text tokenizer has ids,
                or experts that it cannot have.
        """
        vocabulary = Vocabulary(text_size, layout.codebook_size)
        weights = None
        source = language_model(size)
        if source is not None:
            refuse_exports(source)
            sizes, weights = read_stock(source)
            if sizes.vocab_size < text_size:
                raise ValueError(
                    f"{size}: has {sizes.vocab_size} embeddings, and the text tokenizer "
                    f"{text_size} tokens: is it that of the same folder?"
                )
            sizes = replace(sizes, vocab_size=vocabulary.size)
            if experts is not None:
                if sizes.experts is not None:
                    raise ValueError(f"{size}: has experts of its own, so experts cannot be given")
                sizes = replace(sizes, experts=experts)
                assert sizes.experts is not None
                weights = upcycled(weights, sizes.experts)
        else:
            sizes = named_config(str(size), vocabulary.size)
            sizes = replace(sizes, experts=experts or sizes.experts)
            if sizes.experts is not None:
                sizes.experts.check_router()
        config = ModelConfig(
            sizes,
            text_size,
            layout,
            objectives or ObjectivesConfig(),
            reads=tuple(reads),
            draws=tuple(draws),
        )
        network = cls(config)
        features = torch.cat(
            [random_fourier_features(vectors, sizes.hidden_size) for vectors in code_vectors]
        )
        if weights is not None:
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                if name in weights:
                    weights[name] = grown_table(weights[name].float(), vocabulary, features)
            network.transformer.load_stock_state_dict(weights)
        else:
            with torch.no_grad():
                table = network.transformer.embed_tokens.weight
                table[vocabulary.image_start : vocabulary.image_end] = 0.02 * features
        return network

    def take_weights(self, source: "MultimodalLM") -> None:
        """Copy the weights of a network of the same sizes.

        This one may have more levels. It may have experts where the other has none: they start as
        copies of its MLPs (``upcycled``). If this one is quantized, floats are rounded.

        Raises:
            ValueError: if it has other bits, the sizes differ, or one of its levels is not one of
                this network.
        """
        ours, theirs = self.config, source.config
        bits, given = (config.transformer.weight_bits for config in (ours, theirs))
        if given is not None and given != bits:
            raise ValueError(
                f"its weights have {given} bits: an adapter can be trained over them (lora.bits="
                f"{given}), all else needs floats: start from the model that it was quantized from"
            )
        experts = theirs.transformer.experts
        grows = experts is None and ours.transformer.experts is not None
        shared = replace(
            theirs.transformer,
            vocab_size=ours.transformer.vocab_size,
            experts=ours.transformer.experts if grows else experts,
            weight_bits=bits,
        )
        has, here = asdict(shared), asdict(ours.transformer)
        has["text_size"], here["text_size"] = theirs.text_size, ours.text_size
        if differ := [
            f"{name} {has[name]}, here {here[name]}" for name in has if has[name] != here[name]
        ]:
            raise ValueError(f"its sizes are not those of this run: {'; '.join(differ)}")
        if not set(theirs.layout.levels) <= set(ours.layout.levels):
            raise ValueError(f"its levels are not those of this run: {theirs.layout}")
        weights = source.state_dict()
        if grows and ours.transformer.experts is not None:
            weights = upcycled(weights, ours.transformer.experts)
        for name, weight in self.state_dict().items() if theirs.layout != ours.layout else ():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                weights[name] = self._with_rows_of(source, weights[name], weight.clone())
        if bits is not None and given is None:
            weights = quantized(weights, self.state_dict(), bits)
        self.load_state_dict(weights)

    def _with_rows_of(self, source: "MultimodalLM", theirs: Tensor, ours: Tensor) -> Tensor:
        """A table of ids with the rows of texts, specials, and levels that another network has."""
        texts, start = self.vocabulary.image_start, source.vocabulary.image_start
        ours[:texts] = theirs[:start]
        for level in source.config.layout.levels:
            place, found = (n.config.layout.numbers(level.name) for n in (self, source))
            ours[texts:][place] = theirs[start:][found]
        return ours

    @property
    def device(self) -> torch.device:
        return self.alignment.log_scale.device

    def hidden(self, packed: Packed, router_logits: list[Tensor] | None = None) -> Tensor:
        """The last hidden states of packed rows: float[R, L, D].

        Args:
            router_logits: see ``Transformer.forward``.
        """
        make_mask = block_mask if self.attention_backend == "flex" else attention_mask
        mask = make_mask(packed.documents, packed.blocks, packed.branches)
        return self.transformer(packed.ids, packed.positions, mask, router_logits=router_logits)

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The joint loss of a batch.

        Returns:
            The weighted sum of all losses, float32[], and its parts by name.
        """
        objectives_config, packed = self.config.objectives, batch.packed
        router_logits: list[Tensor] = []
        hidden = self.hidden(packed, router_logits).flatten(0, 1)
        assert batch.predicted is not None, "found when the batch was made"
        predicted, counts = batch.predicted.positions, batch.predicted.counts
        objectives = packed.objectives.flatten()[predicted]
        objectives[counts["log_z"] :] = NO_LOSS  # padding
        head, targets = self.transformer.head, packed.targets.flatten()[predicted]
        groups = unknown_groups(objectives, packed.unknown.flatten()[predicted])
        states, teacher = hidden[predicted], None
        if (teaching := batch.teaching) is not None:
            about = teaching, predicted, objectives, counts
            teacher = losses_of_taught(states, head, *about), teaching.weights
        total, parts = token_losses(
            states,
            head,
            targets,
            objectives,
            objectives_config,
            groups,
            self.label_smoothing if self.training else 0.0,
            self.vocabulary.image_start,
            teacher,
            counts,
        )
        if objectives_config.alignment_weight:
            image_states, text_states = hidden[batch.image_positions], hidden[batch.text_positions]
            parts["alignment"], parts["alignment_accuracy"] = self.alignment(
                self.alignment.embed_image(image_states),
                self.alignment.embed_text(text_states),
                batch.image_hashes,
                batch.text_hashes,
            )
            weighted = objectives_config.alignment_weight * parts["alignment"]
            if hidden.requires_grad:
                gradients = torch.autograd.grad(
                    weighted, (image_states, text_states), retain_graph=True
                )
                squares = global_sum(torch.cat(gradients).float().square().sum())
                parts["grad_norm/alignment"] = squares.sqrt() / world_size()
            total = total + weighted
        if (policy := batch.policy) is not None:
            loss, of_policy = policy.loss(hidden, self.transformer.head)
            total, parts = policy.config.joint_weight * total + loss, parts | of_policy
        if (completions := batch.completions) is not None:
            loss, of_preferences = completions.loss(self.log_probabilities(completions))
            total, parts = completions.joint_weight * total + loss, parts | of_preferences
        if router_logits:  # last: the weights of the joint losses are not those of the routers
            routing, of_routing = self._router_losses(stacked(router_logits), packed)
            total, parts = total + routing, parts | of_routing
        return total, {**parts, "total": total}

    def log_probabilities(self, completions: Completions) -> Tensor:
        """Of each token of completions: float32[M]."""
        hidden = self.hidden(completions.packed).flatten(0, 1)[completions.positions]
        return token_log_probabilities(hidden, self.transformer.head, completions.targets)

    def _router_losses(self, logits: Tensor, packed: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted losses of the routers, and for the log these and the use of the experts.

        Args:
            logits: float32[S, R * L, E].
        """
        experts, vocabulary = self.config.transformer.experts, self.vocabulary
        assert experts is not None
        ids, tokens = packed.ids.flatten(), packed.documents.flatten() > 0
        images = tokens & (ids >= vocabulary.image_start) & (ids < vocabulary.image_end)
        k = experts.num_experts_per_tok
        balance, z_loss = balance_loss(logits, k, tokens), router_z_loss(logits, tokens)
        use = expert_use(logits, k, {"text": tokens & ~images, "image": images})
        total = experts.router_aux_loss_coef * balance + experts.router_z_loss_coef * z_loss
        return total, {
            "router_balance": balance,
            "router_z": z_loss,
            **{f"experts/{name}": value for name, value in use.items()},
        }


def random_fourier_features(vectors: Tensor, width: int) -> Tensor:
    """Features in which similar vectors are similar (Rahimi & Recht 2007).

    With thousands of codes most are rare. Without this start each would be learned alone.

    Args:
        vectors: float[K, C], each channel in about [-1, 1].
        width: D, the number of features.

    Returns:
        float[K, D] with unit variance.
    """
    # A frequency of pi over the range [-1, 1]: neighbouring values of a channel stay similar.
    angles = vectors @ (torch.randn(vectors.shape[-1], width) * torch.pi / 2)
    return 2**0.5 * torch.cos(angles + 2 * torch.pi * torch.rand(width))


def grown_table(table: Tensor, vocabulary: Vocabulary, features: Tensor) -> Tensor:
    """An embedding table with rows for the specials and the image codes.

    Args:
        table: float[old V, D], of a text model.
        features: float[K, D], of the image codes.

    Returns:
        float[V, D]. Text rows are kept. The others start at the mean of the text rows, and codes
        differ around it by a tenth of what texts do.
    """
    text = table[: vocabulary.text_size]
    grown = text.mean(0).repeat(vocabulary.size, 1)
    grown[: vocabulary.text_size] = text
    grown[vocabulary.image_start : vocabulary.image_end] += 0.1 * text.std() * features
    return grown
