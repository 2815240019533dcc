"""Checks the claims of a caption against the ground truth of its scene.

The slots of the caption are matched to the objects of the scene. The matching makes the most
colours, shapes, sizes and textures true, then the most positions and relations. No object is
matched twice, so a caption that names an object twice makes a false claim.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from multimodal.scenes.claims import ATTRIBUTES, Claim, parse_caption
from multimodal.scenes.positions import in_region, is_between, relation_holds
from multimodal.scenes.scene import Scene, SceneObject

MAX_SLOTS = 8  # twice the most objects of a scene. Further slots stay unmatched.


@dataclass
class CaptionScore:
    """The claims of a caption and which of them are true.

    Args:
        results: each claim, and whether it is true.
        mentioned: number of objects that the caption mentions.
        matched: number of those that the scene has with that colour and shape, each at most once.
        objects: number of objects of the scene.
        items: number of the object that each matched slot stands for.
    """

    results: list[tuple[Claim, bool]] = field(default_factory=list)
    mentioned: int = 0
    matched: int = 0
    objects: int = 0
    items: dict[int, int] = field(default_factory=dict)

    @property
    def precision(self) -> float:
        """Share of the claims that are true, in [0, 1]."""
        return sum(true for _, true in self.results) / len(self.results)

    @property
    def recall(self) -> float:
        """Share of the objects that are mentioned with their colour and shape, in [0, 1]."""
        return self.matched / self.objects

    @property
    def unparsed(self) -> int:
        """Number of clauses that could not be parsed."""
        return sum(claim.kind == "unparsed" for claim, _ in self.results)


def _assignments(
    scores: list[list[int]], slot: int = 0, used: int = 0
) -> Iterator[tuple[int, dict[int, int]]]:
    """All matchings of slots to objects, as (sum of scores, {slot: object}).

    No object is matched twice. A score of 0 is no match. ``used``: bit set of matched objects.
    """
    if slot == len(scores):
        yield 0, {}
        return
    yield from _assignments(scores, slot + 1, used)
    for item, score in enumerate(scores[slot]):
        if score and not used >> item & 1:
            for total, rest in _assignments(scores, slot + 1, used | 1 << item):
                yield total + score, {slot: item, **rest}


def _holds(claim: Claim, items: dict[int, SceneObject]) -> bool:
    """Whether a position or relation holds for all its objects. ``items``: slot -> object."""
    slots = [*claim.subject, *(slot for group in claim.others for slot in group)]
    if any(slot not in items for slot in slots):
        return False
    subjects = [items[slot] for slot in claim.subject]
    if claim.kind == "position":
        return all(in_region(item, claim.value) for item in subjects)
    others = [[items[slot] for slot in group] for group in claim.others]
    if claim.value == "between":
        first, second = others
        return all(is_between(a, b, c) for a in subjects for b in first for c in second)
    return all(relation_holds(a, claim.value, b) for a in subjects for b in others[0])


def check_caption(text: str, scene: Scene) -> CaptionScore:
    """Parse a caption and check each of its claims against the scene. Never raises."""
    claims = parse_caption(text)
    attributes_of: dict[int, dict[str, str]] = {}  # slot -> kind -> value
    for claim in claims:
        for slot in claim.subject:
            attributes_of.setdefault(slot, {})
        if claim.kind in ATTRIBUTES:
            attributes_of[claim.subject[0]][claim.kind] = claim.value

    def matching(attributes: dict[str, str], item: SceneObject) -> int:
        return sum(getattr(item, kind) == value for kind, value in attributes.items())

    scores = [
        [matching(attributes_of[slot], item) for item in scene.objects]
        for slot in sorted(attributes_of)[:MAX_SLOTS]
    ]
    spatial_claims = [claim for claim in claims if claim.kind in ("position", "relation")]
    assignments = list(_assignments(scores))
    best = max(total for total, _ in assignments)

    def objects_of(assignment: dict[int, int]) -> dict[int, SceneObject]:
        return {slot: scene.objects[item] for slot, item in assignment.items()}

    matched = max(
        (assignment for total, assignment in assignments if total == best),
        key=lambda option: sum(_holds(claim, objects_of(option)) for claim in spatial_claims),
    )
    items = objects_of(matched)
    score = CaptionScore(mentioned=len(attributes_of), objects=len(scene.objects), items=matched)
    for claim in claims:
        if claim.kind in ATTRIBUTES:
            item = items.get(claim.subject[0])
            true = item is not None and getattr(item, claim.kind) == claim.value
        elif claim.kind == "count":
            attributes = attributes_of[claim.subject[0]] if claim.subject else {}
            count = sum(matching(attributes, item) == len(attributes) for item in scene.objects)
            true = str(count) == claim.value
        elif claim.kind == "background":
            true = claim.value == scene.background
        else:
            true = claim.kind != "unparsed" and _holds(claim, items)
        score.results.append((claim, true))
    mentioned = Counter((a.get("colour"), a.get("shape")) for a in attributes_of.values())
    present: Counter[tuple[str | None, str | None]] = Counter(item.pair for item in scene.objects)
    score.matched = (mentioned & present).total()
    return score
