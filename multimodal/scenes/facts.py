"""What can be said of a scene, and what a caption says of it.

A fact is a kind and the objects that it is about. Its value is left out: a caption that calls the
object by another colour makes a false claim, and says nothing.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations

from multimodal.scenes.checking import CaptionScore
from multimodal.scenes.claims import ATTRIBUTES, Claim
from multimodal.scenes.positions import SPATIAL, region_of, relation_holds
from multimodal.scenes.scene import Scene

# (kind of claim, numbers of the objects in the scene; none for the whole picture)
Fact = tuple[str, frozenset[int]]


def facts_of(scene: Scene) -> set[Fact]:
    """What a full description of the scene would say.

    - ``colour``, ``shape``, ``size`` of each object, and its ``texture`` unless it is solid: a
      solid object is seldom called so.
    - ``count``: how many objects there are, and how many of one colour and shape, if several.
    - ``position`` of each object that is surely in a region.
    - ``relation``: of two objects of different looks, if one is surely left of or above the other.
    - ``background``.
    """
    objects = scene.objects
    facts = {(kind, frozenset({i})) for kind in ATTRIBUTES for i in range(len(objects))}
    facts -= {("texture", frozenset({i})) for i, o in enumerate(objects) if o.texture == "solid"}
    groups = defaultdict(set)
    for number, item in enumerate(objects):
        groups[item.pair].add(number)
        if region_of([item]):
            facts.add(("position", frozenset({number})))
    for group in (*groups.values(), range(len(objects))):
        if len(group) > 1:
            facts.add(("count", frozenset(group)))
    for a, b in combinations(range(len(objects)), 2):
        differ = objects[a].pair != objects[b].pair
        if differ and any(relation_holds(objects[a], r, objects[b], sure=True) for r in SPATIAL):
            facts.add(("relation", frozenset({a, b})))
    return facts | {("background", frozenset())}


def facts_said(score: CaptionScore, scene: Scene) -> set[Fact]:
    """Those of the facts of the scene that the true claims of a caption say.

    Any true relation of two objects counts, also that one is larger or that one is between others.
    """
    said = {fact for claim, true in score.results if true for fact in _facts(claim, score, scene)}
    return said & facts_of(scene)


def _facts(claim: Claim, score: CaptionScore, scene: Scene) -> Iterator[Fact]:
    """The facts that a true claim states."""
    subject = [score.items[slot] for slot in claim.subject if slot in score.items]
    if claim.kind == "count":
        yield "count", frozenset(subject if claim.subject else range(len(scene.objects)))
    elif claim.kind == "relation":
        for other in (score.items[slot] for group in claim.others for slot in group):
            yield from (("relation", frozenset({item, other})) for item in subject)
    elif claim.kind == "background":
        yield "background", frozenset()
    else:
        yield from ((claim.kind, frozenset({item})) for item in subject)
