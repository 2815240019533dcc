"""Reward training of answers and drawings, by several rewards, held to a reference: whole runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from multimodal.api import Model
from multimodal.cli import main
from multimodal.data.shards import Shards
from multimodal.model.training_batch import TrainingSample
from multimodal.train.rewards.rewards import WrittenText, find_reward
from multimodal.train.rewards.tasks import Answers, Captions, Drawings, reward_weights
from tests.launches import launch, logged
from tests.preferring import preferring, values

pytestmark = pytest.mark.usefixtures("one_thread")

MINE = """
def length(texts, records):
    return [len(text) / 10 for text in texts]
def asked(answers, records):
    return [float(record["question"] in ("Is it?", "What is it?")) + len(record["answer"])
            for record in records]
def redness(texts, images, records):
    assert all(image.mode == "RGB" and "captions" in r for image, r in zip(images, records))
    return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images]
"""


def recipe(work: Path, folder: Path, **arguments: Any) -> Path:
    config = yaml.safe_load((work / "joint.yaml").read_text())
    config["model"]["class_path"] = "multimodal.train.rewards.module.RewardModule"
    config["model"]["init_args"] |= {"captions_written": 3, "max_tokens": 8} | arguments
    (folder / "mine.py").write_text(MINE)
    (folder / "reward.yaml").write_text(yaml.safe_dump(config))
    return folder / "reward.yaml"


def fit(work: Path, folder: Path, steps: int, **arguments: Any) -> list[str]:
    config = str(recipe(work, folder, **arguments))
    return ["fit", "--config", config, "--trainer.max_steps", str(steps),
            "--trainer.limit_val_batches", "0"]  # fmt: skip


# --- rewards --------------------------------------------------------------------------------------


def test_answers_are_rewarded_if_they_are_those_of_the_data(
    tmp_path: Path, tiny_model: Callable[..., Model]
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    codes = np.zeros(16, np.int64)

    def answer(text: str, expected: str, ended: bool = True) -> WrittenText:
        return WrittenText(text, ended, {"captions": []}, codes, 0, "What is it?", expected)

    exact = find_reward("exact", tiny_model(), [], "answers")
    answers = [answer("The cat.", "cat"), answer("a dog", "cat"), answer("cat", "cat", False)]
    assert list(exact([*answers, answer("2", "two")])) == [1.0, 0.0, 0.0, 1.0]
    asked = find_reward(f"{tmp_path}/mine.py:asked", tiny_model(), [], "answers")
    assert list(asked(answers)) == [4.0, 4.0, 4.0], "a function sees the question and the answer"
    with pytest.raises(ValueError, match="no reward of answers 'cider': expected exact, or FILE"):
        find_reward("cider", tiny_model(), [], "answers")


def test_a_prompt_is_what_the_sample_has(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(noise=0.1)
    builder = model.batch_builder(96)
    arguments = model, builder
    codes = np.zeros((1, 16), np.int64)

    def sample(record: dict[str, Any], seed: int = 0, **more: Any) -> TrainingSample:
        return TrainingSample("k", record, codes, seed, **more)

    captioned = sample({"captions": ["a red bus", "two dogs"], "qa": [["What?", "a bus"]]})
    captions = Captions(*arguments, ["cider"], 2, 8, 1.0)
    assert captions.prompt(captioned) and not captions.prompt(sample({"qa": [["What?", "a"]]}))
    assert not captions.prompt(sample({"captions": ["a"]}, document=["a", None]))
    answers = Answers(*arguments, ["exact"], 2, 8, 1.0)
    asked = answers.prompt(captioned)
    assert asked and (asked.text, asked.answer) == ("What?", "a bus")
    assert model.text_tokenizer.decode(list(asked.ids)) == model.config.templates.ask("What?")
    assert not answers.prompt(sample({"captions": ["a red bus"]}))
    assert not answers.prompt(sample({"qa": [["What is it? " * 20, "a"]]})), "too long for a row"
    two = {"qa": [["Is it?", "yes"], ["What is it?", "a cat"]]}
    found = {(p.text, p.answer) for n in range(20) if (p := answers.prompt(sample(two, n)))}
    assert found == {("Is it?", "yes"), ("What is it?", "a cat")}, "the seed chooses"
    drawings = Drawings(*arguments, ["alignment"], 2, 8, 1.0)
    texts = {p.text for n in range(20) if (p := drawings.prompt(sample(captioned.record, n)))}
    assert texts == {"a red bus", "two dogs"}
    assert not drawings.prompt(sample(captioned.record, drawn=False)), "data.drawn leaves it out"
    scenes = Drawings(*arguments, ["alignment", "scenes"], 2, 8, 1.0)
    assert not scenes.prompt(captioned) and "a scene" in scenes.needs


def test_drawings_are_judged_as_they_are_decoded(
    tmp_path: Path, tiny_model: Callable[..., Model]
) -> None:
    """By their pixels, and in the order in which they were made."""
    from multimodal.inference.codec import decode_images
    from multimodal.inference.embedding import embed_codes, embed_texts

    (tmp_path / "mine.py").write_text(MINE)
    model = tiny_model(noise=0.1)
    mine = f"{tmp_path}/mine.py:redness"
    drawings = Drawings(model, model.batch_builder(96), [mine, "alignment"], 3, 8, 1.0)
    drawings.find_rewards([])
    codes = np.zeros((1, 16), np.int64)
    prompts = [
        prompt
        for n, text in enumerate(("a red bus in the snow", "two dogs run"))
        if (prompt := drawings.prompt(TrainingSample(f"{n}", {"captions": [text]}, codes, n)))
    ]
    made = drawings.make(prompts)
    assert [len(group) for group in made] == [3, 3] and made == drawings.make(prompts)
    assert len({tuple(ids) for group in made for ids in group}) > 3
    alone = drawings.make(prompts[1:])
    assert alone[0] == made[1], "the drawings of a sample depend on its seed alone"
    judged = drawings.judge(prompts, made)
    drawn = torch.tensor([ids for group in made for ids in group]) - model.vocabulary.image_start
    reds = (decode_images(model, drawn)[:, 0].flatten(1).mean(1) + 1) / 2
    assert list(judged[mine]) == pytest.approx(reds.tolist(), abs=0.02)
    texts = [prompt.text for prompt in prompts for _ in range(3)]
    cosines = (embed_codes(model, drawn) * embed_texts(model, texts)).sum(-1)
    assert list(judged["alignment"]) == pytest.approx(cosines.tolist(), abs=1e-5)
    greedy = drawings.make(prompts, greedy=True)
    assert [len(group) for group in greedy] == [1, 1]


def test_rewards_have_weights() -> None:
    assert reward_weights("cider") == {"cider": 1.0}
    assert reward_weights({"cider": 1, "my.py:fn": -0.5}) == {"cider": 1, "my.py:fn": -0.5}
    for wrong in ({}, {"cider": 0.0}, {"cider": float("nan")}):
        with pytest.raises(ValueError, match="expected names with their weights"):
            reward_weights(wrong)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "of", ["captions", "answers", pytest.param("drawings", marks=pytest.mark.slow)]
)
def test_a_killed_run_with_several_rewards_and_a_reference_resumes(
    work: Path, tmp_path: Path, of: str
) -> None:
    first, second = {
        "captions": ("scenes", "length"), "answers": ("exact", "length"),
        "drawings": ("scenes", "redness"),
    }[of]  # fmt: skip
    reward = {first: 1.0, f"{tmp_path}/mine.py:{second}": 0.5}
    arguments = {"of": of, "reward": reward, "beta": 0.1, "baseline": "group"}
    arguments |= {"scale_rewards": "group", "learning_rate": 0.01}
    run, whole = tmp_path / "run", tmp_path / "whole"
    start = ["--init_from", str(work / "joint/model"), "--output"]
    begun = fit(work, tmp_path, 4, **arguments)
    assert main([*begun, *start, str(whole)]) == 0
    launch([*begun, *start, str(run)], dies_at=3)
    assert main([*begun, "--output", str(run), "--ckpt_path", "last"]) == 0
    parts = ["train/reward", f"train/reward/{first}", f"train/reward/mine.py:{second}"]
    for name in (*parts, "train/reward_greedy", "train/policy", "train/kl", "train/total"):
        expected = logged(whole, name)
        assert len(expected) == 4 and logged(run, name) == expected, name
    one, other = (each / "model/model.safetensors" for each in (whole, run))
    assert one.read_bytes() == other.read_bytes()
    total, one, two = (np.array(values(whole, name)) for name in parts)
    assert total == pytest.approx(one + 0.5 * two, abs=1e-5)
    kl = values(whole, "train/kl")
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[-1] > 1e-4
    assert np.abs(values(whole, "train/policy")).max() > 0
    weights = torch.load(whole / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name in ("network.transformer.norm.weight", "network.transformer.embed_tokens.weight"):
        reference = weights[name.replace("network", "reference", 1)]
        assert not torch.equal(weights[name], reference), "the reference stays where it was"


@pytest.mark.parametrize("kind", ["rewards", "preferences"])
def test_the_base_of_an_adapter_is_the_reference(work: Path, tmp_path: Path, kind: str) -> None:
    """Without a copy: what a run with a copy of the same weights measures, it measures, too."""
    arguments: dict[str, Any] = {"beta": 0.1, "learning_rate": 0.02}
    arguments["lora"] = {"r": 4}
    begun = fit(work, tmp_path, 4, reward=f"{tmp_path}/mine.py:length", **arguments)
    name = "train/kl"
    if kind == "preferences":

        def change(records: list[dict[str, Any]], number: int) -> dict[str, Any]:
            own = records[number]["captions"][0]
            return {**records[number], "preferences": [{"chosen": own, "rejected": f"no {own}"}]}

        data, name = preferring(work, tmp_path / "data", change), "train/preference_kl"
        config = yaml.safe_load((work / "joint.yaml").read_text())
        config["model"]["class_path"] = "multimodal.train.preferences.module.PreferenceModule"
        config["model"]["init_args"] |= arguments
        config["data"]["folders"] = [str(data)]
        (tmp_path / "reward.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    assert main([*begun, "--init_from", str(work / "joint/model"), "--output", str(run)]) == 0
    kl = values(run, name)
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[-1] > 1e-4
    weights = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert any(".lora_A" in key for key in weights)
    assert not any(key.startswith("reference.") for key in weights)
    assert (run / "adapter").is_dir()


def without_scenes(records: list[dict[str, Any]], number: int) -> dict[str, Any]:
    return {"captions": records[number]["captions"]}


REFUSED: dict[str, tuple[dict[str, Any], bool, str]] = {
    "no question": ({"of": "answers", "reward": "exact"}, True,
                    "has a question with its answer that fits row_length=192"),
    "no scene": ({"of": "drawings", "reward": "scenes"}, True, "a caption to draw after and a"),
    "nothing drawn": ({"of": "drawings", "reward": "alignment"}, True,
                      "has an image that is drawn (data.drawn) with a caption to draw after"),
    "another reward": ({"of": "drawings", "reward": "cider"}, True, "expected alignment, scenes"),
    "no weight": ({"reward": {"cider": 0.0}}, True, "names with their weights, not all of them 0"),
    "no base": ({"beta": 0.1}, False, "give a model with --init_from"),
    "beta": ({"beta": -1.0}, True, "beta=-1.0: expected 0 or more"),
    "no such file": ({"reward": {"cider": 1.0, "no.py:f": 1.0}}, True, "no.py: no such Python"),
    "a short row": ({"of": "drawings", "row_length": 6}, True, "a drawing of 4 codes needs"),
    "an unknown scale": ({"scale_rewards": "all"}, True, "scale_rewards"),
    "one alone": ({"captions_written": 1, "baseline": "group"}, True, "captions_written=1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes' pictures with captions alone."""
    return preferring(work, tmp_path_factory.mktemp("plain") / "data", without_scenes)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_rewarded_is_refused_before_the_first_step(
    work: Path, plain: Path, tmp_path: Path, capsys: Any, kind: str
) -> None:
    arguments, starts, message = REFUSED[kind]
    more = ["--data.folders", f"[{plain}]", "--output", str(tmp_path / "run")]
    more += ["--init_from", str(work / "joint/model")] if starts else []
    more += ["--data.drawn", "[]"] if kind == "nothing drawn" else []
    assert "scene" not in Shards(plain, "train")[0].record
    assert main([*fit(work, tmp_path, 2, **arguments), *more]) != 0
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.ckpt"))
