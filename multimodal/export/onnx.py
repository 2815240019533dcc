"""Export an image tokenizer to ONNX: pixels to codes, and codes to pixels, in any runtime.

Shapes: B images, S pixels of a side, n codes of an image.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.files import local_path, new_folder, write_json
from multimodal.hub.names import find_model, part_of
from multimodal.tokenizers.image import ImageTokenizer, load_image_tokenizer

ENCODE, DECODE, ABOUT = "encode.onnx", "decode.onnx", "image_tokenizer.json"


def export_onnx(source: str | Path, out: str | Path) -> list[str]:
    """Write ``encode.onnx``, ``decode.onnx`` if it can draw, and what to feed them.

    LICENSE and sources.json of the weights are beside them.

    ``encode.onnx`` reads images: float32[B, 3, S, S] in [-1, 1], and gives codes: int64[B, n].
    ``decode.onnx`` reads codes: int64[B, n], and gives images: float32[B, 3, H, W] in [-1, 1].

    Args:
        source: an image tokenizer, a model folder, or the name of a bundled model.
        out: a new or empty folder.

    Returns:
        The names of the written files.

    Raises:
        ValueError: for a source without an image tokenizer, a folder that is not empty, or without
            the packages of the extra ``onnx``.
    """
    try:
        import onnxscript  # noqa: F401  # torch says less clearly that it is missing
    except ImportError as error:
        raise ValueError(f"ONNX needs: pip install multimodal[onnx] ({error})") from error
    tokenizer = load_image_tokenizer(part_of(find_model(source), "image_tokenizer"))
    size = tokenizer.image_size
    images = torch.zeros(2, 3, size, size)
    codes = tokenizer.encode(images)  # also fills caches, which tracing must not
    with new_folder(local_path(out)) as folder:
        _export(_Encode(tokenizer), images, folder / ENCODE, ("images", "codes"))
        if tokenizer.can_draw:
            _export(_Decode(tokenizer), codes, folder / DECODE, ("codes", "images"))
        about = {
            "image_size": size,
            "fit": tokenizer.fit,
            "range": [-1, 1],
            "codes_per_image": tokenizer.codes_per_image,
            "codebook_size": tokenizer.codebook_size,
            "levels": [vars(level) for level in tokenizer.layout.levels],
            "drawn_size": tokenizer.drawn_size if tokenizer.can_draw else None,
            "fingerprint": tokenizer.fingerprint,
        }
        write_json(folder / ABOUT, about)
        tokenizer.provenance.write(folder)
        return sorted(path.name for path in folder.iterdir())


def _export(module: nn.Module, example: Tensor, path: Path, names: tuple[str, str]) -> None:
    program = torch.onnx.export(
        module.eval(),
        (example,),
        dynamo=True,
        input_names=names[:1],
        output_names=names[1:],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=False)


class _Encode(nn.Module):
    """``ImageTokenizer.encode`` without its checks, in operations that ONNX has."""

    first: Tensor
    shrink: Tensor | None

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.meaning, self.detail = tokenizer.meaning, tokenizer.detail
        self.register_buffer("first", tokenizer.layout.first)
        # Resizing is a product with one matrix from each side. ONNX's own differs at the edges.
        matrix, size = None, tokenizer.image_size
        if self.detail is not None and (side := self.detail.config.image_size) != size:
            square = torch.eye(size)[None, None]
            matrix = F.interpolate(square, (side, size), mode="bicubic", antialias=True)[0, 0]
        self.register_buffer("shrink", matrix)

    def forward(self, images: Tensor) -> Tensor:
        codes = []
        if self.meaning is not None:
            codes.append(self.meaning.encode(images).flatten(1))
        if self.detail is not None:
            if self.shrink is not None:
                images = (self.shrink @ images @ self.shrink.T).clamp(-1, 1)
            codes.append(self.detail.quantizer(self.detail.encoder(images)).codes.flatten(1))
        return torch.cat(codes, 1) + self.first


class _Decode(nn.Module):
    """``ImageTokenizer.decode`` without its checks."""

    first: Tensor

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        assert tokenizer.detail is not None
        self.meaning, self.detail, self.layout = (
            tokenizer.meaning,
            tokenizer.detail,
            tokenizer.layout,
        )
        self.register_buffer("first", tokenizer.layout.first)

    def forward(self, codes: Tensor) -> Tensor:
        codes, vectors = codes - self.first, None
        if self.meaning is not None and self.detail.config.meaning_channels:
            vectors = self.meaning.vectors(self.level(codes, "meaning"))
        detail = self.level(codes, "detail")[..., 0]
        vectors_of_detail = self.detail.quantizer.lookup(detail)
        joined = self.detail.joined(vectors_of_detail, vectors)
        return self.detail.decoder(joined).float().clamp(-1, 1)

    def level(self, codes: Tensor, name: str) -> Tensor:
        """int64[B, n] -> int64[B, h, w, G]"""
        level = self.layout[name]
        return codes[:, self.layout.span(name)].view(-1, level.grid, level.grid, level.groups)
