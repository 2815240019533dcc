"""Scores drawings of scenes: which objects and claims of the captions they show.

Drawings are read off their pixels by ``multimodal.eval.metrics.scene_pixels``, without a model.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from multimodal.eval.metrics.proportions import Cases
from multimodal.eval.metrics.scene_pixels import detect_objects, detect_scene
from multimodal.scenes.checking import check_caption
from multimodal.scenes.claims import parse_caption
from multimodal.scenes.scene import scene_of

CLAIM_KINDS = ("count", "position", "relation", "size", "background")


def named_objects(caption: str) -> Counter[tuple[str, str]]:
    """The objects that a caption names with colour and shape: (colour, shape) -> how many."""
    attributes_of: dict[int, dict[str, str]] = {}  # slot -> kind -> value
    for claim in parse_caption(caption):
        if claim.kind in ("colour", "shape"):
            attributes_of.setdefault(claim.subject[0], {})[claim.kind] = claim.value
    return Counter((a["colour"], a["shape"]) for a in attributes_of.values() if len(a) == 2)


def complete_caption(record: Mapping[str, Any]) -> str | None:
    """The first caption of a record that names every object of its scene with colour and shape.

    None: there is no such caption, or no scene.
    """
    if (scene := scene_of(record)) is None:
        return None
    objects = len(scene.objects)
    complete = (
        text for text in record.get("captions", ()) if named_objects(text).total() == objects
    )
    return next(complete, None)


def judge_scene_drawings(
    captions: Sequence[str], drawings: Sequence[Image.Image]
) -> dict[str, Cases]:
    """How many of the named objects the drawings show.

    Args:
        captions: N texts.
        drawings: N pictures, one for each caption.

    Returns:
        The scores of ``score_scene_drawings`` without ``n``, with the number of the caption of each
        case: a named object, or for ``extra`` a drawn one.

    Raises:
        ValueError: if the lengths differ, or no caption names an object.
    """
    objects, of_colours, extra = Cases(), Cases(), Cases()
    for row, (caption, drawing) in enumerate(zip(captions, drawings, strict=True)):
        named, detected = named_objects(caption), detect_objects(drawing)
        pairs: Counter[tuple[str, str | None]] = Counter((d.colour, d.shape) for d in detected)
        colours = Counter(d.colour for d in detected)
        matched = sum(min(count, pairs[pair]) for pair, count in named.items())
        named_colours: Counter[str] = Counter()
        for (colour, _), count in named.items():
            named_colours[colour] += count
        objects.add_count(row, matched, named.total())
        of_colours.add_count(row, (named_colours & colours).total(), named.total())
        extra.add_count(row, len(detected) - matched, len(detected))
    if not objects.values:
        raise ValueError("no caption names an object with its colour and shape")
    return {"objects": objects, "colours": of_colours, "extra": extra}


def score_scene_drawings(
    captions: Sequence[str], drawings: Sequence[Image.Image]
) -> dict[str, float]:
    """How many of the named objects the drawings show.

    Args:
        captions: N texts.
        drawings: N pictures, one for each caption.

    Returns:
        Shares over all captions. Each object of a drawing counts at most once.

        - ``objects``: named objects that are drawn with the right colour and shape.
        - ``colours``: named objects that are drawn with the right colour, whatever the shape.
        - ``extra``: drawn objects that match no named object.
        - ``n``: number of named objects.

    Raises:
        ValueError: if the lengths differ, or no caption names an object.
    """
    judged = judge_scene_drawings(captions, drawings)
    scores = {name: cases.mean for name, cases in judged.items()}
    return scores | {"n": float(len(judged["objects"].values))}


def judge_drawn_claims(
    captions: Sequence[str], drawings: Sequence[Image.Image]
) -> dict[str, Cases]:
    """Which claims of the captions are true of the drawings.

    Textures cannot be read off the pixels, so counts of textured objects are left out.

    Args:
        captions: N texts.
        drawings: N pictures, one for each caption.

    Returns:
        Kind of claim -> its claims, with the number of the caption of each, for the kinds in
        ``CLAIM_KINDS`` that the captions have.

    Raises:
        ValueError: if the lengths differ.
    """
    results = {kind: Cases() for kind in CLAIM_KINDS}
    for row, (caption, drawing) in enumerate(zip(captions, drawings, strict=True)):
        scene = detect_scene(drawing)
        if scene is None:
            checked = [(claim, False) for claim in parse_caption(caption)]
        else:
            checked = list(check_caption(caption, scene).results)
        textured = {
            slot for claim, _ in checked if claim.kind == "texture" for slot in claim.subject
        }
        for claim, true in checked:
            counts_textured = claim.kind == "count" and not textured.isdisjoint(claim.subject)
            if claim.kind in results and not counts_textured:
                results[claim.kind].add(row, [float(true)])
    return {kind: cases for kind, cases in results.items() if cases.values}


def score_drawn_claims(
    captions: Sequence[str], drawings: Sequence[Image.Image]
) -> dict[str, tuple[float, int]]:
    """Kind of claim -> (share that is true, number of claims). See ``judge_drawn_claims``."""
    judged = judge_drawn_claims(captions, drawings)
    return {kind: (cases.mean, len(cases.values)) for kind, cases in judged.items()}


def drawing_score(caption: str, drawing: Image.Image) -> float:
    """How right and complete a drawing of a scene is, in [0, 1].

    The F1 of its objects: of those that are drawn and of those that are named, which are right. If
    the caption also says how many, where, how large, or on what, the mean of it and of the share of
    these claims that is true. Objects alone would reward right ones in wrong places.

    Raises:
        ValueError: if the caption names no object.
    """
    scores = score_scene_drawings([caption], [drawing])
    precision, recall = 1 - scores["extra"], scores["objects"]
    objects = 2 * precision * recall / (precision + recall) if recall else 0.0
    claims = score_drawn_claims([caption], [drawing]).values()
    if not (count := sum(number for _, number in claims)):
        return objects
    return (objects + sum(share * number for share, number in claims) / count) / 2
