"""Judges of drawings: the model's own alignment, what is read off the pixels of scenes, or a file.

They are the rewards of drawings. Those of texts are in rewards.py.

Shapes: B drawings, n codes of each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multimodal.data.images import to_image
from multimodal.distributed import rank
from multimodal.eval.metrics.scene_drawings import complete_caption, drawing_score
from multimodal.inference.codec import UNKNOWN, decode_images, encode_images
from multimodal.inference.embedding import embed_codes, embed_texts
from multimodal.model.checkpoint import ModelParts
from multimodal.model.lessons import descriptions_of
from multimodal.plugins import from_file
from multimodal.terminal import print_error
from multimodal.tokenizers.weights import resize

JUDGES = ("alignment", "scenes")
Records = Sequence[Mapping[str, Any]]
# (texts, codes: int64[B, n], records) -> a number for each, larger is better
Judge = Callable[[Sequence[str], Tensor, Records], list[float]]


def find_judge(name: str, model: ModelParts) -> Judge:
    """The judge of a name.

    Args:
        name: ``alignment``, ``scenes``, or ``FILE.py:FUNCTION``, a function (texts: list[str],
            images: list[PIL.Image.Image], records: list[dict]) -> list[float].
        model: which draws.

    Raises:
        ValueError: if there is no such judge.
    """

    def alignment(texts: Sequence[str], codes: Tensor, records: Records) -> list[float]:
        cosines: list[float] = (
            (embed_codes(model, codes) * embed_texts(model, texts)).sum(-1).tolist()
        )
        return cosines

    def scenes(texts: Sequence[str], codes: Tensor, records: Records) -> list[float]:
        return [drawing_score(*pair) for pair in zip(texts, pictures(model, codes), strict=True)]

    if name == "alignment":
        warn_of_unaligned(model, JUDGES)
        return alignment
    if name == "scenes":
        return scenes
    function = from_file(name, "judge of drawings", JUDGES, "FUNCTION")

    def of_file(texts: Sequence[str], codes: Tensor, records: Records) -> list[float]:
        given = function(list(texts), pictures(model, codes), [dict(record) for record in records])
        scores = [float(score) for score in given]
        if len(scores) != len(texts) or not np.isfinite(scores).all():
            raise ValueError(
                f"{name}: gave {len(scores)} scores ({scores[:5]} ...) for {len(texts)} drawings: "
                "expected a finite number for each"
            )
        return scores

    return of_file


def warn_of_unaligned(model: ModelParts, names: Sequence[str]) -> None:
    """Print a warning if the alignment of a model may never have been trained.

    Args:
        names: of all judges, of which the others are named.
    """
    if not model.config.objectives.alignment_weight and not rank():
        others = ", ".join(name for name in names if name != "alignment")
        print_error(
            "alignment: the objectives.alignment_weight of this model is 0: if it was never "
            f"trained to align, these scores are random; other judges: {others}, FILE.py:FUNCTION"
        )


def text_to_draw(record: Mapping[str, Any], of_scene: bool, seed: int) -> str | None:
    """One of the descriptions of an image, by the seed. None: it has none.

    Args:
        of_scene: the one that names all objects of a scene.
    """
    texts = descriptions_of(record)
    if of_scene:
        complete = complete_caption(record)
        texts = [complete] if complete else []
    dice = torch.Generator().manual_seed(seed)
    return texts[int(torch.randint(len(texts), (), generator=dice))] if texts else None


def pictures(model: ModelParts, codes: Tensor) -> list[Image.Image]:
    """Of codes of all levels, or of those that are drawn."""
    return [to_image(pixels) for pixels in decode_images(model, codes)]


@torch.inference_mode()
def completed(model: ModelParts, codes: Tensor) -> Tensor:
    """Drawn codes with all levels: those that were not drawn are seen in the decoded image.

    int64[B, n], UNKNOWN in some levels -> int64[B, n]
    """
    unknown = codes == UNKNOWN
    if not unknown.any():
        return codes
    pixels = resize(decode_images(model, codes), model.image_tokenizer.image_size)
    return torch.where(unknown, encode_images(model, pixels.clamp(-1, 1)).cpu(), codes)
