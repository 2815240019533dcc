"""COCO captions and VQA questions: what is said of each image of an annotation file.

COCO (Chen et al. 2015, arXiv:1504.00325): ``{"images": [{"id", "file_name", "license"}],
"annotations": [{"image_id", "caption"}], "licenses": [{"id", "name"}]}``.
VQA (Antol et al. 2015, arXiv:1505.00468): ``{"questions": [{"question_id", "image_id",
"question"}], "data_type", "data_subtype"}``, and in a file of its own ``{"annotations":
[{"question_id", "multiple_choice_answer" or "answers": [{"answer"}]}]}``.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class AnnotatedImage:
    """An image by its file name, and its record as given; ``problem``: why it cannot be used."""

    name: str
    file: str = ""
    record: Mapping[str, Any] | None = None
    problem: str = ""


def read_annotations(path: Path, answers: Path | None = None) -> Iterator[AnnotatedImage]:
    """Everything in an annotation file; every entry that is of no image, by name.

    answers: of a file of VQA questions, that of their answers; without it only questions that
        carry an ``answer`` themselves can be used.
    Errors: ``ValueError`` for a file that is neither of the two.
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
        content = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def _coco(path: Path, content: dict[str, Any]) -> Iterator[AnnotatedImage]:
    licenses = {
        one["id"]: one.get("name")
        for one in _list(content.get("licenses"))
        if _is_object(one) and _is_id(one.get("id"))
    }
    files: dict[Any, str] = {}
    records: dict[Any, dict[str, Any]] = {}
    for number, image in enumerate(content["images"]):
        if not _is_object(image) or not isinstance(image.get("file_name"), str):
            yield AnnotatedImage(f"{path}: images[{number}]", problem="no file_name")
            continue
        if not _is_id(image.get("id")) or image["id"] in files:
            problem = "its id is another's" if _is_id(image.get("id")) else "no id"
            yield AnnotatedImage(f"{path}: images[{number}]", problem=problem)
            continue
        files[image.get("id")] = image["file_name"]
        record: dict[str, Any] = {"captions": []}
        if _is_id(image.get("license")) and image["license"] in licenses:
            record["license"] = licenses[image["license"]]
        records[image.get("id")] = record
    for number, one in enumerate(content["annotations"]):
        name = f"{path}: annotations[{number}]"
        if not _is_object(one) or not _is_id(one.get("image_id")) or one["image_id"] not in records:
            yield AnnotatedImage(name, problem="its image_id is not among the images")
        elif not isinstance(one.get("caption"), str):
            yield AnnotatedImage(name, problem="no caption")
        else:
            records[one["image_id"]]["captions"].append(one["caption"])
    for key, file in files.items():
        yield AnnotatedImage(f"{path}: image {key}", file, records[key])


def _vqa(
    path: Path, content: dict[str, Any], given: dict[str, Any] | None, answers: Path | None
) -> Iterator[AnnotatedImage]:
    found: dict[Any, str] = {}
    if given is not None:
        if not isinstance(given.get("annotations"), list):
            raise ValueError(f'{answers}: no "annotations": not the answers of VQA')
        for one in given["annotations"]:
            if not _is_object(one) or not _is_id(one.get("question_id")):
                continue
            if (answer := _answer(one)) is not None:
                found[one["question_id"]] = answer
    # By the names of COCO's files; of other data the questions have to name their images.
    named = content.get("data_type", "mscoco") == "mscoco"
    subset = content.get("data_subtype") if named else None
    pairs: dict[str, list[list[str]]] = {}
    for number, one in enumerate(content["questions"]):
        name = f"{path}: questions[{number}]"
        if not _is_object(one) or not isinstance(one.get("question"), str):
            yield AnnotatedImage(name, problem="no question")
            continue
        answer, key = one.get("answer"), one.get("question_id")
        if answer is None and _is_id(key):
            answer = found.get(key)
        file = one.get("image")
        if not isinstance(file, str):
            if not isinstance(one.get("image_id"), int) or not isinstance(subset, str):
                problem = "no image, nor COCO's image_id and data_subtype to name it"
                yield AnnotatedImage(name, problem=problem)
                continue
            file = f"COCO_{subset}_{one['image_id']:012d}.jpg"
        if not isinstance(answer, str):
            yield AnnotatedImage(
                name, problem="no answer" if given else "no answer; give --answers"
            )
            continue
        pairs.setdefault(file, []).append([one["question"], answer])
    for file, qa in pairs.items():
        yield AnnotatedImage(f"{path}: {file}", file, {"qa": qa})


def _answer(one: Mapping[str, Any]) -> str | None:
    """The answer most people gave; of as many, the one that comes first."""
    if isinstance(answer := one.get("multiple_choice_answer"), str):
        return answer
    said = [a.get("answer") for a in _list(one.get("answers")) if _is_object(a)]
    counted = Counter(text for text in said if isinstance(text, str))
    return counted.most_common(1)[0][0] if counted else None


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_object(value: object) -> bool:
    return isinstance(value, dict)
