"""Released unified models in: the logits, texts, codes and images of transformers' own classes."""

import random
from collections.abc import Callable

import pytest
import torch

from multimodal.inference.text import generate_ids
from multimodal.options import TextOptions
from tests.released.theirs import CODES, Pair, chameleon, images

PAIRS: dict[str, Callable[..., Pair]] = {
    "chameleon": chameleon,
    "chameleon 34b": lambda folder, sentences: chameleon(folder, sentences, swin=True),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
    sentences: tuple[str, ...],
) -> Pair:  # fmt: skip
    return PAIRS[request.param](tmp_path_factory.mktemp("released"), sentences)


def prompts(pair: Pair, count: int) -> list[list[int]]:
    """<bos> <boi> 16 codes <eoi> and some text, by our ids."""
    rng, ids = random.Random(0), pair.ours.vocabulary
    return [
        [
            ids.bos, ids.boi,
            *(ids.image_start + rng.randrange(CODES) for _ in range(16)),
            ids.eoi, *(rng.randrange(ids.text_size) for _ in range(rng.randint(3, 12))),
        ]
        for _ in range(count)
    ]  # fmt: skip


def test_each_of_their_ids_is_one_of_ours(pair: Pair) -> None:
    ours = pair.ours.vocabulary
    theirs = [row for row in pair.rows.tolist() if row >= 0]
    twice = [pair.vocabulary[pair.special["<null>"]]]  # the padding is the dropped condition, too
    assert sorted(theirs) == sorted([*pair.vocabulary.values(), *twice])
    assert (pair.rows < 0).sum() == 1 + ours.size - ours.image_end, "<mask> and what fills up"


def test_logits_are_theirs(pair: Pair) -> None:
    length = min(map(len, prompts(pair, 8)))
    ids = torch.tensor([prompt[:length] for prompt in prompts(pair, 8)])
    logits, expected = pair.logits(ids), pair.their_logits(ids)
    shared = pair.rows >= 0
    assert expected[..., shared].std() > 0.5, "logits that differ enough to compare"
    assert (logits - expected)[..., shared].abs().max() < 1e-4


def test_greedy_texts_are_theirs(pair: Pair) -> None:
    """Prompts read together, and token by token with a cache, as captions are written."""
    given = prompts(pair, 12)
    texts = generate_ids(pair.ours, given, TextOptions(max_tokens=8))
    assert texts == [pair.greedy(prompt, 8) for prompt in given]
    assert len({tuple(text) for text in texts}) > 6


def test_texts_have_their_tokens(pair: Pair, sentences: tuple[str, ...]) -> None:
    ours = pair.ours.text_tokenizer
    for text in (*sentences, "", " \n\t", "Ünïcödé 🐈 猫", "don't  stop", "\x00"):
        expected = pair.tokenizer.encode(text, add_special_tokens=False).ids
        assert pair.rows[ours.encode(text)].tolist() == expected
        assert ours.decode(ours.encode(text)) == text
    for token in pair.special.values():  # a control token in a text is a text
        ids = ours.encode(token)
        assert len(ids) > 1 and max(ids) < len(ours) and ours.decode(ids) == token


def test_images_have_their_codes(pair: Pair) -> None:
    codes = pair.ours.image_tokenizer.encode(images())
    assert torch.equal(codes, pair.their_codes(images()))
    assert len(codes.unique()) > 10


# --- what is done with them -----------------------------------------------------------------------


def test_captions_drawings_and_a_step_of_fine_tuning(pair: Pair) -> None:
    """The rules of this toolkit: a caption of any image, a drawing that is codes alone."""
    model = pair.ours
    pictures = [to_image(image) for image in images(2)]
    captions = model.caption(pictures, max_tokens=6)
    assert len(captions) == 2 and any(captions)
    codes = draw_codes(model, ["a red bus"], DrawOptions(seed=1, guidance_scale=2.0))
    assert codes.shape == (1, model.codes_per_image)
    assert 0 <= int(codes.min()) and int(codes.max()) < CODES
    scores = dict(evaluate_captions(model))
    assert 0 <= scores["CIDEr"]

    batch = batch_builder(model).build(samples_of([{"captions": [text]} for text in captions]))
    network = copy.deepcopy(model.network).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    losses = []
    for _ in range(3):
        loss, _ = network(batch)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
