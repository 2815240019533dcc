"""Questions about what captions name: is there a dog in the picture?

Captions say what is there, and never what is not. So a model that learns captions alone says yes to
everything. As many questions are about objects that no caption of the image names as about objects
that one names. Absent objects are drawn as often as they occur in all captions: the name alone
does not tell the answer.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from multimodal.data.objects import named_objects, presence_question
from multimodal.data.samples import Sample, plain, readable
from multimodal.data.shards import (
    Shards,
    index_shard,
    read_manifest,
    write_manifest,
    write_tar,
)
from multimodal.files import local_path, new_folder
from multimodal.seeds import sample_seed

WORDINGS = (
    "is there {}?",
    "is there {} in the picture?",
    "do you see {}?",
    "does the photo show {}?",
    "can {} be seen?",
)


def add_questions(
    source: str | Path,
    out: str | Path,
    pairs: int = 2,
    seed: int = 0,
    on_sample: Callable[[int], object] = lambda count: None,
) -> int:
    """Write a shard folder again, with questions about presence in the records.

    A sample whose captions name no known object, or whose text cannot be read, is written as it is.

    Args:
        source: a shard folder, with images or codes.
        out: a new or empty folder.
        pairs: questions with the answer yes of each sample, and as many with no.
        seed: of the questions.
        on_sample: is called with a number of finished samples.

    Returns:
        The number of questions.
    """
    source, out = Path(source), local_path(out)
    if pairs < 1:
        raise ValueError(f"pairs={pairs}: expected at least 1")
    manifest = read_manifest(source)
    samples = readable(Shards(source), lambda problem: None)
    frequency = Counter(name for sample in samples for name in sorted(_objects_of(sample)))
    if not frequency:
        raise ValueError(f"{source}: no caption names an object of the list")
    names = sorted(frequency)
    shares = np.array([frequency[name] for name in names], float)
    count = 0

    def asked(shards: Shards) -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal count
        for sample in shards:
            if not any(readable([sample], lambda problem: None)):
                yield sample.key, dict(sample.members)
                on_sample(1)
                continue
            present = sorted(_objects_of(sample))
            rng = np.random.default_rng(sample_seed(seed, 0, sample.key))
            questions = list[list[str]]()
            if present:
                chosen = rng.permutation(len(present))[:pairs]
                absent = np.where([name in present for name in names], 0, shares)
                number = min(len(chosen), int((absent > 0).sum()))
                # A sample that names every known object leaves none to ask about.
                likely = absent / absent.sum() if number else None
                others = rng.choice(len(names), number, replace=False, p=likely)
                asked = [(present[i], "yes") for i in chosen] + [(names[i], "no") for i in others]
                for name, answer in asked:
                    wording = WORDINGS[int(rng.integers(len(WORDINGS)))]
                    questions.append([presence_question(name, wording), answer])
            record = sample.record
            record["qa"] = [*record.get("qa", []), *questions]
            count += len(questions)
            members = {k: v for k, v in sample.members.items() if k not in ("json", "txt")}
            members["json"] = json.dumps(plain(record), ensure_ascii=False).encode()
            yield sample.key, members
            on_sample(1)

    with new_folder(out) as folder:
        entries = []
        for entry in manifest["shards"]:
            path = folder / str(entry["name"])
            write_tar(path, asked(Shards(source, only=path.name)))
            entries.append(index_shard(path))
        replaced = ("format", "version", "shards", "made_by")
        about = {k: v for k, v in manifest.items() if k not in replaced}
        about["made_by"] = "multimodal.data.questions.add_questions"
        write_manifest(folder, entries, **about)
    return count


def _objects_of(sample: Sample) -> set[str]:
    return named_objects(" ".join(map(str, sample.record.get("captions", []))))
