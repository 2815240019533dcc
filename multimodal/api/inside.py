"""Looking inside: the codes of images, and where a model looks as it writes about one."""

from __future__ import annotations  # help() shows the names of types as they are written

from dataclasses import dataclass

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from multimodal.data.images import to_image
from multimodal.inference.batch import check_length
from multimodal.inference.codec import (
    decode_images,
    encode_images,
    encode_text,
    encode_to_read,
    read_images,
)
from multimodal.inference.text import caption_codes
from multimodal.inference.values import Images, ImageSource, is_one, to_list
from multimodal.model.checkpoint import ModelParts
from multimodal.model.layers.attention import attention_mask
from multimodal.model.layers.maps import attention_maps
from multimodal.model.sequences import describe_prompt
from multimodal.options import shows_types
from multimodal.tokenizers.levels import Layout

BEFORE_CODES = 2  # <bos> and <boi>


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Where a model looks as it chooses each token of a text about an image.

    Shapes: N layers, H heads, T tokens of the text, L tokens of the whole sequence: <bos>, <boi>,
    the codes that are read, <eoi>, the text.

    Attributes:
        tokens: the T tokens as texts. Joined they are the text, if none has a part of a character.
        weights: float32[N, H, T, L]. Row t is of the state that predicts token t: it sees the image
            and the tokens before t. It sums to 1.
        layout: of all codes of an image.
        reads: the levels that the model reads.
    """

    tokens: list[str]
    weights: Tensor
    layout: Layout
    reads: tuple[str, ...]

    def on_image(self, level: str | None = None) -> Tensor:
        """The weights on the positions of a level, row by row from the top left.

        Args:
            level: its name. None: the first that is read.

        Returns:
            float32[N, H, T, h, w]. The codes of one position count together. What is missing to 1
            fell on other levels, on <bos> and the like, and on the text.

        Raises:
            ValueError: for a level that is not read.
        """
        name = self.reads[0] if level is None else level
        if name not in self.reads:
            raise ValueError(f"level {name!r}: this model reads {', '.join(self.reads)}")
        span, grid = self.layout.span(name, self.reads), self.layout[name].grid
        weights = self.weights[..., BEFORE_CODES + span.start : BEFORE_CODES + span.stop]
        of_groups = rearrange(weights, "n h t (y x g) -> n h t y x g", y=grid, x=grid)
        return of_groups.sum(-1)


class InsideMethods(ModelParts):
    """The methods of ``Model`` that show what is between pixels and texts."""

    @shows_types
    def encode_images(self, images: ImageSource | Images) -> Tensor:
        """The codes of an image, or of each of several, at all levels.

        ``model.config.layout.unflatten(level, codes)`` arranges those of a level as a grid.

        Returns:
            int64[n] of one image, int64[B, n] of several, on the CPU.
        """
        codes = encode_images(self, read_images(self, to_list(images))).cpu()
        return codes[0] if is_one(images) else codes

    @shows_types
    def decode_images(self, codes: Tensor) -> Image.Image | list[Image.Image]:
        """The image of codes at all levels: of int64[n] one, of int64[B, n] several.

        Raises:
            ValueError: for codes out of their range, or an image tokenizer that cannot draw.
        """
        alone = codes.ndim == 1
        pixels = decode_images(self, codes[None] if alone else codes)
        pictures = [to_image(image) for image in pixels]
        return pictures[0] if alone else pictures

    @shows_types
    def attention(self, image: ImageSource, text: str | None = None) -> AttentionMaps:
        """Where the model looks as it chooses each token of a text about an image.

        Weights say where information is taken from, layer by layer. They do not prove what caused
        a word (Jain & Wallace 2019, arXiv:1902.10186).

        Args:
            text: the text. None: the model's own caption, greedy.

        Raises:
            ValueError: for an empty text, or one that is too long.
        """
        codes = encode_to_read(self, read_images(self, [image]))
        words = caption_codes(self, codes)[0] if text is None else text
        prompt, ids = describe_prompt(self.vocabulary, codes[0].tolist()), encode_text(self, words)
        check_length(self.network, [prompt], len(ids))
        sequence = torch.tensor([prompt + ids], device=self.device)
        maps = attention_maps(
            self.network.transformer,
            sequence,
            torch.arange(sequence.shape[1], device=self.device)[None],
            attention_mask(torch.ones_like(sequence), torch.zeros_like(sequence)),
        )
        first = len(prompt) - 1  # the state at <eoi> predicts the first token
        return AttentionMaps(
            [self.text_tokenizer.decode([token]) for token in ids],
            maps[:, 0, :, first:-1].cpu(),
            self.config.layout,
            self.config.reads,
        )
