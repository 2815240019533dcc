"""``multimodal prefer``: preferences of what a model makes, as shards for preference training."""

import sys
from pathlib import Path

from multimodal.commands.options import add_adapter, add_device, at_least_one, load_model
from multimodal.devices import DTYPES
from multimodal.terminal import Parser

EPILOG = """The model writes several captions of each image (or draws several pictures of each
caption). A judge scores them. The best one is chosen, the worst one rejected, where they differ by
the margin. OUT is a shard folder for PreferenceModule, and OUT/candidates.jsonl has all candidates
with their scores. The same command goes on where it was stopped.

A judge is alignment (the model's own embeddings), scenes (what is true of synthetic scenes), cider
or objects (captions only: by the words or the objects of the references), or FILE.py:FUNCTION, a
function of yours: (captions, records) -> scores, or for drawings (texts, images, records) ->
scores.

examples:
  multimodal prefer runs/scenes-joint/model --data data/scenes --out data/better --judge scenes
  multimodal prefer runs/scenes-joint/model --data data/scenes --out data/drawn --judge scenes \\
      --of drawings --candidates 8 --margin 0.2
  multimodal prefer starter --data data/photos --out data/better --judge mine.py:no_inventions
"""


def main(argv: list[str]) -> int:
    """Run ``multimodal prefer ARGV...``. Returns the exit status."""
    parser = Parser(
        prog="multimodal prefer",
        description="Make preferences: of what a model writes or draws, the best and the worst.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, a bundled model, or user/name of the Hub")
    add("--data", type=Path, required=True, metavar="DIR", help="a shard folder")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    add("--of", choices=("captions", "drawings"), default="captions", help="(default captions)")
    add("--judge", default="alignment", help="see below (default alignment)")
    add("--candidates", type=int, default=4, metavar="K", help="of each sample (default 4)")
    add("--margin", type=float, default=0.0, help="least difference of the scores (default 0: any)")
    add("--split", help="of the shard folder; by default all of it")
    add("--limit", type=int, default=0, metavar="N", help="only the first N samples of a split")
    add("--temperature", type=float, help="of the candidates (default 1; of drawings 0.8)")
    add("--top-p", type=float, default=1.0, help="as for caption and draw (default 1)")
    add("--max-tokens", type=int, default=64, metavar="N", help="of a caption (default 64)")
    add(
        "--guidance-scale", type=float, default=1.0, metavar="SCALE", help="of drawings (default 1)"
    )
    add("--batch-size", type=int, default=16, metavar="N", help="samples at once (default 16)")
    add("--seed", type=int, default=0, help="seed of all random numbers (default 0)")
    add_adapter(parser)
    add_device(parser)
    add("--dtype", choices=DTYPES, default="auto", help="of the network (default auto)")
    add("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    arguments = parser.parse_args(argv)
    at_least_one(arguments, "batch_size")
    if arguments.limit < 0:
        raise ValueError(f"--limit {arguments.limit}: expected 0 (all) or more")
    arguments.urls = False

    from tqdm import tqdm

    from multimodal.data.shards import Shards, splits_of
    from multimodal.options import DrawOptions, TextOptions
    from multimodal.train.preferences.candidates import PreferSettings, make_preferences

    if arguments.temperature is None:
        arguments.temperature = 1.0 if arguments.of == "captions" else DrawOptions().temperature
    shared = {name: getattr(arguments, name) for name in ("temperature", "top_p", "seed")}
    settings = PreferSettings(
        arguments.of,
        arguments.judge,
        TextOptions(max_tokens=arguments.max_tokens, **shared)
        if arguments.of == "captions"
        else DrawOptions(guidance_scale=arguments.guidance_scale, **shared),
        arguments.candidates,
        arguments.margin,
        arguments.batch_size,
    )
    splits = [arguments.split] if arguments.split else splits_of(arguments.data)
    sizes = [len(Shards(arguments.data, split)) for split in splits]
    total = sum(min(size, arguments.limit or size) for size in sizes)
    model = load_model(arguments)
    with tqdm(total=total, unit="sample", file=sys.stderr, disable=None) as bar:
        lines = make_preferences(
            model,
            arguments.data,
            arguments.out,
            settings,
            arguments.split,
            arguments.limit,
            bar.update,
        )
    print(f"{arguments.out}: {summary(lines)}")
    return 0


def summary(lines: list[dict[str, object]]) -> str:
    """How many samples have a preference, how good candidates are, and what was left out."""
    from multimodal.train.preferences.candidates import mean_scores, reasons_of

    kept = sum("chosen" in line for line in lines)
    means = ", ".join(f"{name} {value:.3f}" for name, value in mean_scores(lines).items())
    left = "".join(f"; {count:,} have {what}" for what, count in reasons_of(lines).items())
    return f"{kept:,} of {len(lines):,} samples have a preference (mean scores: {means}){left}"
