"""Markdown to PDF: markdown-it reads it, Typst (a compiler in one wheel) sets it."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it.token import Token

from docs.reporting.results import ROOT

STYLE = """
#set page(paper: "a4", margin: (x: 2.2cm, y: 2.2cm), numbering: "1")
#set text(size: 10pt, lang: "en")
#set par(justify: true, leading: 0.6em)
#set table(stroke: none, inset: (x: 5pt, y: 3.2pt))
#show table: set text(size: 8.5pt)
#show table: set par(justify: false)
#show table: it => block(above: 1em, below: 1.2em, breakable: false, it)
#show raw.where(block: true): it => block(above: 1em, below: 1em, breakable: false, it)
#show heading: it => block(above: 1.6em, below: 0.8em, sticky: true, it)
#show link: set text(fill: rgb("#1f4e8c"))
#show raw: set text(size: 8pt)
"""
PERCENT, NO_BREAK = re.compile(r"(?<=\d) (?=%)"), "\N{NO-BREAK SPACE}"


def write_pdf(page: Path, out: Path) -> None:
    """Write a page as PDF. Its pictures are found beside it. Links to other pages are words.

    Raises:
        ValueError: without the packages.
    """
    try:
        import typst
    except ImportError as error:
        raise ValueError("a PDF needs typst: pip install 'multimodal[docs]'") from error
    source = STYLE + markup(page.read_text("utf-8"), page.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    typst.compile(source.encode(), output=str(out), root=str(ROOT))


def markup(text: str, folder: Path) -> str:
    """Markdown as Typst's markup. folder: where relative pictures are."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return "".join(_blocks(tokens, folder))


def _string(text: str) -> str:
    """A string of Typst: its escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _blocks(tokens: Sequence["Token"], folder: Path) -> Iterator[str]:
    opened: list[str] = []  # the ends of what is open
    for token in tokens:
        match token.type:
            case "heading_open":
                yield f"#heading(level: {token.tag[1]})["
            case "heading_close":
                yield "]\n\n"
            case "paragraph_close":
                yield "\n\n" if not token.hidden else "\n"
            case "bullet_list_open" | "ordered_list_open":
                yield f"#{'list' if token.type.startswith('bullet') else 'enum'}("
            case "list_item_open":
                yield "["
            case "list_item_close":
                yield "],"
            case "bullet_list_close" | "ordered_list_close":
                yield ")\n\n"
            case "fence" | "code_block":
                yield f"#raw({_string(token.content.rstrip())}, block: true)\n\n"
            case "table_open":
                opened.append(")\n\n")
                yield _table_start(tokens, token)
            case "table_close":
                yield "table.hline(stroke: 0.8pt)" + opened.pop()
            case "thead_open":
                yield "table.header("
            case "thead_close":
                yield "table.hline(stroke: 0.4pt)),"
            case "th_open":
                yield "[*"
            case "th_close":
                yield "*],"
            case "td_open":
                yield "["
            case "td_close":
                yield "],"
            case "inline":
                yield from _inline(token.children or [], folder)


def _table_start(tokens: Sequence["Token"], start: "Token") -> str:
    """The first column takes the room that the others leave, and the widest cells may wrap."""
    place = tokens.index(start)
    columns, widest, column = 0, list[int](), 0
    for token in tokens[place:]:
        if token.type == "table_close":
            break
        if token.type == "tr_open":
            column = 0
        if token.type in ("th_open", "td_open"):
            columns, column = max(columns, column + 1), column + 1
            widest += [0] * (columns - len(widest))
        if token.type == "inline":
            widest[column - 1] = max(widest[column - 1], len(token.content))
    total = sum(widest)
    sizes = ", ".join("1fr" if n == max(widest) or n > 0.35 * total else "auto" for n in widest)
    return f"#table(columns: ({sizes},), align: left, table.hline(stroke: 0.8pt),"


def _inline(tokens: Sequence["Token"], folder: Path) -> Iterator[str]:
    for token in tokens:
        match token.type:
            case "text":
                yield f"#{_string(PERCENT.sub(NO_BREAK, token.content))};"
            case "softbreak" | "hardbreak":
                yield "\n"
            case "code_inline":
                yield f"#raw({_string(token.content)});"
            case "strong_open":
                yield "#strong["
            case "em_open":
                yield "#emph["
            case "strong_close" | "em_close":
                yield "];"
            case "link_open":
                href = str(token.attrs["href"])
                web = href.startswith(("http://", "https://"))
                yield f"#link({_string(href)})[" if web else "#emph["
            case "link_close":
                yield "];"
            case "image":
                path = (folder / str(token.attrs["src"])).resolve().relative_to(ROOT)
                yield f"#figure(image({_string('/' + path.as_posix())}, width: 92%), caption: ["
                yield from _inline(token.children or [], folder)
                yield "]);"
