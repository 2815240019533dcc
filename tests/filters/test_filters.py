"""Rules: what they find, what they leave, and files that are no rules."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from multimodal.filters.personal import KINDS, find_personal
from multimodal.filters.rules import Filters, Rule, RuleFile, masked, refusal, scripts_of

PERSONAL = {
    "email": (["write to a.b+c@mail.example.org now", "ü@bücher.de"], ["a@b", "@name", "5 @ 3.50"]),
    "card": (["4111 1111 1111 1111", "pay 5500-0000-0000-0004!"], ["4111 1111 1111 1112", "123"]),
    "iban": (["DE89 3704 0044 0532 0130 00", "gb82WEST12345698765432"], ["DE88370400440532013000"]),
    "ip": (["from 192.168.1.7.", "2001:db8::8a2e:370:7334"], ["1.2.3.999", "v 1.2.3", "12:30"]),
    "phone": (["call +49 (30) 123456-78", "0041 44 668 18 00"], ["room 4212", "2026-11-28", "+1"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", PERSONAL)
def test_personal_data_is_found_and_other_numbers_are_not(kind: str) -> None:
    found, other = PERSONAL[kind]
    for text in found:
        assert [name for *_, name in find_personal(text, (kind,))] == [kind], text
    for text in other:
        assert not list(find_personal(text, (kind,))), text


def test_patterns_of_personal_data_end_soon_on_hostile_texts() -> None:
    pieces = ["a@", "1 ", "12-", "+1(", ":", "DE89 ", "0." * 3, "a.a@a.", "1", "00", "1:", "a:::"]
    pieces += ["1111 ", "DE89" + "a" * 40 + " ", "+" + "1" * 40 + " ", "4111 1111 1111 1112 "]
    for piece in pieces:
        for _ in find_personal(piece * 20_000, tuple(KINDS)):
            pass


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("iban", "My IBAN is DE89370400440532013000 please use it", "DE89370400440532013000"),
        ("iban", "GB82 WEST 1234 5698 7654 32 for rent", "GB82 WEST 1234 5698 7654 32"),
        ("iban", "no12 is DE89 3704 0044 0532 0130 00 7", "DE89 3704 0044 0532 0130 00"),
        ("iban", "MA64011519000001205000534921 of Morocco", "MA64011519000001205000534921"),
        ("card", "4111 1111 1111 1111 12/27", "4111 1111 1111 1111"),
        ("card", "card 4111111111111111 123", "4111111111111111"),
        ("card", "pay 2 4111 1111 1111 1111", "4111 1111 1111 1111"),
        ("card", "in 2026 3782 822463 10005 of 01/28", "3782 822463 10005"),
        ("phone", "+49 170 1234567 2026-11-28", "+49 170 1234567"),
        ("ip", "192.168.0.1:8080", "192.168.0.1"),
        ("ip", "http://192.168.0.1:8080/x", "192.168.0.1"),
        ("ip", "IP:10.0.0.1", "10.0.0.1"),
        ("ip", "::ffff:10.0.0.1", "10.0.0.1"),
        ("ip", "from 2001:db8::1: ok", "2001:db8::1"),
        ("ip", "2001:db8::/32", "2001:db8::"),
    ],
)
def test_a_number_ends_where_other_words_and_digits_begin(kind: str, text: str, found: str) -> None:
    assert [text[start:end] for start, end, _ in find_personal(text, (kind,))] == [found]


@pytest.mark.parametrize(
    "text",
    [
        " ".join(map(str, range(200))),
        " ".join(f"2026-11-{day:02}" for day in range(1, 31)),
        "43:51:43:a1:b5:fc:8b:b7:0a:3a:a9:b1:0f:66:73:a8",
        "aa:bb:cc:dd:ee:ff std::map 12:30:45",
    ],
)
def test_rows_of_numbers_are_not_personal_data(text: str) -> None:
    assert not list(find_personal(text, tuple(KINDS)))


def filters(**rules: dict[str, Any]) -> Filters:
    made = {name: {"reason": f"about {name}", **values} for name, values in rules.items()}
    return Filters([Rule(name, RuleFile(**values)) for name, values in made.items()])


def test_words_are_whole_and_in_any_case() -> None:
    rules = filters(insults={"words": ("idiot", "größer", "a b")})
    for text in ("You IDIOT!", "GRÖßER als", "say a b"):
        assert refusal(rules.text(text, "prompt")[1]) is not None, text
    for text in ("idiotic", "a bc", "groesser"):
        assert rules.text(text, "prompt") == (text, [])


def test_masks_add_up_and_a_refusal_ends_it() -> None:
    rules = filters(
        mail={"personal": ("email",), "action": "mask"},
        numbers={"pattern": r"\d+", "action": "mask", "when": ("reply",)},
        zlast={"words": ("secret",), "answer": "no"},
    )
    text = "a@b.org has 5 and 17"
    assert rules.text(text, "prompt")[0] == "[mail] has 5 and 17"
    shown, decisions = rules.text(text, "reply")
    assert shown == "[mail] has [numbers] and [numbers]"
    assert [(each.rule, each.reason) for each in decisions] == [
        ("mail", "about mail"), ("numbers", "about numbers"),
    ]  # fmt: skip
    refused = refusal(rules.text("a secret of a@b.org", "reply")[1])
    assert refused is not None and (refused.rule, refused.answer) == ("zlast", "no")


def test_lengths_and_scripts() -> None:
    rules = filters(long={"characters": (1, 10)}, latin={"scripts": ("latin",)})
    for text, broken in (
        ("a dog", None), ("", "long"), ("a very long text", "long"), ("собака", "latin"),
        ("ein Hündchen"[:10], None), ("狗", "latin"), ("12, 3!", None),
    ):  # fmt: skip
        found = refusal(rules.text(text, "prompt")[1])
        assert (found and found.rule) == broken, text
    assert scripts_of("dog собака 1") == {"LATIN", "CYRILLIC"}


@pytest.mark.parametrize(
    ("text", "scripts"),
    [
        ("1º piso", {"LATIN"}),
        ("5 µm, 3 k\N{OHM SIGN}", {"LATIN"}),
        ("Hawaiʻi", {"LATIN"}),
        ("Ｃａｆé ﬁn ℓ", {"LATIN"}),
        ("コーヒー ｶﾌｪ", {"KATAKANA"}),
        ("時々", {"CJK"}),
        ("μ", {"GREEK"}),
        ("犬™ №", {"CJK"}),
    ],
)
def test_forms_of_letters_and_signs_are_of_no_other_script(text: str, scripts: set[str]) -> None:
    assert scripts_of(text) == scripts


DOG = {
    "type": "object",
    "properties": {"dog": {"$ref": "#/$defs/dog"}, "cat": False},
    "additionalProperties": {"type": "integer"},
    "required": ["dog"],
    "$defs": {"dog": {"properties": {"ages": {"items": {"type": "integer"}}}}},
}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (' {"dog": {"ages": [1, 2]}, "bird": 3}\n', None),
        ('{"dog": {"ages": [1, "secret"]}}', '$.dog.ages[1]: expected type "integer"'),
        ('{"dog": {}, "secret": "secret"}', '$.*: expected type "integer"'),
        ('{"dog": {}, "cat": "secret"}', "$: has what is never allowed"),
        ("{}", '$: expected required ["dog"]'),
        ("[]", '$: expected type "object"'),
        ("A secret dog.", "is not JSON"),
        ('```json\n{"dog": {}}\n```', "is not JSON"),
        ('{"dog": {}, "bird": NaN}', "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_text_follows_a_schema_or_is_refused_where_it_does_not(
    text: str, problem: str | None
) -> None:
    """The reason shows nothing of the text: it stands in the record."""
    rules = filters(form={"json_schema": DOG, "when": ("reply",), "answer": "none"})
    shown, decisions = rules.text(text, "reply")
    assert shown == text and rules.text(text, "prompt") == (text, [])
    assert [each.reason for each in decisions] == ([f"about form: {problem}"] if problem else [])
    assert all((each.action, each.answer) == ("refuse", "none") for each in decisions)


def test_a_schema_that_cannot_be_followed_refuses_and_fetches_nothing() -> None:
    rules = filters(form={"json_schema": {"$ref": "http://127.0.0.1:9/schema.json"}})
    (refused,) = rules.text("{}", "reply")[1]
    assert "cannot be followed: Unresolvable: http://127.0.0.1:9/schema.json" in refused.reason
    rules = filters(form={"json_schema": {"items": {"$ref": "#"}}})
    (refused,) = rules.text("[" * 500 + "]" * 500, "reply")[1]
    assert refused.reason == "about form: the schema cannot be followed: RecursionError"
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "exclusiveMinimum": True}
    rules = filters(form={"json_schema": {**old, "minimum": 3}})
    assert rules.text("4", "reply")[1] == [] and rules.text("3", "reply")[1]


def test_spans_that_overlap_become_one() -> None:
    assert masked("abcdef", [(1, 3), (2, 4), (5, 6)], "*") == "a*e*"


LOOK = """
def look(image):
    if image.size == (1, 1):
        raise RuntimeError("too small")
    return "is red" if image.getpixel((0, 0)) == (255, 0, 0) else None
"""


def test_images_are_judged_by_a_function_and_its_errors_refuse(tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(LOOK, "utf-8")
    rule = "reason: no red\nimage: look.py:look\nwhen: [prompt]\n"
    (tmp_path / "red.yaml").write_text(rule, "utf-8")
    rules = Filters.read(tmp_path)
    assert [d.reason for d in rules.image(Image.new("RGB", (9, 9), "red"), "prompt")] == ["is red"]
    assert not rules.image(Image.new("RGB", (9, 9), "red"), "reply")
    assert not rules.image(Image.new("RGB", (9, 9), "blue"), "prompt")
    (broken,) = rules.image(Image.new("RGB", (1, 1)), "prompt")
    assert broken.action == "refuse" and "too small" in broken.reason
    assert rules.has("prompt") and not rules.has("reply")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("reason: x", "gives nothing: expected one of words"),
        ("reason: x\nwords: [a]\npattern: b", "gives words, pattern"),
        ("words: [a]", "reason"),
        ("reason: x\npattern: '('", "pattern: missing"),
        ("reason: x\npersonal: [name]", "unknown, expected some of email"),
        ("reason: x\ncharacters: [5, 2]", "expected [least, most]"),
        ("reason: x\nwords: ['']", "has an empty word"),
        ("reason: x\nscripts: [latin]\naction: mask", "only refuse"),
        ("reason: x\njson_schema: {}\naction: mask", "only refuse"),
        ("reason: x\njson_schema: {type: x}", "json_schema: $.type: 'x' is not valid"),
        ("reason: x\njson_schema: {pattern: '('}", "json_schema: $.pattern: '(' is not a 'regex'"),
        ("reason: x\njson_schema: {$schema: other}", "json_schema: $schema 'other' is unknown"),
        ("reason: x\njson_schema: {const: 2026-11-28}", "json_schema: is not JSON"),
        ("reason: x\njson_schema: 3", "expected an object"),
        ("reason: x\nwords: [a]\nwhen: [never]", "when"),
        ("reason: x\nwords: [a]\nsay: b", "say"),
        ("- a", "expected the fields of a rule"),
        ("a: [", "rule.yaml"),
        ("a: " + "[" * 20_000, "nested too deep"),
        ('a: !!int ""', "not readable as YAML"),
        ("reason: x\n1: 2", "1: unknown"),
        ("reason: x\nimage: none.py:look", "no such Python file"),
    ],
)
def test_files_that_are_no_rules_are_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "rule.yaml").write_text(text, "utf-8")
    with pytest.raises(ValueError) as raised:
        Filters.read(tmp_path)
    assert "rule.yaml" in str(raised.value) and reason in str(raised.value)


def test_a_folder_without_rules_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no rule"):
        Filters.read(tmp_path)
    with pytest.raises(ValueError, match="no folder of rules"):
        Filters.read(tmp_path / "none")
    with pytest.raises(ValueError, match="^s3://rules: an address"):
        Filters.read("s3://rules")
    os.mkfifo(tmp_path / "rule.yaml")
    with pytest.raises(ValueError, match=r"rule.yaml: not a regular file"):
        Filters.read(tmp_path)
