"""A model in the interface of open_clip: its zero-shot and retrieval code runs on ours.

    model, preprocess, tokenizer = as_open_clip(multimodal.load("starter"))
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)

Shapes: B images or texts, S pixels of a side, L tokens, E width of an embedding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from multimodal.data.images import fit_image, open_image, to_tensor
from multimodal.inference.batch import DecodeBatch
from multimodal.inference.codec import encode_text, encode_to_read
from multimodal.inference.embedding import embed_codes
from multimodal.model.checkpoint import ModelParts
from multimodal.model.sequences import draw_prompt


class ClipModel(nn.Module):
    """``encode_image``, ``encode_text`` and ``logit_scale``, as open_clip's models have them.

    Embeddings always have unit norm, whatever ``normalize`` is.

    Attributes:
        logit_scale: log of what similarities are multiplied by, float32[].
        logit_bias: what is added to them, float32[]. 0 for a softmax.
    """

    def __init__(self, parts: ModelParts) -> None:
        super().__init__()
        self._parts = (parts,)  # in a tuple: ``to`` must not round the image tokenizer
        alignment = parts.network.alignment
        # Copies: ``half`` rounds what a module has.
        self.logit_scale = nn.Parameter(alignment.log_scale.detach().clone())
        self.logit_bias = nn.Parameter(alignment.bias.detach().clone())

    @property
    def parts(self) -> ModelParts:
        return self._parts[0]

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Images as ``preprocess`` gives them, float[B, 3, S, S] -> float32[B, E]."""
        with torch.autocast(self.parts.device.type, enabled=False):
            codes = encode_to_read(self.parts, images.float())  # codes are made in float32
        # A clone is no tensor of inference mode: a product with the scale may have a gradient.
        return embed_codes(self.parts, codes).to(images.device).clone()

    @torch.no_grad()
    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Texts as the tokenizer gives them, int64[B, L] -> float32[B, E]."""
        vocabulary = self.parts.vocabulary
        rows = [[i for i in row if i != vocabulary.pad] for row in tokens.tolist()]
        prompts = [draw_prompt(vocabulary, row) for row in rows]
        states = DecodeBatch(self.parts.network, prompts, 0).hidden
        return self.parts.network.alignment.embed_text(states).to(tokens.device)

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Any]:
        """What open_clip's models return in training: the embeddings, scale and bias."""
        return {
            "image_features": None if image is None else self.encode_image(image),
            "text_features": None if text is None else self.encode_text(text),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


class ClipTokenizer:
    """Texts to ids, padded: what ``encode_text`` reads."""

    def __init__(self, parts: ModelParts) -> None:
        self.parts = parts

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Texts to int64[B, L].

        Args:
            context_length: at most so many ids of each. None: all.

        Raises:
            ValueError: for an empty text.
        """
        texts = [texts] if isinstance(texts, str) else texts
        rows = [encode_text(self.parts, text)[:context_length] for text in texts]
        ids = torch.full((len(rows), max(map(len, rows), default=0)), self.parts.vocabulary.pad)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        return ids


def as_open_clip(
    parts: ModelParts,
) -> tuple[ClipModel, Callable[[Image.Image], Tensor], ClipTokenizer]:
    """A model as ``open_clip.create_model_and_transforms`` and ``get_tokenizer`` give one.

    Returns:
        The model, a function from a Pillow image to float32[3, S, S], and the tokenizer.
    """
    tokenizer = parts.image_tokenizer

    def preprocess(image: Image.Image) -> Tensor:
        return to_tensor(fit_image(open_image(image), tokenizer.image_size, tokenizer.fit))

    return ClipModel(parts), preprocess, ClipTokenizer(parts)
