"""Frozen pretrained encoders of timm and open_clip, by name.

By default the features are those that the network's own classifier pools, on their grid. On
flickr8k they find better captions than the stage before (docs/decisions/meaning.md).

    timm:tf_efficientnet_lite0            downloaded by its name, or from the cache
    timm:tf_efficientnet_lite0=lite0.pth  weights from a file
    open_clip:ViT-B-32/laion2b_s34b_b79k  the image tower of an architecture and its weights
    open_clip:ViT-B-32/laion2b_s34b_b79k=weights.safetensors

Files are safetensors, or checkpoints that torch opens with ``weights_only``: nothing in them runs.

Shapes: B images, H W pixels, h w a grid of positions, D channels of all stages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Self, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.files import open_file
from multimodal.tokenizers.folding import fold_batch_norms
from multimodal.tokenizers.weights import load_weights

KINDS = ("timm", "open_clip")
_folding = Lock()


@dataclass(frozen=True)
class EncoderName:
    """The parts of ``KIND:MODEL[=FILE]``."""

    kind: str
    model: str
    file: str = ""

    @classmethod
    def parse(cls, name: str) -> "EncoderName":
        """Raises ``ValueError`` that says what is expected."""
        kind, _, rest = name.partition(":")
        model, _, file = rest.partition("=")
        if kind not in KINDS or not model:
            expected = " or ".join(f"{kind}:MODEL[=FILE]" for kind in KINDS)
            raise ValueError(f"encoder {name!r}: expected {expected}")
        if file and not Path(file).is_file():
            raise ValueError(f"encoder {name!r}: {file}: no such file")
        return cls(kind, model, file)

    def __str__(self) -> str:
        return f"{self.kind}:{self.model}"


class Encoder(nn.Module):
    """Feature maps of a frozen network.

    The maps of several stages are resized to the grid of the last one, and their channels stand
    side by side. The normalisation is that of the weights.

    Args:
        name: ``KIND:MODEL[=FILE]``.
        stages: () for the final features, None for all stages, or numbers of stages, -1 the last.
            Stages of a convolutional network halve the resolution; those of a transformer are its
            blocks.
        pretrained: load weights. Without them they are random, to be filled by ``load_state_dict``.

    Raises:
        ValueError: for an unknown name or stage, or weights that are not available.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, stages: Sequence[int] | None = (), pretrained: bool = True
    ) -> None:
        super().__init__()
        parsed = EncoderName.parse(name)
        self._folded: tuple[nn.Module] | None = None  # in a tuple: it is no part of this module
        self.name, self.stages = str(parsed), None if stages is None else tuple(stages)
        make = _timm if parsed.kind == "timm" else _open_clip
        self.network, mean, std, self.image_size = make(parsed, self.stages, pretrained)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Encoder":
        return super().train(False)  # always in eval mode, also inside a module in training

    @torch.no_grad()
    def _shape(self, size: int) -> torch.Size:
        return self(torch.zeros(1, 3, size, size)).shape

    def grid(self, size: int) -> int:
        """Positions per side of an image of so many pixels per side."""
        return self._shape(size)[1]

    @property
    def channels(self) -> int:
        """D."""
        return self._shape(self.image_size)[3]

    def maps(self, images: Tensor) -> list[Tensor]:
        """The feature map of each stage.

        Args:
            images: float[B, 3, H, W] in [-1, 1].

        Returns:
            float[B, C, h, w] for each stage.
        """
        # This order of memory is a third faster on a CPU.
        images = images.contiguous(memory_format=torch.channels_last)
        as_it_is = torch.is_grad_enabled() or images.is_meta  # without values there is no folding
        network = self.network if as_it_is else self._without_norms()
        return network(((images + 1) / 2 - self.mean) / self.std)

    def _without_norms(self) -> nn.Module:
        """The network for inference. It is made again after the weights have changed."""
        with _folding:  # several threads may encode
            if self._folded is None:
                shape = 1, 3, self.image_size, self.image_size
                waves = torch.arange(math.prod(shape), device=self.mean.device).sin()
                self._folded = (fold_batch_norms(self.network, waves.view(shape).to(self.mean)),)
            return self._folded[0]

    def _apply(self, *arguments: Any, **more: Any) -> Self:
        self._folded = None
        return super()._apply(*arguments, **more)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *arguments: Any, **more: Any) -> None:
        self._folded = None
        super()._load_from_state_dict(*arguments, **more)

    def forward(self, images: Tensor) -> Tensor:
        """float[B, 3, H, W] in [-1, 1] -> float32[B, h, w, D], on the grid of the last stage."""
        maps = [stage.float() for stage in self.maps(images)]
        height, width = maps[-1].shape[-2:]
        resized = [F.adaptive_avg_pool2d(stage, (height, width)) for stage in maps]
        return torch.cat(resized, dim=1).permute(0, 2, 3, 1)


Made = tuple[nn.Module, list[float], list[float], int]


Stages: TypeAlias = tuple[int, ...] | None


def _timm(name: EncoderName, stages: Stages, pretrained: bool) -> Made:
    import timm

    if not timm.is_model(name.model):
        raise ValueError(f"encoder {name}: timm has no such model")
    kind: dict[str, Any] = {"num_classes": 0} if stages == () else {"features_only": True}
    if stages:
        kind["out_indices"] = stages
    try:
        network: Any = timm.create_model(
            name.model, pretrained=pretrained and not name.file, **kind
        )
    except (IndexError, AssertionError) as error:
        raise ValueError(f"encoder {name}: stages {stages}: {error}") from error
    except Exception as error:  # timm and its hub raise any type: no cache, no network
        raise _unavailable(name, error) from error
    if pretrained and name.file:
        whole = timm.create_model(name.model)
        weights = fit_weights(read_weights(name.file), whole.state_dict(), name.file)
        kept = network.state_dict().keys()
        # A network of features leaves out what comes after the last stage.
        renamed = {_feature_name(key, kept): weight for key, weight in weights.items()}
        network.load_state_dict({key: renamed[key] for key in kept})
    config = network.pretrained_cfg
    if stages == ():
        network = _FinalMap(network)
    return network, list(config["mean"]), list(config["std"]), int(config["input_size"][-1])


class _FinalMap(nn.Module):
    """What the classifier of a network of timm pools, as one map: [float[B, D, h, w]]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.prefix = network, int(getattr(network, "num_prefix_tokens", 0))

    def forward(self, images: Tensor) -> list[Tensor]:
        found: Tensor = self.network.forward_features(images)
        if found.ndim == 3:  # tokens, after those that stand for no position
            found = found[:, self.prefix :]
            return [rearrange(found, "b (h w) d -> b d h w", h=math.isqrt(found.shape[1]))]
        if found.shape[1] != self.network.num_features:  # some transformers have channels last
            found = found.permute(0, 3, 1, 2)
        return [found]


def _feature_name(name: str, names: Any) -> str:
    """The name of a weight in a network of features, which may flatten or wrap the network."""
    for candidate in (name, name.replace(".", "_", 1), f"model.{name}"):
        if candidate in names:
            return candidate
    return name


class _ClipTower(nn.Module):
    """The image tower of open_clip as a list of maps."""

    def __init__(self, visual: nn.Module, stages: Stages) -> None:
        super().__init__()
        self.visual, self.stages = visual, None if stages is None else list(stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        found: Any = self.visual.forward_intermediates(  # type: ignore[operator]
            images,
            indices=1 if self.stages == [] else self.stages,
            stop_early=True,
            normalize_intermediates=self.stages == [],
            intermediates_only=True,
        )
        return list(found["image_intermediates"])


def _open_clip(name: EncoderName, stages: Stages, pretrained: bool) -> Made:
    import open_clip

    model, _, tag = name.model.partition("/")
    if model not in open_clip.list_models():
        raise ValueError(f"encoder {name}: open_clip has no such model")
    if pretrained and not name.file and not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ValueError(f"encoder {name}: which weights? {name}/TAG or {name}=FILE; tags: {tags}")
    if pretrained:
        _check_activation(model, tag)
    try:
        clip: Any = open_clip.create_model(
            model,
            pretrained=tag if pretrained and not name.file else None,
            device=torch.get_default_device(),  # meta, where shapes alone are asked for
            load_weights=pretrained,
        )
    except Exception as error:
        raise _unavailable(name, error) from error
    visual = clip.visual
    if pretrained and name.file:
        weights = read_weights(name.file)
        if not all(key in weights for key in visual.state_dict()):
            start = "visual."
            weights = {k.removeprefix(start): w for k, w in weights.items() if k.startswith(start)}
        visual.load_state_dict(fit_weights(weights, visual.state_dict(), name.file))
    mean, std = list(visual.image_mean), list(visual.image_std)
    if pretrained and name.file:
        mean, std = _normalisation(model, tag) or (mean, std)
    size = visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    return _ClipTower(visual, stages), mean, std, int(side)


def _check_activation(model: str, tag: str) -> None:
    """Refuse weights that were trained with QuickGELU in a transformer with GELU: all shapes fit.

    Args:
        tag: of the weights. Empty: any of this model.

    Raises:
        ValueError: if they were, or if it depends on the tag.
    """
    from open_clip import get_model_config, list_pretrained_tags_by_model
    from open_clip.pretrained import get_pretrained_cfg

    tags = [tag] if tag else list_pretrained_tags_by_model(model)
    quick = [each for each in tags if get_pretrained_cfg(model, each).get("quick_gelu")]
    config = get_model_config(model)
    is_resnet = isinstance(config["vision_cfg"].get("layers"), list)  # and has ReLU
    if quick and not is_resnet and not config.get("quick_gelu"):
        raise ValueError(
            f"encoder open_clip:{model}: the weights {', '.join(quick)} need QuickGELU: name them "
            f"open_clip:{model}-quickgelu/TAG, and others in a file open_clip:{model}/TAG=FILE"
        )


def _normalisation(model: str, tag: str) -> tuple[list[float], list[float]] | None:
    """Mean and deviation of the pixels that weights of a file were trained on: open_clip knows them
    by the tag, and a file does not say.

    Args:
        tag: of the weights. Empty: any of this model.

    Returns:
        None if open_clip has no weights of this model.

    Raises:
        ValueError: if it depends on the tag, or if there is no such tag.
    """
    from open_clip import list_pretrained_tags_by_model
    from open_clip.pretrained import get_pretrained_cfg

    tags = list_pretrained_tags_by_model(model)
    if tag and tag not in tags:
        raise ValueError(f"encoder open_clip:{model}/{tag}: no such tag; tags: {', '.join(tags)}")
    configs = [get_pretrained_cfg(model, each) for each in ([tag] if tag else tags)]
    found = {(tuple(each["mean"]), tuple(each["std"])) for each in configs}
    if len(found) > 1:
        raise ValueError(
            f"encoder open_clip:{model}: what pixels have to be divided by depends on the weights: "
            f"name those of the file, as open_clip:{model}/TAG=FILE; tags: {', '.join(tags)}"
        )
    return next(((list(mean), list(std)) for mean, std in found), None)


def _unavailable(name: EncoderName, error: Exception) -> ValueError:
    return ValueError(
        f"encoder {name}: the weights are not available ({type(error).__name__}: {error}). "
        f"Give a file: {name}=FILE"
    )


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The weights of a file by name. Nothing in the file is run.

    Raises:
        ValueError: for a file that is neither safetensors nor a checkpoint of tensors.
    """
    if Path(file).suffix == ".safetensors":
        return load_weights(Path(file))
    open_file(file).close()  # a regular file
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(f"{file}: not readable: {error}") from error
    except Exception as error:  # pickle's own, for what weights_only refuses
        raise ValueError(f"{file}: not a checkpoint of tensors alone: {error}") from error
    for key in ("state_dict", "model", "state_dict_ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(w, Tensor) for w in state.values()):
        raise ValueError(f"{file}: not a dictionary of tensors")
    return {name.removeprefix("module."): weight for name, weight in state.items()}


def fit_weights(
    weights: dict[str, Tensor], expected: dict[str, Tensor], file: str
) -> dict[str, Tensor]:
    """Weights under the expected names.

    Other implementations of a network use other names, but often the same order: if names differ,
    and the shapes in their order are the same, they are taken in their order.

    Raises:
        ValueError: if the weights are of another network.
    """
    if expected.keys() <= weights.keys():
        found = {name: weights[name] for name in expected}
        wrong = [name for name in expected if found[name].shape != expected[name].shape]
        if not wrong:
            return found
        name = wrong[0]
        raise ValueError(
            f"{file}: {name} has shape {tuple(found[name].shape)}, "
            f"the network {tuple(expected[name].shape)}"
        )
    shapes = [tuple(weight.shape) for weight in weights.values()]
    if shapes == [tuple(weight.shape) for weight in expected.values()]:
        return dict(zip(expected, weights.values(), strict=True))
    missing = [name for name in expected if name not in weights]
    raise ValueError(
        f"{file}: weights of another network: {len(missing)} of {len(expected)} are missing, "
        f"such as {missing[0]}"
    )
