"""Synthetic scenes: coloured shapes on a background, drawn by program, so every fact is known.

A scene is 1-4 objects that do not overlap, on one of five backgrounds. It follows the idea of CLEVR
(https://arxiv.org/abs/1612.06890) and of held-out compositions (CoGenT, same paper): eight pairs of
colour and shape never occur in a training scene, though each colour and each shape does.

Coordinates are scene units: x to the right and y downwards, both in [0, 1]; so is a radius.
Facts about places come in two strengths: ``sure`` (said only where nobody would doubt it) and the
plain one (not false). Captions are written with the first and checked with the second.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw

RGB = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")
COLOURS: dict[str, RGB] = {
    "red": (218, 28, 36),
    "orange": (255, 135, 10),
    "yellow": (250, 222, 30),
    "green": (28, 150, 52),
    "blue": (30, 70, 215),
    "purple": (132, 44, 172),
    "pink": (255, 132, 192),
    "brown": (122, 70, 30),
}
SIZES: dict[str, tuple[float, float]] = {"small": (0.125, 0.138), "large": (0.185, 0.2)}
TEXTURES = ("solid", "striped", "dotted")
# Each background from its top to its bottom; no name is also the name of an object's colour.
BACKGROUNDS: dict[str, tuple[RGB, RGB]] = {
    "white": ((252, 252, 252), (252, 252, 252)),
    "black": ((12, 12, 14), (12, 12, 14)),
    "grey": ((150, 150, 150), (150, 150, 150)),
    "cream": ((255, 240, 205), (255, 240, 205)),
    "sky": ((120, 185, 240), (222, 240, 252)),
}
# One per colour and one per shape, so that nothing else about them is new.
HELD_OUT = (
    ("red", "diamond"),
    ("orange", "cross"),
    ("yellow", "ring"),
    ("green", "star"),
    ("blue", "heart"),
    ("purple", "square"),
    ("pink", "triangle"),
    ("brown", "circle"),
)
TRAINING_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT)
MAX_OBJECTS = 4
GAP = 0.03  # between the circles around two objects; also covers a square's corners (1.06 radius)
JITTER = 10  # per channel, of 255: far below the distance between two named colours

REGIONS = (
    *("top left", "top right", "bottom left", "bottom right"),
    *("centre", "left", "right", "top", "bottom"),
)
OPPOSITE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "larger than": "smaller than",
    "smaller than": "larger than",
}
RELATIONS = tuple(OPPOSITE)
SPATIAL = RELATIONS[:4]


@dataclass(frozen=True)
class SceneObject:
    """One object; ``radius``: of the circle around it; ``rgb``: its exact colour, if jittered."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    rgb: RGB | None = None

    def __post_init__(self) -> None:
        known = (
            ("shape", self.shape, SHAPES),
            ("colour", self.colour, tuple(COLOURS)),
            ("size", self.size, tuple(SIZES)),
            ("texture", self.texture, TEXTURES),
        )
        for name, value, allowed in known:
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
        if not (0 <= self.x <= 1 and 0 <= self.y <= 1 and 0 < self.radius <= 0.5):
            raise ValueError(f"x {self.x}, y {self.y}, radius {self.radius}: not in scene units")
        if self.rgb is not None and not all(0 <= channel <= 255 for channel in self.rgb):
            raise ValueError(f"rgb is {self.rgb}, expected 0 to 255")

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape)."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """The ground truth of one picture; the objects go from left to right, then top to bottom."""

    objects: tuple[SceneObject, ...]
    background: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise ValueError(f"{len(self.objects)} objects, expected 1 to {MAX_OBJECTS}")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background {self.background!r}, expected one of {[*BACKGROUNDS]}")

    @property
    def has_held_out(self) -> bool:
        return any(item.pair in HELD_OUT for item in self.objects)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with everything needed to draw and to check the scene."""
        return {"background": self.background, "objects": [asdict(o) for o in self.objects]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Scene":
        """The inverse of ``to_json``. Errors: ``ValueError`` for anything that is not a scene."""
        try:
            if unknown := set(record) - {"background", "objects"}:
                raise ValueError(f"unknown keys {sorted(unknown)}")
            objects = []
            for fields in record["objects"]:
                rgb = fields.get("rgb")
                if rgb is not None:
                    red, green, blue = (int(value) for value in rgb)
                    rgb = (red, green, blue)
                objects.append(SceneObject(**{**fields, "rgb": rgb}))
            return cls(tuple(objects), record["background"])
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not a scene: {error}") from error


def sample_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """Draw a scene; with ``held_out`` at least one object is of a held-out pair, else none is."""
    count = rng.choices((1, 2, 3, 4), (20, 30, 30, 20))[0]
    kinds: list[tuple[str, str, str, str]] = []  # colour, shape, size, texture
    special = rng.randrange(count) if held_out else -1
    for number in range(count):
        if number != special and kinds and rng.random() < 0.2:
            kinds.append(kinds[-1])  # identical objects, for counting
            continue
        colour, shape = rng.choice(HELD_OUT if number == special else TRAINING_PAIRS)
        size = rng.choice(tuple(SIZES))
        texture = rng.choices(TEXTURES, (60, 20, 20))[0]
        kinds.append((colour, shape, size, texture))
    while True:
        places = _places([SIZES[size] for _, _, size, _ in kinds], rng)
        if places is not None:
            break
    objects = []
    for (colour, shape, size, texture), (x, y, radius) in zip(kinds, places, strict=True):
        red, green, blue = (
            min(255, max(0, channel + rng.randint(-JITTER, JITTER))) for channel in COLOURS[colour]
        )
        objects.append(SceneObject(shape, colour, size, texture, x, y, radius, (red, green, blue)))
    objects.sort(key=lambda item: (item.x, item.y))
    return Scene(tuple(objects), rng.choice(tuple(BACKGROUNDS)))


def _places(
    ranges: list[tuple[float, float]], rng: random.Random
) -> list[tuple[float, float, float]] | None:
    """(x, y, radius) for each object, none overlapping; None where chance left no room."""
    places: list[tuple[float, float, float]] = []
    for low, high in ranges:
        # Rounded, so that the JSON is short and says exactly what was drawn.
        radius = round(rng.uniform(low, high), 4)
        for _ in range(60):
            x = round(rng.uniform(radius + 0.02, 0.98 - radius), 4)
            y = round(rng.uniform(radius + 0.02, 0.98 - radius), 4)
            if all(math.hypot(x - a, y - b) > radius + r + GAP for a, b, r in places):
                places.append((x, y, radius))
                break
        else:
            return None
    return places


def in_region(item: SceneObject, region: str, sure: bool = False) -> bool:
    """Whether the object's centre lies in one of ``REGIONS``."""
    edge = 0.35 if sure else 0.43
    inner = 0.1 if sure else 0.17
    parts = {
        "left": item.x < edge,
        "right": item.x > 1 - edge,
        "top": item.y < edge,
        "bottom": item.y > 1 - edge,
        "centre": abs(item.x - 0.5) < inner and abs(item.y - 0.5) < inner,
    }
    return all(parts[part] for part in region.split())


def region_of(items: Sequence[SceneObject]) -> str | None:
    """The most telling region that surely holds all the objects; corners come first."""
    for region in REGIONS:
        if all(in_region(item, region, sure=True) for item in items):
            return region
    return None


def relation_holds(a: SceneObject, relation: str, b: SceneObject, sure: bool = False) -> bool:
    """Whether a is ``relation`` b, of ``RELATIONS``; ``sure``: it is also the main direction."""
    if relation in ("larger than", "smaller than"):
        return (a.size, b.size) == (
            ("large", "small") if relation == "larger than" else ("small", "large")
        )
    right, down = b.x - a.x, b.y - a.y
    along = {"left of": right, "right of": -right, "above": down, "below": -down}[relation]
    if not sure:
        return along > 0.06
    across = down if relation in ("left of", "right of") else right
    return along > 0.2 and along > 1.2 * abs(across)


def is_between(a: SceneObject, b: SceneObject, c: SceneObject, sure: bool = False) -> bool:
    """Whether a lies between b and c: near the line that joins them, away from its ends."""
    dx, dy = c.x - b.x, c.y - b.y
    length = math.hypot(dx, dy)
    if length == 0:
        return False
    along = ((a.x - b.x) * dx + (a.y - b.y) * dy) / length**2
    off = abs((a.x - b.x) * dy - (a.y - b.y) * dx) / length
    return (0.25 < along < 0.75 and off < 0.1) if sure else (0.1 < along < 0.9 and off < 0.18)


def _outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape of radius 1 around the origin."""
    if shape == "square":
        return [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)]
    if shape == "triangle":
        return [(0, -0.95), (0.95, 0.75), (-0.95, 0.75)]
    if shape == "diamond":
        return [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)]
    if shape == "star":
        turns = [(k * math.pi / 5, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
        return [(r * math.sin(turn), -r * math.cos(turn)) for turn, r in turns]
    if shape == "cross":
        arm = 0.31
        quarter = [(arm, -0.95), (arm, -arm), (0.95, -arm)]
        corners = list(quarter)
        for _ in range(3):
            quarter = [(-y, x) for x, y in quarter]
            corners += quarter
        return corners
    assert shape == "heart"
    points = []
    for k in range(48):
        t = k * math.pi / 24
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -(y + 2.5) / 16.5))
    return points


_OUTLINES = {shape: _outline(shape) for shape in SHAPES if shape not in ("circle", "ring")}
OVERSAMPLING = 4
RING_HOLE = 0.5  # of the radius
RIM = 0.16  # of the radius


def stencil(shape: str, radius: int) -> Image.Image:
    """The shape as a mask, L of 2 radius + 1 pixels; integer corners, so no rounding differs."""
    side = 2 * radius + 1
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    if shape in _OUTLINES:
        corners = [
            (radius + round(radius * x), radius + round(radius * y)) for x, y in _OUTLINES[shape]
        ]
        draw.polygon(corners, fill=255)
        return mask
    draw.ellipse((0, 0, side - 1, side - 1), fill=255)
    if shape == "ring":
        edge = radius - round(radius * RING_HOLE)
        draw.ellipse((edge, edge, side - 1 - edge, side - 1 - edge), fill=0)
    return mask


def _second_colour(rgb: RGB) -> RGB:
    """What stripes and dots are drawn in: near white on a dark colour, near black on a light."""
    red, green, blue = rgb
    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 130
    target, share = (255, 0.85) if dark else (0, 0.75)
    return (
        round(red + share * (target - red)),
        round(green + share * (target - green)),
        round(blue + share * (target - blue)),
    )


def _fill(texture: str, rgb: RGB, side: int, unit: int) -> Image.Image:
    """The object's surface, RGB side x side; ``unit`` is one scene unit in these pixels."""
    fill = Image.new("RGB", (side, side), rgb)
    draw, second, middle = ImageDraw.Draw(fill), _second_colour(rgb), side // 2
    if texture == "striped":
        period = max(4, round(unit * 0.07))
        # A stripe of the object's own colour runs through the centre.
        for top in range((middle + period // 4) % period - period, side, period):
            draw.rectangle((0, top, side, top + round(period * 0.45) - 1), fill=second)
        return fill
    period, dot = max(4, round(unit * 0.078)), max(1, round(unit * 0.02))
    for row, y in enumerate(range(middle % period - 2 * period, side + period, period)):
        shift = (row + middle // period) % 2 * (period // 2)
        for x in range(middle % period - 2 * period + shift, side + period, period):
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=second)
    return fill


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Draw the scene: RGB, size x size pixels, edges smoothed by drawing four times larger."""
    if size < 8:
        raise ValueError(f"size is {size} pixels, expected at least 8")
    unit = size * OVERSAMPLING
    high, low = (np.array(rgb, np.float64) for rgb in BACKGROUNDS[scene.background])
    # The gradient steps once per output row: smooth to see, and few colours to compress.
    share = np.repeat(np.linspace(0, 1, size), OVERSAMPLING)[:, None, None]
    rows = np.rint(high + share * (low - high)).astype(np.uint8)
    canvas = Image.fromarray(np.repeat(rows, unit, axis=1))
    for item in scene.objects:
        radius = max(1, round(item.radius * unit))
        mask = stencil(item.shape, radius)
        rgb = item.rgb or COLOURS[item.colour]
        left, top = round(item.x * unit) - radius, round(item.y * unit) - radius
        canvas.paste(rgb, (left, top, left + mask.width, top + mask.height), mask)
        if item.texture != "solid":
            # A rim of the plain colour keeps the outline whole on a background like the stripes.
            rim = round(radius * RIM)
            inner = Image.new("L", mask.size, 0)
            inner.paste(stencil(item.shape, radius - rim), (rim, rim))
            texture = _fill(item.texture, rgb, mask.width, unit)
            canvas.paste(texture, (left, top), ImageChops.darker(inner, mask))
    return canvas.reduce(OVERSAMPLING)
