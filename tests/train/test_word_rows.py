"""Codes start near the words that they occur with, and are not output."""

import io
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from multimodal.api import Model
from multimodal.cli import main
from multimodal.data.samples import CODES, Sample
from multimodal.data.shards import Shards
from multimodal.model.sequences import OBJECTIVES
from multimodal.model.training_batch import TrainingSample
from multimodal.scenes.dataset import write_scenes
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.tokenizers.text import TextTokenizer
from multimodal.train import word_rows as word_rows_module
from multimodal.train.word_rows import (
    LONGEST,
    captioned,
    silent_offset,
    special_rows,
    start_rows,
    word_rows,
)
from tests.model.test_transfer import images, qwen  # noqa: F401 (fixtures)

TEXTS, KINDS, WIDTH = 40, 6, 8


def counted(seed: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images of four codes. Code k goes with word 10 + k, but 4 with any, and 5 is in none."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        codes = rng.choice(5, size=2, replace=False)
        words = [1, 2, *(10 + k for k in codes if k < 4), *rng.integers(20, TEXTS, 2)]
        pairs.append((torch.tensor([*codes, *codes]), torch.tensor(words)))
    return pairs


def by_hand(
    table: np.ndarray, texts: int, codes: int, pairs: list[tuple[torch.Tensor, torch.Tensor]]
) -> np.ndarray:
    """The formula of the module, one code and one word at a time."""
    offsets = table[:texts] - table[:texts].mean(0)
    rows, known = np.zeros((codes, table.shape[1])), np.zeros(codes)
    for code in range(codes):
        with_code = [set(ids.tolist()) for image, ids in pairs if code in image]
        weights = {}
        for word in range(texts):
            both = sum(word in words for words in with_code)
            everywhere = sum(word in ids for _, ids in pairs)
            if both > 1:
                share = (both - both**0.5) / len(with_code)
                weights[word] = share * max(0.0, np.log(share * len(pairs) / everywhere))
        if sum(weights.values()) > 0:
            known[code] = len(with_code)
            rows[code] = sum(w * offsets[n] for n, w in weights.items()) / sum(weights.values())
    rows[known > 0] -= known @ rows / known.sum()
    lengths = np.linalg.norm(rows[known > 0], axis=1).mean()
    usual = np.linalg.norm(offsets, axis=1).mean()
    rows *= usual / lengths
    return np.array([row / max(1, np.linalg.norm(row) / (LONGEST * usual)) for row in rows])


def test_a_code_starts_near_its_word() -> None:
    table = torch.randn(TEXTS + 12, WIDTH, generator=torch.Generator().manual_seed(1))
    pairs = counted(0, 1_500)
    rows = word_rows(table, TEXTS, KINDS, pairs)
    expected = by_hand(table.double().numpy(), TEXTS, KINDS, pairs)
    assert np.allclose(rows.numpy(), expected, atol=1e-5)
    offsets = table[:TEXTS] - table[:TEXTS].mean(0)
    offsets -= offsets[10:14].mean(0)  # what the words of all codes have in common
    nearest = torch.cosine_similarity(rows[:4, None], offsets[None, 10:14], dim=-1).argmax(1)
    assert nearest.tolist() == [0, 1, 2, 3]
    assert not rows[5].any()


def test_a_code_that_was_seen_twice_is_no_longer_than_others() -> None:
    """It goes with one word for certain, where others go with many: it would be output itself."""
    texts, rng = 400, np.random.default_rng(0)
    table = torch.randn(texts, WIDTH, generator=torch.Generator().manual_seed(1))
    often = [  # each of five codes with many words
        (torch.tensor([code]), torch.from_numpy(rng.choice(np.arange(20, texts), 200, False)))
        for code in rng.integers(0, 5, 600).tolist()
    ]
    rows = word_rows(table, texts, KINDS, [*often, *[(torch.tensor([5]), torch.tensor([11]))] * 2])
    words = table - table.mean(0)
    lengths = rows.norm(dim=1) / words.norm(dim=1).mean()
    assert lengths[5] == pytest.approx(LONGEST) and (lengths[:5] < 1).all()
    assert torch.cosine_similarity(rows[5], words[11], dim=0) > 0.9


@pytest.mark.parametrize("pairs", [[], [(torch.tensor([0, 1]), torch.tensor([3]))]])
def test_nothing_is_known_of_codes_seen_never_or_once(
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    assert not word_rows(torch.randn(TEXTS, WIDTH), TEXTS, KINDS, pairs).any()


def test_an_offset_lowers_the_logits_of_all_states_by_one() -> None:
    states = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(0)) + 5
    lowered = states @ silent_offset(states)
    assert lowered.mean() == pytest.approx(-1, abs=0.05) and lowered.std() < 0.2


def test_a_language_model_starts_with_words_for_codes(
    qwen: Path,  # noqa: F811
    images: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_scenes(tmp_path / "scenes", 60, 0, 32)
    encode = ["tokenizer", "encode", str(tmp_path / "scenes"), str(tmp_path / "codes")]
    assert main([*encode, "--tokenizer", images]) == 0
    text = TextTokenizer.load(qwen)
    model = Model.new(str(qwen), text, load_image_tokenizer(images)).eval()
    transformer, vocabulary = model.network.transformer, model.vocabulary
    tied = transformer.head is transformer.embed_tokens.weight
    before = transformer.embed_tokens.weight.detach().clone()
    start_rows(model, [Shards(tmp_path / "scenes", "train")], 256)
    assert torch.equal(transformer.embed_tokens.weight, before)  # images without codes say nothing
    shards = Shards(tmp_path / "codes", "train")
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="row_length=8"):
        patched.setattr(word_rows_module, "MIN_ROW", 8)
        start_rows(model, [shards], 8)
    start_rows(model, [shards], 256)
    after = transformer.embed_tokens.weight.detach()
    codes = slice(vocabulary.image_start, vocabulary.image_end)
    assert torch.equal(after[: vocabulary.text_size], before[: vocabulary.text_size])
    assert torch.equal(after[vocabulary.image_end :], before[vocabulary.image_end :])
    assert torch.equal(after[vocabulary.eos], before[text.vocabulary()["<|im_end|>"]])
    # Codes that go with words differ from those that are in no image.
    every = torch.cat([torch.from_numpy(sample.codes).flatten() for sample in shards])
    counts = torch.bincount(every, minlength=vocabulary.codebook_size)
    moved, never = (after - before)[codes], (counts == 0).nonzero().flatten()
    lengths = (moved - moved[never[0]]).norm(dim=1)
    assert lengths[never].max() < 1e-5 and lengths[counts > 0].max() > 0.1
    # As outputs they are less likely than before, where the table is both.
    ids = torch.tensor([text.encode("two dogs run on the beach")])
    states = hidden(model, ids)
    change = (states @ moved.T).mean()
    assert change < -1 if tied else torch.equal(moved[never], torch.zeros_like(moved[never]))


def test_codes_are_lowered_where_texts_are_predicted_and_nowhere_else(
    tiny_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lowered = tiny_model(noise=0.1), list[torch.Tensor]()
    write_scenes(tmp_path / "scenes", 20, 0, 32)
    model.save(tmp_path / "model")
    encode = ["tokenizer", "encode", str(tmp_path / "scenes"), str(tmp_path / "codes")]
    assert main([*encode, "--tokenizer", str(tmp_path / "model")]) == 0
    shards = Shards(tmp_path / "codes", "train")

    def noted(states: torch.Tensor) -> torch.Tensor:
        lowered.append(states)
        return silent_offset(states)

    monkeypatch.setattr(word_rows_module, "silent_offset", noted)
    some = [TrainingSample(s.key, s.record, s.codes[:1], 0) for s in islice(shards, 16)]
    packed = model.batch_builder(256).build(some).packed
    states, objectives = model.network.hidden(packed).flatten(0, 1), packed.objectives.flatten()
    expected = [
        state
        for state, objective in zip(states, objectives.tolist(), strict=True)
        if objective >= 0 and OBJECTIVES[objective] in ("caption", "text", "answer")
    ]
    assert 0 < len(expected) < (objectives >= 0).sum()
    start_rows(model, [shards], 256)
    torch.testing.assert_close(lowered[0], torch.stack(expected).detach())
    monkeypatch.setattr(
        word_rows_module, "predicting_texts", lambda packed: torch.zeros(0, dtype=torch.int64)
    )
    start_rows(model, [shards], 256)
    assert len(lowered) == 1 and model.network.transformer.embed_tokens.weight.isfinite().all()


def hidden(model: Model, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1])[None]
    causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with torch.no_grad():
        return model.network.transformer(ids, positions, causal)[0]


def test_specials_start_like_what_the_language_model_has(qwen: Path) -> None:  # noqa: F811
    text = TextTokenizer.load(qwen)
    table = torch.randn(len(text) + 10, WIDTH)
    rows = special_rows(table, text)
    known = text.vocabulary()
    assert torch.equal(rows["<eos>"], table[known["<|im_end|>"]])
    assert torch.equal(rows["<eoi>"], table[text.encode(":")[0]])
    assert "<bos>" not in rows and "<mask>" not in rows  # it has nothing that these are like


def test_unusable_samples_are_left_out() -> None:
    def sample(codes: np.ndarray, record: bytes) -> Sample:
        buffer = io.BytesIO()
        np.save(buffer, codes)
        return Sample("key", {CODES: buffer.getvalue(), "json": record})

    codes = np.zeros((2, 4), np.uint16)
    good = sample(codes, b'{"captions": ["a dog"]}')
    bad = [
        sample(codes, b'{"captions": '),
        sample(codes, b'{"captions": []}'),
        sample(codes[:, :3], b'{"captions": ["a dog"]}'),
        sample(codes[0], b'{"captions": ["a dog"]}'),
        Sample("key", {"json": b'{"captions": ["a dog"]}'}),
        Sample("key", {CODES: b"no array", "json": b'{"captions": ["a dog"]}'}),
    ]

    class Folder(list[Sample]):
        encoding: ClassVar = {}

    assert list(captioned([Folder([*bad, good])], 4)) == [good]  # type: ignore[list-item]
