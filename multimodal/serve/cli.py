"""``multimodal serve``: a model behind HTTP, in the shape of OpenAI's API."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from multimodal.commands.options import load_model, make_parser
from multimodal.commands.signing import add_sign, signer_of
from multimodal.devices import add_in_one_order
from multimodal.serve.engine.settings import LOCAL_HOSTS, Settings
from multimodal.terminal import print_error

if TYPE_CHECKING:
    from multimodal.api import Model
    from multimodal.serve.server import Fallback

KEY = "MULTIMODAL_API_KEY"
EPILOG = f"""Addresses: / is a page for people. /v1/chat/completions, /v1/images/generations,
/v1/images/edits, /v1/embeddings, /v1/models, /health, /metrics. Requests of all kinds are decoded
together, and each gets what it would get alone. An adapter is a model of its own: requests name
it. It takes the memory of the layers that it changes. Without a key everyone who reaches the
address may use it. A key on the command line can be seen by other users of the machine, {KEY}
in the environment cannot. SIGINT and SIGTERM let running requests end, a second one does not.

Of several workers each has a record of its own (NAME.0.jsonl, NAME.1.jsonl: multimodal log takes
several), and /metrics has the numbers of all, by the label worker. One that dies takes its
connections with it, and is started again.

examples:
  multimodal serve
  multimodal serve runs/photos-joint/model --port 9000 --name photos
  multimodal serve runs/photos-joint/model --adapter scenes=runs/scenes/adapter
  multimodal serve --record requests.jsonl --record-texts --record-text-days 30
  {KEY}=... multimodal serve user/name --host 0.0.0.0
"""
MAX_WORKERS = 64
MISSING = "serving needs more packages: pip install 'multimodal[serve]'"
SETTINGS = {
    "rows": "texts and drawings that are decoded together",
    "requests": "at once, running or waiting; more get status 429",
    "prefix_bytes": "in which what prompts begin with is kept, so that it is read once; 0: nothing",
    "max_body": "bytes of a request",
    "max_pixels": "of an image in a request",
    "max_tokens": "of a text that is written",
    "stop_timeout": "seconds in which requests may end when the server stops",
}


def main(argv: list[str]) -> int:
    parser = make_parser(
        "serve", "Answer requests in the shape of OpenAI's API.", EPILOG, adapters=True
    )
    parser.add_argument("folder", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("--host", default="127.0.0.1", help="(default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="(default 8000)")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes behind the address, each with the model; limits are of each (default 1)",
    )
    parser.add_argument("--name", help="of the model for clients (default: that of its folder)")
    parser.add_argument(
        "--api-key", action="append", metavar="KEY", help="clients must send it; several: any"
    )
    parser.add_argument(
        "--private-urls",
        action="store_true",
        help="with --urls: addresses may be in private networks",
    )
    parser.add_argument(
        "--record", default="", metavar="FILE", help="note requests in it: see multimodal log"
    )
    parser.add_argument(
        "--record-texts", action="store_true", help="note prompts and replies, not only digests"
    )
    for name, what in (("--record-days", "entries"), ("--record-text-days", "their texts")):
        parser.add_argument(
            name,
            type=int,
            default=0,
            metavar="N",
            help=f"remove {what} after N days (default: never)",
        )
    parser.add_argument(
        "--filters", default="", metavar="DIR", help="rules for prompts and replies, YAML files"
    )
    parser.add_argument(
        "--fallback-model",
        metavar="MODEL",
        help="answers where the model fails, is unsure, or its reply is refused",
    )
    parser.add_argument(
        "--fallback-answer", default="", metavar="TEXT", help="the same, a fixed text"
    )
    parser.add_argument(
        "--unsure",
        type=float,
        metavar="NUMBER",
        help="below this log probability of a token on average (in nats, as -2.5)",
    )
    parser.add_argument(
        "--drift-reference",
        default="",
        metavar="FILE",
        help="an earlier record: /metrics says how the last requests differ (multimodal drift)",
    )
    add_sign(parser)
    defaults = {item.name: item.default for item in fields(Settings)}
    for name, about in SETTINGS.items():
        default = defaults[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            help=f"{about} (default {default:,})",
        )
    arguments = parser.parse_args(argv)
    if not 0 < arguments.port < 2**16:
        raise ValueError(f"--port {arguments.port}: expected 1 to 65,535")
    if not 0 < arguments.workers <= MAX_WORKERS:
        raise ValueError(f"--workers {arguments.workers}: expected 1 to {MAX_WORKERS}")
    if arguments.private_urls and not arguments.urls:
        raise ValueError("--private-urls: give --urls, or no address is fetched")
    if arguments.record_texts and not arguments.record:
        raise ValueError("--record-texts: give --record FILE, or nothing is noted")
    arguments.model = arguments.folder or arguments.model
    arguments.adapter = named_adapters(arguments.adapter or ()) or None
    keys = tuple(arguments.api_key or filter(None, [os.environ.get(KEY)]))
    settings = Settings(
        name=arguments.name or Path(arguments.model).name or str(arguments.model),
        keys=keys,
        fetch=arguments.urls,
        private=arguments.private_urls,
        record=arguments.record,
        record_texts=arguments.record_texts,
        record_days=arguments.record_days,
        record_text_days=arguments.record_text_days,
        filters=arguments.filters,
        fallback_answer=arguments.fallback_answer,
        unsure=arguments.unsure,
        drift_reference=arguments.drift_reference,
        **{name: getattr(arguments, name) for name in SETTINGS},
    )
    add_in_one_order()
    try:
        from multimodal.serve.server import serve
    except ImportError as error:
        raise ValueError(MISSING) from error
    url = f"http://{arguments.host}:{arguments.port}"

    def ready() -> None:
        print(f"{settings.name} answers at {url}/v1, and to people at {url}", flush=True)
        if not keys and arguments.host not in LOCAL_HOSTS:
            print_error(f"multimodal serve: no API key: everyone who reaches {url} may use it")

    if arguments.workers > 1 and not arguments.threads:
        arguments.threads = max(1, (os.cpu_count() or 1) // arguments.workers)
    load, signer = partial(_load, arguments), signer_of(arguments.sign)
    host, port = arguments.host, arguments.port
    return serve(load, settings, host, port, arguments.workers, ready, signer)


def _load(arguments: argparse.Namespace) -> "tuple[Model, Fallback]":
    """The model with its adapters, and the fallback. Each worker calls it."""
    model = load_model(arguments)
    if not arguments.fallback_model:
        return model, None
    other = argparse.Namespace(**vars(arguments))
    other.model, other.adapter = arguments.fallback_model, None
    return model, (Path(other.model).name, load_model(other))


def named_adapters(given: Sequence[str]) -> dict[str, str]:
    """NAME=DIR, or DIR by the name of the folder, as names and folders.

    Raises:
        ValueError: for a name that is empty or there twice.
    """
    adapters: dict[str, str] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        name, folder = (name, folder) if equals else (Path(each).name, each)
        if not name.strip() or not folder or name in adapters:
            raise ValueError(f"--adapter {each}: expected NAME=DIR, each name once")
        adapters[name] = folder
    return adapters
