"""Few-shot documents: which samples they are made of, how they are written, what they teach."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from multimodal.api import Model, load
from multimodal.cli import main
from multimodal.model.batches import FEW_SHOT, BatchBuilder
from multimodal.model.lessons import descriptions_of
from multimodal.model.training_batch import TrainingSample
from multimodal.train.data import ShardData
from multimodal.train.examples import ShardDataset
from multimodal.train.mixing.few_shot import FewShot, Style

NAMES = ("bus", "dogs", "circle", "square", "cat", "chair", "beach", "snow")


def test_documents_are_made_of_the_pairs_of_a_folder(work: Path) -> None:
    shards = ShardData([str(work / "scenes")]).shards("train")

    def dataset(**few_shot: Any) -> ShardDataset:
        return ShardDataset(shards, 16, "squash", 3, few_shot=FewShot(**few_shot))

    plain, made = dataset(), dataset(share=0.5, examples=3, restyled=0.0)
    lengths = Counter[int]()
    for number in range(50):
        pair, example = plain[0, number], made[0, number]
        images, document = example["images"], example["document"]
        lengths[len(images)] += 1
        assert (images[-1] == pair["images"][0]).all() and example["key"] == pair["key"]
        if len(images) > 1:
            assert document[::2] == [None] * len(images)
            captions = {text for n in range(50) for text in plain[0, n]["record"]["captions"]}
            assert {*document[1::2]} <= captions
            assert document[-1] in descriptions_of(pair["record"])
            assert len({image.tobytes() for image in images}) == len(images)
    assert 15 < lengths[1] < 35 and set(lengths) == {1, 2, 3, 4}
    again = dataset(share=0.5, examples=3, restyled=0.0)
    for number in (49, 7, 3):
        assert again[0, number]["document"] == made[0, number]["document"], "by its seed alone"
    styled = [dataset(share=1.0, restyled=1.0)[0, number]["document"][1::2] for number in range(9)]
    assert len({text for texts in styled for text in texts}) > 9


def test_a_style_is_the_same_for_all_texts_of_a_document() -> None:
    rng = np.random.default_rng(0)
    styles = [Style.random(rng) for _ in range(200)]
    assert len({style("a red bus") for style in styles}) > 60
    assert Style()("a red  bus") == "a red bus"
    shout = Style(str.upper, "-", True, "zuko: ", "!")
    assert shout("a red bus") == "zuko: BUS-RED-A!"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.few_shot.share", "1.5"], "expected shares from 0 to 1"),
        (
            ["--data.few_shot.share", "0.5", "--data.few_shot.examples", "40"],
            "41 images have 247 tokens and their texts",
        ),
        (
            ["--data.few_shot.share", "0.5", "--data.few_shot.examples", "9"],
            "61 tokens and their texts: raise it to 381 or more",
        ),
    ],
)
def test_few_shot_that_cannot_be_learned_is_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    fit = ["fit", "--config", str(work / "joint.yaml"), "--output", str(tmp_path / "run")]
    assert main([*fit, *options]) != 0
    assert message in capsys.readouterr().err


def test_the_recipe_has_room_for_its_examples() -> None:
    """And for their captions in capitals. This one has 24 tokens of SmolLM2, whose recipe it is."""
    text = (files("multimodal.train") / "recipes/few_shot.yaml").read_text("utf-8")
    recipe, model = yaml.safe_load(text), load("starter")
    few_shot = FewShot(**recipe["data"]["few_shot"])
    arguments = recipe["model"]["init_args"]
    builder = replace(
        model.batch_builder(arguments["row_length"]),
        reads=arguments["reads"],
        encode=lambda text: [7] * 24,
    )
    few_shot.check(builder)
    images = few_shot.examples + 1
    codes = np.zeros((images, model.codes_per_image), np.int64)
    caption = "A BROWN DOG RUNS OVER THE GRASS WITH A RED BALL IN ITS MOUTH ."
    sample = TrainingSample("a", {FEW_SHOT: True}, codes, 0, [None, caption] * images)
    (sequence,) = builder.document(sample)
    assert (sequence.ids == model.vocabulary.boi).sum() == images and not sequence.cut


def toy_pairs(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Images whose 16 codes say which of the eight names is their caption."""
    names = rng.integers(len(NAMES), size=count)
    return [
        {
            "key": str(number),
            "images": [np.full(16, name * 8)],
            "record": {"captions": [f"a {NAMES[name]}"]},
            "document": [],
            "seed": int(rng.integers(1 << 40)),
        }
        for number, name in enumerate(names)
    ]


def toy_documents(rng: np.random.Generator, few_shot: FewShot) -> list[TrainingSample]:
    pairs = toy_pairs(rng, 64)
    made = [few_shot.document(pair, n, 64, lambda m: pairs[m]) for n, pair in enumerate(pairs[:16])]
    return [
        TrainingSample(m["key"], m["record"], np.stack(m["images"]), m["seed"], m["document"])
        for m in made
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_examples_of_a_new_style_help_after_such_training(tiny_model: Callable[..., Model]) -> None:
    """The captions of new styles, with invented words that no training text had, after four
    examples in the same style, after four as they are, and after none."""
    model, few_shot = tiny_model(), FewShot(share=1.0, examples=4, restyled=1.0)
    network, builder = model.network.train(), model.batch_builder(256)
    optimizer, rng = torch.optim.AdamW(network.parameters(), 3e-3), np.random.default_rng(0)
    for _ in range(200):
        total, _ = network(builder.build(toy_documents(rng, few_shot), skip_untaught=True))
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    network.eval()
    rng, losses = np.random.default_rng(1), list[tuple[float, float, float]]()
    for _ in range(40):
        style, shots = Style.random(rng), toy_pairs(rng, 5)
        plain = [pair["record"]["captions"][0] for pair in shots]
        codes = np.stack([pair["images"][0] for pair in shots])
        last = style(plain[-1])
        same = last_loss(model, builder, codes, [*map(style, plain[:-1]), last])
        other = last_loss(model, builder, codes, [*plain[:-1], last])
        losses.append((same, other, last_loss(model, builder, codes[-1:], [last])))
    same, other, none = np.mean(losses, axis=0)
    assert same < 0.7 * other and same < 0.7 * none, (same, other, none)


@torch.no_grad()
def last_loss(model: Model, builder: BatchBuilder, codes: Any, texts: list[str]) -> float:
    """The loss of a token of the last text, after all images and texts before it."""
    parts = [part for text in texts for part in (None, text)]
    sample = TrainingSample("a", {FEW_SHOT: True}, codes, 0, parts)
    packed = builder.build([sample]).packed
    logits = model.network.transformer.logits(model.network.hidden(packed))[0]
    (images,) = torch.where(packed.ids[0] == model.vocabulary.eoi)
    here = slice(int(images[-1]), int(packed.documents[0].sum()) - 1)  # the last token is <eos>
    return float(torch.nn.functional.cross_entropy(logits[here], packed.targets[0, here]))
