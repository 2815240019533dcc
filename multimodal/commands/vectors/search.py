"""``multimodal search``: the images of a folder that fit a text, or another image, best."""

import json
import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from multimodal.commands.options import at_least_one, load_model, make_parser
from multimodal.data.formats.folders import IMAGE_SUFFIXES
from multimodal.files import address_of
from multimodal.terminal import print_error

if TYPE_CHECKING:
    from PIL import Image

EPILOG = """QUERY is an image where it is an address (see --urls), a file that exists, or ends in
.jpg, .png and the like; else a text. --images embeds a folder. What was embedded is kept by content
under --cache (default: multimodal/ in the user's cache folder), so the second search of a folder is
quick; --cache "" keeps nothing. What is not an image, or cannot be read, is named on stderr, and
the exit status is 1. --index searches what multimodal index wrote: images, or pieces of texts with
their lines.

examples:
  multimodal search "a dog in the snow" --images photos/ -k 5
  multimodal search cat.jpg --images photos/ --json
  multimodal search "a dog in the snow" --index photos.index
"""


def default_cache() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(home) / "multimodal" / "embeddings")


def main(argv: list[str]) -> int:
    parser = make_parser(
        "search", "Find the images or texts that fit a text, or another image, best.", EPILOG
    )
    parser.add_argument("query", metavar="QUERY", help="a text, or the path of an image")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--images", type=Path, metavar="DIR", help="a folder of images")
    where.add_argument("--index", type=Path, metavar="DIR", help="what multimodal index wrote")
    parser.add_argument("-k", type=int, default=10, metavar="K", help="how many (default 10)")
    parser.add_argument("--json", action="store_true", help='{"image": ..., "score": ...} a line')
    parser.add_argument("--batch-size", type=int, default=32, help="images at once (default 32)")
    parser.add_argument("--cache", default=None, metavar="DIR", help='embeddings; "" for none')
    arguments = parser.parse_args(argv)
    at_least_one(arguments, "k", "batch_size")
    query = read_query(arguments.query, arguments.urls)
    search = _search_images if arguments.images else _search_index
    return search(query, arguments)


def read_query(query: str, urls: bool) -> "str | Image.Image":
    """The text or the image to search for.

    Args:
        query: as the user wrote it.
        urls: whether web addresses are fetched.

    Raises:
        ValueError: for the path or address of an image that cannot be read. As a text it would
            find images that have nothing to do with it.
    """
    is_image = os.path.splitext(query)[1].lower().removeprefix(".") in IMAGE_SUFFIXES
    if not (is_image or os.path.isfile(query) or address_of(query)):
        return query
    from multimodal.inference.values import open_source

    return open_source(query, urls=urls)


def _search_index(query: "str | Image.Image", arguments: Namespace) -> int:
    from multimodal.index.index import Index

    index = Index.open(arguments.index, load_model(arguments))
    for hit in index.search(query, arguments.k):
        words = " ".join(hit.words.split())
        line = json.dumps(hit.to_json()) if arguments.json else None
        print(line or f"{hit.score:.3f}\t{hit.source}" + (f"\t{words}" if words else ""))
    return 0


def _search_images(query: "str | Image.Image", arguments: Namespace) -> int:
    from tqdm import tqdm

    from multimodal.data.formats.folders import list_images
    from multimodal.inference.embedding import EmbeddingCache

    folder = default_cache() if arguments.cache is None else arguments.cache
    found = list_images(arguments.images, outside=Path(folder) if folder else None)
    for complaint in found.complaints():
        print_error(f"multimodal search: {complaint}")
    model = load_model(arguments)
    cache = EmbeddingCache(Path(folder), model.fingerprint) if folder else None
    results = model.search(
        query,
        found.files,
        arguments.k,
        cache=cache,
        batch_size=arguments.batch_size,
        progress=partial(tqdm, total=len(found.files), unit="image", file=sys.stderr, disable=None),
    )
    if cache is not None:
        cache.save()
    for error in results.skipped.values():
        print_error(f"multimodal search: error: {error}")
    for path, score in results:
        line = {"image": str(path), "score": score}
        print(json.dumps(line) if arguments.json else f"{score:.3f}\t{path}")
    return int(bool(found.skipped or results.skipped))
