"""The card of a model on the Hub: its README.md with metadata that the Hub and its search read.

Results are those of ``multimodal eval``. They become a table, and the metadata ``model-index``.

Format: https://huggingface.co/docs/hub/model-cards
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal.files import UnreadableFile, read_json

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

DEFAULT_CARD = "# A model of the multimodal toolkit\n\nNo card was written for this model.\n"
# The names that the Hub has for tasks. Others are any-to-any.
# What scores stand beside: a lookup, a constant, captions for other pictures, the references.
YARDSTICKS = re.compile("shuffled|constant|lookup|_references|_of_reconstructions|_of_true_images")
HUB_TASKS = {
    "captioning": "image-to-text",
    "few_shot": "image-to-text",
    "scene_captions": "image-to-text",
    "answers": "visual-question-answering",
    "choices": "visual-question-answering",
    "presence": "visual-question-answering",
    "robustness": "visual-question-answering",
    "person_words": "image-to-text",
    "scene_counterfactuals": "visual-question-answering",
    "scene_answers": "visual-question-answering",
    "scene_presence": "visual-question-answering",
    "classification": "zero-shot-image-classification",
    "retrieval": "image-feature-extraction",
    "drawing": "text-to-image",
    "scene_drawings": "text-to-image",
    "reconstruction": "image-to-image",
}
TAGS = ("multimodal", "image-captioning", "text-to-image")
USE = """
## Use

```python
import multimodal

model = multimodal.load("{name}")
model.caption(["photo.jpg"])
```

The toolkit is `pip install multimodal[hub]`. The weights are safetensors, and nothing here is code.
"""


def read_results(path: str | Path, fingerprint: str) -> dict[str, Any]:
    """What ``multimodal eval --output`` wrote.

    Args:
        fingerprint: of the model that they have to be about.

    Raises:
        ValueError: for another kind of file, or results of another model.
    """
    try:
        results = read_json(path)
        measured = results["protocol"]["fingerprint"]
        table(results)
        for result in results["results"]:
            HUB_TASKS.get(result["task"], _data(result))
    except UnreadableFile:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: not the results of multimodal eval ({error!r})") from error
    if measured != fingerprint:
        raise ValueError(f"{path}: the results of model {measured}, and this is {fingerprint}")
    return dict(results)


def _scores(
    results: Mapping[str, Any],
) -> Iterator[tuple[Mapping[str, Any], str, dict[str, float]]]:
    """The result, the name and the value of each score to show.

    Of each task these are the scores with an interval, or the first one if none has an interval.
    """
    for result in results["results"]:
        finite = [
            (name, score)
            for name, score in result["scores"].items()
            if score["value"] is not None and math.isfinite(score["value"])  # null was NaN
        ]
        shown = [(name, score) for name, score in finite if "low" in score] or finite[:1]
        for name, score in shown:
            yield result, name, score


def evaluation(results: Mapping[str, Any]) -> "list[EvalResult]":
    """The results as the Hub's metadata: those of the model, without what they stand beside."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=HUB_TASKS.get(result["task"], "any-to-any"),
            dataset_type=_data(result),
            dataset_name=_data(result),
            dataset_split=results["protocol"]["split"],
            metric_type=name.lower(),
            metric_name=f"{result['task']}: {name}",
            metric_value=round(score["value"], 6),
        )
        for result, name, score in _scores(results)
        if not YARDSTICKS.search(name)
    ]


def table(results: Mapping[str, Any]) -> str:
    """A section of Markdown: each score with its interval, how it was measured, and the notes."""
    about = results["protocol"]
    lines = [
        "",
        "## Results",
        "",
        f"By `multimodal eval`, split {about['split']}, {about['image_size']} x "
        f"{about['image_size']} pixels ({about['fit']}), seed {about['seed']}, {about['dtype']}. "
        "All scores and intervals are in results.json.",
        "",
        "| task | data | samples | score | value | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    protocols = {}
    notes = [
        f"- {result['task']} ({_cell(_data(result))}): {_cell(note)}"
        for result in results["results"]
        for note in result.get("notes", ())
    ]
    for result, name, score in _scores(results):
        low_high = f"{score['low']:.4f} to {score['high']:.4f}" if "low" in score else ""
        row = (result["task"], _data(result), f"{result['n']:,}", name, f"{score['value']:.4f}")
        lines.append(f"| {' | '.join(_cell(text) for text in (*row, low_high))} |")
        protocols[result["task"]] = result["protocol"]
    lines += ["", *(f"- {task}: {_cell(words)}" for task, words in protocols.items()), ""]
    if notes:
        lines += ["Notes of the measurement:", "", *notes, ""]
    return "\n".join(lines)


def _data(result: Mapping[str, Any]) -> str:
    """The name of a shard folder. Where it lies is nobody's business."""
    return Path(result["data"]).name or "data"


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def make_card(
    text: str, name: str, results: Mapping[str, Any] | None, license: str, has_license: bool
) -> str:
    """README.md for the Hub.

    Args:
        text: the card of the model. Metadata that it has already is kept.
        name: ``user/name``.
        results: see ``read_results``.
        license: its name on the Hub, such as ``apache-2.0``, or "".
        has_license: there is a file LICENSE, which is named where no license is.
    """
    from huggingface_hub import ModelCard, ModelCardData

    kept: dict[str, Any] = {}
    if text.lstrip().startswith("---"):
        card = ModelCard(text)
        kept, text = card.data.to_dict(), card.text  # type: ignore[no-untyped-call]
    ours: dict[str, Any] = {"library_name": "multimodal", "pipeline_tag": "any-to-any"}
    tags = list(dict.fromkeys([*(kept.get("tags") or ()), *TAGS]))
    if license:
        ours["license"] = license
        kept.pop("license", None)
    elif has_license and "license" not in kept:
        ours |= {"license": "other", "license_name": "see-license", "license_link": "LICENSE"}
    if results is not None:
        ours |= {"model_name": name.rpartition("/")[2], "eval_results": evaluation(results)}
        kept.pop("model-index", None)  # of an earlier evaluation
    data = ModelCardData(**{**kept, **ours, "tags": tags})
    body = text.strip("\n") + "\n"
    if "multimodal.load(" not in body:
        body += USE.format(name=name)
    if results is not None:
        body += table(results)
    return f"---\n{data.to_yaml()}\n---\n\n{body}"
