"""Scores captions of synthetic scenes against the ground truth, claim by claim.

The idea follows CHAIR (Rohrbach et al. 2018, https://arxiv.org/abs/1809.02156) and SPICE (Anderson
et al. 2016, https://arxiv.org/abs/1607.08822). The score does not depend on how similar a caption
is to a reference, but on which of its claims are true. All scores are shares in [0, 1] over all
captions, so a caption with more claims has more weight.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from multimodal.eval.metrics.proportions import Cases
from multimodal.scenes.checking import check_caption
from multimodal.scenes.claims import KINDS, parse_caption
from multimodal.scenes.facts import facts_of, facts_said
from multimodal.scenes.scene import Scene, scene_of

CHECKED_KINDS = tuple(kind for kind in KINDS if kind != "unparsed")
TOTALS = ("attribute_precision", "object_recall", "object_precision", "perfect", "unparsed")


def named_shapes(caption: str) -> set[str]:
    """The shapes that a caption names."""
    return {claim.value for claim in parse_caption(caption) if claim.kind == "shape"}


def hallucinated(caption: str, scene: Scene) -> bool:
    """Whether the caption names a shape that the scene does not have.

    The share of such captions is CHAIR per sentence (Rohrbach et al. 2018, arXiv:1809.02156). Here
    it is exact, because all objects of a scene are known.
    """
    return bool(named_shapes(caption) - {item.shape for item in scene.objects})


def judge_scene_captions(captions: Sequence[str], scenes: Sequence[Scene]) -> dict[str, Cases]:
    """Which claims of captions are true, and which objects of the scenes they name.

    Args:
        captions: N captions, any text.
        scenes: of each caption its ground truth, N > 0.

    Returns:
        The scores of ``score_scene_captions`` without ``n``, with the number of the caption of each
        case. ``object_precision`` has no case if no caption mentions an object.
    """
    total = {name: Cases() for name in TOTALS}
    of_kind = {
        f"{score}_{kind}": Cases()
        for kind in CHECKED_KINDS
        for score in ("precision", "recall", "said")
    }
    for row, (caption, scene) in enumerate(zip(captions, scenes, strict=True)):
        score = check_caption(caption, scene)
        total["attribute_precision"].add(row, [float(holds) for _, holds in score.results])
        total["object_recall"].add_count(row, score.matched, score.objects)
        total["object_precision"].add_count(row, score.matched, score.mentioned)
        total["perfect"].add(row, [float(score.precision == 1 and score.recall == 1)])
        total["unparsed"].add(row, [float(score.unparsed > 0)])
        facts = Counter(kind for kind, _ in facts_of(scene))
        said = Counter(kind for kind, _ in facts_said(score, scene))
        for kind in CHECKED_KINDS:
            holds = [float(true) for claim, true in score.results if claim.kind == kind]
            of_kind[f"precision_{kind}"].add(row, holds)
            of_kind[f"recall_{kind}"].add_count(row, said[kind], facts[kind])
            of_kind[f"said_{kind}"].add(row, [float(len(holds))])
    return total | {name: cases for name, cases in of_kind.items() if cases.values}


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
    judged = judge_scene_captions([predictions[key] for key in scenes], list(scenes.values()))
    return {name: cases.mean for name, cases in judged.items()} | {"n": float(len(scenes))}


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
