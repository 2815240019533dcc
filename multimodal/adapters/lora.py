"""LoRA: a linear layer stays as it is, and a product of two thin matrices is added to what it says.

    y = W x + alpha / r * B A x

Only A and B are trained, so only they need gradients and an optimizer (Hu et al. 2021,
arXiv:2106.09685). B starts at zero: an untrained adapter changes nothing. The layers are those of
the library peft (Apache-2.0).

Shapes: r the rank, A [r, inputs], B [outputs, r].
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from multimodal.model.layers.experts import SparseMLP
from multimodal.model.layers.quantization import QuantizedLinear, round_no_inputs
from multimodal.model.layers.transformer import Transformer
from multimodal.schemas import Between, check_fields
from multimodal.tokenizers.detail import VQTokenizer

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get an adapter, and its size.

    Args:
        r: the rank. Twice the rank is twice the parameters.
        alpha: the product is multiplied by alpha / r.
        dropout: the share of the inputs of A that is set to 0 in training.
        target: names of linear layers, as peft's ``target_modules``: ``q_proj`` is that of every
            layer, ``layers.0.self_attn.q_proj`` that of the first one. Of an image tokenizer also
            parts, such as ``decoder``. Empty: all matrices inside the layers; all linear layers and
            convolutions of an image tokenizer. With experts only those of attention can be named.
        bits: of the weights of the base in training, 8 or 4 (model/layers/quantization.py): less
            memory (QLoRA, Dettmers et al. 2023, arXiv:2305.14314). None: floats.
        new_rows: train the embeddings of codes and specials too, and write a model into which the
            adapter is merged: so a language model learns to see, and its texts keep their
            embeddings.

    Raises:
        ValueError: for numbers out of range.
    """

    r: Annotated[int, Between(1, 1024)] = 16
    alpha: Annotated[int, Between(1, 2**16)] = 32
    dropout: Annotated[float, Between(0, 0.9)] = 0.0
    target: tuple[str, ...] = ()
    bits: Literal[8, 4] | None = None
    new_rows: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.new_rows and self.bits is not None:
            raise ValueError("lora.new_rows: the embeddings train, so they need floats, not bits")
        object.__setattr__(self, "target", tuple(self.target))

    def names(self, module: nn.Module) -> list[str]:
        """The ``target_modules`` for a transformer, or for the level of detail of images.

        Raises:
            ValueError: for a name of no layer that can be adapted.
        """
        return self._of_images(module) if isinstance(module, VQTokenizer) else self._of(module)

    def _of_images(self, tokenizer: VQTokenizer) -> list[str]:
        # A subclass of a convolution resizes what it reads first, and A would read another size.
        layers = [
            name
            for name, part in tokenizer.named_modules()
            if type(part) in (nn.Linear, nn.Conv2d) and name.startswith(("encoder.", "decoder."))
        ]
        for target in self.target:
            if not any(f".{target}." in f".{layer}." for layer in layers):
                raise ValueError(
                    f"lora.target: {target!r} is no layer to adapt; there is encoder, decoder"
                )
        chosen = self.target or ("encoder", "decoder")
        return [x for x in layers if any(f".{target}." in f".{x}." for target in chosen)]

    def _of(self, transformer: nn.Module) -> list[str]:
        # transformers keeps the experts of a layer in one tensor, and peft takes the name of any
        # MLP beside them (mlp_only_layers) for theirs: such an adapter would not load.
        experts = any(isinstance(module, SparseMLP) for module in transformer.modules())
        linear = [
            f".{name}"
            for name, module in transformer.named_modules()
            if isinstance(module, nn.Linear | QuantizedLinear)
            and name.startswith("layers.")
            and not (experts and ".mlp." in name)
        ]
        for name in self.target:
            if not any(each.endswith(f".{name}") for each in linear):
                known = ", ".join(dict.fromkeys(each.rpartition(".")[2] for each in linear))
                raise ValueError(f"lora.target: {name!r} is no layer to adapt; there is {known}")
        return list(self.target) or [*ATTENTION, *(() if experts else MLP)]


def inject(module: nn.Module, config: LoraConfig) -> None:
    """Give a module an adapter, in place. Of its parameters only those of the adapter train.

    Args:
        module: a transformer, or the level of detail of an image tokenizer.

    Raises:
        ValueError: without peft, or for a wrong target.
    """
    try:
        import peft
        from peft.tuners.lora import Linear, LoraLayer
    except ImportError as error:
        raise ValueError(f"lora needs: pip install multimodal[lora] ({error})") from error
    wanted = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.names(module),
        task_type="CAUSAL_LM" if isinstance(module, Transformer) else None,
    )
    wanted._register_custom_module({QuantizedLinear: Linear})
    round_no_inputs(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # it asks for sizes, and finds
        peft.inject_adapter_in_model(wanted, module)
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            # Or under autocast peft would make a float32 copy of each input, and autocast another
            # one of that. Without autocast A has the dtype of the input.
            layer.cast_input_dtype_enabled = False


def has_adapter(module: nn.Module) -> bool:
    return hasattr(module, "peft_config")


def adapter_parts(module: nn.Module) -> list[nn.Module]:
    """The modules that hold the matrices A and B. Empty without an adapter."""
    return [part for name, part in module.named_modules() if name.endswith((".lora_A", ".lora_B"))]


def stored_config(module: nn.Module) -> dict[str, Any]:
    """The content of ``adapter_config.json`` for the adapter of a module."""
    config: Any = module.peft_config
    stored: dict[str, Any] = config["default"].to_dict()
    return {**stored, "inference_mode": True, "target_modules": sorted(stored["target_modules"])}


def adapter_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a module's weights those of its adapter, by the names that peft has for them.

    Args:
        weights: the state dict of the module. A sharded one is gathered before.
    """
    import peft

    found: dict[str, Tensor] = peft.get_peft_model_state_dict(
        module, dict(weights), save_embedding_layers=False
    )
    return found


def merged_weights(transformer: Transformer) -> dict[str, Tensor]:
    """The state dict of a transformer without adapters that computes the same."""
    from peft.tuners.lora import LoraLayer

    weights = {
        name.replace(".base_layer.", "."): weight.detach()
        for name, weight in transformer.state_dict().items()
        if ".lora_" not in name
    }
    adapted = {n: m for n, m in transformer.named_modules() if isinstance(m, LoraLayer)}
    layer: Any
    for name, layer in adapted.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.get_delta_weight("default")
    return weights


def train_rows_from(table: nn.Parameter, first: int) -> None:
    """Train the rows of a table from this one on. The others get gradients of zero."""

    def without_first(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:first] = 0
        return gradient

    table.requires_grad_(True).register_hook(without_first)  # type: ignore[no-untyped-call]


@contextmanager
def without_adapter(transformer: Transformer) -> Iterator[None]:
    """The base model inside the context. It costs no memory: the weights of the base are there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
