"""Training that compares the network with its reference: the weights that a run starts from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from multimodal.adapters.lora import without_adapter
from multimodal.model.network import MultimodalLM
from multimodal.train.joint import JointModule
from multimodal.train.sharding import unsharded


class ReferencedModule(JointModule):
    """Can keep what ``--init_from`` gave as a frozen reference, as long as the run lasts.

    With ``lora`` the network without its adapter is the reference, so it costs no memory. Otherwise
    (and with ``new_rows``) it is a copy, which is kept in the checkpoints and never exported.

    Args:
        joint: the arguments of JointModule.
    """

    def __init__(self, **joint: Any) -> None:
        super().__init__(**joint)
        self.needs_reference = self.has_reference = False
        self.reference: MultimodalLM | None = None

    def keep_reference(self) -> None:
        """Have a reference. To be called by ``__init__``."""
        self.needs_reference = True
        if self.lora is None or self.lora.new_rows:
            self.reference = MultimodalLM(self.network.config).requires_grad_(False)
            self.reference.attention_backend = self.network.attention_backend

    def train(self, mode: bool = True) -> "ReferencedModule":
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def init_from(self, folder: str) -> None:
        super().init_from(folder)
        if self.reference is not None:
            self.reference.load_state_dict(self.network.state_dict())
        self.has_reference = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.has_reference = True

    def on_fit_start(self) -> None:
        if self.needs_reference and not (self.has_reference or self.trainer.ckpt_path):
            raise ValueError(
                "the network is compared with the weights that a run starts from: give a model "
                "with --init_from"
            )
        super().on_fit_start()

    @contextmanager
    def as_reference(self) -> Iterator[MultimodalLM]:
        """The reference, without dropout and gradients."""
        with torch.no_grad():
            if self.reference is not None:
                yield self.reference
                return
            mode = self.network.training
            self.network.eval()
            try:
                with unsharded(self.network), without_adapter(self.network.transformer):
                    yield self.network
            finally:
                self.network.train(mode)
