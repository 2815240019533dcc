"""Released unified models in: the logits, texts, codes and images of transformers' own classes."""

import copy
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from multimodal.api import load
from multimodal.cli import main
from multimodal.data.images import to_image
from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Subject, evaluate
from multimodal.eval.tasks.likelihood import Likelihood
from multimodal.inference.drawing import draw_codes
from multimodal.inference.text import generate_ids
from multimodal.model.training_batch import TrainingSample
from multimodal.options import DrawOptions, TextOptions
from tests.released.theirs import CODES, Pair, chameleon, complete_vqgan, emu3, images

PAIRS: dict[str, Callable[..., Pair]] = {
    "chameleon": chameleon,
    "emu3": emu3,
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


def test_codes_have_their_images_where_a_decoder_was_released(pair: Pair) -> None:
    tokenizer = pair.ours.image_tokenizer
    codes = torch.randint(CODES, (2, 64), generator=torch.Generator().manual_seed(0))
    theirs = pair.their_images(codes)
    assert tokenizer.can_draw == (theirs is not None)
    if theirs is None:
        with pytest.raises(ValueError, match="this image tokenizer has no decoder"):
            tokenizer.decode(codes)
        return
    assert theirs.std() > 0.1
    assert (tokenizer.decode(codes) - theirs.clamp(-1, 1)).abs().max() < 1e-4


def to_png(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


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
    samples = [
        Sample(str(number), {"png": to_png(picture), "json": b'{"captions": ["a red bus"]}'})
        for number, picture in enumerate(pictures)
    ]
    scores = evaluate(Likelihood(), Subject(model, samples))
    assert scores and all(score["value"] > 0 for score in scores.values())

    codes = model.image_tokenizer.encode(images(2)).numpy()
    training = [
        TrainingSample(str(number), {"captions": ["a red bus"]}, image[None], number)
        for number, image in enumerate(codes)
    ]
    batch = model.batch_builder(256).build(training)
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


# --- one of them alone ----------------------------------------------------------------------------


def test_a_decoder_from_elsewhere_draws_what_theirs_draws(
    tmp_path: Path, sentences: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Meta's file of the image tokenizer is complete, the folders of transformers are not."""
    alone = chameleon(tmp_path / "alone", sentences)
    assert "cannot draw" in capsys.readouterr().out
    with pytest.raises(ValueError, match="this image tokenizer has no decoder"):
        alone.ours.draw("a red bus")
    encoder = alone.stock.model.vqmodel
    vqgan, janus = complete_vqgan(encoder)
    path = tmp_path / "vqgan.safetensors"
    save_file(vqgan, path)
    again = ["import", str(alone.folder), str(tmp_path / "ours"), "--image-tokenizer", str(path)]
    assert main(again) == 0
    ours = load(tmp_path / "ours")
    codes = torch.randint(CODES, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vectors = encoder.quantize.embedding(codes).unflatten(1, (8, 8)).permute(0, 3, 1, 2)
        theirs = janus.decoder(encoder.post_quant_conv(vectors)).clamp(-1, 1)
    assert (ours.image_tokenizer.decode(codes) - theirs).abs().max() < 1e-4
    assert ours.draw("a red bus", seed=0)[0].size == (32, 32)

    other = {name: torch.randn_like(w) if "embedding" in name else w for name, w in vqgan.items()}
    save_file(other, path)
    again[2] = str(tmp_path / "other")
    assert main(again) == 1 and not (tmp_path / "other").exists()
    assert "has other codes than the model" in capsys.readouterr().err


def refused(folder: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "out"
    assert main(["import", str(folder), str(out)]) == 1
    line = capsys.readouterr().err
    assert message in line and str(folder) in line and line.count("\n") == 1
    assert not out.exists()


def test_other_folders_are_refused_in_one_line(
    tmp_path: Path, pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(pair.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = (folder / "tokenizer.json").read_text()

    def changed(**others: object) -> None:
        (folder / "config.json").write_text(json.dumps(config | others))

    for others, message in (
        ({"model_type": "janus"}, "a Janus cannot be imported: it reads images as continuous"),
        ({"attention_bias": True, "text_config": {"attention_bias": True}}, "attention_bias"),
        ({"model_type": "llama"}, "a language model starts a training instead (size: FOLDER)"),
        ({"model_type": None}, "a model of type 'None', expected one of chameleon"),
        ({"vocabulary_map": None}, "vocabulary_map"),
        ({"vocabulary_map": {}}, "its vocabulary has 0 image codes, its image tokenizer 64"),
    ):
        changed(**others)
        refused(folder, message, capsys)
    # A config that lies: nothing of its sizes is allocated.
    texts = config.get("text_config", config)
    for others, message in (
        ({"num_hidden_layers": 200}, "its weights have 2 layers, its config.json 200"),
        ({"intermediate_size": 1000}, "its weights and its config.json differ"),
        ({"vocab_size": 10}, "of 10"),
        ({"hidden_size": "big"}, "config.json"),
    ):
        changed(**others, text_config=texts | others)
        refused(folder, message, capsys)
    vision = config["vq_config"]
    for others, message in (
        ({"channel_multiplier": 3}, "its config.json does not fit"),
        ({"channel_multiplier": [1, "x", 2]}, "expected a list, each of it a whole number"),
        ({"base_channels": 2**12}, "its image tokenizer and its config.json differ: decoder"),
    ):
        if config["model_type"] == "emu3":  # the other one infers it from the weights
            changed(vq_config=vision | others)
            refused(folder, message, capsys)
    tokens = config["vocabulary_map"]
    code = pair.code_token(3)
    for number, message in (
        ("many", "its config.json does not fit"),
        (-1, "ids -1 to"),
        (10**9, "ids 0 to 1000000000 of"),
        (tokens[pair.code_token(4)], "its vocabulary has 63 image codes, its image tokenizer 64"),
    ):
        changed(vocabulary_map=tokens | {code: number})
        refused(folder, message, capsys)
    changed()
    begin = pair.special["<boi>"]
    (folder / "tokenizer.json").write_text(tokenizer.replace(begin, begin[::-1]))
    refused(folder, f"its text tokenizer has no {begin}", capsys)
    (folder / "tokenizer.json").unlink()
    refused(folder, "no such file", capsys)
    (folder / "tokenizer.json").write_text(tokenizer)
    weights = folder / "model.safetensors"
    stored = load_file(weights)
    save_file({k: v for k, v in stored.items() if "layers.1.self_attn.q_proj" not in k}, weights)
    refused(folder, "its weights and its config.json differ", capsys)
    weights.rename(folder / "pytorch_model.bin")
    refused(folder, "safetensors", capsys)  # never pytorch_model.bin


def test_shards_of_half_precision_and_the_names_of_transformers_4(
    tmp_path: Path, pair: Pair
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(pair.folder, folder)
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards: list[dict[str, Tensor]] = [{}, {}]
    for number, (name, weight) in enumerate(stored.items()):
        old = name.replace("model.text_model.", "text_model.model.")
        old = (
            old.replace("model.vqmodel.", "vqmodel.") if "text_model" in str(stored.keys()) else old
        )
        shards[number % 2][old] = weight.bfloat16()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = {}
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file)
        names |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    out = tmp_path / "ours"
    assert main(["import", str(folder), str(out), "--image-size", "32"]) == 0
    assert {w.dtype for w in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    rounded = load(out).network.state_dict()
    for name, weight in pair.ours.network.transformer.state_dict().items():
        rows = slice(pair.ours.vocabulary.image_end if "embed" in name or "head" in name else None)
        kept = (pair.rows[rows] >= 0) if rows.stop else slice(None)
        expected = weight[rows][kept].bfloat16().float()
        assert torch.equal(rounded[f"transformer.{name}"][rows][kept], expected), name


def test_an_export_is_stock_where_there_is_a_stock_class(
    tmp_path: Path, pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["export", "hf", str(pair.out), str(tmp_path / "stock")])
    if type(pair.stock).__name__.startswith("Emu3"):
        assert status == 0 and "LlamaForCausalLM" in capsys.readouterr().out
    else:
        assert status == 1
        assert "no stock class has qk_norm=layer" in capsys.readouterr().err
