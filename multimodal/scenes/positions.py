"""Where objects of a scene are: regions of the picture, and relations between two objects.

Facts come in two strengths. With ``sure`` a fact is clear to everyone. Without it, the fact is not
false. Captions are written with the first and checked with the second.
"""

import math
from collections.abc import Sequence

from multimodal.scenes.scene import SceneObject

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


def in_region(item: SceneObject, region: str, sure: bool = False) -> bool:
    """Whether the centre of the object is in ``region``, one of ``REGIONS``."""
    edge = 0.35 if sure else 0.43
    inner = 0.1 if sure else 0.17
    holds = {
        "left": item.x < edge,
        "right": item.x > 1 - edge,
        "top": item.y < edge,
        "bottom": item.y > 1 - edge,
        "centre": abs(item.x - 0.5) < inner and abs(item.y - 0.5) < inner,
    }
    return all(holds[part] for part in region.split())


def region_of(items: Sequence[SceneObject]) -> str | None:
    """The most specific region that surely contains all the objects, or None.

    Corners come before the centre and the sides.
    """
    for region in REGIONS:
        if all(in_region(item, region, sure=True) for item in items):
            return region
    return None


def relation_holds(a: SceneObject, relation: str, b: SceneObject, sure: bool = False) -> bool:
    """Whether a is ``relation`` b.

    Args:
        a: first object.
        relation: one of ``RELATIONS``.
        b: second object.
        sure: for a direction, it must also be the main direction from a to b.
    """
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
    """Whether a is between b and c: near the line that joins them, away from its ends."""
    dx, dy = c.x - b.x, c.y - b.y
    length = math.hypot(dx, dy)
    if length == 0:
        return False
    along = ((a.x - b.x) * dx + (a.y - b.y) * dy) / length**2
    off = abs((a.x - b.x) * dy - (a.y - b.y) * dx) / length
    return (0.25 < along < 0.75 and off < 0.1) if sure else (0.1 < along < 0.9 and off < 0.18)
