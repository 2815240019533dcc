"""``multimodal tokenizer text|import|encode``: train, import and apply tokenizers."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from multimodal.commands.options import add_engine

EXAMPLES = """examples:
  multimodal tokenizer text data/photos --out text_tokenizer.json --vocabulary-size 4096
  multimodal tokenizer text data/photos corpus.txt --out text_tokenizer.json
  multimodal tokenizer import vq_ds16_t2i.pt runs/llamagen --image-size 256
  multimodal tokenizer encode data/photos data/photos-codes --tokenizer runs/photos-tokenizer/model
  multimodal tokenizer encode data/photos data/photos-codes --tokenizer starter \\
      --encodings 8 --crop-scale 0.5 --mirror
"""


def texts(sources: list[str], split: str) -> Iterator[str]:
    """All texts of shard folders (captions, questions, answers) and all lines of text files."""
    from multimodal.data.samples import texts_of
    from multimodal.data.shards import Shards

    for source in sources:
        if Path(source).is_dir():
            for sample in Shards(source, split):
                yield from texts_of(sample.record)
        else:
            yield from Path(source).read_text("utf-8").splitlines()


def train_text(arguments: argparse.Namespace) -> int:
    """Train a byte-level BPE and write its file."""
    from tqdm import tqdm

    from multimodal.tokenizers.text import TextTokenizer

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
    tokenizer.save(arguments.out)
    print(f"{arguments.out}: {len(tokenizer)} tokens from {count} texts")
    return 0


def import_released(arguments: argparse.Namespace) -> int:
    """Write a tokenizer folder from released VQ weights."""
    out = Path(arguments.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; give a new folder")
    from multimodal.tokenizers.released import import_tokenizer

    tokenizer = import_tokenizer(arguments.source, arguments.image_size, arguments.fit)
    tokenizer.save(out)
    grid, size = tokenizer.config.grid, tokenizer.codebook_size
    print(f"{out}: {grid} x {grid} codes of {size}, fingerprint {tokenizer.fingerprint}")
    return 0


def encode(arguments: argparse.Namespace) -> int:
    """Write shards of codes from shards of images."""
    from tqdm import tqdm

    from multimodal.commands.options import use_device
    from multimodal.data.encode import Encoding, encode_shards
    from multimodal.data.shards import read_manifest
    from multimodal.model.checkpoint import part_of
    from multimodal.tokenizers.image import load_image_tokenizer

    if arguments.batch_size < 1 or arguments.decoders < 0:
        raise ValueError("--batch-size, --decoders: expected at least 1, and at least 0")
    use_device(arguments)
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
    total = sum(entry["samples"] for entry in read_manifest(Path(arguments.source))["shards"])
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
    print(f"{arguments.out}: {total} samples, codes {encoding.fingerprint}")
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="multimodal tokenizer",
        description="Train a text tokenizer, import the weights of a released image tokenizer, or "
        "encode shards. To train an image tokenizer: multimodal fit. To measure image tokenizers: "
        "multimodal tokenizer compare",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(required=True, metavar="text|import|encode")
    text = kinds.add_parser(
        "text",
        help="train a byte-level BPE",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text.add_argument("sources", nargs="+", help="shard folders, and files with a text a line")
    text.add_argument("--out", required=True, help="the file to write, JSON")
    text.add_argument(
        "--vocabulary-size", type=int, default=4096, help="largest number of tokens (default 4096)"
    )
    text.add_argument("--split", default="train", help="split of the shard folders to read")
    text.set_defaults(run=train_text)
    released = kinds.add_parser(
        "import",
        help="import released VQ weights: LlamaGen, taming VQGAN, Janus, Chameleon",
        description="Convert the weights of a released VQ image tokenizer to a tokenizer folder. "
        "Sizes are inferred from the weights. No code of a checkpoint is run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    shards.add_argument("--device", default="cpu", help="device of torch (default cpu)")
    shards.add_argument(
        "--threads", type=int, default=0, help="CPU threads (default: torch's choice)"
    )
    shards.set_defaults(run=encode)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)
