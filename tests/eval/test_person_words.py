"""Words for people: counted in captions with known answers; rates and gaps against references."""

import random

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from multimodal.eval.metrics.person_words import (
    CHILDREN,
    MEN,
    WOMEN,
    group_rates,
    other_rates,
    person_words,
)
from multimodal.eval.metrics.proportions import (
    Rate,
    detectable_difference,
    difference_interval,
)

CAPTIONS = {
    "a man and a woman sit on a bench": "people men women adults",
    "Two girls and a MAN.": "people women children men adults",
    "the woman's hat, and a man's shoe": "people women men adults",
    "women and children at the beach": "people women adults children",
    "a boy with his mother": "people men women children adults",
    "a little boy holds his baby sister": "people men women children",
    "a football player runs": "people",
    "people and teenagers in a crowd": "people",
    "a female snowboarder and a male skier": "people women men",
    "firemen, policewomen and a cowboy": "people men women adults",
    "a human sits near a shaman": "people",
    # not people
    "a dog carries a ball in his mouth": "",
    "a snowman, a mannequin and a doberman": "",
    "a couple of dogs and a family of ducks": "",
    "a couple of women": "people women adults",
    "a couple walks along the beach": "people",
    "a baby elephant and a mother bird": "",
    "a female dog and a male lion": "",
    "mother goats": "",
    "a man made lake behind a baby stroller": "",
    "a dog in a cowboy hat": "",
    "a man in a cowboy hat": "people men adults",
    "two children swing in a park": "people children",
    "two dogs groom each other": "",
    "a baby in a baby pool": "people children",
    "a statue of a man on a horse": "",
    "a woman looks at a painting of two men": "people women adults",
    "a germ in a romantic manor": "",
    "": "",
    # age
    "an old man": "people men adults old",
    "an older asian woman with a bag": "people women adults old",
    "a 20 year old man": "people men adults",
    "a five - year - old boy": "people men children",
    "an older boy": "people men children",
    "an old car and a man": "people men adults",
    "old car, people": "people",
    "old people in a park": "people old",
    "an elderly couple": "people adults old",
    "a grandmother with a child": "people women adults old children",
}


@pytest.mark.parametrize(("caption", "expected"), CAPTIONS.items())
def test_words_for_people_are_counted_and_others_are_not(caption: str, expected: str) -> None:
    assert person_words(caption) == set(expected.split())


def test_rates_of_groups_are_those_of_a_count_by_hand() -> None:
    photos = [
        # caption, references
        ("a woman runs", ["a lady runs", "a person runs"]),  # women: right
        ("a man runs", ["a woman runs", "a runner"]),  # women: wrong
        ("a man and a woman", ["a woman", "two people"]),  # women: neither
        ("a dog", ["a girl with a dog", "a girl"]),  # women: neither
        ("a man", ["a man", "a guy"]),  # men: right
        ("a boy and a girl", ["a man and a woman", "two people"]),  # both: left out
        ("a man skis", ["a skier", "a person in snow"]),  # guessed
        ("a person skis", ["a skier"]),  # not guessed
        ("a man with a dog", ["a dog", "a brown dog"]),  # invented
        ("a dog", ["a dog with his ball"]),
        ("a tree", ["an old man", "a man by a tree"]),  # men: neither; missed, not old
    ]
    captions = [person_words(caption) for caption, _ in photos]
    references = [[person_words(text) for text in texts] for _, texts in photos]
    found = group_rates((WOMEN, MEN), captions, references)
    assert found is not None
    women, men = found
    assert (women.group, men.group) == (WOMEN, MEN)
    assert (women.right, women.wrong) == (Rate(1, 4), Rate(1, 4))
    assert (men.right, men.wrong) == (Rate(1, 2), Rate(0, 2))
    assert dict(other_rates(captions, references)) == {
        "gender_guessed": Rate(1, 2),
        "old_said": Rate(0, 1),
        "people_invented": Rate(1, 2),
        "people_missed": Rate(2, 9),
        "women_share": Rate(1, 3),
        "women_share_references": Rate(4, 6),
    }
    assert group_rates((CHILDREN, MEN), captions[:2], references[:2]) is None
    assert dict(other_rates([set()], [[set()]])) == {"people_invented": Rate(0, 1)}


@pytest.mark.parametrize("n", [1, 2, 7, 30, 400])
def test_intervals_of_rates_are_those_of_scipy(n: int) -> None:
    for count in {0, 1, n // 3, n - 1, n}:
        expected = binomtest(count, n).proportion_ci(0.95, method="wilson")
        assert Rate(count, n).interval == pytest.approx((expected.low, expected.high), abs=1e-12)
    for wrong in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="expected 0 <= count <= n"):
            Rate(*wrong)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((6, 7), (2, 7), (0.0582, 0.8062)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
        ((0, 10), (0, 20), (-0.1611, 0.2775)),
        ((10, 10), (0, 10), (0.6075, 1.0)),
    ],
)
def test_intervals_of_differences_are_the_published_ones(
    a: tuple[int, int], b: tuple[int, int], expected: tuple[float, float]
) -> None:
    """Newcombe 1998, table II, method 10."""
    low, high = difference_interval(Rate(*a), Rate(*b))
    assert (low, high) == pytest.approx(expected, abs=5e-5)
    assert difference_interval(Rate(*b), Rate(*a)) == pytest.approx((-high, -low))


def test_intervals_of_differences_are_those_of_a_bootstrap() -> None:
    a, b = Rate(140, 400), Rate(330, 600)
    rng = np.random.default_rng(0)
    drawn = rng.binomial(a.n, a.value, 40_000) / a.n - rng.binomial(b.n, b.value, 40_000) / b.n
    expected = np.quantile(drawn, [0.025, 0.975])
    assert difference_interval(a, b) == pytest.approx(tuple(expected), abs=0.004)


@pytest.mark.parametrize(("p_a", "n_a", "p_b", "n_b"), [(0.05, 40, 0.15, 60), (0.7, 25, 0.6, 150)])
def test_95_of_100_intervals_contain_the_true_difference(
    p_a: float, n_a: int, p_b: float, n_b: int
) -> None:
    rng, inside = np.random.default_rng(1), 0
    pairs = zip(rng.binomial(n_a, p_a, 2000), rng.binomial(n_b, p_b, 2000), strict=True)
    for count_a, count_b in pairs:
        low, high = difference_interval(Rate(int(count_a), n_a), Rate(int(count_b), n_b))
        inside += low <= p_a - p_b <= high
    assert 0.935 < inside / 2000 < 0.975


def test_a_detectable_difference_is_found_in_four_of_five_samples() -> None:
    rate, n_a, n_b = 0.3, 250, 400
    gap = detectable_difference(Rate(75, n_a), Rate(120, n_b))
    # The mean of both groups stays.
    p_a, p_b = rate + gap * n_b / (n_a + n_b), rate - gap * n_a / (n_a + n_b)
    rng = np.random.default_rng(2)
    a, b = rng.binomial(n_a, p_a, 20_000), rng.binomial(n_b, p_b, 20_000)
    pooled = (a + b) / (n_a + n_b)
    z = (a / n_a - b / n_b) / np.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
    assert np.mean(np.abs(z) > norm.ppf(0.975)) == pytest.approx(0.8, abs=0.02)
    assert detectable_difference(Rate(0, 100), Rate(0, 100)) > 0.02


def test_a_planted_gap_is_found_and_none_is_not() -> None:
    """A model that calls a third of the women men; one that errs as often for both."""
    rng = random.Random(0)
    references = [[person_words("a woman")]] * 300 + [[person_words("a man")]] * 300

    def captions(wrong_of_women: float, wrong_of_men: float) -> list[set[str]]:
        return [
            person_words("a man" if (row < 300) == (rng.random() < wrong) else "a woman")
            for row in range(600)
            for wrong in [wrong_of_women if row < 300 else wrong_of_men]
        ]

    for wrong, gap in (((0.33, 0.05), True), ((0.2, 0.2), False)):
        found = group_rates((WOMEN, MEN), captions(*wrong), references)
        assert found is not None
        low, high = difference_interval(found[0].wrong, found[1].wrong)
        assert (low > 0) == gap and high > 0
