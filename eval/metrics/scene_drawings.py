"""What a drawing of a scene shows, read off its pixels: for scores of drawings, not of captions.

No model judges here. What differs from the background is cut into connected blobs; a blob has the
colour most of its pixels are nearest to, and the shape whose stencil, sharp or blurred, covers it
best. On true renderings this program finds 99 % of the objects, blurred by 0.8 pixels over 90 %
(tests/eval/test_scene_drawings.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from multimodal.scenes.claims import check_caption, parse_caption
from multimodal.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    stencil,
)

Mask = NDArray[np.bool_]
SIDE = 64  # pixels: drawings are looked at in this size
CONTRAST = 60  # RGB distance from the background that makes a pixel part of something
SMALLEST = 40  # pixels of a blob; the smallest cross has 110
FITS = 0.7  # of stencil and blob together, the share in both; below it a blob has no shape
CLAIMED = ("count", "position", "relation", "size", "background")  # what else drawings are held to
STENCIL = 48  # pixels per side at which shapes are compared
SOFTNESS = (0.0, 0.04, 0.08, 0.12)  # deviations of the blurs of stencils, in longer sides
STRETCH = 1.25  # how far a blob's proportions may be from its stencil's


@dataclass(frozen=True)
class Seen:
    """One blob: colour and shape as in ``multimodal.scenes.scene``, shape None where none fits;
    box: left, top, right, bottom in pixels of SIDE."""

    colour: str
    shape: str | None
    box: tuple[int, int, int, int]


def objects_seen(image: Image.Image) -> list[Seen]:
    """The objects of a picture of a scene, from left to right."""
    from scipy import ndimage

    pixels = _pixels(image)
    _, ramp = _background(pixels)
    labels, _ = ndimage.label(np.linalg.norm(pixels - ramp, axis=-1) > CONTRAST)
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        blob = labels[rows, columns] == number
        if blob.sum() >= SMALLEST:
            box = (columns.start, rows.start, columns.stop, rows.stop)
            colour = _colour(pixels[rows, columns], ndimage.binary_fill_holes(blob))
            behind = ramp[(rows.start + rows.stop) // 2, 0]
            visible = CONTRAST / float(np.linalg.norm(np.array(COLOURS[colour]) - behind))
            found.append(Seen(colour, _shape(blob, visible), box))
    return sorted(found, key=lambda seen: seen.box)


def _pixels(image: Image.Image) -> NDArray[np.float64]:
    picture = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(picture, np.float64)


def scene_seen(image: Image.Image) -> Scene | None:
    """The scene that a picture shows, as far as it can be read off: its objects that have a shape,
    at most MAX_OBJECTS, the largest ones, their textures not among what is read; None without any.
    """
    found = []
    for seen in objects_seen(image):
        left, top, right, bottom = (edge / SIDE for edge in seen.box)
        if seen.shape is not None:
            radius = min(0.5, max(right - left, bottom - top) / 2 / _extents()[seen.shape])
            size = "large" if radius > (SIZES["small"][1] + SIZES["large"][0]) / 2 else "small"
            place = (left + right) / 2, (top + bottom) / 2
            found.append(SceneObject(seen.shape, seen.colour, size, "solid", *place, radius))
    largest = sorted(found, key=lambda item: -item.radius)[:MAX_OBJECTS]
    if not largest:
        return None
    name, _ = _background(_pixels(image))
    return Scene(tuple(item for item in found if item in largest), name)


def score_drawn_claims(
    captions: Sequence[str], drawings: Sequence[Image.Image]
) -> dict[str, tuple[float, int]]:
    """Of each kind of claim that captions make of their drawings (count, position, relation, size,
    background): the share that is true of what is seen there, and how many there are.

    Textures are not read off, so how many striped ones there are is left out."""
    results: dict[str, list[bool]] = {kind: [] for kind in CLAIMED}
    for caption, drawing in zip(captions, drawings, strict=True):
        scene = scene_seen(drawing)
        if scene is None:
            checked = [(claim, False) for claim in parse_caption(caption)]
        else:
            checked = list(check_caption(caption, scene).results)
        textured = {
            slot for claim, _ in checked if claim.kind == "texture" for slot in claim.subject
        }
        for claim, true in checked:
            of_texture = claim.kind == "count" and not textured.isdisjoint(claim.subject)
            if claim.kind in results and not of_texture:
                results[claim.kind].append(true)
    return {kind: (sum(each) / len(each), len(each)) for kind, each in results.items() if each}


def _background(pixels: NDArray[np.float64]) -> tuple[str, NDArray[np.float64]]:
    """The background of the scenes that is nearest to the picture's edges: its name, and its
    colours from top to bottom, [SIDE, 1, 3]."""
    edges = np.concatenate([pixels[:, :1], pixels[:, -1:]], 1)
    best, least = ("", pixels[:, :1]), np.inf
    for name, (high, low) in BACKGROUNDS.items():
        ramp = np.linspace(np.array(high, np.float64), np.array(low, np.float64), SIDE)[:, None]
        distance = float(np.median(np.linalg.norm(edges - ramp, axis=-1)))
        if distance < least:
            best, least = (name, ramp), distance
    return best


def _colour(pixels: NDArray[np.float64], blob: Mask) -> str:
    """The name most pixels vote for; a stripe or a dot, near black or white, has little say."""
    names, values = list(COLOURS), np.array(list(COLOURS.values()), np.float64)
    distances = np.linalg.norm(pixels[blob][:, None] - values, axis=-1)
    votes = np.exp(-((distances / 40) ** 2)).sum(0)
    return names[int(votes.argmax())]


@cache
def _extents() -> dict[str, float]:
    """Of each shape, half of its longer side over the radius of the circle around it."""
    boxes = {shape: stencil(shape, STENCIL).getbbox() for shape in SHAPES}
    return {
        shape: max(box[2] - box[0], box[3] - box[1]) / 2 / STENCIL
        for shape, box in boxes.items()
        if box is not None
    }


@cache
def _stencils(tenths: int) -> list[tuple[str, float, Mask]]:
    """Each shape in each softness, what of it is seen from so many tenths of its full contrast on:
    its name, height over width, and form. Blurs that close a ring's hole are left out."""
    from scipy import ndimage

    made = []
    for shape in SHAPES:
        sharp = np.pad(np.asarray(stencil(shape, STENCIL), np.float64) / 255, STENCIL)
        for softness in SOFTNESS:
            blurred = ndimage.gaussian_filter(sharp, softness * 2 * STENCIL * _extents()[shape])
            form = blurred > (tenths / 10 if softness else 0.5)
            if shape != "ring" or ndimage.binary_fill_holes(form).sum() > form.sum():
                rows, columns = ndimage.find_objects(form.astype(int))[0]
                cut = form[rows, columns]
                made.append((shape, cut.shape[0] / cut.shape[1], _stretched(cut)))
    return made


def _stretched(form: Mask) -> Mask:
    return np.asarray(Image.fromarray(form).resize((STENCIL, STENCIL))) > 0


def _shape(blob: Mask, visible: float) -> str | None:
    """visible: the share of its full contrast from which on a pixel is in the blob."""
    from scipy import ndimage

    # A texture like the background leaves holes; the one hole that counts is the ring's.
    whole = ndimage.binary_fill_holes(blob)
    height, width = blob.shape
    middle = blob[height // 3 : -(height // 3), width // 3 : -(width // 3)]
    hollow = whole.sum() > blob.sum() and middle.mean() < 0.3
    mask = _stretched(blob if hollow else whole)
    best, most = None, FITS
    for shape, proportion, form in _stencils(round(10 * min(visible, 0.5))):
        alike = 1 / STRETCH < height / width / proportion < STRETCH
        if alike and (shape == "ring") == hollow:
            overlap = (mask & form).sum() / (mask | form).sum()
            if overlap >= most:
                best, most = shape, overlap
    return best


def objects_asked(caption: str) -> Counter[tuple[str, str]]:
    """(colour, shape) of the objects a caption names with both, each as often as it says."""
    said: dict[int, dict[str, str]] = {}
    for claim in parse_caption(caption):
        if claim.kind in ("colour", "shape"):
            said.setdefault(claim.subject[0], {})[claim.kind] = claim.value
    return Counter((s["colour"], s["shape"]) for s in said.values() if len(s) == 2)


def whole_caption(record: Mapping[str, Any]) -> str | None:
    """The first caption of a scene's record that names every object with its colour and shape."""
    objects = len(record["scene"]["objects"])
    named = (c for c in record["captions"] if objects_asked(c).total() == objects)
    return next(named, None)


def score_scene_drawings(
    captions: Sequence[str], drawings: Sequence[Image.Image]
) -> dict[str, float]:
    """How much of what captions name is in the drawings made after them.

    Returns shares, pooled over the captions, no object of a drawing counted twice:
        objects: named objects there with the right colour and shape; colours: with the right
        colour, whatever the shape; extra: objects drawn that have no such named one;
        n: number of objects named.
    Errors: ``ValueError`` where the numbers differ, or no caption names an object.
    """
    asked = found = coloured = drawn = 0
    for caption, drawing in zip(captions, drawings, strict=True):
        wanted, seen = objects_asked(caption), objects_seen(drawing)
        pairs: Counter[tuple[str, str | None]] = Counter((s.colour, s.shape) for s in seen)
        colours = Counter(s.colour for s in seen)
        asked, drawn = asked + wanted.total(), drawn + len(seen)
        found += sum(min(count, pairs[pair]) for pair, count in wanted.items())
        wanted_colours: Counter[str] = Counter()
        for (colour, _), count in wanted.items():
            wanted_colours[colour] += count
        coloured += (wanted_colours & colours).total()
    if not asked:
        raise ValueError("no caption names an object with its colour and shape")
    return {
        "objects": found / asked,
        "colours": coloured / asked,
        "extra": (drawn - found) / drawn if drawn else 0.0,
        "n": float(asked),
    }
