"""``multimodal tokenizer text``: train the byte-level BPE on the texts of shards and files."""

import argparse
from collections.abc import Iterator
from pathlib import Path

EXAMPLES = """examples:
  multimodal tokenizer text data/photos --out text_tokenizer.json --vocabulary-size 4096
  multimodal tokenizer text data/photos corpus.txt --out text_tokenizer.json
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


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="multimodal tokenizer",
        description="Train a text tokenizer. Image tokenizers are trained with: multimodal fit",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(required=True, metavar="text")
    text = kinds.add_parser("text", help="byte-level BPE", epilog=EXAMPLES,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    text.add_argument("sources", nargs="+", help="shard folders and text files (a line, a text)")
    text.add_argument("--out", required=True, help="the file to write, JSON")
    text.add_argument("--vocabulary-size", type=int, default=4096, help="at most so many tokens")
    text.add_argument("--split", default="train", help="split of the shard folders to read")
    text.set_defaults(run=train_text)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status
