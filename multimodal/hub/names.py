"""What the name of a model means. Every option that takes a model takes all of these:

    runs/joint/model        a folder
    starter                 a bundled model
    user/name               a repository of the Hugging Face Hub, from the cache or the network
    user/name@revision      the same at a branch, a tag or a commit
    hf://user/name@revision, https://huggingface.co/user/name/tree/revision    the same

A folder or a file that exists comes first, whatever else its name may mean.
"""

from importlib.resources import files
from pathlib import Path

from multimodal.files import read_json
from multimodal.hub.address import HubName
from multimodal.hub.download import download

BUNDLED = ("starter",)


def find_model(name: str | Path) -> Path:
    """The folder of a model. A name that is nothing at all is returned as a path.

    Raises:
        ValueError: if a model of the Hub cannot be had, or must not be read.
    """
    return _find(name)


def part_of(name: str | Path, part: str) -> Path:
    """A part of a model, such as ``image_tokenizer``. What has no such part is returned whole.

    Of a model of the Hub that part alone is downloaded, with the small files that are read beside
    it. Raises ``ValueError`` as ``find_model``.
    """
    # A stock language model has its text tokenizer under another name.
    others = ("tokenizer.json",) if part == "text_tokenizer.json" else ()
    folder = _find(name, part, *others)
    return folder / part if (folder / part).exists() else folder


def levels_of(image_tokenizer: str | Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The levels that a model reads and draws, if its name stands for its image tokenizer.

    Of an image tokenizer that belongs to no model both are empty.
    """
    folder = part_of(image_tokenizer, "image_tokenizer")
    config = folder.parent / "config.json"
    if folder.name != "image_tokenizer" or not config.is_file():
        return (), ()
    stored = read_json(config)
    reads, draws = (stored.get(k) if isinstance(stored, dict) else None for k in ("reads", "draws"))
    return tuple(reads or ()), tuple(draws or ())


def _find(name: str | Path, *parts: str) -> Path:
    path = Path(name)
    if str(name) in BUNDLED and not path.is_dir():
        return Path(str(files("multimodal") / str(name)))
    if path.exists():
        return path
    hub_name = HubName.parse(str(name))
    if hub_name is None:
        return path
    return download(hub_name, *parts)
