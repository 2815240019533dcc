"""Tables of text: the cells are those of Python's csv, and no row decides over another one."""

import csv
import io
import json
import random
from pathlib import Path

import pytest

from multimodal.data.builder.build import build_shards
from multimodal.data.builder.rows import find_layout, looks_like_image, read_rows, split_rows
from tests.photos import picture, samples


def split(text: str, delimiter: str = ",") -> list[list[str]]:
    lines = list(io.StringIO(text, newline=""))
    return [cells for _, cells in split_rows(lines, delimiter)]


@pytest.mark.parametrize("delimiter", [",", "|", ";"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_that_csv_writes_are_read_as_csv_reads_them(
    delimiter: str, quoting: int, end: str
) -> None:
    rng = random.Random(0)
    for _ in range(150):
        width = rng.randint(1, 4)
        rows = [
            [
                "".join(rng.choices(f"ab \n\"'{delimiter}é", k=rng.randrange(6)))
                for _ in range(width)
            ]
            for _ in range(rng.randint(1, 6))
        ]
        file = io.StringIO(newline="")
        csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(rows)  # type: ignore[arg-type]
        text = file.getvalue()
        expected = [
            row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row
        ]
        assert split(text, delimiter) == expected == [row for row in rows if row]


def test_cells_of_any_length_are_read() -> None:
    long = "x" * (csv.field_size_limit() + 1)
    assert split(f"a,{long}\n") == [["a", long]]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('a.png\t"a dog" in snow\nb.png\tx\n', [["a.png", '"a dog" in snow'], ["b.png", "x"]]),
        ('a.png\tsaid "no"\n', [["a.png", 'said "no"']]),
        # The quote would swallow two rows, up to the end of the third.
        (
            'a.png\t"a dog\nb.png\ta cat\nc.png\tstop"\nd.png\tx\n',
            [["a.png", '"a dog'], ["b.png", "a cat"], ["c.png", 'stop"'], ["d.png", "x"]],
        ),
        ('a.png\t"never closed\nb.png\tx', [["a.png", '"never closed'], ["b.png", "x"]]),
        ('a.png\t"2\nlines"\tx\nb.png\ty\tz\n', [["a.png", "2\nlines", "x"], ["b.png", "y", "z"]]),
        ('"two\nlines"\ta.png\n', [["two\nlines", "a.png"]]),
        ('a.png\t""\t"5"""\n', [["a.png", "", '5"']]),
        ("a\t\n\n\nb\t\n", [["a", ""], ["b", ""]]),
        ('"', [['"']]),
        ("", []),
    ],
)  # fmt: skip
def test_a_quote_that_cannot_be_one_is_a_letter(text: str, rows: list[list[str]]) -> None:
    assert split(text, "\t") == rows
    assert split(text.replace("\t", ","), ",") == rows
    assert split(text.replace("\n", "\r\n").replace("\t", "|"), "|") == [
        [cell.replace("\n", "\r\n") for cell in row] for row in rows
    ]


def test_rows_have_the_numbers_of_their_lines(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text('image,text\n\na.png,"one\ntwo"\nb.png,x,y,z\nc.png,last\n')
    _, rows = read_rows(table)
    assert [(row.place.numbers, bool(row.problem)) for row in rows] == [
        ((3,), False), ((5,), True), ((6,), False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "delimiter", "image", "text"),
    [
        ("image,caption", ",", None, None),
        ("image_name| comment_number| comment", "|", None, None),  # Flickr30k
        ("Caption\tFILE", "\t", None, None),
        ("caption;file_name", ";", None, None),
        ("1000268201_693b08cb0e.jpg#0\tA child in a pink dress .", "\t", "1", "2"),  # Flickr8k
        ("a dog, running\ta.jpg", "\t", "2", "1"),
        ("a.jpg|0|a dog", "|", "1", None),
        ("where,what", ",", None, None),
    ],
)
def test_the_first_line_says_how_a_table_is_read(
    first: str, delimiter: str, image: str | None, text: str | None
) -> None:
    for candidates in (",\t|;", "\t|,;"):
        layout = find_layout([first + "\n"], candidates)
        assert (layout.delimiter, layout.image, layout.text) == (delimiter, image, text)
        assert layout.header == (image is None)


def test_names_of_images() -> None:
    for name in ("a.jpg", "b c/d.JPEG ", "x.jpg#3", "https://x.org/a.png", " e.webp"):
        assert looks_like_image(name)
    for text in ("a dog.", ".jpg", "jpg", "a.jpg is nice", "a.txt", ""):
        assert not looks_like_image(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        (tmp_path / f"{name}.png").write_bytes(picture(number))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "a.png,one\nb.png,two\n"),
        ("t.txt", "a.png#0\tone\nb.png#0\ttwo\n"),
        ("t.token", "a.png#0\tone\nb.png#0\ttwo\n"),
        ("t.csv", "image_name| comment_number| comment\na.png| 0| one\nb.png| 0| two\n"),
        ("t.txt", "image,caption\na.png,one\nb.png,two\n"),
        ("t.tsv", '"image"\t"caption"\n"a.png"\t"one"\n"b.png"\t"two"\n'),
        ("t.csv", "\ufeffimage;caption\r\na.png;one\r\nb.png;two\r\n"),
        ("t.jsonl", '{"images": ["a.png"], "text": "one"}\n{"images": "b.png", "text": "two"}\n'),
        ("t.json", '[{"image": "a.png", "caption": "one"}, {"image": "b.png", "text": "two"}]'),
        ("t.json", '{"a.png": "one", "b.png": ["two"]}'),
    ],
)
def test_tables_that_people_have(folder: Path, name: str, content: str) -> None:
    for encoding in ("utf-8", "utf-16"):
        (folder / name).write_bytes(
            content.replace("\ufeff", "").encode(encoding)
            if encoding == "utf-16"
            else content.encode()
        )
        report = build_shards(folder / name, folder / encoding)
        assert report is not None and (report.kept, report.total) == (2, 2)
        records = {
            key: sample.record["captions"] for key, sample in samples(folder / encoding).items()
        }
        assert records == {"a": ["one"], "b": ["two"]}


def test_a_table_without_header_and_with_three_columns_asks_for_the_text(folder: Path) -> None:
    (folder / "t.csv").write_text("a.png|0|one\na.png|1|more\n")
    with pytest.raises(ValueError, match="which column is the text. It has 1, 2, 3"):
        build_shards(folder / "t.csv", folder / "out")
    build_shards(folder / "t.csv", folder / "out", text_column="3")
    assert samples(folder / "out")["a"].record["captions"] == ["one", "more"]


def test_rejected_rows_are_listed_with_file_and_line(folder: Path) -> None:
    table = folder / "t.csv"
    table.write_bytes(
        b"image,caption\n"
        b"a.png,good\n"
        b"a.png,\xff\xfe\n"  # line 3
        b"b.png,x,y\n"
        b"gone.png,one\n"  # lines 5 and 6
        b"gone.png,two\n"
        b",no image\n"
        b"c.png,\n"
        b"https://x.org/a.jpg,far\n"
    )
    report = build_shards(table, folder / "out")
    assert report is not None and (report.kept, report.rejected) == (1, 6)
    lines = [json.loads(line) for line in (folder / "out/rejected.jsonl").read_text().splitlines()]
    assert all(line["file"] == str(table) for line in lines)
    assert {tuple(line["lines"]): line["reason"] for line in lines} == {
        (3,): "unreadable text", (4,): "unreadable row", (5, 6): "unreadable image",
        (7,): "no image", (8,): "no text", (9,): "no image",
    }  # fmt: skip
    assert samples(folder / "out")["a"].record["captions"] == ["good"]
