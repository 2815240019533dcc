"""Levels of codes: their places in one sequence, the level of meaning, and tokenizers of both."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
from multimodal.tokenizers.encoder import Encoder
from multimodal.tokenizers.image import ImageTokenizer, load_image_tokenizer
from multimodal.tokenizers.levels import Layout, Level
from multimodal.tokenizers.meaning import Meaning, MeaningConfig, fit_codebooks, round_to_half
from multimodal.tokenizers.quantizers.kmeans import kmeans, nearest

NETWORK = "timm:test_efficientnet"
VIT = {"name": "vit", "dim": 32, "encoder_depth": 0, "decoder_depth": 1, "heads": 2}
LAYOUT = Layout((Level("meaning", 2, 2, 8), Level("detail", 3, 1, 100)))


def pictures(count: int, side: int = 64, seed: int = 0) -> Tensor:
    """float32[count, 3, side, side]: smooth noise, in [-1, 1]."""
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(noise, side, mode="bilinear").clamp(-1, 1)


def encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(NETWORK, (-2, -1), pretrained=False)


def meaning(
    form: Any = "residual", groups: int = 2, fit: bool = True, colours: bool = False
) -> Meaning:
    config = MeaningConfig(NETWORK, (-2, -1), 64, "squash", 2, groups, 6, 12, form, colours=colours)
    made = Meaning(config, encoder())
    if fit:
        fit_codebooks(made, made.features(pictures(60)).flatten(0, 2), rounds=6)
    return made


def detail(autoencoder: dict[str, Any] = VIT, reads: Meaning | None = None) -> VQTokenizer:
    torch.manual_seed(0)
    config = VQTokenizerConfig(32, "squash", 8, autoencoder, {"name": "fsq", "levels": [4] * 3})
    made = VQTokenizer(config).train()
    with torch.no_grad():
        for _ in range(10):
            made(pictures(16, 32))
    if reads is not None:
        channels = reads.config.vector_channels
        config = replace(config, meaning_channels=channels, meaning_fingerprint=reads.fingerprint)
        source, made = made, VQTokenizer(config)
        made.start_from(source)
    return made.eval()


def test_every_place_has_the_range_of_its_group() -> None:
    assert LAYOUT.codes_per_image == 2 * 2 * 2 + 3 * 3 and LAYOUT.codebook_size == 2 * 8 + 100
    ranges = list(zip(LAYOUT.first.tolist(), LAYOUT.last.tolist(), strict=True))
    assert ranges == [(0, 7), (8, 15)] * 4 + [(16, 115)] * 9
    assert LAYOUT.span("detail") == slice(8, 17) and LAYOUT.numbers("detail") == slice(16, 116)
    assert LAYOUT.indices(["detail"]).tolist() == list(range(8, 17))


def test_flattened_codes_come_back_and_wrong_ones_are_named() -> None:
    codes = torch.randint(8, (5, 2, 2, 2))
    flat = LAYOUT.flatten("meaning", codes)
    # Row by row, the groups of a position side by side.
    assert flat[:, 3].equal(codes[:, 0, 1, 1] + 8)
    whole = torch.cat([flat, torch.full((5, 9), 16)], 1)
    assert LAYOUT.unflatten("meaning", whole).equal(codes)
    whole[2, 1] = 7  # a code of the first group where the second belongs
    with pytest.raises(ValueError, match="meaning codes from -1 to"):
        LAYOUT.unflatten("meaning", whole)


def test_levels_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="grid=0: expected a whole number from 1"):
        Level("meaning", 0, 1, 8)
    with pytest.raises(ValueError, match="each with its own name"):
        Layout((Level("detail", 1, 1, 2), Level("detail", 1, 1, 2)))
    with pytest.raises(ValueError, match="has meaning, detail"):
        LAYOUT.span("sound")


def test_kmeans_is_lloyds_algorithm() -> None:
    vectors = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    found = kmeans(vectors, 7, rounds=30, seed=3)
    distances = (vectors[:, None] - found.centres).square().sum(-1)
    numbers = distances.argmin(1)
    # At the end each centre is the mean of its vectors, and each vector is with its nearest centre.
    for number in range(7):
        expected = vectors[numbers == number].mean(0)
        assert torch.allclose(found.centres[number], expected, atol=1e-4)
    assert found.error == pytest.approx(float(distances.min(1).values.mean()), rel=1e-5)
    assert torch.equal(nearest(vectors, found.centres)[0], numbers)
    assert found.centres.equal(kmeans(vectors, 7, rounds=30, seed=3).centres)


def test_centres_without_vectors_start_again() -> None:
    # Two places, far apart: of centres that all start at one place most would stay empty.
    vectors = torch.cat([torch.zeros(500, 2), torch.randn(20, 2) * 5])
    assert kmeans(vectors, 8, rounds=10).used == 1.0
    with pytest.raises(ValueError, match="3 vectors for 8 codes"):
        kmeans(vectors[:3], 8)


@pytest.mark.parametrize("form", ["residual", "product"])
def test_codes_are_the_nearest_by_search(form: str) -> None:
    made = meaning(form)
    features = made.features(pictures(9, seed=1))
    components = (features - made.center) @ made.components
    codes = made.quantize(features)
    books = made.codebooks
    for place in torch.cartesian_prod(torch.arange(9), torch.arange(2), torch.arange(2)).tolist():
        vector, first, second = components[tuple(place)], *codes[tuple(place)].tolist()
        if form == "product":
            halves = vector.chunk(2)
            assert first == int((books[0] - halves[0]).norm(dim=1).argmin())
            assert second == int((books[1] - halves[1]).norm(dim=1).argmin())
        else:
            assert first == int((books[0] - vector).norm(dim=1).argmin())
            assert second == int((books[1] - (vector - books[0][first])).norm(dim=1).argmin())
    assert torch.allclose(
        made.lookup(codes[0, 0, 0]),
        torch.cat([books[0][codes[0, 0, 0, 0]], books[1][codes[0, 0, 0, 1]]])
        if form == "product"
        else books[0][codes[0, 0, 0, 0]] + books[1][codes[0, 0, 0, 1]],
    )


@pytest.mark.parametrize("form", ["residual", "product"])
def test_colours_are_one_more_code_of_each_position(form: str) -> None:
    plain, coloured = meaning(form), meaning(form, colours=True)
    images = pictures(9, seed=1)
    assert coloured.level.groups == 3 and coloured.level.codes == 3 * plain.level.codes // 2
    codes = coloured.encode(images)
    assert torch.equal(codes[..., :2], plain.encode(images)), "the others stay what they are"
    quarters = images.unflatten(2, (4, -1)).unflatten(4, (4, -1)).mean((3, 5))  # [B, 3, 4, 4]
    for b, h, w in torch.cartesian_prod(torch.arange(9), torch.arange(2), torch.arange(2)).tolist():
        cell = quarters[b, :, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].permute(1, 2, 0).flatten()
        assert codes[b, h, w, 2] == int((coloured.palette - cell).norm(dim=1).argmin())
    vectors = coloured.vectors(codes)
    assert vectors.shape[-1] == coloured.config.vector_channels == plain.config.channels + 12
    torch.testing.assert_close(vectors[..., :-12], plain.vectors(codes[..., :2]))
    shades = vectors[..., -12:] * coloured.palette.std()
    torch.testing.assert_close(shades, coloured.palette[codes[..., 2]])
    again = detail(reads=coloured)  # a decoder reads them, too
    assert again.config.meaning_channels == 24
    tokenizer = ImageTokenizer(coloured)
    assert len(list(tokenizer.code_vectors())) == 3
    assert coloured.fingerprint != plain.fingerprint


def test_a_recoloured_picture_has_other_colour_codes() -> None:
    made = meaning("residual", colours=True)
    images = pictures(9, seed=1)
    changed = made.encode(images.flip(1)) != made.encode(images)  # red and blue change places
    assert changed[..., 2].float().mean() > 0.5


@pytest.mark.parametrize("form", ["residual", "product"])
def test_what_fitting_reports_is_what_is_lost(form: str) -> None:
    made = meaning(form, fit=False)
    features = made.features(pictures(80)).flatten(0, 2)
    fitted = fit_codebooks(made, features, rounds=8)
    components = made.project(features)
    # The components are uncorrelated, as principal components are.
    covariance = components.T @ components / len(components)
    off = covariance - covariance.diag().diag()
    assert off.abs().max() < 1e-3 * covariance.diag().max()
    lost = (components - made.lookup(made.quantize(features))).square().sum()
    assert fitted.lost[-1] == pytest.approx(float(lost / components.square().sum()), rel=1e-3)
    assert 1 > fitted.lost[0] > fitted.lost[1] > 0
    assert 0 < fitted.explained <= 1


def test_an_encoder_is_that_of_timm_with_the_normalisation_of_its_weights() -> None:
    torch.manual_seed(0)
    made = Encoder(NETWORK, (-1,), pretrained=False)
    network = timm.create_model("test_efficientnet", features_only=True, out_indices=(-1,)).eval()
    network.load_state_dict(made.network.state_dict())
    config = network.pretrained_cfg
    images = pictures(3)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    expected = network((images / 2 + 0.5 - mean) / std)[-1]
    torch.testing.assert_close(made(images), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_resnet", "test_convnext"])
def test_final_features_are_what_the_classifier_pools(name: str) -> None:
    torch.manual_seed(0)
    made = Encoder(f"timm:{name}", pretrained=False)
    network = timm.create_model(name, num_classes=0).eval()
    network.load_state_dict(made.network.network.state_dict())  # type: ignore[union-attr]
    size = made.image_size
    found = made(pictures(2, size))
    assert found.shape == (2, made.grid(size), made.grid(size), made.channels)
    config = network.pretrained_cfg
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    expected = network.forward_features((pictures(2, size) / 2 + 0.5 - mean) / std)
    if expected.ndim == 4:
        expected = expected.flatten(2).transpose(1, 2)
    else:
        expected = expected[:, network.num_prefix_tokens :]
    torch.testing.assert_close(found.flatten(1, 2), expected)


def test_weights_are_read_from_files_by_name_or_by_their_order(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = timm.create_model("test_efficientnet").eval()
    state = {name: weight + 0.1 for name, weight in whole.state_dict().items()}
    save_file(state, tmp_path / "named.safetensors")
    torch.save(
        {f"other.{number}": w for number, w in enumerate(state.values())}, tmp_path / "a.pth"
    )
    named = Encoder(f"{NETWORK}={tmp_path / 'named.safetensors'}")
    ordered = Encoder(f"{NETWORK}={tmp_path / 'a.pth'}")
    for name, weight in named.state_dict().items():
        assert torch.equal(weight, ordered.state_dict()[name])
    assert torch.equal(
        named.state_dict()["network.network.conv_stem.weight"], state["conv_stem.weight"]
    )
    shuffled = dict(reversed(list(enumerate(state.values()))))
    torch.save({str(number): weight for number, weight in shuffled.items()}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="weights of another network"):
        Encoder(f"{NETWORK}={tmp_path / 'b.pth'}")


def test_a_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="not a checkpoint of tensors alone"):
        Encoder(f"{NETWORK}={tmp_path / 'evil.pth'}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", "expected timm:MODEL"),
        ("timm:nothing_of_this_name", "no such model"),
        ("open_clip:nothing", "no such model"),
        ("open_clip:ViT-B-32", "which weights"),
        (f"{NETWORK}=missing.pth", "no such file"),
    ],
)
def test_wrong_names_of_encoders_say_what_to_do(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder(name)


def test_a_folder_gives_the_same_codes_and_half_weights_lose_nothing(tmp_path: Path) -> None:
    made = meaning(fit=False)
    round_to_half(made.encoder)
    fit_codebooks(made, made.features(pictures(60)).flatten(0, 2), rounds=3)
    made.save(tmp_path)
    again = Meaning.load(tmp_path)
    assert again.fingerprint == made.fingerprint
    assert torch.equal(again.encode(pictures(4)), made.encode(pictures(4)))
    weights = sum(weight.numel() for weight in made.encoder.state_dict().values())
    assert (tmp_path / "model.safetensors").stat().st_size < 2.5 * weights + 40_000
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "fit": "crop"}))
    with pytest.raises(ValueError, match="do not belong together"):
        Meaning.load(tmp_path)


def test_a_tokenizer_of_two_levels(tmp_path: Path) -> None:
    tokenizer = ImageTokenizer(meaning(), detail())
    images = pictures(5)
    codes = tokenizer.encode(images)
    assert codes.shape == (5, 2 * 2 * 2 + 4 * 4)
    first, last = tokenizer.layout.first, tokenizer.layout.last
    assert ((codes >= first) & (codes <= last)).all()
    assert torch.equal(tokenizer.encode(images, ["meaning"]), codes[:, :8])
    assert tokenizer.decode(codes).shape == (5, 3, 32, 32)
    tokenizer.save(tmp_path)
    again = load_image_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint and again.layout == tokenizer.layout
    assert torch.equal(again.encode(images), codes)
    assert torch.equal(again.decode(codes), tokenizer.decode(codes))
    wrong = codes.clone()
    wrong[0, -1] = 0  # a code of meaning in the place of detail
    with pytest.raises(ValueError, match="detail codes from"):
        tokenizer.decode(wrong)
    # Another level in its place does not belong to it.
    meaning("product").save(tmp_path / "meaning")
    with pytest.raises(ValueError, match="do not belong together"):
        load_image_tokenizer(tmp_path)


def test_meaning_alone_reads_and_cannot_draw(tmp_path: Path) -> None:
    meaning().save(tmp_path)
    tokenizer = load_image_tokenizer(tmp_path)
    codes = tokenizer.encode(pictures(2))
    assert codes.shape == (2, 8)
    with pytest.raises(ValueError, match="it reads images, and cannot draw them"):
        tokenizer.decode(codes)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"encoder": "timm:eva_giant_patch14_224", "image_size": 224}, "weights are missing"),
        ({"encoder": "open_clip:ViT-bigG-14", "image_size": 224}, "weights are missing"),
        ({"encoder": "timm:vit_tiny_patch16_224"}, "image_size=64: timm:vit.* does not read it"),
        ({"stages": [-3, -1]}, "config.json says|weights are missing"),
        ({"codebook_size": 2**22}, "codebooks has shape"),
    ],
)
def test_a_config_of_another_size_is_refused_before_memory_is_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], wrong: str
) -> None:
    meaning(fit=False).save(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stages = {"stages": []} if "encoder" in change else {}
    (tmp_path / "config.json").write_text(json.dumps(stored | stages | change))
    devices, make = [], Encoder.__init__

    def spy(self: Encoder, *arguments: Any, **options: Any) -> None:
        devices.append(torch.get_default_device().type)
        make(self, *arguments, **options)

    monkeypatch.setattr(Encoder, "__init__", spy)
    with pytest.raises(ValueError, match=wrong):
        Meaning.load(tmp_path)
    assert devices == ["meta"], "two billion weights would take eight gigabytes"


VQGAN = {"name": "vqgan", "channels": 32, "multipliers": [1, 1, 1, 1], "depth": 1}


@pytest.mark.parametrize("autoencoder", [VIT, VQGAN], ids=["vit", "vqgan"])
def test_a_decoder_reads_meaning_and_the_codes_do_not(
    autoencoder: dict[str, Any], tmp_path: Path
) -> None:
    plain, made, images = detail(autoencoder), meaning(), pictures(5)
    tokenizer = ImageTokenizer(made, detail(autoencoder, made))
    assert tokenizer.detail is not None
    codes = tokenizer.encode(images)
    # At first it draws as the decoder that it started from, whatever the meaning.
    before = ImageTokenizer(made, plain)
    assert torch.equal(before.encode(images), codes)
    torch.testing.assert_close(tokenizer.decode(codes), before.decode(codes))
    with torch.no_grad():
        tokenizer.detail.decoder.first_layer.normal_(0, 0.2)
    assert torch.equal(tokenizer.encode(images), codes)
    assert tokenizer.codes_fingerprint == before.codes_fingerprint
    other = codes.clone()
    other[:, :8] = codes.roll(1, 0)[:, :8]  # the meaning of another image
    assert not torch.equal(tokenizer.decode(other), tokenizer.decode(codes))
    # What it reads: the components of the codes, with a deviation of 1, on the grid of detail.
    vectors = made.vectors(tokenizer.layout.unflatten("meaning", codes))
    assert torch.equal(vectors, tokenizer.meaning_vectors(images))
    numbers = tokenizer.layout.unflatten("detail", codes)[..., 0]
    resized = torch.nn.functional.interpolate(vectors.movedim(3, 1), 4, mode="bilinear")
    joined = torch.cat([plain.quantizer.lookup(numbers), resized.movedim(1, 3)], -1)
    with torch.no_grad():
        expected = tokenizer.detail.decoder(joined).clamp(-1, 1)
    assert torch.equal(tokenizer.decode(codes), expected)
    tokenizer.save(tmp_path)
    again = load_image_tokenizer(tmp_path)
    assert torch.equal(again.decode(codes), tokenizer.decode(codes))


def test_meaning_for_a_decoder_has_a_deviation_of_about_one() -> None:
    for form in ("residual", "product"):
        made = meaning(form)
        vectors = made.vectors(made.encode(pictures(60)))
        assert 0.5 < float(vectors.std()) < 2
        lookup = made.lookup(made.encode(pictures(60)))
        torch.testing.assert_close(vectors / vectors.std(), lookup / lookup.std())


def test_a_decoder_of_another_level_of_meaning_is_refused() -> None:
    reads = detail(reads=meaning())
    with pytest.raises(ValueError, match="reads the level of meaning .*, not"):
        ImageTokenizer(meaning("product"), reads)
    with pytest.raises(ValueError, match="reads a level of meaning: give it"):
        ImageTokenizer(detail=reads)
    codes = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="meaning of 0 channels: the decoder reads 12"):
        reads.decode(codes)
    with pytest.raises(ValueError, match="meaning of 12 channels: the decoder reads 0"):
        detail().decode(codes, torch.zeros(1, 2, 2, 12))
    with pytest.raises(ValueError, match="expected both or none"):
        replace(reads.config, meaning_fingerprint="")
    with pytest.raises(ValueError, match="its configuration is"):
        detail().start_from(reads)
