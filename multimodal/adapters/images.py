"""An adapter of the autoencoder of images, merged into the level of detail of an image tokenizer.

Only that level has weights that gradients reach. Meaning is a frozen encoder, and its codes are the
nearest of fixed vectors. An adapter of the decoder keeps all codes: any model that knows them draws
with it. One of the encoder changes the codes: a model has to be trained on them.
"""

from pathlib import Path

from multimodal.adapters.folder import Adapter
from multimodal.tokenizers.image import ImageTokenizer


def adapt_images(tokenizer: ImageTokenizer, adapter: Adapter, name: str | Path) -> None:
    """Merge an adapter into an image tokenizer, in place.

    Args:
        name: of the tokenizer or its model, for errors.

    Raises:
        ValueError: if there is no level of detail, or the adapter is for another one.
    """
    if tokenizer.detail is None:
        raise ValueError(f"{adapter.folder}: {name} has no level of detail to adapt")
    adapter.check_base(f"the level of detail of {name}", tokenizer.detail.fingerprint)
    adapter.merge(tokenizer.detail)
    tokenizer.provenance += adapter.provenance


def adapt_decoder(tokenizer: ImageTokenizer, adapter: Adapter, name: str | Path) -> None:
    """As ``adapt_images``, for a model that knows the codes: they must stay as they are.

    Raises:
        ValueError: as ``adapt_images``, and for an adapter of the encoder.
    """
    if any(layer.startswith("encoder.") for layer in adapter.pairs):
        raise ValueError(
            f"{adapter.folder}: adapts the encoder of images, so their codes become others than "
            "the model has learned: merge it into the image tokenizer (multimodal export model "
            "MODEL/image_tokenizer OUT --adapter DIR), and train a model on that"
        )
    adapt_images(tokenizer, adapter, name)
