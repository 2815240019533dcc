"""``multimodal import``: a released unified model, as a model folder."""

import shutil
from pathlib import Path

from multimodal.terminal import Parser

EXAMPLES = """examples:
  multimodal import chameleon-7b runs/chameleon
  multimodal import Anole-7b-v0.1-hf runs/anole --image-tokenizer vqgan.ckpt
  multimodal import Emu3-Gen-hf runs/emu3 --image-size 512
  multimodal import exported-and-tuned runs/mine
  multimodal caption --model runs/chameleon cat.jpg
"""
CARD = """\
# {name}

A {kind} as a model of the multimodal toolkit. Its licence is that of the weights it was made of.
The embeddings of images and texts (`multimodal embed`, `search`) are not trained.
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="multimodal import",
        description="Turn a released unified model, a folder as transformers saves it, into a "
        "model folder: Chameleon, Anole, Emu3, and what `multimodal export hf` wrote, perhaps "
        "trained further elsewhere. The weights stay what they are. No code of the folder is run.",
        epilog=EXAMPLES,
    )
    parser.add_argument("folder", metavar="FOLDER", help="config.json, tokenizer.json, safetensors")
    parser.add_argument("out", metavar="OUT", help="the folder to write; new, or empty")
    parser.add_argument(
        "--image-tokenizer",
        metavar="PATH",
        help="take this one: the same codes, but with a decoder (Chameleon's folders have none), "
        "or not rounded; released weights, or a tokenizer folder",
    )
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="pixels of a side (default: the model's)"
    )
    parser.add_argument(
        "--fit",
        choices=["squash", "crop", "letterbox"],
        help="how other images are made square (default: the model's)",
    )
    arguments = parser.parse_args(argv)
    from multimodal.files import new_folder
    from multimodal.released.importing import import_model
    from multimodal.tokenizers.weights import read_config_file

    source = Path(arguments.folder)
    with new_folder(Path(arguments.out)) as folder:
        model, dtype = import_model(
            source, arguments.image_size, arguments.fit, arguments.image_tokenizer
        )
        kind = read_config_file(source / "config.json")["model_type"]
        model.save(folder, CARD.format(name=source.resolve().name, kind=kind), dtype)
        if (source / "LICENSE").is_file():
            shutil.copyfile(source / "LICENSE", folder / "LICENSE")
    images, size = model.image_tokenizer, model.config.text_size
    draws = "draws" if images.can_draw else "cannot draw: its release has no decoder"
    print(
        f"{arguments.out}: {size} text ids, {images.codebook_size} codes, {images.codes_per_image} "
        f"of an image of {images.image_size} x {images.image_size}; {draws}"
    )
    return 0
