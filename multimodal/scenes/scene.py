"""Synthetic scenes: coloured shapes on a background, with known ground truth.

A scene has 1 to 4 objects that do not overlap, on one of five backgrounds. The idea follows CLEVR
(Johnson et al. 2017, https://arxiv.org/abs/1612.06890). Held-out combinations follow its CoGenT
split: eight pairs of colour and shape never occur in a training scene. Each colour and each shape
does occur.

Coordinates are scene units in [0, 1]: x to the right, y downwards. A radius has the same unit.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

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
# The colour of each background at its top and at its bottom. No name is also an object's colour.
BACKGROUNDS: dict[str, tuple[RGB, RGB]] = {
    "white": ((252, 252, 252), (252, 252, 252)),
    "black": ((12, 12, 14), (12, 12, 14)),
    "grey": ((150, 150, 150), (150, 150, 150)),
    "cream": ((255, 240, 205), (255, 240, 205)),
    "sky": ((120, 185, 240), (222, 240, 252)),
}
# Each colour and each shape occurs exactly once, so that only the combination is new.
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
GAP = 0.03  # between the circles around two objects. It covers a square's corners (1.06 radius).
MAX_TRIES = 60  # to find a free position for an object
JITTER = 10  # per channel, of 255. It is far below the distance between two named colours.


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Args:
        shape: one of ``SHAPES``.
        colour: a name in ``COLOURS``.
        size: a name in ``SIZES``.
        texture: one of ``TEXTURES``.
        x: centre, in scene units.
        y: centre, in scene units.
        radius: of the circle around the object, in (0, 0.5] scene units.
        rgb: the exact colour, 0 to 255 per channel. None is the colour of ``COLOURS``.

    Raises:
        ValueError: if a value is unknown or out of range.
    """

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
            raise ValueError(
                f"x {self.x}, y {self.y}, radius {self.radius}: expected x and y in [0, 1], "
                "radius in (0, 0.5]"
            )
        if self.rgb is not None and not all(0 <= channel <= 255 for channel in self.rgb):
            raise ValueError(f"rgb is {self.rgb}, expected 0 to 255")

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape)."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """The ground truth of one picture.

    Args:
        objects: 1 to ``MAX_OBJECTS``, from left to right, then from top to bottom.
        background: a name in ``BACKGROUNDS``.

    Raises:
        ValueError: for another number of objects or an unknown background.
    """

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
        """A JSON object with everything needed to render and to check the scene."""
        return {"background": self.background, "objects": [asdict(item) for item in self.objects]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Scene":
        """The inverse of ``to_json``.

        Raises:
            ValueError: if ``record`` is not the JSON of a scene.
        """
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


def scene_of(record: Mapping[str, Any]) -> Scene | None:
    """The scene of a record. None: it has none, or another field of that name."""
    try:
        return Scene.from_json(record["scene"])
    except (KeyError, ValueError):
        return None


def sample_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene.

    Args:
        rng: source of all randomness.
        held_out: True puts a held-out pair of colour and shape on at least one object. False uses
            training pairs only.
    """
    count = rng.choices((1, 2, 3, 4), (20, 30, 30, 20))[0]
    kinds: list[tuple[str, str, str, str]] = []  # colour, shape, size, texture
    held_out_index = rng.randrange(count) if held_out else -1
    for index in range(count):
        if index != held_out_index and kinds and rng.random() < 0.2:
            kinds.append(kinds[-1])  # identical objects, for counting
            continue
        colour, shape = rng.choice(HELD_OUT if index == held_out_index else TRAINING_PAIRS)
        size = rng.choice(tuple(SIZES))
        texture = rng.choices(TEXTURES, (60, 20, 20))[0]
        kinds.append((colour, shape, size, texture))
    while True:
        circles = _place_circles([SIZES[size] for _, _, size, _ in kinds], rng)
        if circles is not None:
            break
    objects = []
    for (colour, shape, size, texture), (x, y, radius) in zip(kinds, circles, strict=True):
        red, green, blue = (
            min(255, max(0, channel + rng.randint(-JITTER, JITTER))) for channel in COLOURS[colour]
        )
        objects.append(SceneObject(shape, colour, size, texture, x, y, radius, (red, green, blue)))
    objects.sort(key=lambda item: (item.x, item.y))
    return Scene(tuple(objects), rng.choice(tuple(BACKGROUNDS)))


def _place_circles(
    radius_ranges: list[tuple[float, float]], rng: random.Random
) -> list[tuple[float, float, float]] | None:
    """(x, y, radius) of each object, without overlap. None if no free position was found."""
    circles: list[tuple[float, float, float]] = []
    for low, high in radius_ranges:
        # Rounded: the JSON is short and holds exactly what is rendered.
        radius = round(rng.uniform(low, high), 4)
        for _ in range(MAX_TRIES):
            x = round(rng.uniform(radius + 0.02, 0.98 - radius), 4)
            y = round(rng.uniform(radius + 0.02, 0.98 - radius), 4)
            if all(math.hypot(x - a, y - b) > radius + r + GAP for a, b, r in circles):
                circles.append((x, y, radius))
                break
        else:
            return None
    return circles
