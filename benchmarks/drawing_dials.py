"""How drawings depend on the method, the steps, the guidance and the temperature.

    python benchmarks/drawing_dials.py [--model starter] [--scenes DIR] [--photos DIR]

Of 100 captions of scenes (val): the share of objects with the right colour and shape, read off the
pixels. Of 100 first captions of photos (val): the similarity of drawing and caption in the model's
embeddings. Seed 0. Prints a table. The last line is JSON.
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from fits import markdown
from tqdm import tqdm

from multimodal import load
from multimodal.data.images import to_image
from multimodal.data.shards import Shards
from multimodal.eval.metrics.scene_drawings import complete_caption, score_scene_drawings
from multimodal.inference.codec import decode_images
from multimodal.inference.drawing import draw_codes
from multimodal.inference.embedding import embed_codes, embed_texts
from multimodal.model.lessons import descriptions_of
from multimodal.options import DrawOptions, Method

COUNT = 100
METHODS: tuple[tuple[Method, int, float], ...] = (  # steps, temperature
    ("causal", 1, 1.0),
    ("causal", 1, 0.8),
    ("causal", 1, 0.6),
    ("causal", 1, 0.4),
    ("masked", 4, 1.0),
    ("masked", 8, 1.0),
    ("masked", 12, 1.0),
    ("masked", 12, 0.6),
)
SCALES = (1.0, 2.0, 3.0, 5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--scenes", type=Path, default=Path("data/scenes"))
    parser.add_argument("--photos", type=Path, default=Path("data/flickr8k"))
    arguments = parser.parse_args()
    model = load(arguments.model)
    records = (sample.record for sample in islice(Shards(arguments.scenes, "val"), COUNT))
    prompts = [caption for record in records if (caption := complete_caption(record))]
    photo_captions = [
        descriptions_of(sample.record)[0]
        for sample in islice(Shards(arguments.photos, "val"), COUNT)
    ]
    embedded = embed_texts(model, photo_captions)
    rows: list[dict[str, Any]] = []
    settings = [(*method, scale) for method in METHODS for scale in SCALES]
    for method, steps, temperature, scale in tqdm(settings, disable=None):
        start = time.perf_counter()
        options = DrawOptions(
            method=method, steps=steps, guidance_scale=scale, temperature=temperature
        )
        drawn = decode_images(model, draw_codes(model, prompts, options))
        score = score_scene_drawings(prompts, [to_image(image) for image in drawn])
        photos = draw_codes(model, photo_captions, options)
        images = torch.cat([embed_codes(model, part) for part in photos.split(64)])
        rows.append(
            {
                "method": method if method == "causal" else f"masked, {steps} steps",
                "temperature": temperature,
                "guidance": scale,
                "objects": score["objects"],
                "colours": score["colours"],
                "extra": score["extra"],
                "alignment on photos": float((images * embedded).sum(-1).mean()),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    print(markdown(rows))
    print(json.dumps({"model": model.fingerprint, "scenes": len(prompts), "rows": rows}))


if __name__ == "__main__":
    main()
