"""Recall of retrieval in both directions: image by text, and text by image."""

from collections.abc import Sequence

import torch
from torch import Tensor

KS = (1, 5, 10)  # the values of k that are usual


def count_ahead(
    images: Tensor, texts: Tensor, image_of_text: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """How many wrong candidates score at least as high as the right one.

    Args:
        images: float[N, D], unit norm.
        texts: float[M, D], unit norm.
        image_of_text: M numbers in [0, N), the image of each text. Each image needs a text.

    Returns:
        (int64[M], int64[N]). For each text the number of such images. For each image the number of
        texts of other images that score at least as high as the best of its own.

    Raises:
        ValueError: if an image has no text, or a text has no image.
    """
    targets = torch.as_tensor(list(image_of_text))
    if len(targets) != len(texts) or set(targets.tolist()) != set(range(len(images))):
        raise ValueError(
            f"{len(texts)} texts for {len(images)} images: expected an image number for each text, "
            "and at least one text for each image"
        )
    scores = texts @ images.T
    is_pair = targets[:, None] == torch.arange(len(images))
    right_image = scores.gather(1, targets[:, None])
    best_text = scores.masked_fill(~is_pair, -torch.inf).amax(0)
    return (
        ((scores >= right_image) & ~is_pair).sum(1),
        ((scores >= best_text) & ~is_pair).sum(0),
    )


def score_retrieval(
    images: Tensor, texts: Tensor, image_of_text: Sequence[int], ks: Sequence[int] = KS
) -> dict[str, float]:
    """Recall at k in both directions.

    Equal scores count against the model: constant embeddings have a recall of 0.

    Args:
        images: float[N, D], unit norm.
        texts: float[M, D], unit norm.
        image_of_text: M numbers in [0, N), the image of each text. Each image needs a text.
        ks: the values of k.

    Returns:
        Shares in [0, 1].

        - ``text_to_image@k``: texts whose image is among the k nearest of N.
        - ``image_to_text@k``: images with one of their texts among the k nearest of M.

    Raises:
        ValueError: if an image has no text, or a text has no image.
    """
    ahead_of_image, ahead_of_text = count_ahead(images, texts, image_of_text)
    recalls = {}
    for k in ks:
        recalls[f"text_to_image@{k}"] = (ahead_of_image < k).float().mean().item()
        recalls[f"image_to_text@{k}"] = (ahead_of_text < k).float().mean().item()
    return recalls
