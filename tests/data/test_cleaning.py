"""Cleaning rejects samples, masks texts, counts both, and writes the counts to the manifest."""

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from multimodal.commands.folders.data import main
from multimodal.data.builder.build import Report, build_shards
from multimodal.data.builder.cleaning import Cleaning, find_personal, mask_personal
from multimodal.data.shards import Shards, read_manifest


def image(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    samples = {
        "good": ((40, 30), {"captions": ["a red field", "red"], "license": "CC0"}),
        "tiny": ((40, 7), {"captions": ["a red line"], "license": "CC0"}),
        "long": ((90, 20), {"captions": ["a red stripe"], "license": "cc0 "}),
        "blocked": ((40, 30), {"captions": ["fine", "a DAMN red field"], "license": "CC0"}),
        "close": ((40, 30), {"captions": ["a damnable red field"], "license": "CC0"}),
        "mail": (
            (40, 30),
            {
                "captions": ["write to jo.doe+x@mail.example.org now"],
                "qa": [["call?", "+49 (30) 901820-11"]],
                "license": "CC0",
            },
        ),
        "theirs": ((40, 30), {"captions": ["a red field"], "license": "all rights reserved"}),
        "unknown": ((40, 30), {"captions": ["a red field"]}),
        "short": ((40, 30), {"captions": ["red"], "license": "CC0"}),
    }
    for name, (size, record) in samples.items():
        (folder / f"{name}.png").write_bytes(image(size))
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def rejected(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {Path(line["sample"]).stem: line["reason"] for line in lines}


def built(source: Path, out: Path, **steps: object) -> Report:
    report = build_shards(source, out, cleaning=Cleaning(**steps))  # type: ignore[arg-type]
    assert report is not None
    return report


def test_each_step_alone_and_all_together(source: Path, tmp_path: Path) -> None:
    assert built(source, tmp_path / "none").rejected == 0, "all steps are off by default"
    alone = {
        "min_side": (8, {"tiny": "smaller than min_side"}),
        "max_aspect_ratio": (4, dict.fromkeys(("tiny", "long"), "more than max_aspect_ratio")),
        "min_words": (2, {"short": "no text left"}),
        "blocklist": (["Damn", "x(y"], {"blocked": "word of the blocklist"}),
        "personal_data": ("drop", {"mail": "personal data"}),
        "licenses": (["CC0", "MIT"], dict.fromkeys(("theirs", "unknown"), "license not allowed")),
    }
    for name, (value, expected) in alone.items():
        report = built(source, tmp_path / name, **{name: value})
        assert rejected(tmp_path / name) == expected, name
        manifest = read_manifest(tmp_path / name)
        assert manifest["rejected"] == report.reasons and report.rejected == len(expected)
        assert manifest["cleaning"].keys() == {name, "changed"}
    assert read_manifest(tmp_path / "min_words")["cleaning"]["changed"] == {
        "captions of a wrong length": 3
    }
    all_steps = {name: value for name, (value, _) in alone.items()}
    report = built(source, tmp_path / "all", **all_steps)
    assert report.kept == 2 and sum(report.reasons.values()) == report.rejected == 7


def test_personal_data_is_masked_in_captions_and_questions(source: Path, tmp_path: Path) -> None:
    report = built(source, tmp_path / "out", personal_data="mask")
    record = {sample.key: sample.record for sample in Shards(tmp_path / "out")}["mail"]
    assert record["captions"] == ["write to [e-mail] now"]
    assert record["qa"] == [["call?", "[phone]"]]
    assert report.changed == {"texts with personal data masked": 2} and report.rejected == 0


def test_masks_do_not_change_the_text_around_them() -> None:
    for text, masked in (
        ("write to 555-123-4567@vtext.com or call home", "write to [e-mail] or call home"),
        ("0171-1234567@web.de is mine", "[e-mail] is mine"),
        ("a@b.org,c@d.org; 030 1234567 or 030 7654321.", "[e-mail],[e-mail]; [phone] or [phone]."),
    ):
        assert mask_personal(text) == masked
    mask_personal("a" * 1_000_000 + " @ " + "1" * 100_000)  # fast: no pattern takes quadratic time


@pytest.mark.parametrize(
    "text",
    [
        "2024-01-15 12:30:00",
        "192.168.100.100",
        "a dog at 12:30 on 2026-11-22",
        "two men, 3 dogs and 1 000 000 sheep",
        "built 1914 - 1918",
        "@home with a cat",
        "score 21-19 21-17",
        "12345678",
        "a 1920x1080 screen",
        "item 1.2.3",
        "4111 1111 1111 1111 1111",
    ],
)
def test_other_texts_are_not_personal_data(text: str) -> None:
    assert find_personal(text) == [] and mask_personal(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "+1 555 010 9999",
        "(030) 901820-115",
        "030/901 820 11",
        "+4930901820",
        "555-010-9999",
        "0171 1234567",
    ],
)
def test_telephone_numbers_are_masked(text: str) -> None:
    assert mask_personal(f"call {text}, now") == "call [phone], now"


def test_invalid_values_are_errors() -> None:
    for steps, message in (
        ({"min_side": -1}, "min_side"),
        ({"max_aspect_ratio": 0.5}, "at least 1"),
        ({"min_words": 3, "max_words": 2}, "max_words=2"),
        ({"copies": "all"}, "exact or near"),
        ({"personal_data": "keep"}, "mask or drop"),
    ):
        with pytest.raises(ValueError, match=message):
            Cleaning(**steps)  # type: ignore[arg-type]


def test_the_command_has_the_steps(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("damn\n\n")
    command = [
        "build",
        str(source),
        str(tmp_path / "out"),
        "--min-side",
        "8",
        "--min-words",
        "2",
        "--max-words",
        "9",
        "--max-aspect-ratio",
        "4",
        "--blocklist",
        str(words),
        "--personal-data",
        "mask",
        "--licenses",
        "CC0",
        "MIT",
    ]
    assert main(command) == 0
    stdout, stderr = capsys.readouterr()
    assert "kept 3 of 9" in stdout and "rejected 2: license not allowed" in stderr
    assert "changed 2: texts with personal data masked" in stderr
    words.write_text("\n")
    with pytest.raises(ValueError, match="holds no words"):
        main([*command[:2], str(tmp_path / "other"), "--blocklist", str(words)])


def test_a_character_of_a_script_without_spaces_counts_as_a_word() -> None:
    cleaning = Cleaning(max_words=5)
    captions = ["一只狗在雪地里跑", "狗在跑", "two dogs run", "狗 and 猫 run abc中", "犬がいる"]
    record = cleaning.cleaned({"captions": captions}, Counter())
    assert record["captions"] == ["狗在跑", "two dogs run", "犬がいる"]


PREFERENCES = [
    {"prompt": "Whose is it?", "chosen": "call 0171 1234567", "rejected": "a DAMN dog"},
    {"prompt": "of me@x.org", "chosen": {"image": "0"}, "rejected": {"image": "1"}},
    {"prompt": "", "completion": "no", "label": False},
    {"prompt": "Who?", "chosen": "ask a@x.org", "rejected": "ask b@x.org"},
]


def test_texts_of_preferences_are_cleaned() -> None:
    record = {"captions": [], "preferences": PREFERENCES}
    for steps, reason in (
        ({"blocklist": ["damn"]}, "word of the blocklist"),
        ({"personal_data": "drop"}, "personal data"),
    ):
        fault = Cleaning(**steps).fault_of_texts(record)  # type: ignore[arg-type]
        assert fault is not None and fault[0] == reason
    changed = Counter[str]()
    masked = Cleaning(personal_data="mask").cleaned(record, changed)
    assert masked["preferences"] == [
        {**PREFERENCES[0], "chosen": "call [phone]"},
        {**PREFERENCES[1], "prompt": "of [e-mail]"},
        PREFERENCES[2],
    ]
    assert +changed == {
        "texts with personal data masked": 3,
        "preferences without a difference": 1,  # training would refuse two equal answers
    }
    alone = {"captions": [], "preferences": PREFERENCES[3:]}
    assert Cleaning(personal_data="mask").cleaned(alone, changed) == {"captions": []}
    other = {"captions": [], "preferences": ["of another kind", 3]}
    cleaning = Cleaning(personal_data="mask", blocklist=["damn"])
    assert cleaning.fault_of_texts(other) is None and cleaning.cleaned(other, changed) == other
