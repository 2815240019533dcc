"""``multimodal quantize``: a model folder with weights of 8 or 4 bits."""

import sys

from multimodal.terminal import Parser, one_line

EPILOG = """int8 is half the size of bfloat16, and about as fast on CPUs with VNNI. int4 is a third
of it on disk; in memory and in speed it is like int8. It loses less with --data: weights are then
rounded for what the layers read of samples such as those of the training. The image tokenizer keeps
its weights. The result is used like any model, on any device. Adapters train over it (fit
--model.lora.bits 8); other training needs the model it was made from.

examples:
  multimodal quantize runs/joint/model smaller
  multimodal quantize starter starter-int4 --to int4 --data data/flickr8k
  multimodal caption --model smaller cat.jpg
"""
BITS = ("int8", "int4")  # of multimodal.export.quantize, which would import torch


def main(argv: list[str]) -> int:
    """Run ``multimodal quantize ARGV...``. Prints the folder."""
    parser = Parser(
        prog="multimodal quantize",
        description="Make a model smaller: weights of 8 or 4 bits.",
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="the model folder, or its name")
    parser.add_argument("out", metavar="OUT", help="the folder to write; new, or empty")
    parser.add_argument("--to", choices=BITS, default="int8", help="default int8")
    parser.add_argument(
        "--data", metavar="DIR", help="for int4: a shard folder of images with captions"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", default=256, help="of the data (default 256)"
    )
    arguments = parser.parse_args(argv)

    from tqdm import tqdm

    from multimodal.export.quantize import quantize_model

    quantize_model(
        arguments.model,
        arguments.out,
        arguments.to,
        arguments.data,
        arguments.samples,
        lambda problem: tqdm.write(one_line(problem), file=sys.stderr),
    )
    print(arguments.out)
    return 0
