"""Scores captions of synthetic scenes against the ground truth, claim by claim.

In the spirit of CHAIR (https://arxiv.org/abs/1809.02156) and SPICE (https://arxiv.org/abs/1607.08822):
not how much a caption resembles another one, but which of its statements are so. All figures are
shares in [0, 1], pooled over the captions (a caption that says more weighs more).
"""

from collections import Counter
from collections.abc import Mapping

from multimodal.scenes.claims import KINDS, check_caption
from multimodal.scenes.scene import Scene


def score_scene_captions(
    predictions: Mapping[str, str], scenes: Mapping[str, Scene]
) -> dict[str, float]:
    """How much of what the captions say is true, and how much of the scenes they name.

    Args:
        predictions: key -> caption, any text.
        scenes: key -> ground truth, for exactly the same keys: a caption left out would otherwise
            improve the figures.
    Returns:
        attribute_precision: share of all claims that are true; an unparsed clause is a false one.
        precision_KIND: the same per kind of claim (colour, shape, size, texture, count, position,
            relation, background), only for kinds that were claimed at all; claims_KIND: how many.
        object_recall: share of the scenes' objects named with the right colour and shape;
        object_precision: share of the objects named that are there, by colour and shape. No
            object counts twice in either.
        perfect: share of the captions that name all objects and claim nothing false.
        unparsed: share of the captions with a clause that could not be read.
        n: number of captions.
    Errors: ``ValueError`` where the keys differ or there are none.
    """
    if not scenes or set(predictions) != set(scenes):
        lost, extra = set(scenes) - set(predictions), set(predictions) - set(scenes)
        raise ValueError(
            f"{len(predictions)} captions for {len(scenes)} scenes, expected the same keys: "
            f"without caption {sorted(lost)[:3]}, without scene {sorted(extra)[:3]}"
        )
    claimed: Counter[str] = Counter()
    true: Counter[str] = Counter()
    mentioned = found = objects = perfect = unparsed = 0
    for key, scene in scenes.items():
        score = check_caption(predictions[key], scene)
        for claim, holds in score.results:
            claimed[claim.kind] += 1
            true[claim.kind] += holds
        mentioned += score.mentioned
        found += score.found
        objects += score.objects
        perfect += score.precision == 1 and score.recall == 1
        unparsed += score.unparsed > 0
    result = {
        "attribute_precision": true.total() / claimed.total(),
        "object_recall": found / objects,
        "object_precision": found / mentioned if mentioned else 0.0,
        "perfect": perfect / len(scenes),
        "unparsed": unparsed / len(scenes),
        "n": float(len(scenes)),
    }
    for kind in KINDS:
        if claimed[kind]:
            if kind != "unparsed":
                result[f"precision_{kind}"] = true[kind] / claimed[kind]
            result[f"claims_{kind}"] = float(claimed[kind])
    return result
