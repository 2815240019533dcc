"""Captions learned in equal time: ours beside open_clip's CoCa, from the same photos.

    python benchmarks/peer_captions.py --data data/flickr8k --meaning runs/meaning
        [--seconds 1500] [--batch-size 32] [--threads 2] [--limit 0] [--text starter]
        [--rows coca coca-pretrained ours] [--out runs/peer-captions]

coca: from random weights. Its ViT reads photos of 112 x 112 pixels.
coca-pretrained: its image tower is the network whose features --meaning quantizes, with the same
    weights, locked, as by open_clip's --lock-image. It reads photos as large as --meaning does.
ours: a `mini` on the codes of --meaning, with the settings of photos_read.yaml, but no questions.

One after the other, each for --seconds of training steps. Equal for all: the photos, two crops of
each (at least 0.4 of the area, squashed, half of them mirrored), --batch-size photos a step, the
threads, bf16 autocast, clipped gradients, and a learning rate that rises for a twentieth of the
time and falls as a cosine to zero. A step of CoCa has one caption of each photo, a step of ours as
many as the recipe says: so each is made to train. CoCa has open_clip's tokenizer, losses and AdamW
(learning rate 1e-3), ours the recipe's Muon.

The clock runs in training steps alone. Before it, and cached: JPEGs become pixels, and pixels
features of the locked network, or codes, both in bf16. To CoCa's advantage, its vocabulary has only
the ids of the training captions, its texts have 32 places instead of 77, and of its last weights
and those with the lowest caption loss on val (8 checks, clock stopped) the ones with the better
greedy captions count. What open_clip 3.3 leaves out is in ``peers/coca.py``.

Measured on all photos of val, in fp32, with the same greedy and beam search for all. A row that is
done is not done again. Prints captions of ten photos, and a table with 95 % intervals. The last
line is JSON.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import open_clip
import torch
import yaml
from fits import markdown
from numpy.typing import NDArray
from peers.coca import PIXELS, Photos, Words, make_coca, train_coca, write_captions
from torch import Tensor
from tqdm import tqdm

from multimodal.data.encode import Encoding, encode_shards
from multimodal.data.samples import Sample
from multimodal.data.shards import MANIFEST, Shards, index_shard, write_manifest, write_tar
from multimodal.eval.evaluator import interval
from multimodal.eval.metrics.captioning import score_captions
from multimodal.eval.metrics.retrieval import count_ahead
from multimodal.files import atomic_file, write_json
from multimodal.inference.embedding import embed_codes, embed_texts
from multimodal.inference.text import caption_codes
from multimodal.memory import keep_freed_memory
from multimodal.model.lessons import descriptions_of
from multimodal.model.objectives import ObjectivesConfig
from multimodal.options import TextOptions
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.train.data import ShardData
from multimodal.train.joint import JointModule

ROWS = ("coca", "coca-pretrained", "ours")
SPLITS = ("train", "val")
WARMUP = 0.05  # share of the time
BATCH, BEAMS, RECALL_AT, SHOWN = 50, 5, 10, 10


def rate(progress: float) -> float:
    """Share of the time -> share of the learning rate."""
    if progress < WARMUP:
        return max(progress, 1e-3) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))


class Budget(L.Callback):
    """Ends training after some seconds, and sets the learning rate by the time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        progress = (time.perf_counter() - self.start) / self.seconds
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * rate(progress)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.spent = time.perf_counter() - self.start
        trainer.should_stop = self.spent >= self.seconds


class Inputs:
    """What the rows read, made once, in ``folder``.

    Args:
        data: shards of images, with captions.
        meaning: folder of an image tokenizer with a level of meaning.
        limit: use so many photos of each split. 0: all.
    """

    def __init__(self, folder: Path, data: Path, meaning: Path, limit: int) -> None:
        self.folder, self.data = folder, data
        self.tokenizer = load_image_tokenizer(meaning)
        if self.tokenizer.meaning is None:
            sys.exit(f"{meaning}: has no level of meaning")
        self.encoding = Encoding.for_tokenizer(
            self.tokenizer, precision="bfloat16", encodings=2, crop_scale=0.4, mirror=True
        )
        if limit:
            self.data = folder / "data"
            self._first_samples(data, limit)
        self.samples = {split: list(Shards(self.data, split)) for split in SPLITS}

    def _first_samples(self, source: Path, count: int) -> None:
        if (self.data / MANIFEST).is_file():
            return
        self.data.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            samples = islice(Shards(source, split), count)
            write_tar(self.data / f"{split}-0000.tar", ((s.key, s.members) for s in samples))
        shards = sorted(self.data.glob("*.tar"))
        write_manifest(self.data, [index_shard(shard) for shard in shards])

    def codes(self) -> Path:
        """A shard folder of the codes of all crops."""
        out = self.folder / "codes"
        if not (out / MANIFEST).is_file():
            total = sum(map(len, self.samples.values()))
            with tqdm(total=total, desc="codes", disable=None) as bar:
                encode_shards(self.data, out, self.tokenizer, self.encoding, on_sample=bar.update)
        return out

    def crops(
        self, name: str, split: str, size: int, change: Callable[[NDArray[Any]], NDArray[Any]]
    ) -> NDArray[Any]:
        """All crops of each photo, changed, from a file: [N, crops, ...].

        Args:
            name: of the file.
            size: pixels of a side.
            change: uint8[B, size, size, 3] -> [B, ...].
        """
        file, encoding = (
            self.folder / f"{name}-{split}.npy",
            replace(self.encoding, image_size=size),
        )
        samples = self.samples[split]
        if not file.is_file():
            with atomic_file(file) as part:
                array = None
                for start in tqdm(range(0, len(samples), BATCH), desc=file.stem, disable=None):
                    batch = samples[start : start + BATCH]
                    crops = np.stack([encoding.prepare(s.key, s.image, split) for s in batch])
                    changed = change(crops.reshape(-1, *crops.shape[2:]))
                    changed = changed.reshape(*crops.shape[:2], *changed.shape[1:])
                    if array is None:
                        shape = (len(samples), *changed.shape[1:])
                        array = np.lib.format.open_memmap(part, "w+", changed.dtype, shape)
                    array[start : start + len(batch)] = changed
                del array  # writes it
        return np.load(file, mmap_mode="r")


# --- scores ---------------------------------------------------------------------------------------


def mean(values: Sequence[float], groups: Sequence[int] | None = None) -> dict[str, float]:
    low, high = interval(values, groups=groups)
    return {"value": sum(values) / len(values), "low": low, "high": high}


def ciders(texts: list[str], samples: list[Sample]) -> list[float]:
    """The CIDEr of each caption."""
    predictions = {sample.key: text for sample, text in zip(samples, texts, strict=True)}
    references = {sample.key: descriptions_of(sample.record) for sample in samples}
    scores = score_captions(predictions, references)["per_image"]
    return [scores[sample.key]["CIDEr"] for sample in samples]


def measure(
    greedy: list[str], beams: list[str], images: Tensor, texts: Tensor, samples: list[Sample]
) -> dict[str, Any]:
    """Scores of captions, and of retrieval by embeddings.

    Args:
        greedy, beams: N captions each.
        images: float[N, D], unit norm.
        texts: float[M, D], unit norm, of all captions of all samples.
        samples: N.
    """
    owners = [row for row, sample in enumerate(samples) for _ in descriptions_of(sample.record)]
    ahead_of_image, ahead_of_text = count_ahead(images, texts, owners)
    shown = range(0, len(samples), max(1, len(samples) // SHOWN))
    return {
        "CIDEr": mean(ciders(greedy, samples)),
        "CIDEr_beams": mean(ciders(beams, samples)),
        "distinct": len(set(greedy)),
        "distinct_beams": len(set(beams)),
        "text_to_image": mean((ahead_of_image < RECALL_AT).double().tolist(), owners),
        "image_to_text": mean((ahead_of_text < RECALL_AT).double().tolist()),
        "photos": len(samples),
        "shown": {samples[row].key: (greedy[row], beams[row]) for row in shown},
    }


# --- rows -----------------------------------------------------------------------------------------


def run_coca(arguments: argparse.Namespace, inputs: Inputs, pretrained: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    words = Words([t for s in inputs.samples["train"] for t in descriptions_of(s.record)])
    meaning = inputs.tokenizer.meaning
    coca = make_coca(words.size, meaning.encoder if pretrained else None)
    size = meaning.config.image_size if pretrained else PIXELS
    change = coca.visual.features if pretrained else np.asarray
    start = time.perf_counter()
    train, val = (
        Photos(
            inputs.crops("features" if pretrained else "pixels", split, size, change),
            [words(descriptions_of(sample.record)) for sample in inputs.samples[split]],
        )
        for split in SPLITS
    )
    preparation = time.perf_counter() - start
    figures, best = train_coca(coca, train, val, arguments.batch_size, arguments.seconds, rate)
    samples, last = inputs.samples["val"], coca.state_dict()
    greedy, figures["weights"] = write_captions(coca, words, val, 1), "last"
    if min(figures["caption_loss_on_val"]) < figures["caption_loss_on_val"][-1]:
        last = {name: weight.clone() for name, weight in last.items()}
        coca.load_state_dict(best)
        other = write_captions(coca, words, val, 1)
        if sum(ciders(other, samples)) > sum(ciders(greedy, samples)):
            greedy, figures["weights"] = other, "lowest caption loss on val"
        else:
            coca.load_state_dict(last)
    beams = write_captions(coca, words, val, BEAMS)
    with torch.inference_mode():
        images = torch.cat([coca.encode_image(part) for part, _ in val.parts()])
        texts = torch.cat([coca.encode_text(each) for each in val.texts])
    figures |= {"vocabulary": words.size, "preparation_seconds": preparation}
    return figures | measure(greedy, beams, images, texts, samples)


def run_ours(arguments: argparse.Namespace, inputs: Inputs) -> dict[str, Any]:
    L.seed_everything(0, verbose=False)
    start = time.perf_counter()
    codes = inputs.codes()
    preparation = time.perf_counter() - start
    recipe = files("multimodal.train.recipes").joinpath("photos_read.yaml").read_text("utf-8")
    settings = yaml.safe_load(recipe)["model"]["init_args"]
    settings |= {"text_tokenizer": arguments.text, "image_tokenizer": str(arguments.meaning)}
    settings |= {"size": "mini", "question_share": 0.0}
    settings["objectives"] = ObjectivesConfig(**settings["objectives"])
    module, budget = JointModule(**settings), Budget(arguments.seconds)
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        max_steps=10**9,  # the budget ends it
        limit_val_batches=0,
        callbacks=[budget],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ShardData([str(codes)], global_batch_size=arguments.batch_size, workers=0))
    model = module.model.eval()
    model.save(arguments.out / "ours")
    samples = list(Shards(codes, "val"))
    rows = torch.stack([torch.from_numpy(sample.codes[0]) for sample in samples]).split(BATCH)
    greedy, beams = (
        [text for part in rows for text in caption_codes(model, part, TextOptions(beams=number))]
        for number in (1, BEAMS)
    )
    images = torch.cat([embed_codes(model, part) for part in rows])
    texts = torch.cat([embed_texts(model, descriptions_of(s.record)) for s in samples])
    figures = {
        "learning_rate": settings["learning_rate"],
        "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "steps": trainer.global_step,
        "captions_a_step": arguments.batch_size * settings["captions_per_image"],
        "seconds": budget.spent,
        "vocabulary": model.config.text_size,
        "preparation_seconds": preparation,
    }
    return figures | measure(greedy, beams, images, texts, samples)


def table_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    def cell(figure: str, digits: int = 3, times: int = 1) -> str:
        value, low, high = (
            f"{times * row[figure][n]:.{digits}f}" for n in ("value", "low", "high")
        )
        return f"{value} ({low} to {high})"

    return {
        "": name,
        "trained": f"{row['trained_parameters'] / 1e6:.1f} M",
        "steps": row["steps"],
        "captions seen": f"{row['steps'] * row['captions_a_step']:,}",
        "CIDEr, greedy": cell("CIDEr"),
        f"{BEAMS} beams": cell("CIDEr_beams"),
        "distinct": f"{row['distinct']}; {row['distinct_beams']}",
        f"text to image @{RECALL_AT}, %": cell("text_to_image", 1, 100),
        f"image to text @{RECALL_AT}, %": cell("image_to_text", 1, 100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="shards of images with captions")
    parser.add_argument("--meaning", type=Path, required=True, help="a trained level of meaning")
    parser.add_argument("--seconds", type=float, default=1500, help="of training, each row")
    parser.add_argument("--batch-size", type=int, default=32, help="photos a step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=int, default=0, help="photos of each split; 0: all")
    parser.add_argument("--text", default="starter", help="the text tokenizer of ours")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--out", type=Path, default=Path("runs/peer-captions"))
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    inputs = Inputs(arguments.out, arguments.data, arguments.meaning, arguments.limit)
    about = {
        "data": arguments.data.name,
        "photos": {split: len(samples) for split, samples in inputs.samples.items()},
        "codes": inputs.tokenizer.codes_fingerprint,
        "text_tokenizer": Path(arguments.text).name,
        "seconds": arguments.seconds,
        "batch_size": arguments.batch_size,
        "threads": arguments.threads,
    }
    settings = arguments.out / "settings.json"
    if settings.is_file() and json.loads(settings.read_text("utf-8")) != about:
        sys.exit(f"{arguments.out}: holds a comparison with other settings; give another --out")
    write_json(settings, about)
    rows: dict[str, dict[str, Any]] = {}
    for name in arguments.rows:
        file = arguments.out / f"{name}.json"
        if not file.is_file():
            pretrained = name == "coca-pretrained"
            ours = name == "ours"
            row = run_ours(arguments, inputs) if ours else run_coca(arguments, inputs, pretrained)
            write_json(file, row)
        rows[name] = json.loads(file.read_text("utf-8"))
    references = {s.key: descriptions_of(s.record)[0] for s in inputs.samples["val"]}
    for key in rows[arguments.rows[0]]["shown"]:
        print(f"{key}: {references[key]}")
        for name, row in rows.items():
            print(f"    {name}: {row['shown'][key][0]}")
    print()
    print(markdown([table_row(name, row) for name, row in rows.items()]))
    for row in rows.values():
        del row["shown"]
    machine = {
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }
    print(json.dumps({"rows": rows, **about, **machine}))


if __name__ == "__main__":
    main()
