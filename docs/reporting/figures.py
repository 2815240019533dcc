"""The figures of the report, drawn from the JSON files into docs/images/report_*.svg.

A figure carries the numbers that it shows as its description, so a test can tell an old one.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from docs.reporting.results import DOCS, STAGES, Score, anywhere, find, written

IMAGES = DOCS / "images"
OURS, OTHERS, CEILING = "#2563a8", "#9aa3ad", "#c2571a"
Bars: TypeAlias = list[tuple[str, str, Score]]  # label, colour, score


def captions() -> Bars:
    """CIDEr of photos, beside captions that need no model."""
    bars: Bars = []

    def add(label: str, colour: str, score: Score | None) -> None:
        if score is not None:
            bars.append((label, colour, score))

    def without(label: str, name: str, colour: str = OTHERS) -> None:
        add(label, colour, anywhere("flickr8k", "captioning", name))

    without("captions of other photos", "CIDEr_shuffled")
    without("one sentence for all photos", "CIDEr_constant")
    for stage, report in STAGES.items():
        for words, name in (("greedy", "CIDEr"), ("5 beams", "CIDEr_beams")):
            add(f"{stage}: {words}", OURS, find(report, "flickr8k", "captioning", name))
    without("lookup: captions of similar photos", "CIDEr_lookup", CEILING)
    return bars


def questions() -> Bars:
    """Answers about scenes in other wordings, and about damaged pictures."""
    names = {
        "plain": "as in training",
        "asked: Please answer. {text} Answer:": '"Please answer. ... Answer:"',
        "asked: Q: {text} A:": '"Q: ... A:"',
        "asked: {text}": "the bare question",
        "noise": "noise", "blur": "blur", "jpeg": "JPEG", "occlusion": "a part hidden",
    }  # fmt: skip
    bars: Bars = []
    for name, label in names.items():
        score = find("starter_val", "scenes", "robustness", name)
        if score is not None:
            bars.append((label, OURS if name == "plain" else OTHERS, score))
    grey = find("starter_val", "scenes", "answers", "blind_accuracy")
    if grey is not None:
        bars.append(("a grey picture", CEILING, grey))
    return bars


def drawings() -> Bars:
    """Objects of drawn scenes with the right colour and shape, and with the right colour."""
    bars: Bars = []
    for words, score in (("colour and shape", "objects"), ("colour", "colours")):
        for how, end, colour in (
            ("masked", "_masked", OTHERS),
            ("code by code", "", OURS),
            ("coded and decoded", "_of_reconstructions", CEILING),
        ):
            found = find("starter_val", "scenes", "scene_drawings", f"{score}{end}")
            if found is not None:
                bars.append((f"{words}, {how}", colour, found))
    return bars


# what makes the bars, the form of their numbers, what they are
FIGURES: dict[str, tuple[Callable[[], Bars], str, str]] = {
    "captions": (captions, ".3f", "CIDEr, photos of Flickr8k val"),
    "questions": (questions, "%", "share of questions about scenes that are answered rightly"),
    "drawings": (drawings, "%", "share of the objects of a text that are drawn"),
}


def numbers(bars: Bars) -> list[tuple[str, float, float | None, float | None]]:
    """What a figure shows."""
    return [(label, score.value, score.low, score.high) for label, _, score in bars]


def path_of(name: str) -> Path:
    return IMAGES / f"report_{name}.svg"


def drawn_numbers(path: Path) -> Any:
    """The numbers that a figure was drawn from."""
    found = re.search(r"<dc:description>(.*?)</dc:description>", path.read_text("utf-8"), re.DOTALL)
    assert found, f"{path} has no description"
    return json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))


def draw(name: str, path: Path) -> None:
    """Write a figure. The same numbers give the same bytes."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("figures need matplotlib: pip install 'multimodal[docs]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    make, form, title = FIGURES[name]
    bars = make()
    with plt.rc_context({"svg.hashsalt": name, "font.size": 9, "axes.spines.top": False,
                         "axes.spines.right": False}):  # fmt: skip
        figure, axis = plt.subplots(figsize=(6.5, 0.5 + 0.32 * len(bars)))
        for row, (_, colour, score) in enumerate(reversed(bars)):
            axis.barh(row, score.value, color=colour, height=0.62)
            end = score.value
            if score.low is not None and score.high is not None:
                end = score.high
                axis.plot([score.low, end], [row, row], color="black", linewidth=1.2)
            axis.text(end, row, f"  {written(score.value, form)}", va="center", fontsize=8)
        axis.set_yticks(range(len(bars)), [label for label, _, _ in reversed(bars)])
        axis.set_xlim(0, 1.12 * max(score.high or score.value for _, _, score in bars))
        if form == "%":
            axis.xaxis.set_major_formatter("{x:.0%}")
        axis.set_xlabel(title)
        description = json.dumps(numbers(bars))
        figure.savefig(path, bbox_inches="tight",
                       metadata={"Date": None, "Description": description})  # fmt: skip
        plt.close(figure)
