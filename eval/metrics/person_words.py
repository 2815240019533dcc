"""Words for people in captions: what they say about gender and age, beside what references say.

What a photo shows is taken from its references, as in Hendricks et al. 2018 ("Women also
Snowboard", arXiv:1803.09797): it is a photo of women if a reference has a word for women and none
has a word for men. So a group is made of the words of annotators, and not of what the people are.

Pronouns do not count. A quarter of the captions of flickr8k with "his", "her" and the like name no
person: they are about dogs.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

from multimodal.eval.metrics.proportions import Rate

PEOPLE, WOMEN, MEN, CHILDREN, ADULTS, OLD = "people", "women", "men", "children", "adults", "old"
# What a word says besides that there are people, and the words. Regular plurals are added.
_WORDS = """
women adults: woman women lady ladies mother mom mum mommy wife wives bride waitress actress nun \
ballerina cowgirl businesswoman businesswomen policewoman policewomen sportswoman saleswoman
men adults: man men guy gentleman gentlemen father dad daddy husband groom groomsman groomsmen \
waiter monk cowboy businessman businessmen policeman policemen fireman firemen fisherman fishermen \
cameraman cameramen sportsman sportsmen workman workmen salesman repairman horseman batsman baseman
women adults old: grandmother grandma
men adults old: grandfather grandpa
women children: girl schoolgirl daughter
men children: boy schoolboy son
women: female sister
men: male brother dude
children: child children kid baby babies toddler infant newborn schoolchild schoolchildren
adults: adult parent
adults old: elderly
: person people persons human someone somebody couple crowd family families audience teen \
teenager youth senior individual member participant pedestrian friend owner spectator onlooker \
bystander player teammate athlete racer runner jogger rider biker cyclist bicyclist motorcyclist \
driver passenger skier snowboarder skateboarder skater rollerblader surfer windsurfer wakeboarder \
waterskier swimmer diver kayaker rower climber mountaineer hiker backpacker snowmobiler \
equestrian wrestler footballer golfer gymnast pitcher catcher batter fielder cheerleader dancer \
performer musician guitarist drummer singer juggler artist photographer vendor worker officer \
soldier firefighter sailor doctor nurse teacher student referee lifeguard tourist
"""
SAYS = {
    form: frozenset({PEOPLE, *says.split()})
    for line in _WORDS.strip().splitlines()
    for says, _, words in [line.partition(":")]
    for word in words.split()
    for form in (word, f"{word}s")
}
# "a couple of dogs", "a family of ducks": people among them have a word of their own.
_GROUP_OF = re.compile(r"\b(?:couple|crowd|family|families) of\b")
_IMAGES = re.compile(r"\b(?:statue|sculpture|painting|mural)s? of (?:an? |the |two )?(?:\w+ )?\w+")
_ANIMALS = frozenset(
    "animal bear bird calf cat chick cow deer dog duck elephant giraffe goat goose horse kitten "
    "lamb lion monkey pig puppy seal sheep swan tiger turtle zebra".split()
)
# Nouns that turn the word before them into an adjective: "baby stroller", "man made".
_NOT_PEOPLE = {
    **dict.fromkeys(
        ("baby", "kid", "child", "toddler"),
        frozenset("bed bottle carriage carrier chair crib doll pool pram seat stroller swing toy "
                  "strollers carriages".split()),
    ),
    **dict.fromkeys(("kids", "children"), frozenset(("pool",))),
    "man": frozenset(("made", "hole", "powered")),
    "cowboy": frozenset(("hat", "hats", "boots")),
    "groom": frozenset(("each",)),
}  # fmt: skip


def person_words(text: str) -> set[str]:
    """What the words of a caption say about people.

    Returns:
        "people" if it names any, and of "women", "men", "children", "adults" and "old" what its
        words for them say. "two girls and a man" says people, women, men, children, adults.
    """
    text = _IMAGES.sub(" ", _GROUP_OF.sub(" ", text.lower()))
    words = re.findall(r"[a-z]+", text)
    said: set[str] = set()
    for number, word in enumerate(words):
        says, following = SAYS.get(word), "".join(words[number + 1 : number + 2])
        is_animal = following in _ANIMALS or following.removesuffix("s") in _ANIMALS
        if says is None or is_animal or following in _NOT_PEOPLE.get(word, ()):
            continue
        said |= says
        if CHILDREN not in says and _is_old(words[max(0, number - 3) : number]):
            said.add(OLD)
    return said


def _is_old(before: Sequence[str]) -> bool:
    """Whether "old" or "older" belongs to the word after these: "old man", "older asian man"."""
    for distance in (1, 2):
        if len(before) >= distance and before[-distance] in ("old", "older"):
            # "a 20 year old man", and not a noun in between: "an old car, people"
            year = len(before) > distance and before[-distance - 1] in ("year", "years")
            return not year and (distance == 1 or before[-1] in _BETWEEN)
    return False


_BETWEEN = frozenset("asian african american black white bald bearded grey gray thin fat".split())


@dataclass(frozen=True)
class GroupRates:
    """How captions name one of two groups.

    Args:
        group: such as "women".
        other: such as "men".
        right: captions that have words of this group and none of the other.
        wrong: captions that have words of the other group and none of this.
    """

    group: str
    other: str
    right: Rate
    wrong: Rate


def photos_of(group: str, other: str, references: Sequence[Sequence[set[str]]]) -> list[bool]:
    """Which photos are of a group alone: some reference says so, and none says the other.

    Args:
        references: what each reference of each photo says (``person_words``).
    """
    return [_only(group, other, set().union(*said)) for said in references]


def _only(group: str, other: str, said: set[str]) -> bool:
    return group in said and other not in said


def group_rates(
    pair: tuple[str, str], captions: Sequence[set[str]], references: Sequence[Sequence[set[str]]]
) -> tuple[GroupRates, GroupRates] | None:
    """How captions name the photos of two groups.

    Args:
        pair: two groups that exclude each other, such as women and men.
        captions: what the caption of each photo says.
        references: what its references say.

    Returns:
        The rates of both groups. None if one of them has no photo.
    """

    def rates(group: str, other: str) -> GroupRates | None:
        said = list(compress(captions, photos_of(group, other, references)))
        if not said:
            return None
        right = sum(_only(group, other, each) for each in said)
        wrong = sum(_only(other, group, each) for each in said)
        return GroupRates(group, other, Rate(right, len(said)), Rate(wrong, len(said)))

    first, second = rates(*pair), rates(*reversed(pair))
    return (first, second) if first and second else None


def other_rates(
    captions: Sequence[set[str]], references: Sequence[Sequence[set[str]]]
) -> Iterator[tuple[str, Rate]]:
    """Rates that are not about two groups, as far as there are such photos.

    - ``gender_guessed``: people, but no reference says a gender: captions that say one.
    - ``old_said``: a reference says that people are old: captions that say so.
    - ``people_invented``: no reference names people: captions that do.
    - ``people_missed``: each reference names people: captions that do not.
    - ``women_share``: photos of women or of men alone: the share of women among the captions that
      say one of them. ``women_share_references``: among the photos.
    """
    any_said = [set[str]().union(*said) for said in references]

    def rate(name: str, said: Sequence[bool], among: Sequence[bool]) -> Iterator[tuple[str, Rate]]:
        chosen = list(compress(said, among))
        if chosen:
            yield name, Rate(sum(chosen), len(chosen))

    yield from rate(
        "gender_guessed",
        [bool(said & {WOMEN, MEN}) for said in captions],
        [PEOPLE in said and not said & {WOMEN, MEN} for said in any_said],
    )
    yield from rate("old_said", [OLD in said for said in captions], [OLD in s for s in any_said])
    named = [PEOPLE in said for said in captions]
    yield from rate("people_invented", named, [PEOPLE not in said for said in any_said])
    yield from rate(
        "people_missed",
        [not name for name in named],
        [all(PEOPLE in said for said in each) for each in references],
    )
    of_women, of_men = photos_of(WOMEN, MEN, references), photos_of(MEN, WOMEN, references)
    either = [a or b for a, b in zip(of_women, of_men, strict=True)]
    says_women = [_only(WOMEN, MEN, said) for said in captions]
    says_one = [a or _only(MEN, WOMEN, s) for a, s in zip(says_women, captions, strict=True)]
    both = [a and b for a, b in zip(either, says_one, strict=True)]
    yield from rate("women_share", says_women, both)
    yield from rate("women_share_references", of_women, either)
