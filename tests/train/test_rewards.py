"""Reward training: the rewards, the exact policy gradient, and runs that raise a reward."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pycocoevalcap.cider.cider import Cider
from torch import Tensor

from multimodal.api import Model
from multimodal.cli import main
from multimodal.data.shards import Shards, index_shard, write_manifest, write_tar
from multimodal.eval.metrics.penn_treebank import ptb_tokenize
from multimodal.model.batches import BatchBuilder
from multimodal.model.network import MultimodalLM
from multimodal.model.objectives import ObjectivesConfig, PolicyConfig
from multimodal.model.sequences import describe, pack
from multimodal.model.templates import Templates
from multimodal.model.training_batch import TrainingSample, Written
from multimodal.options import TextOptions
from multimodal.tokenizers.levels import Layout, Level
from multimodal.train.rewards.advantages import advantages_of, in_standard_deviations, scaled
from multimodal.train.rewards.rewards import (
    AlignmentReward,
    CiderReward,
    WrittenText,
    find_reward,
    objects_reward,
)
from multimodal.train.rewards.tasks import write_texts
from tests.launches import launch, logged

pytestmark = pytest.mark.usefixtures("one_thread")


# --- rewards --------------------------------------------------------------------------------------


def written(
    text: str, record: dict[str, Any], ended: bool = True, seed: int = 0, source: int = 0
) -> WrittenText:
    codes = np.random.default_rng(seed).integers(0, 64, 16)
    return WrittenText(text, ended, record, codes, source)


def test_cider_is_that_of_pycocoevalcap_with_the_end_as_a_word() -> None:
    records = [
        {"captions": ["A dog runs.", "A brown dog is running on grass."]},
        {"captions": ["Two men ride bikes", "men on bikes in the rain", "a bike race"]},
        {"captions": ["The dog's ball, in the water"]},
    ]
    texts = ["a dog runs in the", "two men on a bike", "a dog a dog", "ball in water", ""]
    reward = CiderReward([[record["captions"] for record in records]])
    for ended in (True, False):
        end = " <eos>" if ended else ""
        for row, record in enumerate(records):
            # Its counts of words are those of all images, so that each needs a caption.
            for text in texts:
                guesses = {n: [f"{ptb_tokenize(text)}{end}" if n == row else "x"] for n in range(3)}
                truths = {
                    n: [f"{ptb_tokenize(caption)} <eos>" for caption in each["captions"]]
                    for n, each in enumerate(records)
                }
                expected = Cider().compute_score(truths, guesses)[1][row]
                (ours,) = reward([written(text, record, ended)])
                assert ours == pytest.approx(float(expected), abs=1e-9), (text, ended)
    together = reward([written(text, record) for record in records for text in texts])
    alone = [reward([written(text, record)])[0] for record in records for text in texts]
    assert together == pytest.approx(alone)
    whole, cut = reward([written("a dog runs", records[0], e) for e in (True, False)])
    assert whole > cut > 0


def test_words_are_counted_in_the_folder_of_an_image() -> None:
    """However many pictures the other folders have."""
    photos = [["a dog runs", "a brown dog"], ["a man on a bike"]]
    products = [[f"shirt number {n}"] for n in range(100)]
    alone, beside = CiderReward([photos]), CiderReward([products, [], photos])
    record = {"captions": photos[0]}
    texts = ["a dog runs", "a man", "shirt number 1", "a brown dog on a bike"]
    captions = [written(text, record, source=2) for text in texts]
    expected = alone([written(text, record) for text in texts])
    mixed = [written("shirt number 7", {"captions": products[7]}), *captions]
    assert beside(mixed)[1:] == pytest.approx(expected)
    assert beside(mixed)[0] == pytest.approx(10.0)


def test_words_are_counted_without_the_samples_that_cannot_be_read(tmp_path: Path) -> None:
    good = {"png": b"", "json": b'{"captions": ["a dog runs", "a brown dog"]}'}
    write_tar(tmp_path / "train-0.tar", [("a", {"png": b"", "json": b"{"}), ("b", good)])
    write_manifest(tmp_path, [index_shard(tmp_path / "train-0.tar")])
    reward = find_reward("cider", None, [Shards(tmp_path)])  # type: ignore[arg-type]
    captions = [written("a dog", {"captions": ["a dog runs", "a brown dog"]})]
    assert reward(captions) == CiderReward([[["a dog runs", "a brown dog"]]])(captions)


def test_alignment_is_the_cosine_of_the_models_embeddings(
    tiny_model: Callable[..., Model],
) -> None:
    model = tiny_model(noise=0.1)
    first, second = {"captions": ["a"]}, {"captions": ["b"]}
    captions = [
        written("a red bus", first),
        written("two dogs", first),
        written("a", second, seed=1),
    ]
    captions += [written("", second, seed=1), written("a red", second, ended=False, seed=1)]
    from multimodal.inference.embedding import embed_codes, embed_texts

    images = embed_codes(model, torch.from_numpy(np.stack([c.codes for c in captions])))
    texts = embed_texts(model, [c.text or "?" for c in captions])
    expected = (images * texts).sum(-1).tolist()[:3] + [-1.0, -1.0]
    assert AlignmentReward(model)(captions) == pytest.approx(expected, abs=1e-5)


def test_objects_that_are_invented_or_not_said_cost() -> None:
    record = {"captions": ["A man and his puppy by a tree.", "a guy walks two dogs"]}
    captions = [
        written(text, record)
        for text in ("a dog and a person near trees", "a dog", "a dog and a cat", "blue sky", "")
    ]
    nothing = {"captions": ["blue sky"]}
    captions += [written(text, nothing) for text in ("so very blue", "a bus", "")]
    captions.append(written("a dog and a man", record, ended=False))
    expected = [1, 2 / 4, 2 / 5, 0, 0, 1, 0, 0, 0]
    assert objects_reward(captions) == pytest.approx(expected)
    assert find_reward("objects", None, []) is objects_reward  # type: ignore[arg-type]


def test_a_function_in_a_file_is_a_reward(tmp_path: Path, tiny_model: Callable[..., Model]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("""
def lengths(captions, records):
    return [len(text) + record["more"] for text, record in zip(captions, records)]
def few(captions, records):
    return [1.0]
def infinite(captions, records):
    return [float("inf")] * len(captions)
""")
    model, record = tiny_model(), {"captions": ["a"], "more": 10}
    captions = [written("abc", record), written("abcd", record, ended=False)]
    reward = find_reward(f"{file}:lengths", model, [])
    assert reward(captions) == [13.0, 10.0], "a caption without an end is an empty one"
    for name, message in (("few", "gave 1 rewards"), ("infinite", "expected a finite number")):
        with pytest.raises(ValueError, match=message):
            find_reward(f"{file}:{name}", model, [])(captions)
    with pytest.raises(
        ValueError,
        match="no reward of captions 'bleu': expected cider, alignment, objects, scenes, or FILE",
    ):
        find_reward("bleu", model, [])
    with pytest.raises(ValueError, match="has no function other"):
        find_reward(f"{file}:other", model, [])
    with pytest.raises(ValueError, match="no training sample has one"):
        find_reward("cider", model, [])


# --- the gradient ---------------------------------------------------------------------------------

MAX_TOKENS, CODES = 3, np.array([0, 3, 5, 1])


@pytest.fixture(scope="module")
def toy() -> MultimodalLM:
    """A network with four text ids, of which all captions of three tokens can be listed."""
    layout = Layout((Level("detail", 2, 1, 6),))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MultimodalLM.new("tiny", 4, layout, [torch.randn(6, 3)])
        with torch.no_grad():
            for weight in network.transformer.parameters():
                weight += 0.1 * torch.randn_like(weight)
    return network.eval()


def all_captions(network: MultimodalLM, *more_ends: int) -> list[list[int]]:
    """more_ends: text ids that end a caption as <eos> does."""
    ends = [network.vocabulary.eos, *more_ends]
    letters = [n for n in range(network.vocabulary.text_size) if n not in more_ends]
    ended = [
        [*ids, end]
        for n in range(MAX_TOKENS)
        for ids in itertools.product(letters, repeat=n)
        for end in ends
    ]
    return ended + [list(ids) for ids in itertools.product(letters, repeat=MAX_TOKENS)]


def probability(network: MultimodalLM, ids: list[int], temperature: float) -> Tensor:
    """Of a caption, alone in its row, among the ids of texts and <eos>: float32[]."""
    v = network.vocabulary
    allowed = [*range(v.text_size), v.eos]
    sequence = describe(v, CODES, [ids])
    logits = network.transformer.logits(network.hidden(pack([sequence], len(sequence), v.pad)))
    log_p = (logits[0, sequence.state :, allowed] / temperature).log_softmax(-1)
    return torch.stack([log_p[n, allowed.index(token)] for n, token in enumerate(ids)]).sum().exp()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_expected_gradient_is_that_of_the_expected_reward(
    toy: MultimodalLM, temperature: float
) -> None:
    """All captions, each weighted by its probability, in one sequence."""
    captions, v = all_captions(toy), toy.vocabulary
    rewards = torch.rand(len(captions), generator=torch.Generator().manual_seed(0))
    chances = torch.stack([probability(toy, ids, temperature) for ids in captions])
    assert chances.sum().item() == pytest.approx(1, abs=1e-5) and chances.max() > 0.05
    weights = [weight for weight in toy.transformer.parameters()]
    expected = torch.autograd.grad((chances * rewards).sum(), weights)

    levels = toy.config.layout, ["detail"], ["detail"]
    builder = BatchBuilder(v, ObjectivesConfig(), Templates(), lambda text: [0], *levels, 300)
    baseline = 0.3  # any number: it changes no expectation
    advantages = (chances.detach() * (rewards - baseline)).tolist()
    sample = TrainingSample(
        "a",
        {"captions": ["a"]},
        CODES[None],
        0,
        written=list(map(Written, captions, advantages)),
    )
    batch = builder.build([sample], policy=PolicyConfig(temperature, joint_weight=0.0))
    assert batch.policy is not None
    total, parts = toy(batch)
    assert total == parts["policy"]
    ours = torch.autograd.grad(-len(batch.policy.targets) * total, weights)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max().clamp(min=1e-2)

    joint, _ = toy(builder.build([sample], policy=PolicyConfig(temperature, joint_weight=0.5)))
    alone, _ = toy(builder.build([sample]))
    assert joint.item() == pytest.approx(0.5 * alone.item() + total.item(), rel=1e-5)
    nothing = TrainingSample("a", {"captions": ["a"]}, CODES[None], 0)
    none = builder.build([nothing], policy=PolicyConfig())
    assert toy(none)[1]["policy"] == 0, "a rank may have no written caption"


@pytest.mark.parametrize(("temperature", "more_ends"), [(1.0, []), (0.6, []), (1.0, [1])])
def test_captions_are_written_as_often_as_they_are_likely(
    toy: MultimodalLM, temperature: float, more_ends: list[int]
) -> None:
    captions = all_captions(toy, *more_ends)
    with torch.inference_mode():
        chances = torch.stack([probability(toy, ids, temperature) for ids in captions])
    texts = SimpleNamespace(end_ids=more_ends)
    model: Any = SimpleNamespace(
        network=toy, vocabulary=toy.vocabulary, device=toy.device, text_tokenizer=texts
    )
    options, count = TextOptions(temperature=temperature, max_tokens=MAX_TOKENS), 4000
    (texts,) = write_texts(model, [CODES], [5], count, options)
    counts = np.array([texts.count(ids) for ids in captions])
    assert counts.sum() == count, "nothing else is written"
    means = count * chances.numpy()
    often = means >= 5
    chi_squared = ((counts - means) ** 2 / means)[often].sum()
    assert abs(chi_squared - often.sum()) < 4 * np.sqrt(2 * often.sum())
    # The numbers of a caption depend on the seed of its image alone.
    several = write_texts(model, [CODES[::-1], CODES], [9, 5], 20, options)
    assert several[1] == write_texts(model, [CODES], [5], 20, options)[0] != several[0]


def test_a_caption_is_compared_with_the_others_or_with_the_greedy_one() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5]])
    others = advantages_of(rewards, "others")
    assert others.tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]
    greedy = torch.tensor([[2.0], [1.0]])
    expected = [[-1.0, 0.0, 4.0], [-0.5, -0.5, -0.5]]
    assert advantages_of(rewards, "greedy", greedy).tolist() == expected
    ours = scaled(advantages_of(100 * rewards, "others"), rewards, "batch")
    assert ours.square().mean().item() == pytest.approx(1)
    assert torch.allclose(ours, in_standard_deviations(others))
    for nothing in (torch.zeros(2, 3), torch.zeros(0, 3)):
        assert torch.equal(in_standard_deviations(nothing), nothing)


# --- runs -----------------------------------------------------------------------------------------


def recipe(work: Path, folder: Path, **arguments: Any) -> Path:
    config = yaml.safe_load((work / "joint.yaml").read_text())
    config["model"]["class_path"] = "multimodal.train.rewards.module.RewardModule"
    config["model"]["init_args"] |= {"captions_written": 4, "max_tokens": 8} | arguments
    path = folder / "reward.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_the_reward_rises(work: Path, tmp_path: Path) -> None:
    """For captions with many e. The joint loss goes on, and its captions are learned too."""
    (tmp_path / "mine.py").write_text(
        "def count(captions, records):\n    return [text.count('e') for text in captions]\n"
    )
    run = tmp_path / "run"
    arguments = {"reward": f"{tmp_path / 'mine.py'}:count", "learning_rate": 0.01}
    fit = ["fit", "--config", str(recipe(work, tmp_path, lm_weight=0.01, **arguments))]
    fit += ["--trainer.max_steps", "40", "--trainer.limit_val_batches", "0", "--output", str(run)]
    assert main([*fit, "--init_from", str(work / "joint/model")]) == 0
    rewards = [float(value) for value in logged(run, "train/reward").values()]
    greedy = [float(value) for value in logged(run, "train/reward_greedy").values()]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.5, rewards
    assert greedy[-1] > greedy[0], greedy
    for name in ("caption", "text", "policy", "written_tokens", "written_distinct"):
        assert len(logged(run, f"train/{name}")) == 40, name


@pytest.mark.parametrize("reward", ["cider", "alignment"])
def test_a_killed_run_resumes_and_codes_are_as_good_as_images(
    work: Path, tmp_path: Path, reward: str
) -> None:
    config = recipe(work, tmp_path, reward=reward, baseline="greedy", dropout=0.1)
    model, codes = str(work / "joint/model"), str(tmp_path / "codes")
    fit = ["fit", "--config", str(config), "--trainer.max_steps", "5"]
    fit += ["--trainer.limit_val_batches", "0", "--output"]
    uninterrupted, run, encoded = (str(tmp_path / name) for name in ("whole", "run", "encoded"))
    assert main([*fit, uninterrupted, "--init_from", model]) == 0
    launch([*fit, run, "--init_from", model], dies_at=4)
    assert main([*fit, run, "--ckpt_path", f"{run}/checkpoints/last.ckpt"]) == 0
    for name in ("train/reward", "train/reward_greedy", "train/policy", "train/total"):
        expected = logged(Path(uninterrupted), name)
        assert len(expected) == 5 and logged(Path(run), name) == expected, name
    if reward == "cider":
        encode = ["tokenizer", "encode", str(work / "scenes"), codes, "--tokenizer", model]
        assert main(encode) == 0
        assert main([*fit, encoded, "--init_from", model, "--data.folders", f"[{codes}]"]) == 0
        assert logged(Path(encoded), "train/reward") == logged(Path(uninterrupted), "train/reward")


def test_two_ranks_write_and_learn_as_one(work: Path, tmp_path: Path) -> None:
    """With a copy of the weights on each rank, and with a part of them (FSDP2)."""
    config = recipe(work, tmp_path, reward="alignment")
    more = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    more += ["--init_from", str(work / "joint/model"), "--output"]
    assert main(["fit", "--config", str(config), *more, str(tmp_path / "one")]) == 0
    sharded = yaml.safe_load(config.read_text())
    sharded["trainer"]["strategy"] = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    }
    (tmp_path / "sharded.yaml").write_text(yaml.safe_dump(sharded))
    both = ["--trainer.devices", "2"]
    launch(
        [
            "fit",
            "--config",
            str(config),
            *both,
            "--trainer.strategy",
            "ddp",
            *more,
            str(tmp_path / "ddp"),
        ],
        ["fit", "--config", str(tmp_path / "sharded.yaml"), *both, *more, str(tmp_path / "fsdp")],
        ranks=2,
    )
    for name in ("reward", "policy", "total", "grad_norm/policy", "gradient_norm"):
        runs = [logged(tmp_path / run, f"train/{name}") for run in ("one", "ddp", "fsdp")]
        one, *two = (float(run[0]) for run in runs)
        assert two == pytest.approx([one, one], rel=1e-4), name


def test_what_cannot_be_written_is_refused(work: Path, tmp_path: Path, capsys: Any) -> None:
    for arguments, message in (
        ({"max_tokens": 60}, "row_length=192: an image of 4 codes and 4 captions of 60 tokens"),
        ({"captions_written": 1}, "captions_written=1"),
    ):
        config = str(recipe(work, tmp_path, **arguments))
        assert main(["fit", "--config", config, "--output", str(tmp_path)]) != 0
        assert message in capsys.readouterr().err
