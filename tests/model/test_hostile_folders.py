"""Model folders that a stranger has made: each loads, or is refused in one line that names a file.

Every value of every config is replaced by values of other types and sizes, by nothing, and by
20,000 brackets. Bytes of the weights are flipped, files are cut, and replaced by pipes, devices and
files of a terabyte. What is refused is refused before it takes time or memory: the largest sizes
here would take hours.
"""

import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from multimodal.api import load
from multimodal.tokenizers.detail import VQTokenizer
from multimodal.tokenizers.text import TextTokenizer

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 1.5, -(2**31), 2**31, 2**62, 10**30, 21_474_836, float("nan"),
    float("inf"), 1e308, "x", "", [], [1], {}, {"a": 1}, "detail",
)  # fmt: skip
DEEP = "[" * 20_000 + "]" * 20_000
CONFIGS = ("config.json", "image_tokenizer/config.json")
WEIGHTS = ("model.safetensors", "heads.safetensors", "image_tokenizer/model.safetensors")
FILES = (*CONFIGS, *WEIGHTS, "text_tokenizer.json")
MAX_GROWTH = 300e6  # bytes of memory that a refusal may take
Place: TypeAlias = tuple[str | int, ...]
Change: TypeAlias = Callable[[Path], object]


def places(value: Any, start: Place = ()) -> Iterator[Place]:
    """The way to every value in a JSON value, the whole first."""
    yield start
    items: Any = value.items() if isinstance(value, dict) else ()
    for key, each in enumerate(value) if isinstance(value, list) else items:
        yield from places(each, (*start, key))


def replaced(value: Any, place: Place, new: Any) -> Any:
    """A copy with another value at a place."""
    if not place:
        return new
    copy = value.copy()
    copy[place[0]] = replaced(value[place[0]], place[1:], new)
    return copy


def without(value: Any, place: Place) -> Any:
    """A copy without a value."""
    copy = value.copy()
    if len(place) == 1:
        del copy[place[0]]
    else:
        copy[place[0]] = without(value[place[0]], place[1:])
    return copy


def changed_configs(folder: Path, names: tuple[str, ...]) -> Iterator[tuple[str, str, bytes]]:
    """(file, what was changed, new content) for every value of every config."""
    for name in names:
        content = json.loads((folder / name).read_text("utf-8"))
        for place in places(content):
            dotted = ".".join(map(str, place))
            for new in VALUES:
                yield name, f"{dotted}={new!r}", json.dumps(replaced(content, place, new)).encode()
            text = json.dumps(replaced(content, place, "@")).replace('"@"', DEEP)
            yield name, f"{dotted} nested", text.encode()
            if place:
                yield name, f"{dotted} missing", json.dumps(without(content, place)).encode()
        yield name, "not UTF-8", b"\xff\xfe\x00"
        yield name, "empty", b""


def flipped(folder: Path, name: str, random_numbers: random.Random) -> bytes:
    """The bytes of a file with one bit flipped: in its lengths, in its header, or anywhere."""
    data = bytearray((folder / name).read_bytes())
    end = random_numbers.choice((8, min(500, len(data)), len(data)))
    data[random_numbers.randrange(end)] ^= 1 << random_numbers.randrange(8)
    return bytes(data)


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def outcome(folder: Path, fingerprint: str) -> str:
    """``loaded``, or the line that refuses. Nothing else may happen, and no memory is taken.

    Args:
        fingerprint: of the model before anything was changed. What loads still has it.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        loaded = load(folder)
        said = "loaded"
        assert loaded.fingerprint == fingerprint, "another model was loaded"
    except ValueError as error:
        said = str(error)
        assert str(folder) in said, f"names no file: {said}"
        assert len(said) < 1000 and said.isprintable(), said
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MAX_GROWTH, f"{grown / 1e6:.0f} MB for: {said}"
    return said


def try_each(folder: Path, cases: list[tuple[str, str, bytes]]) -> list[str]:
    """What comes of each changed file, one after the other."""
    results, fingerprint = [], load(folder).fingerprint
    for name, what, content in cases:
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        try:
            results.append(outcome(folder, fingerprint))
        except BaseException as error:
            raise AssertionError(f"{name}: {what}: {type(error).__name__}: {error}") from error
        (folder / name).write_bytes(original)
    return results


def test_changed_configs_are_refused(folder: Path) -> None:
    cases = random.Random(1).sample(list(changed_configs(folder, CONFIGS)), 60)
    results = try_each(folder, cases)
    assert results.count("loaded") < len(results) / 10


@pytest.mark.slow
def test_every_changed_config_is_refused(folder: Path) -> None:
    cases = list(changed_configs(folder, CONFIGS))
    results = try_each(folder, cases)
    assert len(results) > 1000 and results.count("loaded") < len(results) / 10


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("transformer.rope_theta", "x", "transformer.rope_theta='x': expected a number"),
        ("transformer.num_key_value_heads", 0, "num_key_value_heads=0: expected .* 1 to 1,024"),
        ("transformer.num_hidden_layers", 21_474_836, "num_hidden_layers=21474836: expected"),
        ("transformer.num_hidden_layers", 20, "weights are missing, such as model.layers.2."),
        ("transformer.hidden_size", 2**16, r"shape \(384, 64\), config.json says \(384, 65536\)"),
        ("transformer.vocab_size", 2**23, "vocab_size=8388608: text_size and layout need 384"),
        ("transformer.width", 3, "transformer.width: unknown; there are vocab_size, "),
        ("layout.levels.0.grid", 10**6, "layout.levels.0.grid=1000000: expected .* 1 to 512"),
        ("objectives.weights", [], r"objectives.weights=\[\]: expected an object"),
        ("templates.question", 7, "templates.question=7: expected a text"),
        ("reads", ["meaning"], "level 'meaning': this image tokenizer has detail"),
        ("fingerprints.model", "0" * 16, "damaged: its files have the fingerprint"),
    ],
)
def test_the_line_names_file_and_field(
    folder: Path, place: str, value: object, message: str
) -> None:
    content = json.loads((folder / "config.json").read_text("utf-8"))
    *way, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    inner = content
    for part in way:
        inner = inner[part]
    inner[last] = value
    (folder / "config.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("autoencoder", {"decoder_depth": 10**9}, "autoencoder vit.decoder_depth=1000000000"),
        ("autoencoder", {"dim": 0}, "autoencoder vit.dim=0: expected a whole number from 1 to"),
        ("autoencoder", {"heads": 0}, "heads=0"),
        ("autoencoder", {"dim": 8192}, "config.json says"),
        ("quantizer", {"levels": [65000] * 9}, "codes, over 4,194,304"),
        ("quantizer", {"levels": "444"}, "levels='444': expected a list"),
        ("quantizer", {"name": ["fsq"]}, "expected one of fsq, ibq, lfq, vq"),
    ],
)
def test_an_image_tokenizer_has_a_schema_too(
    folder: Path, part: str, options: dict[str, Any], message: str
) -> None:
    path = folder / "image_tokenizer/config.json"
    content = json.loads(path.read_text("utf-8"))
    content[part] |= options
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match=message):
        VQTokenizer.load(folder / "image_tokenizer")


@pytest.mark.parametrize("count", [24, pytest.param(400, marks=pytest.mark.slow)])
def test_flipped_bits_are_noticed(folder: Path, count: int) -> None:
    rng = random.Random(2)
    cases = []
    for number in range(count):
        name = WEIGHTS[number % len(WEIGHTS)]
        cases.append((name, f"bit {number}", flipped(folder, name, rng)))
    for name in WEIGHTS:
        data = (folder / name).read_bytes()
        cases += [(name, f"cut at {at}", data[:at]) for at in (0, 4, 8, 100, len(data) - 1)]
    results = try_each(folder, cases)
    # A bit of the header's white space, or of a name that is sorted, changes nothing.
    assert results.count("loaded") < len(results) / 10


def test_a_damaged_model_can_be_loaded_as_it_is(folder: Path, tiny_model_folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged: .*verify=False"):
        load(folder)
    expected = load(tiny_model_folder).fingerprint
    assert load(folder, verify=False).fingerprint != expected


def be_a_pipe(path: Path) -> None:
    os.mkfifo(path)


def be_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def be_a_terabyte(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


@pytest.mark.parametrize("make", [be_a_pipe, be_endless, be_a_terabyte, Path.mkdir, Path.exists])
def test_what_is_no_file_is_refused(folder: Path, make: Change) -> None:
    fingerprint = load(folder).fingerprint
    for name in FILES:
        original = (folder / name).read_bytes()
        (folder / name).unlink()
        make(folder / name)
        assert outcome(folder, fingerprint) != "loaded", name
        if (folder / name).is_dir():
            (folder / name).rmdir()
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(original)


def token(number: int) -> dict[str, Any]:
    flags = {name: False for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return {"id": number, "content": "zz", **flags}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "trie"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}}, "trie"),
        ({"model": {"vocab": {"a": 0, "b": 2**31}, "merges": []}}, "without a gap"),
        ({"model": {"vocab": {"a": 1}, "merges": []}}, "without a gap"),
        ({"model": {"vocab": {"a": "0"}, "merges": []}}, "a whole number for each token"),
        ({"added_tokens": [token(2**32 - 1)]}, "without a gap"),
        ({"added_tokens": 3}, "added_tokens"),
        ({"model": {"merges": [["a"]]}}, "not a text tokenizer"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}}, "not a text tokenizer"),
    ],
)
def test_text_tokenizers_that_harm_their_library_are_refused(
    folder: Path, change: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "text_tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    for key, value in change.items():
        content[key] = {**content[key], **value} if key == "model" else value
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match=f"text_tokenizer.json.*{message}"):
        TextTokenizer.load(path)
    assert "panicked" not in capfd.readouterr().err


def test_padding_and_truncation_of_a_tokenizer_are_left_out(folder: Path) -> None:
    """Padding to a billion would take all memory, and a text has the ids that it has."""
    path = folder / "text_tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    expected = TextTokenizer.load(path).encode("a red bus")
    content["padding"] = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip
    limits = {"max_length": 2, "stride": 0}
    content["truncation"] = {"direction": "Right", "strategy": "LongestFirst", **limits}
    path.write_text(json.dumps(content), "utf-8")
    assert TextTokenizer.load(path).encode("a red bus") == expected


def test_the_depth_of_json_is_bounded(folder: Path) -> None:
    for name in ("text_tokenizer.json", *CONFIGS):
        original = (folder / name).read_bytes()
        (folder / name).write_text(DEEP, "utf-8")
        with pytest.raises(ValueError, match="nested too deep"):
            load(folder)
        (folder / name).write_bytes(original)


def test_weights_of_another_dtype_are_the_weights_that_they_round_to(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="damaged"):
        load(folder)
