"""How often a text finds its image, and an image one of its texts, among all of a set."""

from collections.abc import Sequence

import torch
from torch import Tensor


def score_retrieval(
    images: Tensor, texts: Tensor, owners: Sequence[int], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall at k in both directions, shares in [0, 1].

    images: float[N, D] and texts: float[M, D], of unit norm; owners: M, the image of each text.
    ``text_to_image@k``: texts whose image is among the k nearest of N; ``image_to_text@k``: images
    with any text of theirs among the k nearest of M. Equal scores count against the model: one
    that gives every pair the same finds nothing.
    Errors: ``ValueError`` for an image without a text, or texts of images that are not there.
    """
    own = torch.as_tensor(list(owners))
    if len(own) != len(texts) or set(own.tolist()) != set(range(len(images))):
        raise ValueError(f"{len(texts)} texts for {len(images)} images: each needs one of its own")
    scores = texts @ images.T
    mine = scores.gather(1, own[:, None])
    # Others that score as high; the own text or image is one of them, and is not counted.
    ahead_of_image = (scores >= mine).sum(1) - 1
    belongs = own[:, None] == torch.arange(len(images))
    best = scores.masked_fill(~belongs, -torch.inf).amax(0)
    ahead_of_text = ((scores >= best) & ~belongs).sum(0)
    found = {}
    for k in ks:
        found[f"text_to_image@{k}"] = (ahead_of_image < k).float().mean().item()
        found[f"image_to_text@{k}"] = (ahead_of_text < k).float().mean().item()
    return found
