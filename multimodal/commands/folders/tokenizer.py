"""``multimodal tokenizer text|meaning|import|encode``: train, import and apply tokenizers."""

import argparse
import codecs
import sys
from collections.abc import Iterator
from pathlib import Path

from multimodal.commands.options import add_device, add_engine
from multimodal.files import address_of, lines_of, local_path, open_file, read_text
from multimodal.terminal import Parser, print_error

EXAMPLES = """examples:
  multimodal tokenizer text data/photos --out text_tokenizer.json --vocabulary-size 4096
  multimodal tokenizer text data/photos corpus.txt --out text_tokenizer.json
  multimodal tokenizer meaning data/photos --out runs/meaning --groups 2 --codes 1024 \\
      --encoder timm:tf_efficientnet_lite0=efficientnet-lite0.pth
  multimodal tokenizer join runs/meaning runs/photos-tokenizer/model --out runs/image-tokenizer
  multimodal tokenizer import vq_ds16_t2i.pt runs/llamagen --image-size 256
  multimodal tokenizer encode data/photos data/photos-codes --tokenizer runs/photos-tokenizer/model
  multimodal tokenizer encode data/photos data/photos-codes --tokenizer starter \\
      --encodings 8 --crop-scale 0.5 --mirror
"""


def texts(sources: list[str], split: str) -> Iterator[str]:
    """All texts of shard folders (captions, questions, answers) and all lines of text files."""
    from tqdm import tqdm

    from multimodal.data.samples import readable, texts_of
    from multimodal.data.shards import Shards

    for source in sources:
        if address_of(source) or Path(source).is_dir():
            samples = Shards(source, split)
            for sample in readable(samples, lambda line: tqdm.write(line, file=sys.stderr)):
                yield from texts_of(sample.record)
        else:
            yield from file_lines(source)


def file_lines(path: str) -> Iterator[str]:
    """The lines of a text file. Those that are not UTF-8 are left out; the first one is named."""
    wrong = 0
    with open_file(path) as file:
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            yield from lines_of(read_text(path))
            return
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                wrong += 1
                if wrong == 1:
                    print_error(f"left out: {path}: line {number}: not UTF-8 ({error})")
            else:
                yield from text.split("\r")
    if wrong > 1:
        print_error(f"left out: {path}: {wrong:,} lines that are not UTF-8")


def train_text(arguments: argparse.Namespace) -> int:
    """Train a byte-level BPE and write its file."""
    from tqdm import tqdm

    from multimodal.tokenizers.text import TextTokenizer

    out = local_path(arguments.out)
    lines = tqdm(texts(arguments.sources, arguments.split), desc="texts", unit="", disable=None)
    count = 0

    def counted() -> Iterator[str]:
        nonlocal count
        for line in lines:
            count += 1
            yield line

    tokenizer = TextTokenizer.train(counted(), arguments.vocabulary_size)
    if not count:
        raise ValueError(f"no text in {', '.join(arguments.sources)}")
    tokenizer.save(out)
    print(f"{arguments.out}: {len(tokenizer)} tokens from {count} texts")
    return 0


def fit_levels(arguments: argparse.Namespace) -> int:
    """Fit the codebooks of a level of meaning."""
    from tqdm import tqdm

    from multimodal.commands.options import use_device
    from multimodal.data.fit_meaning import FitOptions, fit_meaning
    from multimodal.data.shards import Shards
    from multimodal.tokenizers.encoder import Encoder
    from multimodal.tokenizers.meaning import Meaning, MeaningConfig, round_to_half

    use_device(arguments)
    encoder = Encoder(arguments.encoder, arguments.stages)
    if arguments.half:
        round_to_half(encoder)
    size = arguments.image_size or encoder.image_size
    config = MeaningConfig(
        encoder=encoder.name,
        stages=tuple(arguments.stages),
        image_size=size,
        fit=arguments.fit,
        grid=arguments.grid or encoder.grid(size),
        groups=arguments.groups,
        codebook_size=arguments.codes,
        channels=arguments.channels or encoder.channels,
        form=arguments.form,
        colours=arguments.colours,
    )
    options = FitOptions(
        arguments.images,
        arguments.positions,
        arguments.rounds,
        arguments.standardise,
        arguments.seed,
        arguments.split,
    )
    counts = [len(Shards(folder, arguments.split)) for folder in arguments.sources]
    total = sum(min(count, arguments.images or count) for count in counts)
    with (
        tqdm(total=total, desc="images", unit="image", disable=None) as images,
        tqdm(total=config.level.groups * arguments.rounds, desc="k-means", disable=None) as rounds,
    ):

        def on_round(group: int, lost: float) -> None:
            rounds.set_postfix(group=group, lost=f"{lost:.3f}")
            rounds.update()

        skipped: list[str] = []

        def on_skipped(message: str) -> None:
            skipped.append(message)
            tqdm.write(f"left out: {message}", file=sys.stderr)

        fitted = fit_meaning(
            arguments.sources,
            arguments.out,
            Meaning(config, encoder),
            options,
            images.update,
            on_round,
            on_skipped,
        )
    if skipped:
        print(f"left out {len(skipped):,} images that cannot be read", file=sys.stderr)
    side, groups = config.grid, config.level.groups
    print(f"{arguments.out}: {side} x {side} positions, {groups} of {config.codebook_size} codes")
    for group, (lost, clusters) in enumerate(zip(fitted.lost, fitted.clusters, strict=True)):
        name = "colours" if group == config.groups else f"group {group}"
        print(
            f"{name}: {lost:.1%} of the variance lost so far, {clusters.used:.1%} of the "
            f"codes used, perplexity {clusters.perplexity:.0f}"
        )
    return 0


def join_levels(arguments: argparse.Namespace) -> int:
    """Write one tokenizer of a level of meaning and a level of detail."""
    from multimodal.files import new_folder
    from multimodal.hub.names import part_of
    from multimodal.tokenizers.image import ImageTokenizer, load_image_tokenizer

    meaning, detail = (
        load_image_tokenizer(part_of(folder, "image_tokenizer"))
        for folder in (arguments.meaning, arguments.detail)
    )
    if meaning.meaning is None or detail.detail is None:
        missing = arguments.meaning if meaning.meaning is None else arguments.detail
        raise ValueError(f"{missing}: has no such level; give a folder of meaning, then of detail")
    joined = ImageTokenizer(meaning.meaning, detail.detail)
    joined.provenance = meaning.provenance + detail.provenance
    with new_folder(local_path(arguments.out)) as folder:
        joined.save(folder)
    print(f"{arguments.out}: {joined.codes_per_image} codes, fingerprint {joined.fingerprint}")
    return 0


def import_released(arguments: argparse.Namespace) -> int:
    """Write a tokenizer folder from released VQ weights."""
    out = local_path(arguments.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; give a new folder")
    from multimodal.tokenizers.released import import_tokenizer

    tokenizer = import_tokenizer(local_path(arguments.source), arguments.image_size, arguments.fit)
    tokenizer.save(out)
    grid, size = tokenizer.config.grid, tokenizer.codebook_size
    print(f"{out}: {grid} x {grid} codes of {size}, fingerprint {tokenizer.fingerprint}")
    return 0


def encode(arguments: argparse.Namespace) -> int:
    """Write shards of codes from shards of images."""
    from tqdm import tqdm

    from multimodal.commands.options import use_device
    from multimodal.data.encode import REJECTED, UNREADABLE, Encoding, encode_shards
    from multimodal.data.shards import read_manifest
    from multimodal.devices import warn_of_slow_bfloat16
    from multimodal.hub.names import part_of
    from multimodal.tokenizers.image import load_image_tokenizer

    if arguments.batch_size < 1 or arguments.decoders < 0:
        raise ValueError("--batch-size, --decoders: expected at least 1, and at least 0")
    use_device(arguments)
    if arguments.precision == "bfloat16":
        warn_of_slow_bfloat16(arguments.device, "--precision float32")
    tokenizer = load_image_tokenizer(part_of(arguments.tokenizer, "image_tokenizer"))
    encoding = Encoding.for_tokenizer(
        tokenizer,
        precision=arguments.precision,
        encodings=arguments.encodings,
        crop_scale=arguments.crop_scale,
        mirror=arguments.mirror,
        seed=arguments.seed,
        train_split=arguments.train_split,
    )
    total = sum(entry["samples"] for entry in read_manifest(arguments.source)["shards"])
    with tqdm(total=total, desc="samples", unit="sample", disable=None) as progress:
        manifest = encode_shards(
            arguments.source,
            arguments.out,
            tokenizer.to(arguments.device),
            encoding,
            arguments.batch_size,
            arguments.decoders,
            progress.update,
            arguments.engine,
            arguments.workers,
        )
    if manifest is None:  # only the first rank reports
        return 0
    left_out = (manifest.get("rejected") or {}).get(UNREADABLE, 0)
    if left_out:
        where = f"{arguments.out}/{REJECTED}"
        print(f"rejected {left_out:,}: {UNREADABLE}; see {where}", file=sys.stderr)
    print(f"{arguments.out}: {total - left_out} samples, codes {encoding.fingerprint}")
    return 0


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="multimodal tokenizer",
        description="Train a text tokenizer, import the weights of a released image tokenizer, or "
        "encode shards. To train an image tokenizer: multimodal fit. To measure image tokenizers: "
        "multimodal tokenizer compare",
        epilog=EXAMPLES,
    )
    kinds = parser.add_subparsers(required=True, metavar="text|meaning|join|import|encode")
    text = kinds.add_parser(
        "text",
        help="train a byte-level BPE",
        epilog=EXAMPLES,
    )
    text.add_argument("sources", nargs="+", help="shard folders, and files with a text a line")
    text.add_argument("--out", required=True, help="the file to write, JSON")
    text.add_argument(
        "--vocabulary-size", type=int, default=4096, help="largest number of tokens (default 4096)"
    )
    text.add_argument("--split", default="train", help="split of the shard folders to read")
    text.set_defaults(run=train_text)
    meaning = kinds.add_parser(
        "meaning",
        help="cluster the features of a pretrained encoder",
        description="Make a level of meaning: codes of features of a frozen pretrained encoder. "
        "Rotate onto the principal components, k-means. Minutes of a CPU. A stopped run continues "
        "where it stopped.",
        epilog=EXAMPLES,
    )
    meaning.add_argument("sources", nargs="+", help="shard folders with images")
    meaning.add_argument("--out", required=True, help="the folder to write")
    meaning.add_argument(
        "--encoder", required=True, help="timm:MODEL[=FILE] or open_clip:MODEL/TAG[=FILE]"
    )
    meaning.add_argument(
        "--stages",
        type=int,
        nargs="+",
        default=[],
        help="stages of the encoder, -1 the last (default: its final features)",
    )
    meaning.add_argument("--groups", type=int, default=1, help="codes at a position (default 1)")
    meaning.add_argument("--codes", type=int, default=2048, help="codes of a group (default 2048)")
    meaning.add_argument("--form", default="residual", choices=["residual", "product"])
    meaning.add_argument(
        "--colours",
        action="store_true",
        help="one more code at each position, of its colours: encoders of classifiers ignore them",
    )
    meaning.add_argument(
        "--channels", type=int, default=0, help="principal components (default: all)"
    )
    meaning.add_argument("--grid", type=int, default=0, help="positions per side (default: all)")
    meaning.add_argument(
        "--image-size", type=int, default=0, help="pixels of a side (default: the encoder's)"
    )
    meaning.add_argument(
        "--fit",
        default="squash",
        choices=["squash", "crop", "letterbox"],
        help="how other images are made square",
    )
    meaning.add_argument(
        "--half", action="store_true", help="round the encoder's weights: half the size on disk"
    )
    meaning.add_argument(
        "--images", type=int, default=0, help="at most so many of each folder (default: all)"
    )
    meaning.add_argument(
        "--positions", type=int, default=400_000, help="positions to cluster (default 400,000)"
    )
    meaning.add_argument("--rounds", type=int, default=25, help="of k-means (default 25)")
    meaning.add_argument(
        "--standardise", action="store_true", help="give all channels the same variance first"
    )
    meaning.add_argument("--split", default="train", help="split to read (default train)")
    meaning.add_argument("--seed", type=int, default=0)
    meaning.add_argument("--threads", type=int, default=0, help="CPU threads")
    meaning.set_defaults(run=fit_levels, device="cpu")
    join = kinds.add_parser(
        "join",
        help="make one tokenizer of a level of meaning and a level of detail",
        epilog=EXAMPLES,
    )
    join.add_argument("meaning", help="folder of a level of meaning, or a model")
    join.add_argument("detail", help="folder of a tokenizer of pixels, or a model")
    join.add_argument("--out", required=True, help="the folder to write")
    join.set_defaults(run=join_levels)
    released = kinds.add_parser(
        "import",
        help="import released VQ weights: LlamaGen, taming VQGAN, Janus, Chameleon",
        description="Convert the weights of a released VQ image tokenizer to a tokenizer folder. "
        "Sizes are inferred from the weights. No code of a checkpoint is run.",
        epilog=EXAMPLES,
    )
    released.add_argument("source", help="a checkpoint, or a folder of safetensors")
    released.add_argument("out", help="the folder to write")
    released.add_argument("--image-size", type=int, default=256, help="pixels of a side")
    released.add_argument(
        "--fit",
        default="squash",
        choices=["squash", "crop", "letterbox"],
        help="how other images are made square",
    )
    released.set_defaults(run=import_released)
    shards = kinds.add_parser(
        "encode",
        help="convert shards of images to shards of codes",
        description="Encode the images of a shard folder once, before training. A stopped run "
        "continues where it stopped. Only models with this image tokenizer can use the codes.",
        epilog=EXAMPLES,
    )
    shards.add_argument("source", help="a shard folder")
    shards.add_argument("out", help="the folder to write")
    shards.add_argument(
        "--tokenizer", required=True, help="a tokenizer or model folder, or starter"
    )
    shards.add_argument(
        "--encodings", type=int, default=1, help="encodings of each training image (default 1)"
    )
    shards.add_argument(
        "--crop-scale",
        type=float,
        default=1.0,
        help="crop training images to at least this share (default 1: no crops)",
    )
    shards.add_argument("--mirror", action="store_true", help="mirror half of the crops")
    shards.add_argument(
        "--train-split", default="train", help="split that is cropped (default train)"
    )
    shards.add_argument(
        "--precision",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of the encoder (default float32); a few percent of the codes differ",
    )
    shards.add_argument("--seed", type=int, default=0, help="of the crops (default 0)")
    shards.add_argument("--batch-size", type=int, default=64)
    shards.add_argument(
        "--decoders", type=int, default=2, help="threads that decode images (default 2)"
    )
    add_engine(shards)
    add_device(shards)
    shards.add_argument(
        "--threads", type=int, default=0, help="CPU threads (default: torch's choice)"
    )
    shards.set_defaults(run=encode)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)
