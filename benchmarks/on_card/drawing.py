"""Drawings a second both ways, and images a second of an image tokenizer."""

from collections.abc import Iterator
from typing import get_args

import torch

from multimodal.inference.drawing import draw_codes
from multimodal.model.checkpoint import ModelParts
from multimodal.options import DrawOptions, Method
from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
from multimodal.tokenizers.image import ImageTokenizer
from multimodal.tokenizers.text import TextTokenizer
from on_card.sizes import Figure, Sizes, seconds_of

TEXT = "A brown dog runs over the grass with a red ball in its mouth ."
DRAWING = [f"draw/{method}" for method in sorted(get_args(Method))]
TOKENIZING = ["tokenize/encode", "tokenize/decode", "tokenize/encode, compiled"]
PIXELS = 16  # of a side of a code


def image_tokenizer(sizes: Sizes) -> ImageTokenizer:
    """The ViT of the photos recipe, with random weights."""
    torch.manual_seed(0)
    vit = {"name": "vit", "dim": 192, "encoder_depth": 2, "decoder_depth": 3, "heads": 4}
    quantizer = {"name": "vq", "codebook_size": sizes.codebook, "channels": 8}
    config = VQTokenizerConfig(PIXELS * sizes.grid, "squash", PIXELS, vit, quantizer)
    return ImageTokenizer(detail=VQTokenizer(config)).eval()


def draw(sizes: Sizes) -> Iterator[Figure]:
    """Drawings of ``large`` in bf16 with guidance, from a text to codes."""
    text = TextTokenizer.train([TEXT], 320)
    model = ModelParts.new(sizes.models["large"], text, image_tokenizer(sizes)).eval()
    model.network.to(torch.bfloat16)
    model.to(sizes.device)
    model.network.graphs = sizes.graphs()
    texts = [TEXT] * sizes.drawings
    for method in sorted(get_args(Method)):
        options = DrawOptions(method=method, steps=8)
        seconds = seconds_of(lambda options=options: draw_codes(model, texts, options), 1)
        more = {"at once": sizes.drawings, "codes": sizes.grid**2, "size": sizes.models["large"]}
        yield Figure(f"draw/{method}", sizes.drawings / seconds, "drawings/s", more)


@torch.inference_mode()
def tokenize(sizes: Sizes) -> Iterator[Figure]:
    """Images to codes and back, in fp32: in bf16 an image would have other codes."""
    tokenizer = image_tokenizer(sizes).to(sizes.device)
    side = PIXELS * sizes.grid
    pixels = torch.rand(sizes.images, 3, side, side, device=sizes.device) * 2 - 1
    codes = tokenizer.encode(pixels)
    more = {"at once": sizes.images, "pixels": side}
    seconds = seconds_of(lambda: tokenizer.encode(pixels), sizes.steps)
    yield Figure("tokenize/encode", sizes.images / seconds, "images/s", more)
    seconds = seconds_of(lambda: tokenizer.decode(codes), sizes.steps)
    yield Figure("tokenize/decode", sizes.images / seconds, "images/s", more)
    encode = torch.compile(tokenizer.encode) if sizes.compiled else tokenizer.encode
    same = (encode(pixels) == codes).float().mean().item()
    seconds = seconds_of(lambda: encode(pixels), sizes.steps)
    more = {**more, "equal codes": same}
    yield Figure("tokenize/encode, compiled", sizes.images / seconds, "images/s", more)
