"""The tutorials run as they are written, smaller where a command would take minutes."""

import re
import shutil
from pathlib import Path

import pytest

from docs.tutorial_pages import NOT_RUN, PAGES, Page
from docs.tutorials import (
    FOLDER,
    MAX_LINES,
    PART,
    Failed,
    lines_of,
    run_page,
    shortened,
    workplace,
)
from multimodal.cli import VERBS

PAGE_NAMES = sorted(page.stem for page in FOLDER.glob("*.md"))
# Pages that train or start processes.
SLOW = {
    "image_tokenizer", "language_model_that_sees", "lora_and_preferences", "my_domain_aerial",
}  # fmt: skip
NEEDS = {"serve": "starlette", "index_and_answer": "usearch", "lora_and_preferences": "peft"}


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text("utf-8")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PAGE_NAMES]
)
def test_a_tutorial_runs(name: str, one_thread: None) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if "\ncurl " in text_of(name) and shutil.which("curl") is None:
        pytest.skip("needs curl")
    page = FOLDER / f"{name}.md"
    with workplace(page) as folder:
        text, pictures = run_page(page, folder)
    # Outputs depend on the bundled weights: a page has to show one wherever there was one.
    assert text.count("```text") == text_of(name).count("```text"), "python -m docs.tutorials"
    for picture in pictures:
        assert (FOLDER / name / picture).is_file(), "python -m docs.tutorials"


def test_what_makes_commands_small_is_of_commands_that_are_there() -> None:
    assert set(PAGES) <= set(PAGE_NAMES)
    lines = {
        name: [
            line
            for part in PART.finditer(text_of(name))
            if part["kind"] == "sh"
            for line in lines_of(part["text"])
        ]
        for name in PAGE_NAMES
    }
    for name, page in PAGES.items():
        for start in page.smaller:
            assert any(line.startswith(start) for line in lines[name]), (name, start)
    everything = [line for each in lines.values() for line in each]
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in everything), start


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_a_tutorial_has_what_a_reader_looks_for(name: str) -> None:
    text = text_of(name)
    first = text.split("\n\n")[1]
    assert first.startswith("At the end "), "what the reader will have comes first"
    assert "## What to try next" in text and "## What goes wrong" in text
    written = PART.sub(lambda part: part[0] if part["kind"] else "", text)  # without outputs
    assert 400 <= len(written.split()) <= 800
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (FOLDER / link).exists(), link
    for verb in re.findall(r"`multimodal ([a-z]+)", text):
        assert verb in VERBS, verb


def test_long_outputs_keep_their_ends() -> None:
    lines = [str(number) for number in range(MAX_LINES + 1)]
    assert shortened("\n".join(lines[1:]) + "\n") == "\n".join(lines[1:])
    kept = shortened("\n".join(lines) + "\n").split("\n")
    assert kept[0] == "0" and kept[-1] == lines[-1] and "..." in kept and len(kept) < len(lines)


def test_outputs_after_a_small_run_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\necho one\n```\n<!-- output -->\n```text\nold\n```\n"
        "```sh\nmultimodal --version\n```\n<!-- output -->\n```text\nkept\n```\n"
    )
    monkeypatch.setitem(PAGES, "page", Page(smaller={"multimodal --version": "--help"}))
    small, _ = run_page(page, tmp_path)
    assert "one\n" in small and "old" not in small and "kept" in small
    full, _ = run_page(page, tmp_path, full=True)
    assert "kept" not in full and "multimodal 0." in full


def test_a_command_that_fails_or_does_not_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for mark, command in (("", "multimodal draw --no-such-option"), ("<!-- fails -->\n", "true")):
        page.write_text(f"{mark}```sh\n{command}\n```\n")
        with pytest.raises(Failed, match="exit status"):
            run_page(page, tmp_path)
