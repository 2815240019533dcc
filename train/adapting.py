"""What of a training module concerns an adapter: where it begins, its checkpoints, its folder."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from multimodal.adapters.folder import AdapterBase, write_adapter
from multimodal.adapters.lora import (
    LoraConfig,
    adapter_parts,
    has_adapter,
    inject,
    merged_weights,
    train_rows_from,
)
from multimodal.model.checkpoint import ModelParts
from multimodal.model.network import MultimodalLM
from multimodal.train.optim import MuonModule
from multimodal.train.sharding import fsdp_modules, full_state_dict, shard


class LoraModule(MuonModule):
    """Trains a module, or with ``lora`` only an adapter for it.

    The layers of the adapter come in ``configure_model``: after ``init_from``, and before the
    weights of a checkpoint. A checkpoint has the weights of the base too, so a run resumes without
    the folder that it started from.

    Args:
        learning_rate, weight_decay, warmup_steps, learning_rates: see MuonModule.
        lora: of the adapter.
    """

    def __init__(
        self,
        learning_rate: float,
        weight_decay: float,
        warmup_steps: int,
        learning_rates: Mapping[str, float] | None = None,
        lora: LoraConfig | None = None,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_steps, learning_rates)
        self.lora = lora
        self.base: AdapterBase | None = None
        if lora is not None and not lora.new_rows:
            self.exports = "adapter"

    @property
    @abstractmethod
    def adapted(self) -> nn.Module:
        """What gets the adapter."""

    @property
    def heads(self) -> list[nn.Module]:
        # AdamW learns more with them than Muon (docs/decisions/fine_tuning.md).
        return [*super().heads, *adapter_parts(self.adapted)]

    def configure_model(self) -> None:
        if self.lora is None or has_adapter(self.adapted):
            return
        self.adapted.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            # The same A however many ranks there are: their start sets the seed anew.
            torch.default_generator.manual_seed(torch.initial_seed())
            inject(self.adapted, self.lora)

    def on_fit_start(self) -> None:
        if not self.trainer.ckpt_path:  # with FSDP2 it is loaded later
            self._check_base()

    def _check_base(self) -> None:
        if self.exports == "adapter" and self.base is None:
            raise ValueError(
                "lora: an adapter needs a model that it adapts: give --init_from, or a language "
                "model as size, and lora.new_rows"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.lora is not None and self.base is not None:
            checkpoint["adapter_base"] = asdict(self.base)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.lora is not None and "adapter_base" in checkpoint:
            self.base = AdapterBase(**checkpoint["adapter_base"])
        self._check_base()

    def write_adapter(self, folder: str | Path, weights: Mapping[str, Tensor]) -> None:
        """Write the folder of the adapter.

        Args:
            weights: of ``adapted``.
        """
        assert self.base is not None, "see on_fit_start"
        title = f"An adapter (LoRA) of {self.base.name} ({self.base.fingerprint})"
        if self.lora is not None and self.lora.bits is not None:
            title += f", trained over weights of {self.lora.bits} bits"
        card, provenance = self.card(title), self.provenance()
        write_adapter(folder, self.adapted, weights, self.base, provenance, card)


class AdapterModule(LoraModule):
    """Trains a network, or with ``lora`` only an adapter for it."""

    network: MultimodalLM

    @property
    def adapted(self) -> nn.Module:
        return self.network.transformer

    @property
    def no_weight_decay(self) -> list[nn.Module]:
        # Decay would shrink the rows of texts, which stay as they are.
        tables = [*self._tables()] if self.lora is not None and self.lora.new_rows else []
        return [*super().no_weight_decay, *tables]

    def _tables(self) -> tuple[Any, Any]:
        """The embeddings, and the output layer, which may share them."""
        return self.network.transformer.embed_tokens, self.network.transformer.lm_head

    def base_network(self, network: MultimodalLM) -> MultimodalLM:
        """The network to train: the given one, or a quantized one in its place (``lora.bits``)."""
        if self.lora is None or self.lora.bits is None:
            return network
        return MultimodalLM(network.config.with_bits(self.lora.bits))

    def configure_model(self) -> None:
        starts = self.lora is not None and not has_adapter(self.adapted)
        if starts:
            self.network.requires_grad_(False)
        super().configure_model()
        if starts and self.lora is not None and self.lora.new_rows:
            self._train_new_rows()
        if self.device_mesh is None or fsdp_modules(self.network):
            return
        if self.lora is not None and self.lora.bits is not None:
            raise ValueError("lora.bits: quantized weights are not sharded; use the strategy ddp")
        shard(self.network, self.device_mesh["data_parallel"])  # FSDP2

    def on_fit_start(self) -> None:
        super().on_fit_start()
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        averages = any(isinstance(callback, WeightAveraging) for callback in callbacks)
        if averages and self.lora is not None and self.lora.bits is not None:
            raise ValueError("lora.bits: integers have no average; leave out WeightAveraging")

    def _train_new_rows(self) -> None:
        if self.device_mesh is not None:
            raise ValueError("lora.new_rows: needs whole tables, and FSDP2 divides them: use ddp")
        for weight in dict.fromkeys(table.weight for table in self._tables()):
            train_rows_from(weight, self.network.config.text_size)
        self.network.alignment.requires_grad_(bool(self.network.config.objectives.alignment_weight))

    def note_base(self, folder: str, source: ModelParts) -> None:
        """Note the model that an adapter is for.

        Raises:
            ValueError: if this run would change more of it than an adapter can.
        """
        if self.lora is None or self.lora.new_rows:
            return
        ours, theirs = self.network.config, source.config
        ours = ours.with_bits(theirs.transformer.weight_bits)
        if replace(ours, objectives=theirs.objectives) != theirs:
            raise ValueError(
                "an adapter (lora) keeps the sizes, the levels, the experts and what is read: "
                "those of this run are others"
            )
        self.base = AdapterBase(folder, source.fingerprint)
        if self.lora.bits is not None and theirs.transformer.weight_bits is None:
            rank_zero_warn(
                f"lora.bits={self.lora.bits}: the adapter is trained over rounded weights, and "
                f"will be added to those of {folder}, which are not rounded: better run "
                "`multimodal quantize` first, and train over what it writes"
            )

    def written_network(self) -> MultimodalLM | None:
        """The network that a model folder has: whole, with the adapter merged into it.

        Every rank has to call. None: another rank has it.
        """
        sharded = bool(fsdp_modules(self.network))
        if not sharded and self.lora is None:
            return self.network if self.writes_files else None
        weights = full_state_dict(self.network) if sharded else self.network.state_dict()
        if not self.writes_files:
            return None
        network = MultimodalLM(self.network.config)
        if self.lora is not None:
            inside = "transformer."
            weights = {name: w for name, w in weights.items() if not name.startswith(inside)}
            merged = merged_weights(self.network.transformer)
            weights |= {f"{inside}{name}": weight for name, weight in merged.items()}
        network.load_state_dict(weights)
        return network

    def export_adapter(self, folder: str | Path) -> None:
        """Write the folder of the adapter. Every rank has to call."""
        sharded = bool(fsdp_modules(self.network))
        weights = full_state_dict(self.network) if sharded else self.network.state_dict()
        if not self.writes_files:
            return
        inside = "transformer."
        of_transformer = {
            name.removeprefix(inside): weight
            for name, weight in weights.items()
            if name.startswith(inside)
        }
        self.write_adapter(folder, of_transformer)
