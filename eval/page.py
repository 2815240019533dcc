"""A page of pictures and numbers: one HTML file that needs no other file."""

import base64
import io
from dataclasses import dataclass, field
from html import escape

from PIL import Image

from multimodal.terminal import shown

SHOWN = 160  # pixels of a picture's side on the page


@dataclass
class Figure:
    """A picture with a text below it. verdict: True or False if a program checked it."""

    image: Image.Image
    text: str = ""
    verdict: bool | None = None


@dataclass
class Bars:
    """A bar chart: name -> number."""

    title: str
    values: dict[str, float]


@dataclass
class Numbers:
    """A table. Each row has a name, a number and a note, such as an interval."""

    rows: list[tuple[str, str, str]]


@dataclass
class Section:
    """A part of the page: numbers, bar charts, then rows of figures, each below a line of text."""

    title: str
    about: str
    rows: list[tuple[str, list[Figure]]] = field(default_factory=list)
    seconds: float | None = None
    bars: list[Bars] = field(default_factory=list)
    numbers: list[Numbers] = field(default_factory=list)


STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #c0392b; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin: 2.5rem 0 0; border-top: 1px solid var(--line);
  padding-top: 1rem; }
h2 small, p.about, figcaption { color: GrayText; } h2 small { font-weight: normal; float: right; }
p { margin: .2rem 0; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.row { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; width: 8rem; } figcaption { font-size: .8rem; line-height: 1.3;
  overflow-wrap: anywhere; }
img { width: 100%; aspect-ratio: 1; border-radius: 4px; border: 1px solid var(--line);
  box-sizing: border-box; }
.charts { columns: 22rem; margin: .5rem 0; }
table { border-spacing: .5rem .1rem; font-size: .85rem; break-inside: avoid; margin-bottom: 1rem; }
caption { text-align: left; font-weight: bold; } td { max-width: 22rem; overflow-wrap: anywhere; }
td.bar { width: 11rem; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.numbers { columns: 32rem; margin: .5rem 0; } .numbers td { white-space: nowrap; }
.numbers tr { break-inside: avoid; } .numbers table { break-inside: auto; }
td.more { color: GrayText; }
td.bar div { background: #4a7db5; height: .7rem; border-radius: 2px; min-width: 1px; }
.good::before { content: "\\2713\\00a0"; color: var(--good); font-weight: bold; }
.bad::before { content: "\\2717\\00a0"; color: var(--bad); font-weight: bold; }
"""


def page(title: str, about: str, sections: list[Section]) -> str:
    """The text of an HTML file that needs no other file."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1><p class='about'>{escape(about)}</p>",
    ]
    for section in sections:
        seconds = "" if section.seconds is None else f"<small>{section.seconds:.1f} s</small>"
        parts.append(f"<h2>{escape(section.title)} {seconds}</h2>")
        parts.append(f"<p class='about'>{escape(section.about)}</p>")
        parts += map(_numbers, section.numbers)
        if section.bars:
            parts += ["<div class='charts'>", *map(_bars, section.bars), "</div>"]
        for line, figures in section.rows:
            parts.append(f"<h3>{escape(line)}</h3><div class='row'>")
            parts += map(_figure, figures)
            parts.append("</div>")
    return shown("\n".join([*parts, "</html>"])) + "\n"


def _numbers(numbers: Numbers) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td class='number'>{escape(value)}</td>"
        f"<td class='more'>{escape(more)}</td></tr>"
        for name, value, more in numbers.rows
    )
    return f"<div class='numbers'><table>{rows}</table></div>"


def _bars(bars: Bars) -> str:
    largest = max(bars.values.values(), default=0) or 1
    rows = [
        f"<tr><td>{escape(name)}</td><td class='number'>{value:,.4g}</td>"
        if isinstance(value, float)
        else f"<tr><td>{escape(name)}</td><td class='number'>{value:,}</td>"
        for name, value in bars.values.items()
    ]
    widths = [100 * value / largest for value in bars.values.values()]
    lines = [
        f"{row}<td class='bar'><div style='width:{width:.1f}%'></div></td></tr>"
        for row, width in zip(rows, widths, strict=True)
    ]
    return f"<table><caption>{escape(bars.title)}</caption>{''.join(lines)}</table>"


def _figure(figure: Figure) -> str:
    kind = {None: "", True: " class='good'", False: " class='bad'"}[figure.verdict]
    text = escape(figure.text)
    source, alt = _data_address(figure.image), text or "picture"
    caption = f"<figcaption{kind}>{text}</figcaption>" if text or kind else ""
    return f'<figure><img src="{source}" alt="{alt}">{caption}</figure>'


def _data_address(image: Image.Image) -> str:
    small = image.convert("RGB")
    if max(small.size) < SHOWN:  # a browser would blur a small picture
        small = small.resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)
    elif max(small.size) > 2 * SHOWN:
        small = small.resize((2 * SHOWN, 2 * SHOWN), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "PNG" if len(small.getcolors(4096) or []) else "JPEG", quality=90)
    kind = "png" if file.getvalue().startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
