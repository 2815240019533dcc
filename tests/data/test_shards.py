"""All damage is noticed. A reader never gets a wrong pair and never loses one silently."""

import io
import json
import pickle
import random
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from multimodal.commands.folders.data import main
from multimodal.data import shards
from multimodal.data.builder.salvage import LostSample, salvage
from multimodal.data.samples import Sample
from multimodal.data.shards import DamagedShard, Shards, index_shard, write_manifest
from multimodal.data.verify import check

KEYS = {"train-0000.tar": ["a", "b", "c"], "train-0001.tar": ["d", "e"], "val-0000.tar": ["f"]}


def image_of(key: str) -> bytes:
    return (f"image of {key} " * 60).encode()[:700]


def record_of(key: str) -> bytes:
    return json.dumps({"captions": [f"caption of {key}"]}).encode()


def pairs(keys: Iterable[str]) -> list[tuple[str, bytes]]:
    return [
        member
        for key in keys
        for member in ((f"{key}.jpg", image_of(key)), (f"{key}.json", record_of(key)))
    ]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_manifest(
        folder, [index_shard(write_tar(folder / n, pairs(keys))) for n, keys in KEYS.items()]
    )
    return folder


def assert_right(samples: Iterable[Sample]) -> list[str]:
    keys = []
    for sample in samples:
        if "jpg" in sample.members:
            assert sample.image == image_of(sample.key)
        if "json" in sample.members:
            assert sample.record == {"captions": [f"caption of {sample.key}"]}
        keys.append(sample.key)
    return keys


def assert_noticed(folder: Path) -> list[str]:
    """``check`` finds damage. ``Shards`` raises, or gives all samples without an error."""
    problems = list(check(folder))
    assert problems and all("\n" not in problem for problem in problems)
    try:
        assert assert_right(Shards(folder)) == ["a", "b", "c", "d", "e", "f"]
    except ValueError as error:
        assert str(folder) in str(error)
    return problems


def cuts(data: bytes) -> Iterator[int]:
    yield from range(0, len(data), 512)
    yield from (1, 511, 513, 700, len(data) - 1)


def test_an_intact_folder_is_read_as_written(folder: Path) -> None:
    assert list(check(folder)) == []
    assert assert_right(Shards(folder)) == ["a", "b", "c", "d", "e", "f"]
    train = Shards(folder, "train")
    assert len(train) == 5 and train[3].key == train.key(3) == "d" and train[4].key == "e"
    assert assert_right(Shards(folder, "val")) == ["f"]
    assert assert_right(pickle.loads(pickle.dumps(train))) == ["a", "b", "c", "d", "e"]
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        Shards(folder, "test")
    with pytest.raises(ValueError, match="no such folder"):
        Shards(folder / "nowhere")


def test_a_cut_at_any_block_is_noticed(folder: Path) -> None:
    path = folder / "train-0000.tar"
    data = path.read_bytes()
    for position in cuts(data):
        path.write_bytes(data[:position])
        assert any("train-0000.tar" in problem for problem in assert_noticed(folder))
        with pytest.raises(DamagedShard, match="train-0000.tar"):
            Shards(folder)
        # With the index, salvage names every lost sample, and returns the others correctly.
        items = list(salvage(path))
        whole = assert_right(s for s in items if isinstance(s, Sample))
        lost = [item.key for item in items if isinstance(item, LostSample)]
        assert sorted(whole + lost) == ["a", "b", "c"]


def test_a_cut_shard_is_not_indexed_or_salvaged_as_complete(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "cut.tar", pairs("abc"))
    data = path.read_bytes()
    index_shard(path)
    needed = max(
        -(-(offset + size) // 512) * 512
        for sample in shards.read_index(path)
        for offset, size in sample["members"].values()
    )
    shards.index_path(path).unlink()
    for position in cuts(data):
        path.write_bytes(data[:position])
        items = list(salvage(path))
        keys = assert_right(s for s in items if isinstance(s, Sample))
        if position >= needed + 1024:  # only padding is missing
            assert index_shard(path)["samples"] == 3 and keys == ["a", "b", "c"]
            shards.index_path(path).unlink()
            continue
        with pytest.raises(DamagedShard, match="cut.tar"):
            index_shard(path)
        assert not shards.index_path(path).exists()
        halves = [s for s in items if isinstance(s, Sample) and len(s.members) < 2]
        assert halves or any(isinstance(item, LostSample) for item in items), position


def test_flipped_bits_are_noticed(folder: Path) -> None:
    path = folder / "train-0000.tar"
    data = path.read_bytes()
    rng = random.Random(0)
    index = shards.index_path(path).read_bytes()
    for block in range(0, len(data), 512):
        for position in (block, block + 130, block + rng.randrange(512)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            assert any("SHA-256" in problem for problem in assert_noticed(folder))
            with pytest.raises(DamagedShard, match="SHA-256"):
                assert Shards(folder)[0]
            shards.index_path(path).unlink()
            for item in salvage(path):  # data may be wrong, but never that of another sample
                if isinstance(item, Sample) and "jpg" in item.members:
                    other = {key for key in "abc" if item.members["jpg"] == image_of(key)}
                    assert other <= {item.key}
            shards.index_path(path).write_bytes(index)


def test_a_damaged_header_without_an_index(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", pairs("abcde"))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = {member.name: member.offset for member in tar}
    for name, offset in headers.items():
        damaged = bytearray(data)
        damaged[offset + 3] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DamagedShard):
            index_shard(path)
        items = list(salvage(path))
        whole = assert_right(s for s in items if isinstance(s, Sample) and len(s.members) == 2)
        assert whole == [key for key in "abcde" if key != name[0]]
        assert len(items) == 5, "the other member of the sample is returned"
    # With both headers damaged, the name is lost, but the position is reported.
    damaged = bytearray(data)
    damaged[headers["c.jpg"]] ^= 1
    damaged[headers["c.json"]] ^= 1
    path.write_bytes(damaged)
    items = list(salvage(path))
    assert [type(item) for item in items] == [Sample] * 4 + [LostSample]
    # A range of zeros, in the middle and at the end.
    for first, last in (("c.jpg", "d.jpg"), ("d.jpg", None)):
        stop = headers[last] if last else len(data)
        hole = data[: headers[first]] + bytes(stop - headers[first]) + data[stop:]
        path.write_bytes(hole if last else hole + bytes(100_000))
        with pytest.raises(DamagedShard):
            index_shard(path)
        assert isinstance(list(salvage(path))[-1], LostSample)


@pytest.mark.parametrize("damage", ["empty", "garbage", "zeros", "gone", "swapped", "folder"])
def test_another_file_in_place_of_a_shard_is_noticed(folder: Path, damage: str) -> None:
    path = folder / "train-0000.tar"
    size = path.stat().st_size
    if damage == "swapped":
        other = folder / "train-0001.tar"
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
    elif damage in ("gone", "folder"):
        path.unlink()
        if damage == "folder":
            path.mkdir()
    else:
        content = {"empty": b"", "garbage": random.Random(0).randbytes(size), "zeros": bytes(size)}
        path.write_bytes(content[damage])
        with pytest.raises(DamagedShard):
            index_shard(path)
        assert all(isinstance(item, LostSample) for item in salvage(path))
    assert_noticed(folder)
    with pytest.raises(DamagedShard):
        list(Shards(folder))


def test_damage_after_opening_is_noticed(folder: Path) -> None:
    samples = Shards(folder)
    path = folder / "train-0000.tar"
    data = path.read_bytes()
    path.write_bytes(data[:600] + b"?" + data[601:])
    with pytest.raises(DamagedShard, match="SHA-256"):
        assert samples[0]
    path.write_bytes(data)
    assert samples[0].key == "a"
    path.write_bytes(data[:900])  # its hash was verified by now
    with pytest.raises(DamagedShard, match="cut off inside"):
        assert samples[0]


def test_repeated_keys_are_errors(folder: Path, tmp_path: Path) -> None:
    for members in (pairs("aba"), pairs("aa"), [*pairs("ab"), ("a.txt", b"x")]):
        path = write_tar(tmp_path / "twice.tar", members)
        with pytest.raises(DamagedShard, match="twice"):
            index_shard(path)
        items = list(salvage(path))
        assert all(isinstance(item, LostSample) or item.key == "b" for item in items)
    again = write_tar(folder / "train-0002.tar", pairs("xa"))
    entries = [index_shard(folder / name) for name in (*KEYS, again.name)]
    with pytest.raises(DamagedShard, match=r"key a is in train-0000.tar and in train-0002.tar"):
        write_manifest(folder, entries)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"] = entries  # a manifest that another program wrote
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert any("key a is also in" in problem for problem in check(folder))
    assert [s.image for s in Shards(folder) if s.key == "a"] == [image_of("a")] * 2


def test_a_damaged_index_is_noticed(folder: Path) -> None:
    path = folder / "train-0000.index.json"
    text = path.read_bytes()
    rng = random.Random(0)
    flipped = []
    for _ in range(100):
        damaged = bytearray(text)
        damaged[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        flipped.append(bytes(damaged))
    hostile = [b"[]", b"{}", b"null", b'{"samples": 3}', b'{"samples": [{"key": 1}]}', b"[" * 99999]
    for content in [*flipped, *(text[:n] for n in range(0, len(text), 37)), *hostile]:
        path.write_bytes(content)
        assert any("index" in problem for problem in check(folder))
        with pytest.raises(DamagedShard):
            list(Shards(folder))
    path.unlink()
    assert any("missing" in problem for problem in assert_noticed(folder))


def test_a_damaged_manifest_is_noticed(folder: Path) -> None:
    path = folder / "manifest.json"
    text = path.read_bytes()
    rng = random.Random(0)
    for position in range(0, len(text), 2):
        damaged = bytearray(text)
        damaged[position] ^= 1 << rng.randrange(7)
        path.write_bytes(damaged)
        try:
            same = json.loads(damaged) == json.loads(text)
        except ValueError:
            same = False
        assert same or list(check(folder)), damaged[position - 20 : position + 20]
    for position in range(0, len(text) - 2, 29):
        path.write_bytes(text[:position])
        assert_noticed(folder)
    path.unlink()
    assert "multimodal data index" in assert_noticed(folder)[0]


@pytest.mark.parametrize("name", ["../outside.tar", "/etc/passwd", "pipe:touch owned", "a\0.tar"])
def test_a_manifest_cannot_name_files_outside_its_folder(folder: Path, name: str) -> None:
    write_tar(folder.parent / "outside.tar", pairs("z"))
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0] |= {"name": name, "split": shards.split_of(name)}
    path.write_text(json.dumps(manifest))
    assert_noticed(folder)
    with pytest.raises(DamagedShard, match="not the name of a shard"):
        Shards(folder)


def test_a_shard_that_is_not_in_the_manifest_is_noticed(folder: Path) -> None:
    write_tar(folder / "train-0009.tar", pairs("z"))
    assert any("not in the manifest" in problem for problem in assert_noticed(folder))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("owned"),)  # type: ignore[return-value]


def test_members_that_other_readers_would_run_are_reported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    members = [("x.jpg", image_of("x")), ("x.json", record_of("x")), ("x.pyd", bomb)]
    write_tar(folder / "train-0000.tar", [*members, ("pipe:touch owned.jpg", b"y")])
    write_manifest(folder, [index_shard(folder / name) for name in KEYS])
    problems = list(check(folder))
    assert any("pickle" in problem for problem in problems)
    assert any("shell command" in problem for problem in problems)
    assert {sample.key for sample in Shards(folder)} >= {"x", "pipe:touch owned"}
    assert [sample.record for sample in Shards(folder) if sample.key == "x"]
    assert list(salvage(folder / "train-0000.tar"))
    assert not (tmp_path / "owned").exists()


def test_names_of_other_writers_are_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("./v1.0/a.jpg", b"1"), ("./v1.0/a.seg.png", b"2")])
    with tarfile.open(path, "a") as tar:
        directory = tarfile.TarInfo("v2.0")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
    assert index_shard(path)["samples"] == 1
    (sample,) = shards.read_index(path)
    assert sample["key"] == "./v1.0/a" and set(sample["members"]) == {"jpg", "seg.png"}
    for members in ([("nosuffix", b"1")], [(".jpg", b"1")], [("a.", b"1")]):
        with pytest.raises(DamagedShard, match="no samples"):
            index_shard(write_tar(tmp_path / "y.tar", members))
    with tarfile.open(tmp_path / "z.tar", "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DamagedShard, match="not a plain file"):
        index_shard(tmp_path / "z.tar")


def test_unreadable_records_are_errors() -> None:
    for data in (b"", b"{", b"[1]", b"\xff\xfe", b"null"):
        with pytest.raises(ValueError, match="sample k"):
            assert Sample("k", {"json": data}).record
    with pytest.raises(ValueError, match="sample k"):
        assert Sample("k", {"txt": b"\xff"}).record
    with pytest.raises(ValueError, match="sample k has no image"):
        assert Sample("k", {"txt": b"x"}).image
    assert Sample("k", {"txt": b" a cat\n"}).record["captions"] == ["a cat"]


def test_index_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in KEYS:
        shutil.copy(folder / name, plain)
    plain.chmod(0o555)
    try:
        with pytest.raises(ValueError, match="--out NEW_FOLDER"):
            main(["index", str(plain)])
        assert len(list(plain.iterdir())) == len(KEYS)
        for _ in range(2):  # a second time finds the links in place
            assert main(["index", str(plain), "--out", str(tmp_path / "links")]) == 0
    finally:
        plain.chmod(0o755)
    assert main(["check", str(tmp_path / "links")]) == 0
    assert assert_right(Shards(tmp_path / "links")) == ["a", "b", "c", "d", "e", "f"]
    assert main(["index", str(plain)]) == 0
    assert "3 shards, 6 samples" in capsys.readouterr().out
    # indexing again must not bless damage
    data = bytearray((plain / "val-0000.tar").read_bytes())
    data[600] ^= 1
    (plain / "val-0000.tar").write_bytes(data)
    with pytest.raises(ValueError, match="1 of 3 shards are damaged"):
        main(["index", str(plain)])
    assert "val-0000.tar" in capsys.readouterr().err
    assert main(["check", str(plain)]) == 1
    out, err = capsys.readouterr()
    assert "val-0000.tar: SHA-256" in err and "1 problem" in out
    (plain / "train-0001.tar").unlink()
    with pytest.raises(ValueError, match="2 of 3 shards"):
        main(["index", str(plain)])
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        main(["index", str(tmp_path / "nowhere")])


def test_check_decodes_images_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = io.BytesIO()
    Image.new("RGB", (4, 4)).save(good, "JPEG")
    members = [("a.jpg", good.getvalue()), ("a.txt", b"good"), *pairs("b")]
    write_manifest(tmp_path, [index_shard(write_tar(tmp_path / "train-0.tar", members))])
    assert main(["check", str(tmp_path)]) == 0
    assert main(["check", str(tmp_path), "--decode"]) == 1
    assert "sample b: not an image that can be read" in capsys.readouterr().err
