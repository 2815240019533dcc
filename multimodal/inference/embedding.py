"""Images and texts in one space: the states at <eoi> and at <boi>, projected.

Shapes: B images or texts, n codes of an image, D width of an embedding.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from multimodal.files import atomic_file, local_path, read_bytes
from multimodal.inference.batch import DecodeBatch
from multimodal.inference.codec import check_pixels, encode_text, encode_to_read, read_images
from multimodal.model.checkpoint import ModelParts
from multimodal.model.sequences import describe_prompt, draw_prompt


@torch.inference_mode()
def embed_codes(model: ModelParts, codes: Tensor) -> Tensor:
    """codes: int64[B, n] -> float32[B, D] of unit norm, on the CPU."""
    prompts = [describe_prompt(model.vocabulary, row) for row in model.read(codes).tolist()]
    states = DecodeBatch(model.network, prompts, 0).hidden
    return model.network.alignment.embed_image(states).cpu()


@torch.inference_mode()
def embed_texts(model: ModelParts, texts: Sequence[str]) -> Tensor:
    """B texts, none of them empty -> float32[B, D] of unit norm, on the CPU."""
    prompts = [draw_prompt(model.vocabulary, encode_text(model, text)) for text in texts]
    states = DecodeBatch(model.network, prompts, 0).hidden
    return model.network.alignment.embed_text(states).cpu()


def embed_lines(
    model: ModelParts, texts: Sequence[str], batch_size: int = 32
) -> Iterator[Tensor | ValueError]:
    """float32[D] of each text, or what was wrong with it, in their order."""
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        try:
            yield from embed_texts(model, batch)
        except ValueError:
            for text in batch:  # one of them is empty, or too long
                try:
                    yield embed_texts(model, [text])[0]
                except ValueError as error:
                    yield error


class EmbeddingCache:
    """Embeddings by the content of image files, in one safetensors file for each model.

    A moved or renamed image keeps its entry. Changed bytes, or another model, are another entry. A
    cache that cannot be read is no error: it is computed again.

    Args:
        folder: where the files are.
        fingerprint: of the model.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path = local_path(folder) / f"{fingerprint}.safetensors"
        self.rows: dict[str, Tensor] = {}
        self.added = 0
        if self.path.is_file():
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                self.rows = load_file(self.path)
            except (SafetensorError, OSError):
                self.rows = {}

    @staticmethod
    def key(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    def save(self) -> None:
        """Write the file. Without space or permission nothing is written, and that is no error."""
        from safetensors.torch import save_file

        if not self.added:
            return
        with suppress(Exception):  # safetensors raises an exception of its own on a full disk
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path, shared=True) as part:
                save_file({key: row.contiguous() for key, row in self.rows.items()}, part)


def embed_files(
    model: ModelParts, paths: list[Path], cache: EmbeddingCache | None, batch_size: int = 32
) -> Iterator[tuple[Path, Tensor | ValueError]]:
    """(path, float32[D] or what was wrong with the file), in the order of the paths."""
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        check_pixels(model, len(batch))
        results: dict[int, Tensor | ValueError] = {}
        pixels, missing = [], []
        for i, path in enumerate(batch):
            try:
                data = read_bytes(path)
                key = EmbeddingCache.key(data)
                if cache is not None and key in cache.rows:
                    results[i] = cache.rows[key]
                    continue
                pixels.append(read_images(model, [data], [str(path)]))
                missing.append((i, key))
            except ValueError as error:
                results[i] = error
        if pixels:
            rows = embed_codes(model, encode_to_read(model, torch.cat(pixels)))
            for (i, key), row in zip(missing, rows, strict=True):
                results[i] = row
                if cache is not None:
                    cache.rows[key] = row.clone()
                    cache.added += 1
        for i, path in enumerate(batch):
            yield path, results[i]
