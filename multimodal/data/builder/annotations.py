"""Read annotation files: COCO captions and VQA questions.

COCO (Chen et al. 2015, arXiv:1504.00325): ``{"images": [{"id", "file_name", "license"}],
"annotations": [{"image_id", "caption"}], "licenses": [{"id", "name"}]}``.
VQA (Antol et al. 2015, arXiv:1505.00468): ``{"questions": [{"question_id", "image_id",
"question"}], "data_type", "data_subtype"}``, and in a separate file ``{"annotations":
[{"question_id", "multiple_choice_answer" or "answers": [{"answer"}]}]}``.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal.files import UnreadableFile, read_text

MAX_ANNOTATIONS = 1 << 32  # bytes; those of Visual Genome have 1 GB


@dataclass(frozen=True)
class AnnotatedImage:
    """The file name and the record of an image, or the problem of an entry without an image."""

    name: str
    file: str = ""
    record: Mapping[str, Any] | None = None
    problem: str = ""


def read_annotations(path: Path, answers: Path | None = None) -> Iterator[AnnotatedImage]:
    """Read the images of an annotation file, and its entries that belong to no image.

    Args:
        path: COCO captions or VQA questions.
        answers: the file of the answers to VQA questions. Without it, only questions that have an
            ``answer`` themselves can be used.

    Raises:
        ValueError: if the file is neither of the two.
    """
    content = _load(path)
    if isinstance(content.get("questions"), list):
        yield from _vqa(path, content, None if answers is None else _load(answers), answers)
    elif isinstance(content.get("images"), list) and isinstance(content.get("annotations"), list):
        if answers is not None:
            raise ValueError(f"{path}: holds captions, which have no answers")
        yield from _coco(path, content)
    else:
        raise ValueError(
            f'{path}: neither COCO captions ("images" and "annotations") nor VQA questions '
            f'("questions"); its keys are {", ".join(map(str, content)) or "none"}'
        )


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path, MAX_ANNOTATIONS))
    except UnreadableFile:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def _coco(path: Path, content: dict[str, Any]) -> Iterator[AnnotatedImage]:
    licenses = {
        license["id"]: license.get("name")
        for license in _list(content.get("licenses"))
        if _is_object(license) and _is_id(license.get("id"))
    }
    files: dict[Any, str] = {}
    records: dict[Any, dict[str, Any]] = {}
    for number, image in enumerate(content["images"]):
        if not _is_object(image) or not isinstance(image.get("file_name"), str):
            yield AnnotatedImage(f"{path}: images[{number}]", problem="no file_name")
            continue
        if not _is_id(image.get("id")) or image["id"] in files:
            problem = "its id is used twice" if _is_id(image.get("id")) else "no id"
            yield AnnotatedImage(f"{path}: images[{number}]", problem=problem)
            continue
        files[image.get("id")] = image["file_name"]
        record: dict[str, Any] = {"captions": []}
        if _is_id(image.get("license")) and image["license"] in licenses:
            record["license"] = licenses[image["license"]]
        records[image.get("id")] = record
    for number, entry in enumerate(content["annotations"]):
        name = f"{path}: annotations[{number}]"
        if (
            not _is_object(entry)
            or not _is_id(entry.get("image_id"))
            or entry["image_id"] not in records
        ):
            yield AnnotatedImage(name, problem="its image_id is not among the images")
        elif not isinstance(entry.get("caption"), str):
            yield AnnotatedImage(name, problem="no caption")
        else:
            records[entry["image_id"]]["captions"].append(entry["caption"])
    for key, file in files.items():
        yield AnnotatedImage(f"{path}: image {key}", file, records[key])


def _vqa(
    path: Path, content: dict[str, Any], answer_file: dict[str, Any] | None, answers: Path | None
) -> Iterator[AnnotatedImage]:
    by_question: dict[Any, str] = {}
    if answer_file is not None:
        if not isinstance(answer_file.get("annotations"), list):
            raise ValueError(f'{answers}: no "annotations": not the answers of VQA')
        for entry in answer_file["annotations"]:
            if not _is_object(entry) or not _is_id(entry.get("question_id")):
                continue
            if (answer := _answer(entry)) is not None:
                by_question[entry["question_id"]] = answer
    # COCO's file names follow from the image_id. In other data, questions name their images.
    is_coco = content.get("data_type", "mscoco") == "mscoco"
    subset = content.get("data_subtype") if is_coco else None
    pairs: dict[str, list[list[str]]] = {}
    for number, entry in enumerate(content["questions"]):
        name = f"{path}: questions[{number}]"
        if not _is_object(entry) or not isinstance(entry.get("question"), str):
            yield AnnotatedImage(name, problem="no question")
            continue
        answer, key = entry.get("answer"), entry.get("question_id")
        if answer is None and _is_id(key):
            answer = by_question.get(key)
        file = entry.get("image")
        if not isinstance(file, str):
            if not isinstance(entry.get("image_id"), int) or not isinstance(subset, str):
                problem = "no image, nor COCO's image_id and data_subtype to name it"
                yield AnnotatedImage(name, problem=problem)
                continue
            file = f"COCO_{subset}_{entry['image_id']:012d}.jpg"
        if not isinstance(answer, str):
            yield AnnotatedImage(
                name, problem="no answer" if answer_file else "no answer; give --answers"
            )
            continue
        pairs.setdefault(file, []).append([entry["question"], answer])
    for file, qa in pairs.items():
        yield AnnotatedImage(f"{path}: {file}", file, {"qa": qa})


def _answer(entry: Mapping[str, Any]) -> str | None:
    """The answer that most people gave. With equal counts, the first of them."""
    if isinstance(answer := entry.get("multiple_choice_answer"), str):
        return answer
    answers = [answer.get("answer") for answer in _list(entry.get("answers")) if _is_object(answer)]
    counts = Counter(text for text in answers if isinstance(text, str))
    return counts.most_common(1)[0][0] if counts else None


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_object(value: object) -> bool:
    return isinstance(value, dict)
