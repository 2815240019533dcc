"""``multimodal tokenizer compare``: image tokenizers side by side, one protocol, one table."""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

EXAMPLES = """Every tokenizer gets the same images, brought to one size (--image-size; by default
the largest that any of them was made for), resizes them to its own and its reconstructions back.
Perceptual distance and FID depend on the features: with the default, random ones of a fixed seed,
they compare tokenizers with one another, and with nothing published.

examples:
  multimodal tokenizer compare runs/a/model runs/b/model --data data/photos
  multimodal tokenizer compare starter runs/llamagen --data data/photos --split val --limit 500 \\
      --features timm:resnet50.a1_in1k --output compare.json --picture compare.png
"""
SHOWN = 8  # images in the picture


def main(argv: list[str]) -> int:
    made = argparse.ArgumentParser(
        prog="multimodal tokenizer compare",
        description="Measure how well image tokenizers keep the images of a shard folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("tokenizers", nargs="+", help="tokenizer or model folders, or starter")
    made.add_argument("--data", required=True, help="a shard folder")
    made.add_argument("--split", default="val", help="of the shard folder (default val)")
    made.add_argument(
        "--limit", type=int, default=1000, help="at most so many images, the first ones"
    )
    made.add_argument("--image-size", type=int, help="pixels of a side at which all are judged")
    made.add_argument("--fit", default="crop", choices=["squash", "crop", "letterbox"],
                      help="how images are made square (default crop)")  # fmt: skip
    made.add_argument("--features", default="random", help="random, timm:MODEL or timm:MODEL=FILE")
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--output", help="a JSON file for the results and their protocol")
    made.add_argument("--picture", help="a PNG: the first images, and below them what each keeps")
    return compare(made.parse_args(argv))


def compare(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from multimodal.commands.options import check_output
    from multimodal.data.images import fit_image, open_image, to_image, to_tensor
    from multimodal.data.shards import Shards
    from multimodal.eval.metrics.features import Features
    from multimodal.eval.metrics.reconstruction import (
        describe,
        ms_ssim_scales,
        score_reconstructions,
        time_tokenizers,
    )
    from multimodal.files import atomic_file
    from multimodal.model.checkpoint import part_of
    from multimodal.tokenizers.image import load_image_tokenizer

    for path, suffix in ((arguments.output, ".json"), (arguments.picture, ".png")):
        if path:
            check_output(Path(path), (suffix,))
    if arguments.limit < 1 or arguments.batch_size < 1:
        raise ValueError("--limit and --batch-size: expected at least 1")
    tokenizers = {
        name: load_image_tokenizer(part_of(name, "image_tokenizer"))
        for name in dict.fromkeys(arguments.tokenizers)
    }
    side = arguments.image_size or max(t.config.image_size for t in tokenizers.values())
    features = Features(arguments.features)
    samples = islice(Shards(arguments.data, arguments.split), arguments.limit)
    images = torch.stack([
        to_tensor(fit_image(open_image(sample.image), side, arguments.fit))
        for sample in tqdm(samples, desc="images", disable=None)
    ])  # fmt: skip
    rows, pictures = list[dict[str, Any]](), [images[:SHOWN]]
    total = len(images) * len(tokenizers)
    with tqdm(total=total, desc="reconstructions", unit="image", disable=None) as progress:
        for name, tokenizer in tokenizers.items():
            scores, found = score_reconstructions(
                tokenizer, images, features, arguments.batch_size, SHOWN, progress.update
            )
            rows.append({"tokenizer": name, **describe(tokenizer, side), **scores})
            pictures.append(found)
    times = time_tokenizers(tokenizers, images[: arguments.batch_size])
    rows = [{**row, **times[row["tokenizer"]]} for row in rows]
    protocol = {
        "data": f"{arguments.data}, split {arguments.split}, the first {len(images)} images",
        "image_size": side, "fit": arguments.fit, "features": features.label,
        "ms_ssim_scales": ms_ssim_scales(side), "precision": "float32",
        "threads": torch.get_num_threads(), "batch_size": arguments.batch_size,
    }  # fmt: skip
    print(table(rows, protocol))
    if arguments.output:
        with atomic_file(Path(arguments.output)) as file:
            file.write_text(json.dumps({"protocol": protocol, "tokenizers": rows}, indent=1) + "\n")
    if arguments.picture:
        from torchvision.utils import make_grid

        grid = make_grid(torch.cat(pictures), nrow=len(images[:SHOWN]))
        with atomic_file(Path(arguments.picture)) as file:
            to_image(grid).save(file, "PNG")
    return 0


COLUMNS = {
    "codes": "{:d}", "codebook_size": "{:d}", "bits_per_pixel": "{:.3f}", "psnr": "{:.2f}",
    "ssim": "{:.3f}", "ms_ssim": "{:.3f}", "perceptual": "{:.4f}", "fid": "{:.2f}",
    "used": "{:.1%}", "perplexity": "{:.0f}", "encode_per_second": "{:.0f}",
    "decode_per_second": "{:.0f}", "parameters": "{:,d}",
}  # fmt: skip


def table(rows: list[dict[str, Any]], protocol: dict[str, Any]) -> str:
    """Figures in columns, one row for each tokenizer, and below them how they came about."""
    lines = [["tokenizer", *(name.replace("_per_second", "/s") for name in COLUMNS)]]
    for row in rows:
        cells = [form.format(row[name]) if name in row else "-" for name, form in COLUMNS.items()]
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
        f"ms_ssim: {protocol['ms_ssim_scales']} scales; images a second: batches of "
        f"{protocol['batch_size']}, {protocol['threads']} threads, float32"
    )
    return "\n".join([*text, about])
