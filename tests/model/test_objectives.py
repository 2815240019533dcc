"""Each objective can be learned. Its gradient, its weight, and several ranks."""

import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad
from torch.nn.parallel import DistributedDataParallel

from multimodal.api import Model, load
from multimodal.model.layers.attention import attention_mask
from multimodal.model.layers.experts import ExpertsConfig
from multimodal.model.network import MultimodalLM
from multimodal.model.objectives import ObjectivesConfig, token_losses
from multimodal.model.sequences import OBJECTIVES, TokenSequence, describe, draw, pack
from multimodal.model.training_batch import TrainingBatch, TrainingSample
from tests.samples import samples_of

Make = Callable[..., Model]
FORMS = ("siglip", "clip")
ALONE = (*OBJECTIVES, *FORMS)
HEAD = torch.eye(40)  # makes the hidden states the logits


def only(name: str, **others: object) -> dict[str, object]:
    """The settings with which one objective trains alone, on sequences that have it."""
    alignment = name in ("siglip", "clip")
    return {
        "weights": {each: float(each == name) for each in OBJECTIVES},
        "alignment_weight": float(alignment),
        "alignment_form": name if alignment else "siglip",
        "reconstruct_share": float(name == "reconstruct"),
        "next_token_share": float(name == "image"),
        "drop_condition": 0.0,
        "z_loss_weight": 0.0,
        **others,
    }


def samples_with(texts: Sequence[str], questions: bool) -> list[TrainingSample]:
    """Images with a caption each, and, if wanted, with two questions that it answers."""
    return samples_of(
        [
            {"captions": [text], "qa": [("Which?", text), ("It is?", text)] if questions else []}
            for text in texts
        ]
    )


def batch_of(model: Model, texts: Sequence[str], questions: bool = False) -> TrainingBatch:
    return model.batch_builder(160).build(samples_with(texts, questions))


def batch_of_sequences(
    model: Model,
    sequences: list[TokenSequence],
    image_ids: Tensor,
    text_ids: Tensor,
    row_length: int = 160,
) -> TrainingBatch:
    """The sequences of B pairs: B that start with the image, B that start with the text, others."""
    packed, pairs = pack(sequences, row_length, model.vocabulary.pad), len(image_ids)
    states = packed.states[: 2 * pairs].view(2, pairs)
    return TrainingBatch(
        packed,
        *states,
        image_ids,
        text_ids,
        tokens=int((packed.documents > 0).sum()),
    )


def overfit(
    network: MultimodalLM, batch: TrainingBatch, steps: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The parts of the loss before and after."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer, first = torch.optim.AdamW(weights, 3e-3, weight_decay=0), dict[str, float]()
    for _ in range(steps):
        loss, parts = network(batch)
        first = first or {name: value.item() for name, value in parts.items()}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return first, {name: value.item() for name, value in network(batch)[1].items()}


def floor(batch: TrainingBatch, texts: int) -> float:
    """The least mean loss of the texts alone: nothing tells which of them comes."""
    tokens = int((batch.packed.objectives == OBJECTIVES.index("text")).sum())
    return texts * math.log(texts) / tokens


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALONE)
def test_each_objective_alone_overfits_one_batch(
    name: str, tiny_model: Make, sentences: tuple[str, ...]
) -> None:
    model = tiny_model(**only(name))
    batch = batch_of(model, sentences, questions=name == "answer")
    first, last = overfit(model.network, batch, 120)
    assert last["total"] < 0.25 * first["total"]
    least = floor(batch, len(sentences)) if name == "text" else 0.0
    assert least <= last["total"] < least + 0.1
    if name in ("siglip", "clip"):
        assert last["alignment_accuracy"] == 1 > first["alignment_accuracy"]
    else:
        assert last[name] == pytest.approx(last["total"])


def test_all_objectives_together_overfit_one_batch(
    tiny_model: Make, sentences: tuple[str, ...]
) -> None:
    model = tiny_model(drop_condition=0.0)
    batch = batch_of(model, sentences * 2, questions=True)
    assert torch.equal(batch.text_hashes[4:], batch.text_hashes[:4]), "each sentence stands twice"
    assert set(batch.packed.objectives.unique().tolist()) == {-1, 0, 1, 2, 3, 4}
    first, last = overfit(model.network, batch, 240)
    assert last["text"] < floor(batch, 8) + 0.1  # the true floor is lower: 4 texts, not 8
    for name in ("caption", "reconstruct", "answer", "alignment"):
        assert last[name] < 0.1 * first[name], name
    # Where one sentence has two images, its next-token drawing has to guess which.
    assert last["image"] < 0.1 * first["image"] + 2 * math.log(2) / 17
    assert last["alignment_accuracy"] == 1


# --- what a gradient reaches ----------------------------------------------------------------------


def ids_seen_by(name: str, sequence: TokenSequence) -> set[int]:
    """The ids that the predictions of an objective, or the embedding, may see."""
    if name in ("siglip", "clip"):
        positions = [sequence.state]
    else:
        positions = np.flatnonzero(sequence.objectives == OBJECTIVES.index(name)).tolist()
    blocks, branches = (torch.from_numpy(x)[None] for x in (sequence.blocks, sequence.branches))
    sees = attention_mask(torch.ones_like(blocks), blocks, branches)[0, 0, positions]
    return set(sequence.ids[sees.any(0).numpy()].tolist())


@pytest.mark.parametrize("name", ALONE)
def test_the_gradient_of_each_objective_reaches_what_it_should(
    name: str, tiny_model: Make, sentences: tuple[str, ...]
) -> None:
    model = tiny_model(noise=0.05, tied=False, **only(name))
    network = model.network.train()
    samples = samples_with(sentences[:2], questions=name == "answer")
    builder = model.batch_builder(160)
    network(builder.build(samples))[0].backward()

    weights = network.named_parameters()
    reached = {n for n, weight in weights if weight.grad is not None and weight.grad.any()}
    layers = {n for n, _ in network.named_parameters() if n.startswith("transformer.layers")}
    expected = layers | {"transformer.embed_tokens.weight", "transformer.norm.weight"}
    if name in ("siglip", "clip"):
        expected |= {f"alignment.{kind}_projection.weight" for kind in ("image", "text")}
        expected |= {"alignment.log_scale"} | ({"alignment.bias"} if name == "siglip" else set())
    else:
        expected |= {"transformer.lm_head.weight"}
    assert reached == expected

    # Row by row: only the ids that its predictions could see.
    seen = set[int]()
    for pair in map(builder.pair, samples):
        seen |= ids_seen_by(name, pair.describe) | ids_seen_by(name, pair.draw)
    assert (gradient := network.transformer.embed_tokens.weight.grad) is not None
    assert set(gradient.abs().sum(1).nonzero()[:, 0].tolist()) == seen
    assert not any(weight.requires_grad for weight in model.image_tokenizer.parameters())
    assert not model.image_tokenizer.training


def test_the_loss_is_on_the_whole_vocabulary(tiny_model: Make, sentences: tuple[str, ...]) -> None:
    """Codes and padding become less likely after a text, without any grammar."""
    model = tiny_model(tied=False, **only("caption"))
    model.network(batch_of(model, sentences))[0].backward()
    assert (gradient := model.network.transformer.lm_head.weight.grad) is not None
    assert (gradient.abs().sum(1) > 0).all()


# --- the sum of the parts -------------------------------------------------------------------------


def test_each_objective_is_a_mean_over_its_own_tokens() -> None:
    torch.manual_seed(0)
    counts = {"caption": 3, "text": 1, "image": 50, "reconstruct": 7, "answer": 2}
    weights = {"caption": 1.0, "text": 0.5, "image": 0.25, "reconstruct": 2.0, "answer": 3.0}
    objectives = torch.cat([torch.full((n,), i) for i, n in enumerate(counts.values())])
    order = torch.randperm(len(objectives))
    objectives, logits = objectives[order], 3 * torch.randn(len(objectives), 40)
    targets = torch.randint(40, objectives.shape)
    config = ObjectivesConfig(weights=weights, z_loss_weight=0.01)
    total, parts = token_losses(logits, HEAD, targets, objectives, config)
    expected = torch.zeros(())
    for number, name in enumerate(OBJECTIVES):
        mean = F.cross_entropy(logits[objectives == number], targets[objectives == number])
        assert parts[name] == pytest.approx(mean.item(), rel=1e-5)
        expected += weights[name] * mean
    expected += 0.01 * logits.logsumexp(-1).square().mean()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert parts["log_z"] == pytest.approx(logits.logsumexp(-1).mean().item(), rel=1e-5)
    assert parts["largest_logit"] == logits.max()

    # Ten times as many tokens of the image weigh no more than before.
    image = objectives == 2
    more = [torch.cat([x[~image], *[x[image]] * 10]) for x in (logits, targets, objectives)]
    config = ObjectivesConfig(weights=weights, z_loss_weight=0)
    again, _ = token_losses(more[0], HEAD, more[1], more[2], config)
    once, _ = token_losses(logits, HEAD, targets, objectives, config)
    assert again.item() == pytest.approx(once.item(), rel=1e-5)


def test_only_the_targets_of_texts_are_smoothed() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(30, 40), torch.randint(40, (30,))
    for number, name in enumerate(OBJECTIVES):
        config = ObjectivesConfig(weights={name: 1.0}, z_loss_weight=0)
        smoothing = 0.3 if name in ("caption", "answer", "text") else 0.0
        expected = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        objectives = torch.full((30,), number)
        total, parts = token_losses(logits, HEAD, targets, objectives, config, None, 0.3, 40)
        assert total.item() == pytest.approx(expected.item(), rel=1e-5), name
        assert parts[name].item() == pytest.approx(F.cross_entropy(logits, targets).item())


def test_half_precision_throughout_keeps_shares_exact(
    tiny_model: Make, sentences: tuple[str, ...]
) -> None:
    """Lightning's bf16-true: the weights are bf16, and torch's default type is."""
    model = tiny_model()
    model.network.to(torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        loss, parts = model.network(batch_of(model, sentences))
        loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.isfinite() and loss.dtype == torch.float32
    assert all(value.isfinite() for value in parts.values())


def test_a_batch_without_predictions_has_loss_zero_and_no_curve() -> None:
    logits = torch.zeros(0, 40, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    total, parts = token_losses(logits, HEAD, nothing, nothing, ObjectivesConfig())
    total.backward()
    assert total == 0 and not set(OBJECTIVES) & set(parts)
    some, parts = token_losses(
        torch.zeros(2, 40), HEAD, torch.tensor([1, 2]), torch.tensor([3, 3]), ObjectivesConfig()
    )
    assert set(OBJECTIVES) & set(parts) == {"reconstruct"} and some.isfinite()


def test_the_curves_have_gradient_norms_and_masked_losses_by_unknown_share(
    tiny_model: Make, sentences: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    objectives = torch.tensor([0, 0, 2, 2, 2, 4])
    hidden, targets = torch.randn(6, 40).requires_grad_(), torch.randint(40, (6,))
    config = ObjectivesConfig(z_loss_weight=0.0)
    total, parts = token_losses(hidden, HEAD, targets, objectives, config)
    (gradient,) = grad(total, hidden)
    assert {name for name in parts if name.startswith("grad_norm/")} == {
        "grad_norm/caption", "grad_norm/image", "grad_norm/answer"
    }  # fmt: skip
    assert parts["grad_norm/image"].item() == pytest.approx(gradient[2:5].norm().item(), rel=1e-4)

    model = tiny_model(**only("reconstruct"))
    vocabulary, codes = model.vocabulary, np.arange(16)
    masks = [(codes < count, codes >= unknown) for count, unknown in ((2, 3), (8, 8), (5, 16))]
    draws = [draw(vocabulary, [5], codes, *both) for both in masks]
    ids = torch.arange(3)
    describes = [describe(vocabulary, codes, [[5]])] * 3
    _, parts = model.network(batch_of_sequences(model, describes + draws, ids, ids))
    bins = {name: value for name, value in parts.items() if name.startswith("reconstruct/")}
    assert [*bins] == ["reconstruct/0.00-0.25", "reconstruct/0.25-0.50", "reconstruct/0.75-1.00"]
    mean = sum(n * value for n, value in zip((2, 8, 5), bins.values(), strict=True)) / 15
    assert parts["reconstruct"].item() == pytest.approx(mean.item(), rel=1e-5)


def test_z_loss_pulls_log_z_to_zero() -> None:
    logits = torch.full((4, 16), 5.0, requires_grad=True)
    config = ObjectivesConfig(weights=dict.fromkeys(OBJECTIVES, 0.0), z_loss_weight=1.0)
    zeros = torch.zeros(4, dtype=torch.int64)
    total, _ = token_losses(logits, torch.eye(16), zeros, zeros, config)
    assert total.item() == pytest.approx((5 + math.log(16)) ** 2, rel=1e-5)
    total.backward()
    assert logits.grad is not None and (logits.grad > 0).all()


# --- ranks ----------------------------------------------------------------------------------------


def train_rank(rank: int, folder: Path) -> None:
    """One of two ranks of DistributedDataParallel. Writes its losses and gradients to a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = []
    for form in (*FORMS, "experts"):
        network = load(folder / form).network.train()
        replica = DistributedDataParallel(network)  # named: it has to live until backward()
        batch = torch.load(folder / form / f"batch{rank}", weights_only=False)
        total, parts = replica(batch)
        total.backward()
        gradients = {name: w.grad for name, w in network.named_parameters() if w.grad is not None}
        results.append(({name: value.item() for name, value in parts.items()}, gradients))
    dist.destroy_process_group()
    torch.save(results, folder / f"result{rank}")


def handmade_batch(model: Model, numbers: range, texts: tuple[str, ...]) -> TrainingBatch:
    """0, 1, 2 are masked, 3, 4, 5 next-token. 4 has no condition. 1 and 5 are the same image."""
    vocabulary = model.vocabulary
    codes = [sample.codes[0] for sample in samples_of([{}] * 6)]
    describes, draws = [], []
    for i in numbers:
        text = model.text_tokenizer.encode(texts[i % len(texts)])
        describes.append(describe(vocabulary, codes[i], [text]))
        masked = np.arange(16) % (i + 2) == 0 if i < 3 else None
        draws.append(draw(vocabulary, None if i == 4 else text, codes[i], masked))
    chosen = torch.tensor(numbers)
    image_ids = torch.tensor([0, 1, 2, 3, 4, 1])[chosen]
    text_ids = torch.tensor([0, 1, 2, 3, -1, 1])[chosen]
    return batch_of_sequences(model, describes + draws, image_ids, text_ids, row_length=96)


def test_two_ranks_are_one(
    tiny_model: Make,
    sentences: tuple[str, ...],
    tmp_path: Path,
) -> None:
    """Loss and gradients of DistributedDataParallel are those of one process with all the pairs."""
    expected = []
    for form in (*FORMS, "experts"):
        experts = ExpertsConfig(4, router_aux_loss_coef=0.5) if form == "experts" else None
        contrast = "siglip" if experts else form
        model = tiny_model(noise=0.05, alignment_form=contrast, z_loss_weight=0.01, experts=experts)
        model.save(tmp_path / form)
        for rank in range(2):
            numbers = range(3 * rank, 3 * rank + 3)
            torch.save(handmade_batch(model, numbers, sentences), tmp_path / form / f"batch{rank}")
        network = model.network
        total, parts = network(handmade_batch(model, range(6), sentences))
        total.backward()
        expected.append(
            (parts, {n: w.grad for n, w in network.named_parameters() if w.requires_grad})
        )
    processes = multiprocessing.get_context("forkserver")
    ranks = [processes.Process(target=train_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"result{rank}") for rank in range(2))
    for (parts, gradients), *ranks in zip(expected, first, second, strict=True):
        routing = {name for name in parts if name.startswith(("router_", "experts/"))}
        for name in (*(set(OBJECTIVES) & set(parts)), "alignment_accuracy", "total", *routing):
            mean = (ranks[0][0][name] + ranks[1][0][name]) / 2
            assert mean == pytest.approx(parts[name].item(), rel=1e-5), name
        for _, theirs in ranks:
            assert theirs.keys() == {n for n, gradient in gradients.items() if gradient is not None}
            for name, gradient in theirs.items():
                error = (gradient - gradients[name]).abs().max()
                assert error < 1e-5 * gradients[name].abs().max().clamp(min=1), name
