"""Headers of tars: the standard library's reader where it can be trusted, an error elsewhere."""

import errno
import io
import os
import tarfile
from pathlib import Path

import pytest

from multimodal.data.builder.salvage import LostSample, salvage
from multimodal.data.formats.tar import BadTar, only_zeros, read_members
from multimodal.data.members import scan
from multimodal.data.samples import Sample
from multimodal.data.shards import DamagedShard, index_shard, read_index, write_tar

LONG = "x" * 150 + "/" + "y" * 200
NAMES = ("a.jpg", "folder/b.png", "dög ß.jpg", f"{LONG}.jpg", "n" * 100 + ".json", "\udcff.txt")


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **pax: str) -> bytes:
    """The blocks of one member, as pax if it has fields and as GNU otherwise."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.pax_headers = len(data), kind, dict(pax)
    form = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    return info.tobuf(form, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header alone, that claims any size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_the_standard_library(tmp_path: Path, form: int) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:", format=form) as tar:
        names = [n for n in NAMES if form != tarfile.USTAR_FORMAT or len(n) <= 100]
        names.append(f"{'p' * 120}/{'q' * 90}.jpg")  # ustar splits it into two fields
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 700 * number
            if form == tarfile.PAX_FORMAT:
                info.mtime = 1.5  # a field of pax for every member
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(
                f"special {kind!r} {LONG if form != tarfile.USTAR_FORMAT else ''}"
            )
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
    with tarfile.open(path) as tar:
        expected = [
            (m.name, m.offset, m.offset_data, m.size, m.isreg(), m.isdir())
            for m in tar.getmembers()
        ]
    for repair in (False, True):
        found = [
            (m.name, m.start, m.offset, m.size, m.plain, m.folder)
            for m in read_members(path, repair=repair)
        ]
        assert found == expected


HOSTILE = {
    "3,000 long names": member(LONG)[:1024] * 3000 + member("b.jpg", b"x"),
    "3,000 pax headers": b"".join(member("a.jpg", comment="x")[:1024] for _ in range(3000)),
    "a long name of a terabyte": header("././@LongLink", 1 << 40, tarfile.GNUTYPE_LONGNAME),
    "pax fields of a terabyte": header("././@PaxHeader", 1 << 40, tarfile.XHDTYPE),
    "a negative size": header("a.jpg", -1024),
    "a pax size of 2^70": member("a.jpg", b"x", size=str(1 << 70)),
    "a pax size below 0": member("a.jpg", b"x", size="-512"),
    "a pax size in words": member("a.jpg", b"x", size="many"),
    "one pax name for all": member("g", b"19 path=all_in.jpg\n", tarfile.XGLTYPE),
    "pax fields that lie": member("p", b"99 path=a.jpg\n", tarfile.XHDTYPE),
    "pax fields without an end": member("p", b"13 path=a.jpg", tarfile.XHDTYPE),
    "a member of 2^62 bytes": header("a.jpg", 1 << 62),
    "a checksum that is wrong": b"X" + member("a.jpg", b"x")[1:],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_that_lie_are_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.tar"
    good = member("first.jpg", b"1") + member("first.json", b"{}")
    last = member("last.jpg", b"2") + member("last.json", b"{}")
    path.write_bytes(good + HOSTILE[name] + last + bytes(1024))
    with pytest.raises(DamagedShard, match=r"a\.tar"):
        list(scan(path))
    with pytest.raises(DamagedShard, match=r"a\.tar"):
        index_shard(path)
    items = list(salvage(path))
    whole = {item.key for item in items if isinstance(item, Sample)}
    # A sample without its text is one that the builder rejects.
    assert whole >= {"first"}
    assert any(isinstance(item, LostSample) or len(item.members) < 2 for item in items)
    if "2^62" not in name and "3,000" not in name:
        assert "last" in whole


def test_what_is_no_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "zero.tar").symlink_to("/dev/zero")
    (tmp_path / "folder.tar").mkdir()
    for name in ("pipe", "zero", "folder", "missing"):
        path = tmp_path / f"{name}.tar"
        with pytest.raises(DamagedShard, match=rf"{name}\.tar"):
            list(scan(path))
        (lost,) = salvage(path)
        assert isinstance(lost, LostSample) and name in lost.key


def test_a_sparse_file_of_a_terabyte_is_refused_and_holes_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "sparse.tar"
    good = member("a.jpg", b"1") + member("a.json", b"{}")
    try:
        with open(path, "wb") as file:
            file.write(good)
            file.truncate(1 << 40)
    except OSError as error:
        assert error.errno == errno.EFBIG
        pytest.skip("no sparse files here")
    with pytest.raises(DamagedShard, match="unfinished download"):
        list(scan(path))
    (lost,) = salvage(path)
    assert isinstance(lost, LostSample) and "unfinished download" in lost.reason
    os.truncate(path, 1 << 29)  # half a gigabyte of zeros is read, and costs nothing
    with pytest.raises(DamagedShard, match="zeros"):
        list(scan(path))
    assert only_zeros(path, len(good), 1 << 29) and not only_zeros(path, 0, 1 << 29)
    assert [item.key for item in salvage(path) if isinstance(item, Sample)] == ["a"]


def test_a_block_that_is_no_header_is_skipped_only_in_repair(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(member("a.jpg", b"1") + b"?" * 1536 + member("b.jpg", b"2") + bytes(1024))
    with pytest.raises(BadTar, match="byte 1024: not a header"):
        list(read_members(path))
    assert [m.name for m in read_members(path, repair=True)] == ["a.jpg", "b.jpg"]


def test_only_a_long_key_gets_a_header_of_pax(tmp_path: Path) -> None:
    keys = ["a", "folder/b", "k" * 90]
    write_tar(tmp_path / "short.tar", [(key, {"json": b"{}", "jpg": b"x"}) for key in keys])
    with tarfile.open(tmp_path / "ustar.tar", "w:", format=tarfile.USTAR_FORMAT) as tar:
        for key in keys:
            for suffix, data in (("json", b"{}"), ("jpg", b"x")):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert (tmp_path / "short.tar").read_bytes() == (tmp_path / "ustar.tar").read_bytes()
    keys = ["k" * 150, "a", "ö" * 90]
    write_tar(tmp_path / "long.tar", [(key, {"0.codes.npy": b"x"}) for key in keys])
    assert index_shard(tmp_path / "long.tar")["samples"] == 3
    assert [sample["key"] for sample in read_index(tmp_path / "long.tar")] == keys
