"""Wordings of questions: all mean the same, and unseen ones are unseen but have known words."""

import random
import re
from collections import Counter
from string import Formatter

from multimodal.scenes.questions import draw_questions, questions
from multimodal.scenes.scene import sample_scene
from multimodal.scenes.wordings import TRAINING_WORDINGS, UNSEEN_WORDINGS, Wordings
from multimodal.scenes.words import RELATION_PHRASES

SCENES = [sample_scene(random.Random(f"wordings {k}"), held_out=k % 5 == 0) for k in range(200)]
GRAMMAR = {"is", "do", "article"}  # slots that agree with the others and say nothing


def slots(wording: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(wording) if name}


def words(wordings: Wordings) -> set[str]:
    texts = " ".join(text for each in wordings.values() for text in each)
    return set(re.findall(r"[a-z]+", re.sub(r"{\w+}", " ", texts)))


def test_each_kind_has_several_wordings_and_none_of_them_is_unseen() -> None:
    assert TRAINING_WORDINGS.keys() == UNSEEN_WORDINGS.keys()
    for kind, training in TRAINING_WORDINGS.items():
        unseen = UNSEEN_WORDINGS[kind]
        assert len(training) >= 5 and len(unseen) >= 3
        plain = [re.sub(r"\W+", " ", wording) for wording in (*training, *unseen)]
        assert len(set(plain)) == len(plain), "they differ in more than punctuation"
        needed = slots(training[0]) - GRAMMAR
        assert all(slots(wording) - GRAMMAR == needed for wording in (*training, *unseen))


def test_unseen_wordings_have_words_of_training() -> None:
    assert words(UNSEEN_WORDINGS) <= words(TRAINING_WORDINGS)


def test_what_is_asked_does_not_depend_on_the_wording() -> None:
    for number, scene in enumerate(SCENES):
        drawn = draw_questions(scene, random.Random(number), 6)
        pairs = questions(scene, random.Random(number), 6)
        assert [answer for _, answer in pairs] == [question.answer for question in drawn]
        for question, (text, _) in zip(drawn, pairs, strict=True):
            rng, forms = random.Random(0), set()
            for wording in TRAINING_WORDINGS[question.kind]:
                forms |= {question.worded(wording, rng).lower() for _ in range(20)}
            assert question.usual in forms and text.lower() in forms
            for content in (slot for slot in question.slots.values() if " " in slot):
                assert content in text or content in RELATION_PHRASES


def test_training_draws_all_wordings() -> None:
    seen = Counter(
        text for k, scene in enumerate(SCENES) for text, _ in questions(scene, random.Random(k), 6)
    )
    for wording in (
        *TRAINING_WORDINGS["count_all"],
        *TRAINING_WORDINGS["background"],
    ):
        capital = wording[0].upper() + wording[1:]
        assert seen[wording] and seen[capital]
    unseen = [wording for each in UNSEEN_WORDINGS.values() for wording in each]
    assert not {text.lower() for text in seen} & set(unseen)
