"""``multimodal prefer``: what it makes, that nothing is lost, and a run that learns from it."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multimodal.api import Model, load
from multimodal.cli import main
from multimodal.data.encode import Encoding, codes_to_bytes
from multimodal.data.samples import CODES
from multimodal.data.shards import (
    Shards,
    index_shard,
    read_manifest,
    write_manifest,
    write_tar,
)
from multimodal.inference.embedding import embed_codes, embed_texts
from multimodal.options import TextOptions
from multimodal.train.preferences import candidates
from multimodal.train.preferences.candidates import (
    CandidateMaker,
    Candidates,
    PreferSettings,
    make_preferences,
)
from multimodal.train.rewards.judges import find_judge
from multimodal.train.rewards.rewards import find_reward
from tests.launches import logged
from tests.preferring import recipe, values

pytestmark = pytest.mark.usefixtures("one_thread")
# A network that has learned little ends one of four captions within 120 tokens.
MANY = ["--max-tokens", "120", "--candidates", "8"]
LONG = TextOptions(temperature=1.0, max_tokens=120)
JUDGE = """
def words(captions, records):
    return [float(len(set(text.split()))) for text in captions]
def redness(texts, images, records):
    assert all(image.size == images[0].size for image in images)
    return [image.resize((1, 1)).getpixel((0, 0))[0] for image in images]
"""


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "candidates.jsonl").read_text().splitlines()]


def test_captions_are_chosen_by_a_function(work: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.py").write_text(JUDGE)
    out = tmp_path / "out"
    prefer = ["prefer", str(work / "joint/model"), "--data", str(work / "scenes"), "--limit"]
    prefer += ["8", "--judge", f"{tmp_path}/mine.py:words", *MANY, "--out", str(out)]
    assert main(prefer) == 0
    said = capsys.readouterr().out
    lines = lines_of(out)
    kept = [line for line in lines if "chosen" in line]
    assert f"{len(kept)} of {len(lines)} samples have a preference" in said and kept
    samples = {sample.key: sample for sample in Shards(out)}
    originals = {sample.key: sample for sample in Shards(work / "scenes")}
    assert {line["key"] for line in kept} == set(samples)
    for line in kept:
        sample, original = samples[line["key"]], originals[line["key"]]
        assert sample.image == original.image and sample.record["scene"]
        assert sample.record["captions"] == original.record["captions"]
        (entry,) = sample.record["preferences"]
        chosen, rejected = len(set(entry["chosen"].split())), len(set(entry["rejected"].split()))
        scores = sorted(line["scores"])
        assert scores[-1] >= chosen > rejected >= scores[0]
    assert main(["data", "check", str(out)]) == 0
    assert main(prefer) == 1 and "is complete" in capsys.readouterr().err


def test_a_stopped_job_goes_on_and_gives_the_same(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "CHUNK", 4)
    (tmp_path / "mine.py").write_text(JUDGE)
    model = load(work / "joint/model")
    settings = PreferSettings("captions", f"{tmp_path}/mine.py:words", LONG, candidates=8)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    make_preferences(model, work / "scenes", whole, settings, "train", 10)
    done = list[int]()

    def stop(count: int) -> None:
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_preferences(model, work / "scenes", stopped, settings, "train", 10, stop)
    first = stopped / "train-0000.jsonl"
    assert first.is_file() and not (stopped / "manifest.json").exists()
    time = first.stat().st_mtime_ns
    (tmp_path / "mine.py").write_text(JUDGE + "\n# another rule")
    with pytest.raises(ValueError, match="begun with other shards or options"):
        make_preferences(model, work / "scenes", stopped, settings, "train", 10)
    (tmp_path / "mine.py").write_text(JUDGE)
    with pytest.raises(ValueError, match="begun with other shards or options"):
        rounded = load(work / "joint/model", dtype="bfloat16")
        make_preferences(rounded, work / "scenes", stopped, settings, "train", 10)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    make_preferences(model, work / "scenes", stopped, settings, "train", 10)
    assert first.stat().st_mtime_ns == time, "it was not made again"
    assert lines_of(stopped) == lines_of(whole)
    for shard in read_manifest(whole)["shards"]:
        assert (stopped / shard["name"]).read_bytes() == (whole / shard["name"]).read_bytes()
    with pytest.raises(ValueError, match="complete"):
        make_preferences(model, work / "scenes", stopped, settings, "train", 10)


@pytest.mark.parametrize("variant", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_a_run_learns_from_drawings(work: Path, tmp_path: Path, variant: str) -> None:
    (tmp_path / "mine.py").write_text(JUDGE)
    model, out, codes = work / "joint/model", tmp_path / "out", tmp_path / "codes"
    prefer = ["prefer", str(model), "--data", str(work / "scenes"), "--out", str(out)]
    prefer += ["--judge", f"{tmp_path}/mine.py:redness", "--of", "drawings", "--candidates", "3"]
    assert main(prefer) == 0
    lines = {line["key"]: line for line in lines_of(out)}
    for sample in Shards(out, "train"):
        line, (entry,) = lines[sample.key], sample.record["preferences"]
        assert entry["prompt"] == line["prompt"] == sample.record["content"][0]["text"]
        assert max(line["scores"]) == line["scores"][line["chosen"]] > min(line["scores"])
    encode = ["tokenizer", "encode", str(work / "scenes"), str(codes), "--tokenizer", str(model)]
    assert main(encode) == 0
    config = recipe(work, tmp_path, [out, codes], learning_rate=0.003, variant=variant)
    fit = ["fit", "--config", str(config), "--trainer.max_steps", "20", "--output"]
    assert main([*fit, str(tmp_path / "run"), "--init_from", str(model)]) == 0
    rewards = values(tmp_path / "run", "train/rewards/margin")
    assert sum(rewards[-5:]) > sum(rewards[:5])
    assert len(logged(tmp_path / "run", "train/image")) == 20
    assert ("train/kto_kl" in (tmp_path / "run/logs/metrics.csv").read_text()) == (variant == "kto")


def test_alignment_is_that_of_the_model(work: Path, tmp_path: Path, capsys: Any) -> None:
    model = load(work / "joint/model")
    settings = PreferSettings("captions", "alignment", LONG, candidates=8)
    lines = make_preferences(model, work / "scenes", tmp_path / "out", settings, "val", 3)
    assert "alignment_weight" not in capsys.readouterr().err
    sample = Shards(work / "scenes", "val")[0]
    from multimodal.inference.codec import encode_images, read_images

    codes = encode_images(model, read_images(model, [sample.image]))
    ended = [n for n, score in enumerate(lines[0]["scores"]) if score > -1]
    expected = (
        embed_codes(model, codes) @ embed_texts(model, [lines[0]["texts"][n] for n in ended]).T
    )
    found = torch.tensor([lines[0]["scores"][n] for n in ended])
    assert torch.allclose(found, expected[0], atol=1e-5)


def test_a_model_that_learned_no_alignment_is_warned_of(work: Path, capsys: Any) -> None:
    model = load(work / "joint/model")
    config = model.network.config
    objectives = replace(config.objectives, alignment_weight=0.0)
    model.network.config = replace(config, objectives=objectives)
    for find, names in (
        (lambda name: find_reward(name, model, []), "objects, scenes"),
        (lambda name: find_judge(name, model), "scenes"),
    ):
        find("scenes")
        assert not capsys.readouterr().err
        find("alignment")
        (line,) = capsys.readouterr().err.splitlines()
        assert "alignment_weight of this model is 0" in line and f"{names}, FILE.py" in line


@pytest.mark.parametrize("wrong", ["short", "large"])
def test_codes_that_are_not_the_models_are_left_out(work: Path, tmp_path: Path, wrong: str) -> None:
    model = load(work / "joint/model")
    encoding = asdict(Encoding.for_tokenizer(model.image_tokenizer))
    count, size = encoding["codes_per_image"], encoding["codebook_size"]
    record = b'{"captions": ["a red circle", "a blue square"]}'
    bad = np.zeros((1, count - 1)) if wrong == "short" else np.full((1, count), size)
    samples = [
        (key, {CODES: codes_to_bytes(codes.astype(np.int64), 2**16), "json": record})
        for key, codes in (("bad", bad), ("good", np.zeros((1, count))))
    ]
    write_tar(tmp_path / "train-0000.tar", samples)
    write_manifest(tmp_path, [index_shard(tmp_path / "train-0000.tar")], image_tokenizer=encoding)
    settings = PreferSettings("captions", "cider", LONG, candidates=8)
    maker = CandidateMaker(model, settings, Shards(tmp_path, "train"))
    made = maker.make(list(Shards(tmp_path, "train")), encoded=True)
    assert made[0].reason == "codes that cannot be read"
    assert made[1].texts and not made[0].texts


@pytest.mark.parametrize("judge", ["cider", "objects"])
def test_captions_are_not_compared_with_no_captions(
    tiny_model: Callable[..., Model], tmp_path: Path, judge: str
) -> None:
    """Without references every object would be invented, and "blue" better than "a dog"."""
    records = (b'{"captions": []}', b'{"captions": ["a dog"]}')
    write_tar(tmp_path / "train-0000.tar", [(f"{n}", {"json": r}) for n, r in enumerate(records)])
    write_manifest(tmp_path, [index_shard(tmp_path / "train-0000.tar")])
    shards = Shards(tmp_path, "train")
    maker = CandidateMaker(tiny_model(), PreferSettings("captions", judge, LONG), shards)
    (made,) = maker.make([shards[0]], encoded=True)
    assert made.reason == "no captions to compare with"


def test_the_best_and_the_worst_are_chosen_if_they_differ() -> None:
    def chosen(scores: list[float], usable: list[int], margin: float = 0.0) -> Any:
        each = Candidates("key", scores=scores)
        return (each.chosen, each.rejected) if each.choose(usable, margin) else each.reason

    assert chosen([0.1, 0.9, 0.5], [0, 1, 2]) == (1, 0)
    assert chosen([0.1, 0.9, 0.5], [0, 2], 0.4) == (2, 0)
    assert "as good" in chosen([0.1, 0.9, 0.5], [0, 2], 0.41)
    assert "as good" in chosen([0.5, 0.5], [0, 1])
    assert "fewer than two" in chosen([0.5, 0.6], [1])


def test_what_cannot_be_compared_is_refused(work: Path, tmp_path: Path, capsys: Any) -> None:
    prefer = ["prefer", str(work / "joint/model"), "--data", str(work / "scenes")]
    prefer += ["--out", str(tmp_path / "out")]
    for more, message in (
        (["--candidates", "1"], "candidates=1"),
        (["--temperature", "0"], "all candidates would be equal"),
        (["--judge", "bleu"], "expected cider, alignment, objects, scenes, or FILE.py:FUNCTION"),
        (["--judge", "cider", "--of", "drawings"], "expected alignment, scenes, or FILE"),
        (["--split", "x"], "no split 'x'"),
        (["--margin", "1000", "--limit", "2"], "no sample has a preference"),
    ):
        assert main([*prefer, *more]) == 1
        assert message in capsys.readouterr().err, more
