"""An adapter on disk, in the format of peft, and how it is merged into a model.

    adapter_config.json, adapter_model.safetensors, base.json, README.md, LICENSE, sources.json

``PeftModel.from_pretrained`` loads the folder on top of the stock folder of the model
(``multimodal export hf``), or on top of a ``VQTokenizer``. ``base.json`` is ours. It names what the
adapter was trained on, by the fingerprint of the model, or of the level of detail. An adapter that
peft trained has no such file. But peft names the folder that it trained on: if that is here, the
weights of the adapted layers are compared with it.

Reading and merging need no peft, and nothing here is a pickle. Merged weights are W + scale * B A,
so inference costs what it costs without an adapter. Of a convolution B A is one, too: A has its
kernel, and B is 1 x 1.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from multimodal.adapters.lora import adapter_weights, stored_config
from multimodal.files import atomic_folder, local_path, open_file
from multimodal.hub.names import find_model
from multimodal.model.layers.transformer import Transformer
from multimodal.provenance import Provenance
from multimodal.schemas import check_value, construct
from multimodal.terminal import print_error
from multimodal.tokenizers.weights import digest_of, load_weights, read_config_file

AdapterSource: TypeAlias = str | Path | Mapping[str, str | Path]  # one, or several by name
CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
WRAPPER = "base_model.model."  # of peft, and what it wraps
PREFIX = f"{WRAPPER}model."  # the stock class has the transformer inside
OF_IMAGES = ("encoder.", "decoder.")  # of a VQTokenizer
# What a config of peft may say. Of all else only what is off: null, false, empty.
READ = ("r", "lora_alpha", "use_rslora")
WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "target_modules", "task_type",
)  # fmt: skip
FIXED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
}


@dataclass(frozen=True)
class AdapterBase:
    """The model that an adapter was trained on.

    Args:
        name: as it was given.
        fingerprint: of the whole model, 16 hex digits.
    """

    name: str
    fingerprint: str


@dataclass(frozen=True)
class StoredBase:
    """The schema of ``base.json``. adapter: the fingerprint of the adapter itself."""

    format: Literal[1]
    base: AdapterBase
    adapter: str


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a folder holds.

    Attributes:
        pairs: by the name of a layer in what it adapts, A and B.
        scale: of their product.
        base: None: the folder does not say.
        trained_on: the folder that peft loaded, if it is here.
    """

    folder: Path
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scale: float
    base: AdapterBase | None
    provenance: Provenance
    trained_on: Path | None = None

    @classmethod
    def read(cls, name: str | Path) -> "Adapter":
        """Read a folder, given by its path or its name on the Hub.

        Raises:
            ValueError: for anything else than a LoRA of peft, and for files that have changed.
        """
        folder = find_model(name)
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder}: not an adapter ({CONFIG} is missing)")
        config = read_config_file(folder / CONFIG)
        try:
            rank, scale = _checked(config)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from error
        weights = load_weights(folder / WEIGHTS)
        base = None
        if (folder / BASE).is_file():
            stored = construct(StoredBase, read_config_file(folder / BASE), str(folder / BASE))
            if stored.adapter != _fingerprint(config, weights):
                raise ValueError(
                    f"{folder}: damaged: its files are not those that {BASE} names; copy it again"
                )
            base = stored.base
        source = config.get("base_model_name_or_path")
        trained_on = None
        if isinstance(source, str) and os.path.isdir(source):
            trained_on = Path(source)
        return cls(
            folder,
            _pairs(folder, weights, rank),
            scale,
            base,
            Provenance.read(folder),
            trained_on,
        )

    def check_base(self, model: str | Path, fingerprint: str) -> None:
        """Raises ``ValueError`` if it was trained on another model."""
        if self.base is not None and self.base.fingerprint != fingerprint:
            raise ValueError(
                f"{self.folder}: this adapter is for the model {self.base.fingerprint} "
                f"({self.base.name}), and {model} is {fingerprint}"
            )

    @property
    def is_of_images(self) -> bool:
        """Whether it is for an image tokenizer, not for a network."""
        return all(layer.startswith(OF_IMAGES) for layer in self.pairs)

    def delta(self, layer: str) -> Tensor:
        """What it adds to the weight of a layer: float32[outputs, inputs, its kernel]."""
        down, up = self.pairs[layer]
        return self.scale * torch.einsum("or,r...->o...", up.float().flatten(1), down.float())

    def check_layers(self, module: nn.Module) -> None:
        """Raises ``ValueError`` if a model has no such layers, of these sizes, with floats, or if
        the folder that peft trained on has other weights there. Warns if nothing says which model
        the adapter is for.
        """
        parameters = dict(module.named_parameters())
        for layer, (down, up) in self.pairs.items():
            weight = parameters.get(f"{layer}.weight")
            if weight is not None and not weight.is_floating_point():
                raise ValueError(f"{self.folder}: is merged into floats, and {layer} is quantized")
            if weight is None or weight.ndim not in (2, 4):
                raise ValueError(f"{self.folder}: the model has no layer {layer!r:.80} to adapt")
            expected, shape = weight.shape, (len(up), *down.shape[1:])
            if shape != tuple(expected):
                theirs, ours = (" x ".join(map(str, sizes)) for sizes in (shape, expected))
                raise ValueError(
                    f"{self.folder}: is for a {layer} of {theirs}, that of the model is {ours}"
                )
        if self.base is None and not self._has_weights_of(parameters):
            print_error(
                f"{self.folder}: is merged by names and shapes alone: it has no {BASE}, and the "
                "folder that it was trained on is not here to compare with"
            )

    def _has_weights_of(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether the adapted layers are those of the folder that peft trained on.

        A fingerprint in that folder would not do: transformers keeps it when it saves tuned
        weights.

        Returns:
            False if they could not be compared.

        Raises:
            ValueError: if they differ, or a file cannot be read.
        """
        missing = {f"model.{layer}.weight": parameters[f"{layer}.weight"] for layer in self.pairs}
        for path in sorted(self.trained_on.glob("*.safetensors")) if self.trained_on else ():
            open_file(path).close()  # a regular file
            try:
                with safe_open(path, "pt") as file:
                    for name in sorted(missing.keys() & file.keys()):
                        theirs, ours = file.get_tensor(name), missing.pop(name).detach().cpu()
                        # An export may be rounded.
                        if not torch.equal(ours.to(theirs.dtype), theirs):
                            raise ValueError(
                                f"{self.folder}: this adapter was trained on {self.trained_on}, "
                                f"and {name} of the model is another one"
                            )
            except SafetensorError as error:
                raise ValueError(f"{path}: not readable as safetensors: {error}") from error
        return not missing

    @torch.no_grad()
    def merge(self, module: nn.Module) -> None:
        """Add it to the weights, in place. Raises ``ValueError`` as ``check_layers``."""
        self.check_layers(module)
        parameters = dict(module.named_parameters())
        for layer in self.pairs:
            weight = parameters[f"{layer}.weight"]
            weight.add_(self.delta(layer))


def write_adapter(
    folder: str | Path,
    module: nn.Module,
    weights: Mapping[str, Tensor],
    base: AdapterBase,
    provenance: Provenance,
    card: str,
) -> None:
    """Write the folder of an adapter. It appears complete or not at all.

    Args:
        module: a transformer or a ``VQTokenizer``, with the adapter.
        weights: its state dict.

    Raises:
        OSError: if something could not be written. What was there before is left.
    """
    config = stored_config(module)
    prefix = PREFIX if isinstance(module, Transformer) else WRAPPER
    named = {
        f"{prefix}{name}": weight.detach().cpu().contiguous()
        for name, weight in adapter_weights(module, weights).items()
    }
    with atomic_folder(local_path(folder), last=CONFIG) as part:
        (part / CONFIG).write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        save_file(named, part / WEIGHTS, metadata={"format": "pt"})
        about = StoredBase(1, base, _fingerprint(config, named))
        (part / BASE).write_text(json.dumps(asdict(about), indent=1) + "\n", "utf-8")
        (part / "README.md").write_text(card, "utf-8")
        provenance.write(part)


def _checked(config: Mapping[str, Any]) -> tuple[int, float]:
    """The rank and the scale. Raises ``ValueError`` for what is not plain LoRA."""
    for name, value in config.items():
        plain = FIXED.get(name, (None, False, "", [], {}))
        if name not in READ + WITHOUT_EFFECT and value not in plain:
            raise ValueError(f"{name}={value!r:.80}: only plain LoRA is read")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 0 < rank <= 2**16:
        raise ValueError(f"r={rank!r:.80}: expected the rank")
    check_value("lora_alpha", alpha, float)
    assert isinstance(alpha, int | float)
    root = config.get("use_rslora") is True
    return rank, alpha / (math.sqrt(rank) if root else rank)


def _pairs(
    folder: Path, weights: Mapping[str, Tensor], rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by layer. Raises ``ValueError`` for weights of other names, shapes or values."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        layer, _, kind = name.removeprefix(WRAPPER).rpartition(".lora_")
        known = name.startswith((PREFIX, *(f"{WRAPPER}{part}" for part in OF_IMAGES)))
        if not known or kind not in ("A.weight", "B.weight"):
            raise ValueError(f"{folder / WEIGHTS}: {name!r:.120} is not a weight of a plain LoRA")
        layer, kernel = layer.removeprefix("model."), weight.shape[2:] if kind[0] == "B" else ()
        flat = weight.ndim in (2, 4) and set(kernel) <= {1}  # B of a convolution is 1 x 1
        if not flat or weight.shape["AB".index(kind[0])] != rank:
            raise ValueError(
                f"{folder / WEIGHTS}: {name!r:.120} has shape {tuple(weight.shape)}, and the rank "
                f"is {rank}"
            )
        if not weight.is_floating_point() or not weight.isfinite().all():
            raise ValueError(f"{folder / WEIGHTS}: {name!r:.120} has values that are not numbers")
        found.setdefault(layer, {})[kind[0]] = weight
    if not found:
        raise ValueError(f"{folder / WEIGHTS}: is empty")
    for layer, pair in found.items():
        if len(pair) < 2:
            raise ValueError(f"{folder / WEIGHTS}: {layer!r:.120} has only one of its two matrices")
    return {layer: (pair["A"], pair["B"]) for layer, pair in found.items()}


def _fingerprint(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """16 hex digits over what decides what an adapter does."""
    return digest_of({name: config.get(name) for name in READ}, dict(weights))
