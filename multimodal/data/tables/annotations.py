"""Read annotation files: captions of COCO and Karpathy, VQA questions, captions by file name.

COCO (Chen et al. 2015, arXiv:1504.00325): ``{"images": [{"id", "file_name", "license"}],
"annotations": [{"image_id", "caption"}], "licenses": [{"id", "name"}]}``.
Karpathy and Fei-Fei (2015, arXiv:1412.2306): ``{"images": [{"filename", "filepath", "split",
"sentences": [{"raw"}]}]}``.
VQA (Antol et al. 2015, arXiv:1505.00468): ``{"questions": [{"question_id", "image_id",
"question"}], "data_type", "data_subtype"}``, and in a separate file ``{"annotations":
[{"question_id", "multiple_choice_answer" or "answers": [{"answer"}]}]}``.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal.data.samples import normalise
from multimodal.data.tables.records import (
    ReadOptions,
    RejectedSample,
    SourceItem,
    SourceSample,
    encodable,
    held_out,
    shuffled,
)
from multimodal.data.tables.rows import MAX_TABLE, looks_like_image
from multimodal.files import UnreadableFile, UnreadableText, read_json
from multimodal.terminal import shown


@dataclass(frozen=True)
class AnnotatedImage:
    """The file name and the record of an image, or the problem of an entry without an image."""

    name: str
    file: str = ""
    record: Mapping[str, Any] | None = None
    problem: str = ""
    split: str | None = None


def load_json(path: Path) -> dict[str, Any] | list[Any]:
    """The content of a JSON file.

    Raises:
        UnreadableFile: if it cannot be read, or is not an object or a list.
    """
    content = read_json(path, MAX_TABLE)
    if not isinstance(content, dict | list):
        raise UnreadableFile(path, "not a JSON object or list")
    return content


def read_annotations(
    path: Path, content: dict[str, Any], options: ReadOptions
) -> Iterator[SourceItem]:
    """The samples of an annotation file, in the order of a hash of the names of the images.

    Raises:
        ValueError: if the file has none of the known forms.
    """
    root = options.images or path.parent
    images: dict[str, AnnotatedImage] = {}
    records: dict[str, dict[str, Any]] = {}
    for image in _entries(path, content, options.answers, root):
        if image.record is None:
            yield RejectedSample(image.name, "unreadable annotation", image.problem)
            continue
        file = os.path.normpath(image.file)
        if not encodable(file):
            yield RejectedSample(image.name, "no image", "its file name is not Unicode")
        elif file.startswith("..") or os.path.isabs(file):
            # It may be a private file of the user.
            yield RejectedSample(image.name, "image outside the folder", file)
        elif file in records:
            yield RejectedSample(image.name, "image named twice", file)
        else:
            try:
                records[file] = normalise(image.record, options.notes.of(image.name))
                images[file] = image
            except UnreadableText as error:
                yield RejectedSample(image.name, "unreadable text", str(error))
    for file in shuffled(list(records)):
        yield SourceSample(
            name=shown(root / file),
            hint=shown(os.path.splitext(file)[0]),
            identity=shown(file),
            images=(root / file,),
            record=records[file],
            split=images[file].split,
        )


def _entries(
    path: Path, content: dict[str, Any], answers: Path | None, root: Path
) -> Iterator[AnnotatedImage]:
    if isinstance(content.get("questions"), list):
        yield from _vqa(path, content, answers)
        return
    if answers is not None:
        raise ValueError(f"{path}: holds captions, which have no answers")
    images = content.get("images")
    if isinstance(images, list) and isinstance(content.get("annotations"), list):
        yield from _coco(path, content)
    elif isinstance(images, list) and any(_is_object(i) and "sentences" in i for i in images):
        yield from _karpathy(path, images, root)
    elif content and all(map(looks_like_image, content)):
        for file, captions in content.items():
            yield AnnotatedImage(f"{path}: {file}", file, {"captions": captions})
    else:
        raise ValueError(
            f'{path}: neither a list of objects, nor COCO captions ("images" and "annotations"), '
            'nor Karpathy captions ("images" with "sentences"), nor VQA questions ("questions"), '
            f"nor captions by file name; its keys are {', '.join([*content][:9]) or 'none'}"
        )


def _karpathy(path: Path, images: list[Any], root: Path) -> Iterator[AnnotatedImage]:
    for number, image in enumerate(images):
        name = f"{path}: images[{number}]"
        if not _is_object(image) or not isinstance(image.get("filename"), str):
            yield AnnotatedImage(name, problem="no filename")
            continue
        sentences = [s.get("raw") for s in _list(image.get("sentences")) if _is_object(s)]
        captions = [raw for raw in sentences if isinstance(raw, str)]
        file, folder = image["filename"], image.get("filepath")
        if isinstance(folder, str) and encodable(folder) and (root / folder).is_dir():
            file = os.path.join(folder, file)
        split = image.get("split")
        split = held_out(split) if isinstance(split, str) else None
        yield AnnotatedImage(name, file, {"captions": captions}, split=split)


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


def _vqa(path: Path, content: dict[str, Any], answers: Path | None) -> Iterator[AnnotatedImage]:
    by_question: dict[Any, str] = {}
    if answers is not None:
        answer_file = load_json(answers)
        if not isinstance(answer_file, dict) or not isinstance(
            answer_file.get("annotations"), list
        ):
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
                name, problem="no answer" if answers else "no answer; give --answers"
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
