"""A model whose images have two levels: it reads meaning, and draws meaning, then detail."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import multimodal
from multimodal import Model
from multimodal.data.shards import Shards
from multimodal.eval.evaluator import Subject, evaluate
from multimodal.eval.tasks import few_shot
from multimodal.eval.tasks.likelihood import Likelihood
from multimodal.inference.codec import decode_images, encode_images, encode_to_read, read_images
from multimodal.inference.drawing import draw_codes
from multimodal.inference.editing import box_mask
from multimodal.inference.likelihoods import text_likelihoods
from multimodal.inference.text import caption_codes
from multimodal.model.objectives import ObjectivesConfig
from multimodal.model.sequences import OBJECTIVES, document, draw, pack
from multimodal.model.training_batch import TrainingSample
from multimodal.options import DrawOptions, EditOptions
from multimodal.scenes.dataset import write_scenes
from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
from multimodal.tokenizers.image import ImageTokenizer
from multimodal.tokenizers.meaning import Meaning, MeaningConfig, fit_codebooks
from multimodal.tokenizers.weights import resize
from multimodal.train.joint import JointModule

VIT = {"name": "vit", "dim": 32, "encoder_depth": 0, "decoder_depth": 1, "heads": 2}
MEANING, DETAIL = slice(0, 8), slice(8, 24)


def pictures(count: int) -> Tensor:
    noise = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return torch.nn.functional.interpolate(noise, 64, mode="bilinear").clamp(-1, 1)


@pytest.fixture(scope="module")
def levels() -> tuple[Meaning, VQTokenizer]:
    torch.manual_seed(0)
    config = MeaningConfig("timm:test_efficientnet", (-1,), 64, "squash", 2, 2, 8, 16)
    meaning = Meaning(config)
    fit_codebooks(meaning, meaning.features(pictures(60)).flatten(0, 2), rounds=5)
    quantizer = {"name": "fsq", "levels": [4, 4, 4]}
    detail = VQTokenizer(VQTokenizerConfig(32, "squash", 8, VIT, quantizer)).train()
    with torch.no_grad():
        for _ in range(10):
            detail(pictures(16)[:, :, ::2, ::2])
    return meaning, detail.eval()


def make(image_tokenizer: ImageTokenizer, like: Model, draws: Sequence[str] = ()) -> Model:
    torch.manual_seed(0)
    objectives = ObjectivesConfig(alignment_dim=32)
    model = Model.new("tiny", like.text_tokenizer, image_tokenizer, objectives, draws=draws)
    with torch.no_grad():
        for weight in model.network.transformer.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return model.eval()


@pytest.fixture(scope="module")
def model(levels: tuple[Meaning, VQTokenizer], tiny_model: Callable[..., Model]) -> Model:
    return make(ImageTokenizer(*levels), tiny_model())


def in_their_ranges(model: Model, codes: Tensor) -> bool:
    layout = model.config.layout
    return bool(((codes >= layout.first) & (codes <= layout.last)).all())


def test_what_is_described_and_embedded_is_meaning_alone(model: Model) -> None:
    assert model.config.reads == ("meaning",)
    codes = encode_images(model, pictures(3))
    assert torch.equal(encode_to_read(model, pictures(3)), codes[:, MEANING])
    changed = codes.clone()
    changed[:, DETAIL] = torch.randint(16, 80, (3, 16))
    captions = caption_codes(model, codes)
    assert caption_codes(model, changed) == caption_codes(model, codes[:, MEANING]) == captions
    other = codes.roll(1, 0)
    assert caption_codes(model, other) != captions


@pytest.mark.parametrize("method", ["causal", "masked"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_each_drawn_code_is_of_its_place(model: Model, method: str, guidance_scale: float) -> None:
    options = DrawOptions(
        method=method,  # type: ignore[arg-type]
        temperature=4.0,
        guidance_scale=guidance_scale,
        steps=3,
    )
    codes = draw_codes(model, ["a red bus", "two dogs"], options)
    assert codes.shape == (2, 24) and in_their_ranges(model, codes)
    assert len(set(codes[0, MEANING].tolist())) > 2 and len(set(codes[0, DETAIL].tolist())) > 4
    # The same in a batch of its own.
    alone = draw_codes(model, ["two dogs"], options, numbers=[1])
    assert torch.equal(alone[0], codes[1])


def test_detail_is_drawn_as_it_was_learned(model: Model) -> None:
    """One step of masked drawing is the argmax of the forward pass of training."""
    known = torch.full((1, 24), -1)
    known[:, MEANING] = encode_images(model, pictures(1))[:, MEANING]
    known[:, 8:11] = torch.tensor([[20, 30, 40]])
    options = DrawOptions(method="masked", steps=1, temperature=0, guidance_scale=1)
    drawn = draw_codes(model, ["a red bus"], options, known=known)
    assert torch.equal(drawn[:, :11], known[:, :11])
    ids = model.text_tokenizer.encode("a red bus")
    masked = (known[0, DETAIL] == -1).numpy()
    whole = torch.where(known < 0, 16, known)[0].numpy()  # what stands under a mask is not read
    sequence = draw(model.vocabulary, ids, whole, masked, level=DETAIL)
    packed = pack([sequence], len(sequence), model.vocabulary.pad)
    with torch.no_grad():
        logits = model.network.transformer.logits(model.network.hidden(packed))[0]
    places = packed.objectives[0] == OBJECTIVES.index("reconstruct")
    start = model.vocabulary.image_start
    expected = logits[places][:, start + 16 : start + 80].argmax(-1) + 16
    assert torch.equal(drawn[0, 11:], expected)


def test_known_codes_of_both_levels_stay(model: Model) -> None:
    codes = encode_images(model, pictures(2))
    known = codes.clone()
    known[:, [1, 2, 9, 20]] = -1
    options = DrawOptions(method="masked", steps=2, temperature=2)
    drawn = draw_codes(model, ["one", "two"], options, known=known)
    assert torch.equal(drawn[known >= 0], codes[known >= 0]) and in_their_ranges(model, drawn)


def test_an_edit_changes_pixels_under_the_mask_alone(model: Model) -> None:
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    mask = box_mask((64, 64), (40, 40, 64, 64))
    edited = model.edit(image, mask, "a red bus", **vars(EditOptions(temperature=2)))
    different = (np.asarray(image) != np.asarray(edited)).any(-1)
    assert different[40:, 40:].any() and not different[:40].any() and not different[:, :40].any()


def test_an_image_that_opens_a_prompt_is_read_and_later_ones_are_whole(model: Model) -> None:
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    first = len(list(multimodal_prompt(model, [image, "it shows"])))
    later = len(list(multimodal_prompt(model, ["it shows", image])))
    assert later - first == 24 - 8
    parts = model.generate(["a red bus"], output="image", temperature=3, seed=1)
    assert isinstance(parts, Image.Image) or isinstance(parts[0], Image.Image)


def multimodal_prompt(model: Model, parts: list[object]) -> list[int]:
    from multimodal.inference.mixed import prompt_ids

    return prompt_ids(model, parts)  # type: ignore[arg-type]


def test_documents_follow_the_same_rule(model: Model) -> None:
    codes = encode_images(model, pictures(1))[0].numpy()
    text = model.text_tokenizer.encode("it shows")
    builder = model.batch_builder(160)
    opening = document(model.vocabulary, [codes, text], None, builder.read)[0]
    later = document(model.vocabulary, [text, codes], None, builder.read)[0]
    assert len(later) - len(opening) == 24 - 8
    image = opening.ids[2:10] - model.vocabulary.image_start
    assert image.tolist() == codes[:8].tolist()


def test_both_levels_are_learned_masked_and_in_order(model: Model) -> None:
    codes = encode_images(model, pictures(1)).numpy()
    builder = model.batch_builder(160)
    blocks = set()
    for seed in range(60):
        record = {"captions": ["a red bus"]}
        drawing = builder.pair(TrainingSample("key", record, codes, seed)).draw
        block = drawing.ids[drawing.blocks > 0]
        targets = drawing.targets[drawing.objectives == OBJECTIVES.index("reconstruct")]
        numbers = {int(t) - model.vocabulary.image_start for t in targets}
        if numbers:
            blocks.add("meaning" if max(numbers) < 16 else "detail")
            assert max(numbers) < 16 or min(numbers) >= 16
            before = drawing.ids[: len(drawing) - len(block)]
            # Before a block of detail stands all of meaning.
            assert (before >= model.vocabulary.image_start).sum() == (8 if max(numbers) > 15 else 0)
    assert blocks == {"meaning", "detail"}


def test_a_model_that_reads_learns_to_draw_without_forgetting(
    model: Model, levels: tuple[Meaning, VQTokenizer], tmp_path: Path
) -> None:
    reader = make(ImageTokenizer(levels[0]), model)
    codes = encode_images(reader, pictures(2))
    with torch.no_grad():
        captions = caption_codes(reader, codes)
    model.network.take_weights(reader.network)
    assert caption_codes(model, codes) == captions
    with pytest.raises(ValueError, match="its levels are not those of this run"):
        reader.network.take_weights(model.network)
    model.save(tmp_path)
    again = multimodal.load(tmp_path)
    assert again.fingerprint == model.fingerprint
    image = Image.effect_noise((80, 60), 90).convert("RGB")
    assert torch.equal(
        encode_images(again, read_images(again, [image])),
        encode_images(model, read_images(model, [image])),
    )
    assert again.caption([image]) == model.caption([image])


def test_a_model_that_draws_learns_to_read_without_forgetting(
    model: Model, levels: tuple[Meaning, VQTokenizer]
) -> None:
    """The level that comes in goes before the one that was there, whose ids move."""
    before = make(ImageTokenizer(detail=levels[1]), model)
    grown = make(ImageTokenizer(*levels), model, ["detail"])
    own = grown.network.transformer.state_dict()["embed_tokens.weight"].clone()
    grown.network.take_weights(before.network)
    options = DrawOptions(method="causal", temperature=0, guidance_scale=1)
    drawn, expected = (draw_codes(each, ["a red bus"], options) for each in (grown, before))
    assert torch.equal(drawn[:, DETAIL] - 16, expected)
    table = grown.network.transformer.state_dict()["embed_tokens.weight"]
    start = grown.vocabulary.image_start
    assert torch.equal(table[start : start + 16], own[start : start + 16])
    assert not torch.equal(table[:start], own[:start])


# --- a model that draws detail alone --------------------------------------------------------------


@pytest.fixture(scope="module")
def drawer(levels: tuple[Meaning, VQTokenizer], tiny_model: Callable[..., Model]) -> Model:
    """It reads meaning and draws detail, beside each other."""
    return make(ImageTokenizer(*levels), tiny_model(), ["detail"])


@pytest.mark.parametrize("method", ["causal", "masked"])
def test_a_level_that_is_not_drawn_is_in_no_drawing(drawer: Model, method: str) -> None:
    options = DrawOptions(method=method, steps=3, temperature=4.0)  # type: ignore[arg-type]
    steps: list[Tensor] = []
    codes = draw_codes(
        drawer, ["a red bus"], options, on_step=lambda numbers, some: steps.append(some)
    )
    assert (codes[:, MEANING] == -1).all() and in_their_ranges_of_detail(codes)
    assert steps and all((some[:, MEANING] == -1).all() for some in steps)
    # It is what a model of this one level would draw, whose ids are the same.
    layout, start = drawer.config.layout, drawer.vocabulary.image_start
    prompt = [drawer.vocabulary.bos, *drawer.text_tokenizer.encode("a red bus")]
    ids = torch.tensor([[*prompt, drawer.vocabulary.boi, *(start + codes[0, DETAIL]).tolist()]])
    greedy = DrawOptions(method="causal", temperature=0, guidance_scale=1)
    ids = ids[:, : len(prompt) + 1]
    with torch.no_grad():
        for _ in range(16):
            positions = torch.arange(ids.shape[1])[None]
            mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            logits = drawer.network.transformer.logits(
                drawer.network.transformer(ids, positions, mask)
            )
            numbers = layout.numbers("detail")
            token = logits[:, -1, start + numbers.start : start + numbers.stop].argmax(-1)
            ids = torch.cat([ids, token[:, None] + start + numbers.start], 1)
    expected = ids[0, len(prompt) + 1 :] - start
    assert torch.equal(draw_codes(drawer, ["a red bus"], greedy)[0, DETAIL], expected)


def in_their_ranges_of_detail(codes: Tensor) -> bool:
    return bool(((codes[:, DETAIL] >= 16) & (codes[:, DETAIL] < 80)).all())


def test_what_is_drawn_becomes_pixels_and_the_best_is_found_by_reading_them(drawer: Model) -> None:
    few = drawer.draw("a red bus", seed=1)[0]
    assert few.size == (32, 32)
    options = DrawOptions(candidates=3, seed=1)
    best = draw_codes(drawer, ["a red bus"], options)
    each = draw_codes(drawer, ["a red bus"] * 3, DrawOptions(seed=1), numbers=[0, 1, 2])
    pixels = resize(decode_images(drawer, each), drawer.image_tokenizer.image_size)
    read = encode_to_read(drawer, pixels)
    likelihoods = text_likelihoods(drawer, read, ["a red bus"] * 3)
    assert torch.equal(best[0], each[int(likelihoods.argmax())])


def test_it_edits_and_reads_a_document_as_it_draws(drawer: Model) -> None:
    image = Image.fromarray(np.full((64, 64, 3), 200, np.uint8))
    mask = box_mask(image.size, (0, 0, 32, 64))
    edited = drawer.edit(image, mask, "two dogs", steps=2, temperature=4.0)
    before, after = np.asarray(image), np.asarray(edited)
    assert (before[:, 32:] == after[:, 32:]).all() and (before[:, :32] != after[:, :32]).any()
    codes = np.arange(24)
    builder = drawer.batch_builder(64)
    sample = TrainingSample("k", {}, np.stack([codes, codes]), 0, (None, "a bus", None))
    (sequence,) = builder.document(sample)
    v = drawer.vocabulary
    images = sequence.ids[(sequence.ids >= v.image_start) & (sequence.ids < v.image_end)]
    assert (images - v.image_start).tolist() == [*range(8), *range(8, 24)]


def test_training_draws_detail_right_after_the_text(drawer: Model) -> None:
    record, codes = {"captions": ["a red bus"]}, np.arange(24)[None]
    v = drawer.vocabulary
    for share in ("next_token_share", "reconstruct_share"):
        objectives = ObjectivesConfig(
            **{"next_token_share": 0.0, "reconstruct_share": 0.0, share: 1.0}
        )
        builder = replace(drawer.batch_builder(64), objectives=objectives)
        for seed in range(5):
            ids = builder.pair(TrainingSample("k", record, codes, seed)).draw.ids
            places = ids[(ids >= v.image_start) & (ids < v.image_end)] - v.image_start
            assert (places >= 8).all(), "no code of meaning"
            if share == "next_token_share":
                assert places.tolist() == list(range(8, 24))


def test_a_saved_model_draws_the_same_levels(drawer: Model, tmp_path: Path) -> None:
    drawer.save(tmp_path / "model")
    loaded = multimodal.load(tmp_path / "model")
    assert loaded.config.draws == ("detail",)
    codes = draw_codes(loaded, ["two dogs"], DrawOptions(seed=3))
    assert torch.equal(codes, draw_codes(drawer, ["two dogs"], DrawOptions(seed=3)))


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        (["meaning"], "without 'detail' there are no pixels"),
        (["detail", "detail"], "each level once"),
        (["pixels"], "level 'pixels': this image tokenizer has meaning, detail"),
    ],
)
def test_levels_that_cannot_be_drawn_are_refused(
    levels: tuple[Meaning, VQTokenizer],
    tiny_model: Callable[..., Model],
    draws: list[str],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        make(ImageTokenizer(*levels), tiny_model(), draws)


def test_a_decoder_that_reads_meaning_needs_it_drawn(
    levels: tuple[Meaning, VQTokenizer], tiny_model: Callable[..., Model]
) -> None:
    meaning, detail = levels
    config = replace(
        detail.config,
        meaning_channels=meaning.config.vector_channels,
        meaning_fingerprint=meaning.fingerprint,
    )
    reader = VQTokenizer(config)
    reader.start_from(detail)
    with pytest.raises(ValueError, match="both have to be drawn"):
        make(ImageTokenizer(meaning, reader), tiny_model(), ["detail"])


def test_the_likelihood_of_a_drawing_is_of_what_is_drawn(drawer: Model, tmp_path: Path) -> None:
    write_scenes(tmp_path, 20, 0, 32)
    subject = Subject(drawer, list(Shards(tmp_path, "train"))[:6])
    before = evaluate(Likelihood(), subject)
    changed = subject.codes.clone()
    changed[:, MEANING] = 15 - changed[:, MEANING]
    subject.__dict__["codes"] = changed
    after = evaluate(Likelihood(), subject)
    assert before["image_nats_per_code"] == after["image_nats_per_code"]
    assert before["caption_bits_per_byte"] != after["caption_bits_per_byte"]


def test_few_shot_prompts_read_meaning_alone(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scenes(tmp_path, 20, 0, 32)
    subject = Subject(model, list(Shards(tmp_path, "train"))[:2])
    v, prompts = model.vocabulary, list[list[int]]()

    def record(_: Model, batch: list[list[int]]) -> list[list[int]]:
        prompts.extend(batch)
        return [model.text_tokenizer.encode("two dogs") for _ in batch]

    monkeypatch.setattr(few_shot, "generate_ids", record)
    evaluate(few_shot.FewShot(), subject)
    images = [
        [v.boi, *codes, v.eoi] for codes in (subject.codes[:, MEANING] + v.image_start).tolist()
    ]
    assert prompts[:2] == [[v.bos, *image] for image in images], "without an example"
    assert [prompt[-10:] for prompt in prompts[2:]] == images, "after one"


def test_a_run_with_the_image_tokenizer_of_a_model_reads_and_draws_what_that_does(
    drawer: Model, tmp_path: Path
) -> None:
    drawer.save(tmp_path / "model")
    text = str(tmp_path / "model")
    for image_tokenizer in (text, f"{text}/image_tokenizer"):
        module = JointModule(text, image_tokenizer, "tiny")
        assert (module.model.config.reads, module.model.config.draws) == (("meaning",), ("detail",))
    both = JointModule(text, text, "tiny", reads=["meaning", "detail"], draws=["meaning", "detail"])
    assert both.model.config.reads == both.model.config.draws == ("meaning", "detail")
    drawer.image_tokenizer.save(tmp_path / "alone")
    alone = JointModule(text, str(tmp_path / "alone"), "tiny")
    assert alone.model.config.draws == ("meaning", "detail")
