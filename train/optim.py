"""The optimizer of all training modules: Muon, warm-up and cosine, clipping by global norm."""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from timm.optim import muon as timm_muon
from timm.optim.muon import Muon
from torch import Tensor, nn

from multimodal.devices import has_slow_bfloat16
from multimodal.model.layers.experts import Router
from multimodal.model.layers.transformer import Transformer
from multimodal.provenance import Provenance, run_card
from multimodal.train.sharding import clip_gradients


class MuonModule(L.LightningModule):
    """A LightningModule that Muon and AdamW train.

    Muon trains the matrices and kernels inside the network, those of each expert too. AdamW trains
    embeddings, the head, norms, biases, routers, the modules of ``heads``, and codebooks. Muon
    makes the update of a matrix orthogonal (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). The update is scaled as in Liu et al. 2025
    (arXiv:2502.16982), so that one learning rate fits both.
    AdamW alone needs twice the steps here (docs/decisions/optimizer.md has the numbers).

    Args:
        learning_rate: of Muon and AdamW, at the end of the warm-up.
        weight_decay: of both.
        warmup_steps: steps of the linear warm-up. A cosine to zero follows.
        learning_rates: other learning rates, by name as in ``parameters_named``.

    Attributes:
        best_by: which validation is the best, by a logged value: NAME:min, NAME:max, or last.
        exports: the name of the folder that a run writes, in its own folder.
    """

    best_by = "val/total:min"
    exports = "model"

    def __init__(
        self,
        learning_rate: float,
        weight_decay: float,
        warmup_steps: int,
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.learning_rates = warmup_steps, dict(learning_rates or {})
        self.started_from = Provenance()  # of everything that this run was given, but its data

    @property
    def writes_files(self) -> bool:
        """Whether this is the first rank, or no training at all."""
        return self._trainer is None or self.trainer.is_global_zero

    @property
    def is_logged(self) -> bool:
        """Whether this training step is logged. What costs time is measured in these steps only."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.global_step + 1) % every == 0

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """As Lightning's, which would wait for a GPU with each number that is no tensor."""
        if isinstance(value, int | float):
            value = torch.full((), float(value), device=self.device)
        super().log(name, value, *args, **options)

    @property
    def heads(self) -> list[nn.Module]:
        """Modules that serve a loss only, and are not exported, and adapters. AdamW trains them."""
        return []

    @property
    def no_weight_decay(self) -> list[nn.Module]:
        """Modules without weight decay, such as codebooks. AdamW trains them."""
        return []

    def note_source(self, name: str, fingerprint: str, provenance: Provenance) -> None:
        """Note a model that the weights come from. Checkpoints keep it."""
        self.started_from += provenance.of_model(name, fingerprint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["provenance"] = asdict(self.started_from)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored = checkpoint.get("provenance", {})
        self.started_from += Provenance(
            tuple(stored.get("licenses", ())), tuple(stored.get("sources", ()))
        )

    def provenance(self) -> Provenance:
        """Of the weights as they are now: what they started from, and the data of this run."""
        data: Any = getattr(self._trainer, "datamodule", None)
        sources = data.sources() if hasattr(data, "sources") else ()
        return self.started_from + Provenance(sources=tuple(sources))

    def card(self, title: str) -> str:
        """The card of the weights as they are now: data, steps, numbers, what they started from."""
        numbers: dict[str, float] = {}
        if self._trainer is not None:
            measured = self._trainer.callback_metrics.items()
            numbers = {name: float(value) for name, value in measured if name.startswith("val")}
        steps = 0 if self._trainer is None else self._trainer.global_step
        return run_card(title, self.provenance(), steps, numbers)

    def configure_optimizers(self) -> Any:
        rates = {
            parameter: rate
            for name, rate in self.learning_rates.items()
            for parameter in parameters_named(self, name)
        }
        optimizer = muon(
            self, self.heads, self.learning_rate, self.weight_decay, self.no_weight_decay, rates
        )
        steps = self.trainer.estimated_stepping_batches
        schedule = warmup_cosine(optimizer, self.warmup_steps, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, and log it."""
        norm = clip_gradients(list(self.parameters()), gradient_clip_val or math.inf)
        self.log("train/gradient_norm", norm)


def parameters_named(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of a part of a module.

    Args:
        module: whose parameters are searched.
        name: of a parameter or a submodule (``network.transformer.layers.0``), or a pattern
            (``*.mlp.*``).

    Raises:
        ValueError: if there are none.
    """
    parameters = [
        parameter
        for key, parameter in module.named_parameters()
        if key == name or key.startswith(f"{name}.") or fnmatchcase(key, name)
    ]
    if not parameters:
        parts = dict.fromkeys(".".join(key.split(".")[:2]) for key, _ in module.named_parameters())
        raise ValueError(f"{name!r}: no part of that name; there is {', '.join(parts)}")
    return parameters


def has_compiler() -> bool:
    """Whether torch.compile finds what it needs: on a CPU a C++ compiler, on a GPU one of C."""
    if torch.cuda.is_available():  # Triton compiles what starts its kernels
        return bool(os.environ.get("CC")) or any(map(shutil.which, ("gcc", "clang")))
    return any(map(shutil.which, ("g++", "clang++")))


def can_compile() -> bool:
    """Whether torch.compile works here. Warns if it does not."""
    if has_compiler():
        return True
    on_gpu = torch.cuda.is_available()
    needed = "a C compiler (gcc, clang)" if on_gpu else "a C++ compiler (g++, clang++)"
    rank_zero_warn(f"compile: true needs {needed}, found none: not compiling")
    return False


_of_timm = timm_muon.zeropower_via_newtonschulz


def _orthogonal(update: Tensor, *args: Any, **options: Any) -> Tensor:
    """timm's iteration, in float32 where bfloat16 is slow: Muon has no option for it."""
    options["dtype"] = torch.float32 if has_slow_bfloat16(update.device) else torch.bfloat16
    return _of_timm(update, *args, **options)


timm_muon.zeropower_via_newtonschulz = _orthogonal  # type: ignore[assignment]


def muon(
    module: nn.Module,
    heads: list[nn.Module],
    learning_rate: float,
    weight_decay: float,
    no_weight_decay: Sequence[nn.Module] = (),
    rates: Mapping[nn.Parameter, float] | None = None,
) -> Muon:
    """Muon for matrices and kernels, AdamW for all other parameters.

    Args:
        module: its trainable parameters are optimised.
        heads: modules that AdamW trains.
        learning_rate: of all parameters that ``rates`` does not name.
        weight_decay: of all parameters but norms, biases and ``no_weight_decay``.
        no_weight_decay: modules without weight decay. AdamW trains them.
        rates: learning rates of single parameters.
    """
    # A router is a classifier: an orthogonal update would give every expert a score as different.
    adamw_modules = [m for m in module.modules() if isinstance(m, nn.Embedding | Router)] + heads
    # A head of its own, whose rows are tokens as those of the embeddings are.
    adamw_modules += [m.lm_head for m in module.modules() if isinstance(m, Transformer)]
    adamw = {id(p) for part in adamw_modules for p in part.parameters()}
    undecayed = {id(p) for part in no_weight_decay for p in part.parameters()}
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in undecayed]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in matrices if id(p) not in adamw]},
        {"params": [p for p in matrices if id(p) in adamw], "use_fallback": True},
        {
            "params": [p for p in parameters if p.ndim < 2 or id(p) in undecayed],
            "use_fallback": True,
            "weight_decay": 0.0,
        },
    ]
    rate_of = {id(parameter): rate for parameter, rate in (rates or {}).items()}
    groups_by_rate = []
    for group in groups:
        group_rates = [rate_of.get(id(p), learning_rate) for p in group["params"]]
        for rate in dict.fromkeys(group_rates):
            params = [p for p, r in zip(group["params"], group_rates, strict=True) if r == rate]
            groups_by_rate.append({**group, "params": params, "lr": rate})
    return Muon(
        groups_by_rate,
        lr=learning_rate,
        weight_decay=weight_decay,
        betas=(0.9, 0.95),
        nesterov=True,
        ns_coefficients="polar_express",
        adjust_lr_fn="match_rms_adamw",
    )


def warmup_cosine(
    optimizer: torch.optim.Optimizer, warmup_steps: int, steps: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine to zero at the end of training.

    Args:
        steps: of the whole training.

    Raises:
        ValueError: if the training has no end.
    """
    if math.isinf(steps):
        raise ValueError("the schedule needs an end: give trainer.max_steps or trainer.max_epochs")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
