"""The words of captions of synthetic scenes, used to write and to parse them.

The first form of a phrase is the usual one. The parser knows no other words.
"""

from collections.abc import Iterator

from multimodal.scenes.positions import REGIONS
from multimodal.scenes.scene import BACKGROUNDS, COLOURS, SHAPES

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE_WORDS = {
    "small": "small",
    "little": "small",
    "tiny": "small",
    "large": "large",
    "big": "large",
}
TEXTURE_WORDS = {"solid": "solid", "striped": "striped", "dotted": "dotted", "spotted": "dotted"}
ADJECTIVES = {
    **{word: ("colour", word) for word in COLOURS},
    **{word: ("size", size) for word, size in SIZE_WORDS.items()},
    **{word: ("texture", texture) for word, texture in TEXTURE_WORDS.items()},
}
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
ANY_NOUNS = {"object": 1, "shape": 1, "thing": 1, "objects": 2, "shapes": 2, "things": 2}
NOUNS = {**{s: (s, 1) for s in SHAPES}, **{plural: (s, 2) for s, plural in PLURALS.items()}}
ARTICLES = {"a": 0, "an": 0, "the": 0, "another": 0} | {w: k for k, w in enumerate(NUMBERS) if k}
AFTER_NOUN = {"with stripes": "striped", "with dots": "dotted"}

RELATION_PHRASES = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above",),
    "below": ("below", "under"),
    "larger than": ("larger than", "bigger than"),
    "smaller than": ("smaller than",),
    "between": ("between", "in between"),
}
POSITION_PHRASES = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "centre": ("in the centre", "in the middle"),
} | {
    corner: (f"in the {corner} corner", f"in the {corner}", f"at the {corner}")
    for corner in REGIONS
    if " " in corner
}
LINKS = ("is", "are", "sits", "which is", "which are", "there is", "there are", "we see")
OPENINGS = (
    *("the picture shows", "the image shows", "this picture has", "a picture of", "an image of"),
    *("a drawing of", "a scene with", "here is", "here are", "with", "and", "only", "just"),
)


def with_article(words: str) -> str:
    """ "an orange ring", "a ring"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def background_phrases() -> Iterator[tuple[str, str]]:
    """(phrase, the background or colour it names)."""
    for word in (*BACKGROUNDS, *COLOURS):
        for start in ("on", "against", "with"):
            yield f"{start} {with_article(word)} background", word
        yield f"the background is {word}", word
    for phrase in ("against the sky", "in the sky", "the background is the sky"):
        yield phrase, "sky"
