"""What mkdocs puts into the site beside the pages that are written (mkdocs.yml names this file).

- ``reference/command_line.md``: what every verb says to ``--help``
- ``models/starter.md``: the card of the bundled model
- ``build/docs/``: the sources as mkdocstrings reads them, with an ``__init__.py`` in each folder
- diagrams: blocks of mermaid become SVG when the site is built, so that a page loads no script
"""

import contextlib
import io
import os
import re
import shutil
from pathlib import Path
from typing import Any, Literal

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "build/docs"  # mkdocs.yml names it
HELP_WIDTH = 84  # characters of a line on a laptop
# A link to a file of the repository that is not part of the site: its path is shown.
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./((?:tests|benchmarks|examples)[^)\s]*)(?: \"[^\"]*\")?\)")
MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)

COMMAND_LINE = """# The command line

What each verb says to `--help`, written by the program when this site is built. What all verbs have
in common (exit status, JSON, errors) is in [the protocol](../formats/command_line.md).

## multimodal

```console
$ multimodal --help
{general}
```
"""
VERB = """
## multimodal {verb}

```console
$ multimodal {verb} --help
{text}
```
"""


def on_startup(command: Literal["build", "gh-deploy", "serve"], dirty: bool) -> None:
    """Copy the package for mkdocstrings, which does not look into folders without __init__.py.

    tokenizers/ at the root has none, so that it does not hide the library of that name.
    """
    shutil.rmtree(SOURCES, ignore_errors=True)
    for folder, _, files in os.walk(ROOT / "multimodal", followlinks=True):
        modules = [name for name in files if name.endswith(".py")]
        if modules:
            copy = SOURCES / Path(folder).relative_to(ROOT)
            copy.mkdir(parents=True)
            (copy / "__init__.py").touch()
            for name in modules:
                shutil.copyfile(Path(folder, name), copy / name)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {"reference/command_line.md": command_line(), "models/starter.md": starter_card()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    markdown = OUTSIDE.sub(r'<abbr title="\2">\1</abbr>', markdown)
    page.meta["diagrams"] = MERMAID.findall(markdown)
    if page.meta["diagrams"]:
        page.meta["hide"] = ["toc"]  # room for a wide picture
    return MERMAID.sub('<div class="diagram"></div>', markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    for number, source in enumerate(page.meta["diagrams"]):
        picture = f'<div class="diagram" tabindex="0">{draw(source, f"diagram-{number}")}</div>'
        html = html.replace('<div class="diagram"></div>', picture, 1)
    return html


def draw(source: str, name: str) -> str:
    """Mermaid to SVG without its colours: docs/theme/style.css has those of light and dark."""
    import mmdr

    svg: str = mmdr.render(source).svg()
    svg = re.sub(r"<style>.*?</style>", "", svg, flags=re.DOTALL)
    return svg.replace("merman", name)


def command_line() -> str:
    """The page of all verbs, and of those that a verb has in it (``data build``)."""
    from multimodal.cli import VERBS

    with _columns(HELP_WIDTH):
        page = COMMAND_LINE.format(general=_help())
        for verb in VERBS:
            text = _help(*verb.split())
            page += VERB.format(verb=verb, text=text)
            names = re.search(r"^  (\w+(?:\|\w+)+)$", text, re.MULTILINE)
            for name in names[1].split("|") if names else ():
                if f"{verb} {name}" not in VERBS:
                    page += VERB.format(verb=f"{verb} {name}", text=_help(verb, name))
    return page


def starter_card() -> str:
    """Its card, and what ``multimodal info`` says of its folder."""
    card = (ROOT / "multimodal/starter/README.md").read_text("utf-8")
    command = "$ multimodal info starter"
    return f"{card}\n## The folder\n\n```console\n{command}\n{_printed('info', 'starter')}\n```\n"


def _help(*verb: str) -> str:
    return _printed(*verb, "--help")


def _printed(*arguments: str) -> str:
    from multimodal.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*arguments])
    return out.getvalue().rstrip()


@contextlib.contextmanager
def _columns(width: int) -> Any:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
