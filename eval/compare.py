"""``multimodal tokenizer compare``: image tokenizers on the same images, by one protocol."""

import argparse
import json
import math
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal.terminal import Parser, print_error

if TYPE_CHECKING:
    from torch import Tensor

    from multimodal.tokenizers.image import ImageTokenizer

EXAMPLES = """Every tokenizer gets the same images at one size (--image-size, by default the largest
size of the tokenizers). It resizes them to its size, and its reconstructions back. Perceptual
distance and FID depend on the features. The default features are random with a fixed seed: their
values compare tokenizers with each other, but not with published values.

examples:
  multimodal tokenizer compare runs/a/model runs/b/model --data data/photos
  multimodal tokenizer compare starter runs/llamagen --data data/photos --split val --limit 500 \\
      --features timm:resnet50.a1_in1k --output compare.json --picture compare.png
"""
SHOWN = 8  # images in the picture
FORMATS = {
    "codes": "{:d}",
    "codebook_size": "{:d}",
    "bits_per_pixel": "{:.3f}",
    "psnr": "{:.2f}",
    "ssim": "{:.3f}",
    "ms_ssim": "{:.3f}",
    "perceptual": "{:.4f}",
    "fid": "{:.2f}",
    "used": "{:.1%}",
    "perplexity": "{:.0f}",
    "encode_per_second": "{:.0f}",
    "decode_per_second": "{:.0f}",
    "parameters": "{:,d}",
}


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="multimodal tokenizer compare",
        description="Measure how well image tokenizers preserve the images of a shard folder.",
        epilog=EXAMPLES,
    )
    parser.add_argument("tokenizers", nargs="+", help="tokenizer or model folders, or starter")
    parser.add_argument("--data", required=True, help="a shard folder")
    parser.add_argument("--split", default="val", help="of the shard folder (default val)")
    parser.add_argument(
        "--limit", type=int, default=1000, help="most images, the first ones (default 1000)"
    )
    parser.add_argument("--image-size", type=int, help="pixels per side, for all tokenizers")
    parser.add_argument(
        "--fit",
        default="crop",
        choices=["squash", "crop", "letterbox"],
        help="how images become square (default crop)",
    )
    parser.add_argument(
        "--features", default="random", help="random, timm:MODEL or timm:MODEL=FILE"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--output", help="a JSON file for the results and their protocol")
    parser.add_argument(
        "--picture", help="a PNG: the first images, and the reconstructions of each tokenizer below"
    )
    return compare(parser.parse_args(argv))


def compare(arguments: argparse.Namespace) -> int:
    """Run the command: print the table, write the JSON file and the picture."""
    import torch
    from tqdm import tqdm

    from multimodal.commands.options import check_output
    from multimodal.data.images import fit_image, open_image, to_image, to_tensor
    from multimodal.data.shards import Shards
    from multimodal.eval.evaluator import usable_samples
    from multimodal.eval.metrics.features import Features
    from multimodal.eval.metrics.reconstruction import ms_ssim_scales
    from multimodal.eval.tasks.reconstruction import score_tokenizer
    from multimodal.files import atomic_file
    from multimodal.hub.names import part_of
    from multimodal.memory import check_memory
    from multimodal.tokenizers.image import load_image_tokenizer
    from multimodal.tokenizers.weights import resize

    for path, suffix in ((arguments.output, ".json"), (arguments.picture, ".png")):
        if path:
            check_output(Path(path), (suffix,))
    if arguments.limit < 1 or arguments.batch_size < 1:
        raise ValueError(
            f"--limit {arguments.limit}, --batch-size {arguments.batch_size}: expected at least 1"
        )
    tokenizers = {
        name: load_image_tokenizer(part_of(name, "image_tokenizer"))
        for name in dict.fromkeys(arguments.tokenizers)
    }
    side = arguments.image_size or max(t.drawn_size for t in tokenizers.values())
    loaded = max(side, *(t.image_size for t in tokenizers.values()))  # meaning may read more pixels
    features = Features(arguments.features)
    shards = Shards(arguments.data, arguments.split)
    count = min(arguments.limit, len(shards))
    needed = 2 * 4 * 3 * count * loaded**2  # the list of them and the tensor
    check_memory(needed, f"{count:,} images of {loaded} x {loaded}", "--limit or --image-size")
    samples = islice(
        usable_samples(shards, lambda problem: print_error(f"multimodal tokenizer: {problem}")),
        count,
    )
    pixels = [
        to_tensor(fit_image(open_image(sample.image), loaded, arguments.fit))
        for sample in tqdm(samples, desc="images", disable=None)
    ]
    if not pixels:
        raise ValueError(f"{arguments.data}: no image can be read")
    images = torch.stack(pixels)
    rows, pictures = list[dict[str, Any]](), [resize(images[:SHOWN], side)]
    total = len(images) * len(tokenizers)
    with tqdm(total=total, desc="reconstructions", unit="image", disable=None) as progress:
        for name, tokenizer in tokenizers.items():
            measured, reconstructions = score_tokenizer(
                tokenizer, images, features, arguments.batch_size, SHOWN, progress.update, side
            )
            scores = measured.compute()
            rows.append({"tokenizer": name, **describe(tokenizer, side), **scores})
            pictures.append(reconstructions)
    times = time_tokenizers(tokenizers, images[: arguments.batch_size])
    rows = [{**row, **times[row["tokenizer"]]} for row in rows]
    protocol = {
        "data": f"{arguments.data}, split {arguments.split}, the first {len(images)} images",
        "image_size": side,
        "fit": arguments.fit,
        "features": features.label,
        "ms_ssim_scales": ms_ssim_scales(side),
        "precision": "float32",
        "threads": torch.get_num_threads(),
        "batch_size": arguments.batch_size,
    }
    print(format_table(rows, protocol))
    if arguments.output:
        with atomic_file(Path(arguments.output)) as file:
            file.write_text(
                json.dumps({"protocol": protocol, "tokenizers": rows}, indent=1) + "\n", "utf-8"
            )
    if arguments.picture:
        from torchvision.utils import make_grid

        grid = make_grid(torch.cat(pictures), nrow=len(images[:SHOWN]))
        with atomic_file(Path(arguments.picture)) as file:
            to_image(grid).save(file, "PNG")
    return 0


def describe(tokenizer: "ImageTokenizer", side: int) -> dict[str, Any]:
    """Facts about a tokenizer, and its bits per pixel for a picture of ``side`` pixels per side."""
    levels = tokenizer.layout.levels
    bits = sum(level.codes * math.log2(level.codebook_size) for level in levels)
    return {
        "image_size": tokenizer.drawn_size,
        "codes": tokenizer.codes_per_image,
        "codebook_size": tokenizer.codebook_size,
        "bits_per_pixel": bits / side**2,
        "parameters": sum(weight.numel() for weight in tokenizer.parameters()),
        "fingerprint": tokenizer.fingerprint,
    }


def time_tokenizers(
    tokenizers: "Mapping[str, ImageTokenizer]", images: "Tensor", rounds: int = 3
) -> dict[str, dict[str, float]]:
    """Measure how many images per second tokenizers encode and decode.

    All tokenizers take turns in each round, so that other load on the machine affects all alike.

    Args:
        tokenizers: by their names.
        images: float[N, 3, R, R] in [-1, 1], one batch.
        rounds: number of measurements, after one round of warm-up. The median counts.

    Returns:
        name -> ``encode_per_second`` and ``decode_per_second``, in images.
    """
    import torch

    from multimodal.tokenizers.weights import resize

    seconds: dict[str, dict[str, list[float]]] = {
        name: {"encode": [], "decode": []} for name in tokenizers
    }
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, tokenizer in tokenizers.items():
                batch = resize(images, tokenizer.image_size)
                start = time.perf_counter()
                codes = tokenizer.encode(batch)
                middle = time.perf_counter()
                tokenizer.decode(codes)
                seconds[name]["encode"].append(middle - start)
                seconds[name]["decode"].append(time.perf_counter() - middle)
    return {
        name: {
            f"{verb}_per_second": len(images) / sorted(times[1:])[len(times[1:]) // 2]
            for verb, times in both.items()
        }
        for name, both in seconds.items()
    }


def format_table(rows: list[dict[str, Any]], protocol: dict[str, Any]) -> str:
    """One row for each tokenizer, aligned, and the protocol in the last line."""
    lines = [["tokenizer", *(name.replace("_per_second", "/s") for name in FORMATS)]]
    for row in rows:
        cells = [form.format(row[name]) if name in row else "-" for name, form in FORMATS.items()]
        lines.append([str(row["tokenizer"]), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    about = (
        f"{protocol['data']}; {protocol['image_size']} x {protocol['image_size']} pixels "
        f"({protocol['fit']}); perceptual and fid: {protocol['features']}; "
        f"ms_ssim: {protocol['ms_ssim_scales']} scales; images per second: batches of "
        f"{protocol['batch_size']}, {protocol['threads']} threads, float32"
    )
    return "\n".join([*text, about])
