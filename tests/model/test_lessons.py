"""What a record teaches: captions, questions, statements, and names put in words."""

from multimodal.model.lessons import descriptions_of, names_of, questions_of
from multimodal.model.templates import Templates


def test_the_name_of_a_class_is_put_in_words() -> None:
    record = {"captions": ["tabby cat"], "label": "tabby_cat", "synonyms": ["tabby cat", "Tabby"]}
    assert names_of(record) == ["tabby cat", "Tabby"]
    described = descriptions_of(record)
    assert "a photo of a tabby cat." in described and "tabby cat" not in described
    questions = questions_of(record, Templates())
    assert {answer for _, _, answer in questions} == {"a tabby cat"} and len(questions) > 1
    assert "there is an owl in the picture." in descriptions_of({"label": "owl"})


def test_a_category_beside_a_caption_is_no_name() -> None:
    record = {"captions": ["A banana."], "label": "food"}
    assert names_of(record) == [] and questions_of(record, Templates()) == []
    assert descriptions_of(record) == ["A banana."]


def test_true_and_false_are_no_names() -> None:
    record = {"captions": ["there is a box"], "label": "true"}
    assert names_of(record) == [] and descriptions_of(record) == []
    assert questions_of(record, Templates())[0][1:] == ("there is a box", "true")
