"""GGUF files that a stranger has made: each is read, or refused in one line, and nothing is run."""

import io
import json
import random
import resource
import shutil
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from multimodal.export.gguf import export_gguf
from multimodal.model.stock import read_stock
from multimodal.tokenizers.text import TextTokenizer

MAX_GROWTH = 200e6  # bytes of memory that a refusal may take


@pytest.fixture(scope="module")
def file(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "m.gguf"
    export_gguf(tiny_model_folder, out, "float32")
    read_stock(out)  # what is imported for it is in memory
    return out


def refused(file: Path) -> str:
    """The line that refuses a model."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=file.name) as caught:
        read_stock(file)
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MAX_GROWTH
    return str(caught.value)


def with_field(file: Path, name: str, value: int, out: Path) -> Path:
    """A copy in which a number of the header is another one."""
    shutil.copy(file, out)
    reader = gguf.GGUFReader(out, "r+")
    field = reader.get_field(name)
    assert field is not None
    field.parts[field.data[0]][0] = value
    reader.data.flush()
    return out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qwen3.block_count", 10**6),
        ("qwen3.block_count", 200),
        ("qwen3.embedding_length", 2**20),
        ("qwen3.feed_forward_length", 2**23),
        ("qwen3.attention.head_count", 3),
        ("qwen3.attention.key_length", 2**20),
        ("qwen3.rope.dimension_count", 2),
    ],
)
def test_a_header_that_lies_about_sizes_is_refused(
    name: str, value: int, file: Path, tmp_path: Path
) -> None:
    refused(with_field(file, name, value, tmp_path / "lies.gguf"))


def test_a_header_without_an_end_is_refused(file: Path, tmp_path: Path) -> None:
    whole, cut = file.read_bytes(), tmp_path / "cut.gguf"
    places = random.Random(0).sample(range(gguf.GGUFReader(file).data_offset), 12)
    for place in (0, 3, 4, 8, 23, *places):
        cut.write_bytes(whole[:place])
        assert "ends before its header" in refused(cut)
    for place in (8, 16):  # how many tensors and fields there are
        cut.write_bytes(whole[:place] + struct.pack("<Q", 2**60) + whole[place + 8 :])
        refused(cut)
    # A list of 2 ** 60 numbers: the reader of gguf would read on behind the end of the file.
    name = b"general.x"
    start = whole[:8] + struct.pack("<QQ", 0, 1) + struct.pack("<Q", len(name)) + name
    for count in (2**60, 2**20):
        cut.write_bytes(start + struct.pack("<IIQ", 9, 4, count))
        refused(cut)
    cut.write_bytes(start + struct.pack("<IIQ", 9, 9, 1))
    assert "a value of type 9" in refused(cut), "lists of lists"
    cut.write_bytes(b"GGML" + whole[4:])
    assert "begins otherwise" in refused(cut)


def test_factors_of_rope_that_are_none_of_ours_are_refused(file: Path, tmp_path: Path) -> None:
    reader, out = gguf.GGUFReader(file), tmp_path / "long.gguf"
    half = int(reader.get_field("qwen3.attention.key_length").contents()) // 2
    longer = np.linspace(1, 40, half, dtype=np.float32) ** 2
    for factors, scaling in ((longer, None), (None, "yarn"), (longer[1:], None)):
        writer = gguf.GGUFWriter(out, "qwen3")
        for field in reader.fields.values():
            if field.name.startswith(("qwen3.", "tokenizer.")):
                kinds = field.types
                sub = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kinds[0], sub)
        if scaling:
            writer.add_string("qwen3.rope.scaling.type", scaling)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data.copy())
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        said = refused(out)
        assert ("'yarn' is not supported" if scaling else "factors of RoPE") in said


def test_what_lies_beside_a_file_is_neither_read_nor_run(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    named = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        stored = {"auto_map": named, "tokenizer_class": "Evil", "model_type": "evil"}
        (tmp_path / name).write_text(json.dumps(stored))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    beside = Path(shutil.copy(file, tmp_path / "m.gguf"))
    config, _ = read_stock(beside)
    assert config == read_stock(file)[0]
    tokenizer = TextTokenizer.load(beside)
    assert tokenizer.to_json() == TextTokenizer.load(file).to_json()
    assert not ran.exists()
