"""``multimodal export``: a model folder as a stock Qwen3 for other engines."""

import argparse

EXAMPLES = """examples:
  multimodal export hf runs/joint/model exported
  multimodal export hf runs/joint/model exported --dtype bfloat16
  multimodal export model runs/joint/model smaller --dtype bfloat16
  multimodal export model runs/joint/checkpoints/last.ckpt model
"""
DTYPES = ("float32", "bfloat16", "float16")  # of multimodal.model.export, which would import torch


def export_hf(arguments: argparse.Namespace) -> int:
    from multimodal.model.export import export_hf

    export_hf(arguments.model, arguments.out, arguments.dtype)
    print(f"{arguments.out}: a Qwen3ForCausalLM; its README.md shows how to use it")
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="multimodal export",
        description="Carry a model to other engines, or make it smaller.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(required=True, metavar="hf|model")
    hf = kinds.add_parser(
        "hf",
        help="a Qwen3 folder for transformers, vLLM, SGLang and the like",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hf.add_argument("model", metavar="MODEL", help="the model folder to export")
    hf.add_argument("out", metavar="OUT", help="the folder to write; new, or empty")
    hf.add_argument("--dtype", choices=DTYPES, default="float32", help="of the written weights")
    hf.set_defaults(run=export_hf)
    kinds.add_parser(  # multimodal.train.export answers it
        "model", help="a model folder of a training checkpoint, or a smaller one of a model folder"
    )
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status
