"""``multimodal draw``: images after a text."""

from pathlib import Path

from multimodal.commands.options import (
    at_least_one,
    check_output,
    given_options,
    load_model,
    make_parser,
    save_image,
    save_images,
)
from multimodal.options import DrawOptions

EPILOG = """With -n over 1 the files are FILE with -0, -1, ... before the suffix, and FILE itself
shows them all in a grid. The same seed draws the same images, however many there are.

examples:
  multimodal draw "a red circle above a blue square" --out drawing.png
  multimodal draw "a dog in the snow" --out dog.png -n 4 --seed 7
  multimodal draw "a blue square" --out square.png --candidates 16
  multimodal draw "a dog" --out dog.png --method masked --steps 8
"""


def main(argv: list[str]) -> int:
    parser = make_parser("draw", "Draw images after a text.", EPILOG, DrawOptions)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="PNG, JPEG or WebP")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="how many (default 1)")
    arguments = parser.parse_args(argv)
    at_least_one(arguments, "n")
    options = given_options(arguments, DrawOptions)
    check_output(arguments.out)

    from multimodal.data.images import grid_of

    model = load_model(arguments)
    images = model.draw(arguments.prompt, arguments.n, **options)
    paths = save_images(images, arguments.out)
    if len(images) > 1:
        save_image(grid_of(images), arguments.out)
        paths.append(arguments.out)
    print(*paths, sep="\n")
    return 0
