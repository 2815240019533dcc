"""``multimodal search``: the images of a folder that fit a text, or another image, best."""

import json
import os
import sys
from functools import partial
from pathlib import Path

from multimodal.commands.options import at_least_one, load_model, make_parser
from multimodal.terminal import print_error

EPILOG = """QUERY is an image where it names a file that exists, else a text. What was embedded is
kept by content under --cache (default: multimodal/ in the user's cache folder), so the second
search of a folder is quick; --cache "" keeps nothing. What is not an image, or cannot be read, is
named on stderr, and the exit status is 1.

examples:
  multimodal search "a dog in the snow" --images photos/ -k 5
  multimodal search cat.jpg --images photos/ --json
"""


def default_cache() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(home) / "multimodal" / "embeddings")


def main(argv: list[str]) -> int:
    parser = make_parser(
        "search", "Find the images that fit a text, or another image, best.", EPILOG
    )
    parser.add_argument("query", metavar="QUERY", help="a text, or the path of an image")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="where to search")
    parser.add_argument("-k", type=int, default=10, metavar="K", help="how many (default 10)")
    parser.add_argument("--json", action="store_true", help='{"image": ..., "score": ...} a line')
    parser.add_argument("--batch-size", type=int, default=32, help="images at once (default 32)")
    parser.add_argument("--cache", default=None, metavar="DIR", help='embeddings; "" for none')
    arguments = parser.parse_args(argv)
    at_least_one(arguments, "k", "batch_size")

    from tqdm import tqdm

    from multimodal.data.formats.folders import list_images
    from multimodal.inference.embedding import EmbeddingCache

    folder = default_cache() if arguments.cache is None else arguments.cache
    found = list_images(arguments.images, outside=Path(folder) if folder else None)
    for complaint in found.complaints():
        print_error(f"multimodal search: {complaint}")
    model = load_model(arguments)
    query = Path(arguments.query) if os.path.isfile(arguments.query) else arguments.query
    cache = EmbeddingCache(Path(folder), model.fingerprint) if folder else None
    total = len(found.images)
    results = model.search(
        query,
        found.images,
        arguments.k,
        cache=cache,
        batch_size=arguments.batch_size,
        progress=partial(tqdm, total=total, unit="image", file=sys.stderr, disable=None),
    )
    if cache is not None:
        cache.save()
    for error in results.skipped.values():
        print_error(f"multimodal search: error: {error}")
    for path, score in results:
        line = {"image": str(path), "score": score}
        print(json.dumps(line) if arguments.json else f"{score:.3f}\t{path}")
    return int(bool(found.skipped or results.skipped))
