"""What a person does with a model: ``load`` it, then call the methods of ``Model``."""

from multimodal.api.model import Model, check_device, load

__all__ = ["Model", "check_device", "load"]
