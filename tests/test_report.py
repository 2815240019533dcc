"""The report: tables and figures are those of the JSON files, written numbers have a source."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from docs.reporting.captions import keep_judgements
from docs.reporting.cost import step_of
from docs.reporting.figures import FIGURES, draw, drawn_numbers, numbers, path_of
from docs.reporting.page import NUMBER, PAGE, TABLE, filled
from docs.reporting.results import DOCS, config, find, parameters, read
from docs.reporting.tables import TABLES

TEXT = PAGE.read_text("utf-8")
DIGITS = re.compile(r"(?<![\w.,])-?\d[\d,]*(?:\.\d+)?(?![\w])")


def test_the_page_is_what_the_scripts_make() -> None:
    assert filled(TEXT) == TEXT, "python -m docs.reporting makes it anew"
    assert {match[2] for match in TABLE.finditer(TEXT)} == set(TABLES), "a table is not shown"


def test_a_changed_number_changes_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = json.loads((DOCS / "starter_val.json").read_text("utf-8"))
    for result in changed["results"]:
        if result["task"] == "captioning":
            result["scores"]["CIDEr"]["value"] = 0.777
    monkeypatch.setitem(read("starter_val"), "results", changed["results"])
    assert "0.777" in filled(TEXT) and "0.777" not in TEXT
    marked = "<!--starter_val flickr8k captioning CIDEr:.2f-->0<!---->"
    assert NUMBER.search(marked) and ">0.78<" in filled(marked)
    with pytest.raises(ValueError, match="not measured"):
        filled("<!--starter_val flickr8k captioning nothing:.2f-->0<!---->")


def test_a_judgement_stays_as_long_as_its_caption_does(tmp_path: Path) -> None:
    old = [
        {"photo": "one", "caption": "a dog", "judged": "right"},
        {"photo": "two", "caption": "a cat", "judged": "wrong"},
        {"photo": "three", "caption": "a hat"},
    ]
    (tmp_path / "old.json").write_text(json.dumps({"captions": old}), "utf-8")
    new: list[dict[str, Any]] = [{**row, "references": []} for row in old]
    for row in new:
        row.pop("judged", None)
    new[1]["caption"] = "a dog"
    keep_judgements(new, tmp_path / "old.json")
    assert [row.get("judged") for row in new] == ["right", None, None]
    keep_judgements(new, tmp_path / "none.json")


def test_a_caption_that_nobody_judged_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"caption": "a dog", "references": ["two dogs"]}
    rows = [{**row, "judged": "wrong"}, row, {**row, "judged": "right"}]
    monkeypatch.setitem(read("starter_captions"), "captions", rows)
    lines = TABLES["thirty"]().splitlines()
    assert lines[0] == "1 right, 0 partly, 1 wrong, 1 not judged:"
    assert lines[3] == "1. **a dog** Not judged. People: two dogs"


def test_figures_show_the_numbers_of_today(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, (bars, *_) in FIGURES.items():
        expected = json.loads(json.dumps(numbers(bars())))
        assert len(expected) > 4
        assert drawn_numbers(path_of(name)) == expected, "python -m docs.reporting draws it anew"
        draw(name, tmp_path / "figure.svg")
        assert drawn_numbers(tmp_path / "figure.svg") == expected
        assert f"(images/{path_of(name).name})" in TEXT, "it is not shown"


def blocks() -> list[str]:
    """Paragraphs, list items and written tables, without what is filled and without code."""
    text = NUMBER.sub("", TABLE.sub("", TEXT))
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    # a written table belongs to the paragraph before it
    text = re.sub(r":\n\n(?=\|)", ":\n", text)
    return re.split(r"\n\n|\n(?=- )", text)


@pytest.mark.parametrize("block", [b for b in blocks() if not b.startswith(("#", "!["))])
def test_every_written_number_stands_in_a_page_that_is_linked(block: str) -> None:
    pages = [DOCS / link for link in re.findall(r"\]\(([\w/]+\.md)\)", block)]
    said = re.sub(r"\]\([^)]*\)|`[^`]*`|arXiv:[\d.]+|Emu3|Qwen3", "", block)
    said = said.replace("95 % bootstrap", "").replace("of the 25 most similar", "")
    sources = "\n".join(page.read_text("utf-8") for page in pages)
    missing = [
        number
        for number in map(lambda n: n.rstrip(","), DIGITS.findall(said))
        if not re.search(rf"(?<![\d.]){re.escape(number)}(?![\d]|\.\d)", sources)
    ]
    assert not missing, f"in no page that is linked beside it: {missing}"


def test_cost_and_sizes_are_of_the_bundled_starter() -> None:
    assert read("starter_cost")["fingerprint"] == config()["fingerprints"]["model"], (
        "python -m docs.reporting.cost writes that of the new one"
    )
    score = find("starter_val", "flickr8k", "captioning", "CIDEr")
    assert score is not None and score.low is not None and score.low < score.value


def test_parameters_are_counted_in_the_headers(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "more").mkdir()
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "one.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    save_file({"c": torch.zeros(2, 2, 2)}, tmp_path / "more" / "two.safetensors")
    assert parameters(tmp_path) == 15 + 7 + 8


def test_the_cost_of_a_run_is_that_of_all_its_starts(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    starts: list[dict[str, Any]] = [
        {"seconds": 90.0, "watt_hours": 1.5, "how": "estimated"},
        {"seconds": 30.0, "watt_hours": 0.5, "how": "estimated"},
    ]
    for name, start in zip(("energy.1.json", "energy.json"), starts, strict=True):
        (tmp_path / "logs" / name).write_text(json.dumps(start))
    expected = {"name": "x", "minutes": 2.0, "watt_hours": 2.0, "how": "estimated"}
    assert step_of("x", tmp_path) == expected
    with pytest.raises(ValueError, match="no energy.json"):
        step_of("x", tmp_path / "logs")


def test_the_page_becomes_a_pdf(tmp_path: Path) -> None:
    pytest.importorskip("typst")
    from docs.reporting.pdf import markup, write_pdf

    write_pdf(PAGE, tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-")
    # What Typst or Markdown could take for a command stays a text.
    hostile = tmp_path / "hostile.md"
    hostile.write_text(
        '# $x_1$ #let "a" \\\\ @b\n\n1. [c]\n\n| #d | *e* |\n|---|---|\n| ~f | =g |\n'
    )
    write_pdf(hostile, tmp_path / "hostile.pdf")
    made = markup(hostile.read_text(), tmp_path)
    assert '#"$x_1$ #let \\"a\\" \\\\ @b";' in made and '#emph[#"e";]' in made
    assert "#enum(" in made and made.count("table.hline") == 3
