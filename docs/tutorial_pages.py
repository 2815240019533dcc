"""What the tutorials need to be run: data a reader has, and options that make commands small."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Options that make a training small. Nothing else about it is changed.
FEW = "--trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.enable_progress_bar false \
--data.global_batch_size 4 --data.val_limit 4 --data.workers 0 --trainer.accelerator cpu \
--trainer.precision 32-true"
JOINT = f"{FEW} --model.init_args.captions_in_validation 2 \
--model.init_args.drawings_in_validation 1 --model.init_args.answers_in_validation 2"
# Commands that are not run, by their beginning, and why. Of those that are ours, --help or
# --print_config is.
NOT_RUN = {
    "pip ": "changes what is installed",
    "hf ": "downloads",
    "aws ": "needs a bucket",
    "torchrun ": "starts a process for each GPU; tests/launches.py does so for CPUs",
    "multimodal fit --config photos_8_gpus.yaml": "needs 8 GPUs",
    "multimodal data check s3://": "needs a bucket; tests/data reads one",
    "multimodal demo": "takes a minute; tests/eval runs it",
}
NEEDED = ("hf ",)  # of these: what comes after them on a page is of what they bring


@dataclass
class Page:
    """What a page needs to be run, beside its text.

    Attributes:
        given: makes in a folder what a reader has before the first command.
        smaller: what is added to the commands with this beginning, so that they take seconds.
        stands_in: what is given stands for other data. The outputs on the page are of these.
    """

    given: Callable[[Path], None] = lambda folder: None
    smaller: dict[str, str] = field(default_factory=dict)
    stands_in: bool = False


def scenes(folder: Path, count: int, table: Path | None = None) -> None:
    """Pictures of shapes and their captions, which stand for the photos of a reader.

    Args:
        table: has the captions. By default each is in a .txt beside its picture.
    """
    from multimodal.scenes.captions import captions
    from multimodal.scenes.rendering import render
    from multimodal.scenes.scene import sample_scene

    rng = random.Random(0)
    folder.mkdir(parents=True)
    rows = ["image,caption"]
    for number in range(1, count + 1):
        scene = sample_scene(rng)
        (caption,) = captions(scene, rng, 1)
        render(scene).save(folder / f"{number:02}.png")
        rows.append(f'{number:02}.png,"{caption}"')
        if table is None:
            (folder / f"{number:02}.txt").write_text(f"{caption}\n")
    if table is not None:
        table.write_text("\n".join(rows) + "\n")


def photos(folder: Path) -> None:
    """The five photos that the demo captions, and a file that is no photo."""
    from multimodal.eval.demo import PHOTOS, photo

    (folder / "photos").mkdir()
    for name in PHOTOS:
        photo(name).save(folder / "photos" / f"{name}.jpg", quality=90)


def notes(folder: Path) -> None:
    scenes(folder / "photos", 24)
    (folder / "notes").mkdir()
    (folder / "notes/kitchen.md").write_text(
        "# The kitchen\n\nThe key of the cellar hangs behind the door.\n\n"
        "The oven needs ten minutes to get hot. Its light goes out when it is ready.\n"
    )
    (folder / "notes/garden.txt").write_text(
        "The roses are cut in March.\nThe hose is in the shed, on the left.\n"
    )


def tiny_llama(folder: Path) -> None:
    """A Llama with random weights, in the folder of a real one, and shards of pictures."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from multimodal.tokenizers.text import TextTokenizer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        config = LlamaConfig(vocab_size=320, tie_word_embeddings=True, **sizes, **heads)
        LlamaForCausalLM(config).save_pretrained(folder / "smollm2")
    TextTokenizer.train(["a red bus in the snow"] * 9, 300).save(folder / "smollm2/tokenizer.json")
    photo_shards(folder)
    scenes(folder / "pictures", 2)


def photo_shards(folder: Path) -> None:
    from multimodal.scenes.dataset import write_scenes

    write_scenes(folder / "data/photos", 400, 0, size=32)


PAGES = {
    "captions_for_my_photos": Page(photos),
    "my_domain_aerial": Page(
        lambda folder: scenes(folder / "aerial", 60, folder / "captions.csv"),
        {
            "multimodal fit --config finetune.yaml": JOINT,
            "multimodal info --config": FEW,
            "multimodal eval": "--limit 2",
        },
        stands_in=True,
    ),
    "image_tokenizer": Page(
        smaller={
            "multimodal data scenes data/scenes": "--count 40 --size 32",
            "multimodal tokenizer text": "--vocabulary-size 400",
            "multimodal fit --config scenes_tokenizer.yaml": f"{FEW} "
            "--model.init_args.tokenizer.autoencoder.dim 32",
            "multimodal fit --config scenes_joint.yaml": f"{JOINT} --model.init_args.size tiny "
            "--model.init_args.row_length 256",
            "multimodal tokenizer encode": "--encodings 1",
        },
    ),
    "language_model_that_sees": Page(
        tiny_llama,
        {"multimodal tokenizer encode": "--encodings 1", "multimodal fit --config see.yaml": JOINT},
    ),
    "lora_and_preferences": Page(
        lambda folder: scenes(folder / "photos", 60),
        {
            "multimodal fit --config finetune.yaml": JOINT,
            "multimodal fit --config prefer.yaml": JOINT,
            "multimodal prefer": "--limit 6 --max-tokens 16",
        },
    ),
    "index_and_answer": Page(notes),
    "eight_gpus": Page(photo_shards),
}
