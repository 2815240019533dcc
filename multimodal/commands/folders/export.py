"""``multimodal export``: a model folder for other engines, or as a smaller one."""

import argparse
from pathlib import Path

from multimodal.terminal import Parser

EXAMPLES = """examples:
  multimodal export hf runs/joint/model exported
  multimodal export hf runs/joint/model exported --dtype bfloat16
  multimodal export gguf runs/joint/model model.gguf --dtype q8_0
  multimodal export onnx runs/joint/model image-tokenizer
  multimodal export bom runs/joint/model bom.json
  multimodal export model runs/joint/model smaller --dtype bfloat16
  multimodal export model runs/joint/checkpoints/last.ckpt model
"""
DTYPES = ("float32", "bfloat16", "float16")  # of multimodal.export.model, which would import torch

GGUF_DTYPES = ("float32", "float16", "bfloat16", "q8_0", "q4_k")


def export_hf(arguments: argparse.Namespace) -> int:
    from multimodal.export.hf import export_hf

    stock_class = export_hf(arguments.model, arguments.out, arguments.dtype)
    print(f"{arguments.out}: a {stock_class}; its README.md shows how to use it")
    return 0


def export_gguf(arguments: argparse.Namespace) -> int:
    from multimodal.export.gguf import export_gguf

    export_gguf(arguments.model, arguments.out, arguments.dtype)
    print(arguments.out)
    return 0


def export_onnx(arguments: argparse.Namespace) -> int:
    from multimodal.export.onnx import export_onnx

    names = export_onnx(arguments.model, arguments.out)
    print(f"{arguments.out}: {', '.join(names)}")
    return 0


def export_bom(arguments: argparse.Namespace) -> int:
    from multimodal.files import write_json
    from multimodal.hub.names import find_model
    from multimodal.origin.bom import bill_of_materials

    bill = bill_of_materials(find_model(arguments.model))
    if arguments.out.exists():
        raise ValueError(f"{arguments.out}: exists; choose another name")
    write_json(arguments.out, bill)
    print(arguments.out)
    return 0


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="multimodal export",
        description="Carry a model to other engines, or make it smaller.",
        epilog=EXAMPLES,
    )
    kinds = parser.add_subparsers(required=True, metavar="hf|gguf|onnx|bom|model")
    hf = kinds.add_parser(
        "hf",
        help="a stock folder (Qwen3, Qwen2, Llama) for transformers, vLLM, SGLang and the like",
        epilog=EXAMPLES,
    )
    hf.add_argument("model", metavar="MODEL", help="the model folder to export")
    hf.add_argument("out", metavar="OUT", help="the folder to write; new, or empty")
    hf.add_argument("--dtype", choices=DTYPES, default="float32", help="of the written weights")
    hf.set_defaults(run=export_hf)
    gguf = kinds.add_parser("gguf", help="one file for llama.cpp and what is built on it")
    gguf.add_argument("model", metavar="MODEL", help="the model folder to export")
    gguf.add_argument("out", metavar="OUT", help="the file to write; new")
    gguf.add_argument(
        "--dtype", choices=GGUF_DTYPES, default="float16", help="of the matrices (default float16)"
    )
    gguf.set_defaults(run=export_gguf)
    onnx = kinds.add_parser("onnx", help="the image tokenizer: pixels to codes, codes to pixels")
    onnx.add_argument("model", metavar="MODEL", help="an image tokenizer, or a model that has one")
    onnx.add_argument("out", metavar="OUT", help="the folder to write; new, or empty")
    onnx.set_defaults(run=export_onnx)
    bom = kinds.add_parser(
        "bom", help="a bill of materials (CycloneDX 1.6): files, data, models, licences"
    )
    bom.add_argument("model", metavar="MODEL", help="the model folder")
    bom.add_argument("out", metavar="OUT", type=Path, help="the JSON file to write; new")
    bom.set_defaults(run=export_bom)
    kinds.add_parser(  # multimodal.train.export answers it
        "model", help="a model folder of a training checkpoint, or a smaller one of a model folder"
    )
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status
