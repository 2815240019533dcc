"""``multimodal tokenizer``: ``text`` trains a byte-level BPE, ``import`` reads released VQ weights."""

import argparse
from collections.abc import Iterator
from pathlib import Path

EXAMPLES = """examples:
  multimodal tokenizer text data/photos --out text_tokenizer.json --vocabulary-size 4096
  multimodal tokenizer text data/photos corpus.txt --out text_tokenizer.json
  multimodal tokenizer import vq_ds16_t2i.pt runs/llamagen --image-size 256
"""


def texts(sources: list[str], split: str) -> Iterator[str]:
    """Every text of shard folders (captions, questions, answers) and every line of text files."""
    from multimodal.shards import Shards, texts_of

    for source in sources:
        if Path(source).is_dir():
            for sample in Shards(source, split):
                yield from texts_of(sample.record)
        else:
            yield from Path(source).read_text("utf-8").splitlines()


def train_text(arguments: argparse.Namespace) -> int:
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
    out = Path(arguments.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; give a new folder")
    from multimodal.tokenizers.released import import_tokenizer

    tokenizer = import_tokenizer(arguments.source, arguments.image_size, arguments.fit)
    tokenizer.save(out)
    grid, size = tokenizer.config.grid, tokenizer.codebook_size
    print(f"{out}: {grid} x {grid} codes of {size}, fingerprint {tokenizer.fingerprint}")
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="multimodal tokenizer",
        description="Train a text tokenizer, or take over the weights of a released image tokenizer. "
        "Image tokenizers are trained with: multimodal fit",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(required=True, metavar="text|import")
    text = kinds.add_parser("text", help="byte-level BPE", epilog=EXAMPLES,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    text.add_argument("sources", nargs="+", help="shard folders and text files (a line, a text)")
    text.add_argument("--out", required=True, help="the file to write, JSON")
    text.add_argument("--vocabulary-size", type=int, default=4096, help="at most so many tokens")
    text.add_argument("--split", default="train", help="split of the shard folders to read")
    text.set_defaults(run=train_text)
    released = kinds.add_parser(
        "import", help="released VQ weights: LlamaGen, taming VQGAN, Janus, Chameleon",
        description="Read the weights of a released VQ image tokenizer into a tokenizer folder. Sizes "
        "are read off the weights; no code in a checkpoint is run.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    released.add_argument("source", help="a checkpoint, or a folder of safetensors")
    released.add_argument("out", help="the folder to write")
    released.add_argument("--image-size", type=int, default=256, help="pixels of a side")
    released.add_argument("--fit", default="squash", choices=["squash", "crop", "letterbox"],
                          help="how other images are made square")  # fmt: skip
    released.set_defaults(run=import_released)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status
