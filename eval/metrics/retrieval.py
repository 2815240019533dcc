"""Recall of retrieval in both directions: image by text, and text by image."""

from collections.abc import Sequence

import torch
from torch import Tensor


def score_retrieval(
    images: Tensor, texts: Tensor, image_of_text: Sequence[int], ks: Sequence[int] = (1, 5, 10)
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
    targets = torch.as_tensor(list(image_of_text))
    if len(targets) != len(texts) or set(targets.tolist()) != set(range(len(images))):
        raise ValueError(
            f"{len(texts)} texts for {len(images)} images: expected an image number for each text, "
            "and at least one text for each image"
        )
    scores = texts @ images.T
    target_scores = scores.gather(1, targets[:, None])
    # Wrong images with at least the score of the right one. The right one itself is subtracted.
    ahead_of_image = (scores >= target_scores).sum(1) - 1
    is_pair = targets[:, None] == torch.arange(len(images))
    best = scores.masked_fill(~is_pair, -torch.inf).amax(0)
    ahead_of_text = ((scores >= best) & ~is_pair).sum(0)
    recalls = {}
    for k in ks:
        recalls[f"text_to_image@{k}"] = (ahead_of_image < k).float().mean().item()
        recalls[f"image_to_text@{k}"] = (ahead_of_text < k).float().mean().item()
    return recalls
