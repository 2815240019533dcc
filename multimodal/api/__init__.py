"""What a person does with a model: ``load`` it, then call the methods of ``Model``."""

from multimodal.api.model import Model, load

__all__ = ["Model", "load"]
