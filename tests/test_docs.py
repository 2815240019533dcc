"""The documentation: the site builds without a warning, links lead somewhere, examples are true."""

import html.parser
import logging
import re
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

from docs.examples import BLOCK, SLOW, pages, run_page, workplace
from docs.hooks import command_line
from multimodal.cli import VERBS, main

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INPUT = re.compile(r"^\$ (?:.*\\\n)*.*\n|^(?:>>>|\.\.\.).*\n", re.MULTILINE)
# Entries of decisions are a log: dated, with the numbers that were measured. Commands of then need
# not exist now, so they have tables in place of examples. A report and a comparison have them, too.
WITHOUT_EXAMPLES = ("decisions/", "report.md", "peers.md", "language_model.md")
OF_TUTORIALS = re.compile(r"^```(console|pycon|python|text)\n", re.MULTILINE)


class Page(html.parser.HTMLParser):
    """The anchors of a page, what it links to, and what a browser loads with it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.loaded = {""}, list[str](), list[str]()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if "src" in values:
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(values["href"])


def sources() -> list[Path]:
    return sorted(path for path in DOCS.rglob("*.md"))


def name_of(page: Path) -> str:
    return page.relative_to(DOCS if DOCS in page.parents else ROOT).as_posix()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A warning of mkdocs is an error."""
    folder = tmp_path_factory.mktemp("site")
    logging.getLogger("mkdocs").setLevel(logging.WARNING)
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def test_the_site_has_every_page_and_its_links_lead_somewhere(site: Path) -> None:
    built = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    names = {path.relative_to(site).with_suffix(".md").as_posix() for path in built}
    readmes = {name_of(page).replace("README.md", "index.md") for page in sources()}
    assert readmes <= names and {"reference/command_line.md", "models/starter.md"} <= names
    wrong = []
    for path, page in built.items():
        for link in (*page.links, *page.loaded):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = built[target].anchors if target in built else {parts.fragment}
            if not target.exists() or unquote(parts.fragment) not in anchors:
                wrong.append(f"{path.relative_to(site)}: {link}")
    assert wrong == []
    readme = (ROOT / "README.md").read_text("utf-8")
    for file, anchor in re.findall(r"\]\(docs/([\w/]+)\.md#?([^)]*)\)", readme):
        target = site / f"{file.removesuffix('README')}{'index' * file.endswith('README')}.html"
        assert anchor in built[target].anchors, f"README.md: {file}#{anchor}"


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text("utf-8")
        assert [link for link in Page(path).loaded if urlsplit(link).netloc] == [], path
        assert "fonts.googleapis" not in text and "language-mermaid" not in text, path
    assert (site / "search/search_index.js").stat().st_size > 1e5  # read without a server
    assert "<svg" in (site / "architecture.html").read_text("utf-8")


@pytest.mark.parametrize("page", sources(), ids=name_of)
def test_every_page_has_an_example_with_output(page: Path) -> None:
    text = page.read_text("utf-8")
    if name_of(page).startswith(WITHOUT_EXAMPLES):
        assert re.search(r"^\|.*\|$", text, re.MULTILINE) or len(text.split()) < 1000
        return
    if page.parent.name == "tutorials":  # their own tests run them
        assert OF_TUTORIALS.search(text)
        return
    examples = [block["text"] for block in BLOCK.finditer(text)]
    assert any(INPUT.sub("", example).strip() for example in examples)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if SLOW in page.read_text("utf-8") else [])
        for page in pages()
    ],
    ids=name_of,
)
def test_the_examples_print_what_stands_below_them(page: Path, one_thread: None) -> None:
    with workplace() as folder:
        results = run_page(page.read_text("utf-8"), folder)
    wrong = [result.run for result in results if not result.agrees]
    assert wrong == [], "python -m docs.examples PAGE writes the outputs anew"


def test_the_options_of_all_other_commands_exist() -> None:
    """Commands in blocks of ``sh`` take hours, GPUs or files: their options are looked up."""
    sections = re.split(r"^## multimodal ", command_line(), flags=re.MULTILINE)
    help_of = {section.partition("\n")[0].strip(): section for section in sections[1:]}
    seen = 0
    for page in sources():
        for language, block in FENCE.findall(page.read_text("utf-8")):
            lines = block.replace("\\\n", " ").splitlines() if language == "sh" else []
            for line in lines:
                if not line.startswith("multimodal "):
                    continue
                words = shlex.split(line, comments=True)[1:]
                if words == ["--version"]:
                    continue
                verbs = [verb for verb in help_of if words[: len(verb.split())] == verb.split()]
                assert verbs, f"{name_of(page)}: {line}"
                verb = max(verbs, key=len)
                known = help_of[verb]
                for word in words:
                    option = word.partition("=")[0]
                    lightning = option.startswith(("--data.", "--model.", "--trainer.", "--init_"))
                    if option.startswith("--") and not (lightning and verb.split()[0] in VERBS):
                        assert re.search(rf"{option}\b", known), f"{name_of(page)}: {line}"
                seen += 1
    assert seen > 50


CONFIGURATIONS = [
    (name_of(page), block)
    for page in sources()
    for language, block in FENCE.findall(page.read_text("utf-8"))
    if language == "yaml" and "class_path: multimodal.train" in block and "model:" in block
]


@pytest.mark.parametrize(
    ("page", "block"),
    CONFIGURATIONS,
    ids=[f"{n}-{page}" for n, (page, _) in enumerate(CONFIGURATIONS)],
)
def test_configurations_have_keys_and_values_that_exist(
    page: str, block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(block)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(tmp_path / "mine.yaml"), "--print_config"])
    assert stopped.value.code in (0, None), capsys.readouterr().err
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"]
