"""Scores captions of synthetic scenes against the ground truth, claim by claim.

The idea follows CHAIR (Rohrbach et al. 2018, https://arxiv.org/abs/1809.02156) and SPICE (Anderson
et al. 2016, https://arxiv.org/abs/1607.08822). The score does not depend on how similar a caption
is to a reference, but on which of its claims are true. All scores are shares in [0, 1] over all
captions, so a caption with more claims has more weight.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from multimodal.scenes.checking import check_caption
from multimodal.scenes.claims import KINDS, parse_caption
from multimodal.scenes.facts import facts_of, facts_said
from multimodal.scenes.scene import Scene, scene_of

CHECKED_KINDS = tuple(kind for kind in KINDS if kind != "unparsed")


def named_shapes(caption: str) -> set[str]:
    """The shapes that a caption names."""
    return {claim.value for claim in parse_caption(caption) if claim.kind == "shape"}


def hallucinated(caption: str, scene: Scene) -> bool:
    """Whether the caption names a shape that the scene does not have.

    The share of such captions is CHAIR per sentence (Rohrbach et al. 2018, arXiv:1809.02156). Here
    it is exact, because all objects of a scene are known.
    """
    return bool(named_shapes(caption) - {item.shape for item in scene.objects})


def score_scene_captions(
    predictions: Mapping[str, str], scenes: Mapping[str, Scene]
) -> dict[str, float]:
    """Which claims of the captions are true, and which objects of the scenes they name.

    Args:
        predictions: key -> caption, any text.
        scenes: key -> ground truth, with exactly the same keys. A missing caption would otherwise
            improve the scores.

    Returns:
        For a KIND of claim: colour, shape, size, texture, count, position, relation, background.

        - ``attribute_precision``: share of all claims that are true. An unparsed clause is false.
        - ``precision_KIND``: the same for one kind of claim, only for kinds that occur.
        - ``recall_KIND``: of the facts that can be said of the scenes (``facts_of``), the share
          that is said. Even a good caption does not say everything: compare with the references.
        - ``said_KIND``: claims a caption, true or not.
        - ``object_recall``: share of the scenes' objects named with the right colour and shape.
        - ``object_precision``: share of the named objects that exist, by colour and shape. Each
          object counts at most once, in recall and in precision.
        - ``perfect``: share of the captions that name all objects and have no false claim.
        - ``unparsed``: share of the captions with a clause that could not be parsed.
        - ``n``: number of captions.

    Raises:
        ValueError: if the keys differ or there are none.
    """
    if not scenes or set(predictions) != set(scenes):
        no_caption, no_scene = set(scenes) - set(predictions), set(predictions) - set(scenes)
        raise ValueError(
            f"{len(predictions)} captions for {len(scenes)} scenes, expected the same keys: "
            f"without caption {sorted(no_caption)[:3]}, without scene {sorted(no_scene)[:3]}"
        )
    claims: Counter[str] = Counter()
    true: Counter[str] = Counter()
    facts: Counter[str] = Counter()
    said: Counter[str] = Counter()
    mentioned = matched = objects = perfect = unparsed = 0
    for key, scene in scenes.items():
        score = check_caption(predictions[key], scene)
        for claim, holds in score.results:
            claims[claim.kind] += 1
            true[claim.kind] += holds
        facts.update(kind for kind, _ in facts_of(scene))
        said.update(kind for kind, _ in facts_said(score, scene))
        mentioned += score.mentioned
        matched += score.matched
        objects += score.objects
        perfect += score.precision == 1 and score.recall == 1
        unparsed += score.unparsed > 0
    result = {
        "attribute_precision": true.total() / claims.total(),
        "object_recall": matched / objects,
        "object_precision": matched / mentioned if mentioned else 0.0,
        "perfect": perfect / len(scenes),
        "unparsed": unparsed / len(scenes),
        "n": float(len(scenes)),
    }
    for kind in CHECKED_KINDS:
        if claims[kind]:
            result[f"precision_{kind}"] = true[kind] / claims[kind]
        if facts[kind]:
            result[f"recall_{kind}"] = said[kind] / facts[kind]
        result[f"said_{kind}"] = claims[kind] / len(scenes)
    return result


def has_scene(record: Mapping[str, Any]) -> bool:
    """Whether a record has a scene to check claims by."""
    return scene_of(record) is not None


def claims_score(caption: str, record: Mapping[str, Any]) -> float:
    """How right and complete a caption of a scene is, in [0, 1].

    The mean of the share of its claims that are true, and of the objects that it names.

    Raises:
        ValueError: if the record has no scene.
    """
    if (scene := scene_of(record)) is None:
        raise ValueError("the claims of a caption are checked for scenes: the record has none")
    score = check_caption(caption, scene)
    return (score.precision + score.recall) / 2
