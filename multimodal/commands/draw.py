"""``multimodal draw``: images after a text."""

from pathlib import Path

from multimodal.commands.options import (
    at_least_one,
    check_output,
    given_options,
    load_model,
    make_parser,
    numbered,
    save_image,
    with_progress,
)
from multimodal.commands.signing import add_sign, signer_of
from multimodal.options import DrawOptions
from multimodal.torchrun import check_one_process

EPILOG = """With -n over 1 the files are FILE with -0, -1, ... before the suffix, and FILE itself
shows them in a grid (the first 1,024). The same seed draws the same images, however many there are.
Each is saved when it is done. Long drawings say on stderr how long they will take.

examples:
  multimodal draw "a red circle above a blue square" --out drawing.png
  multimodal draw "a dog in the snow" --out dog.png -n 4 --seed 7
  multimodal draw "a blue square" --out square.png --candidates 16
  multimodal draw "a dog" --out dog.png --method masked --steps 8
  multimodal draw "a dog" --out dog.png --sign keys/     # see multimodal provenance
"""
MAX_IN_GRID = 1024


def main(argv: list[str]) -> int:
    parser = make_parser("draw", "Draw images after a text.", EPILOG, DrawOptions)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="PNG, JPEG or WebP")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="how many (default 1)")
    add_sign(parser)
    arguments = parser.parse_args(argv)
    at_least_one(arguments, "n")
    options = given_options(arguments, DrawOptions)
    check_output(arguments.out)
    check_one_process("draw")
    signer = signer_of(arguments.sign)

    from multimodal.data.images import grid_of

    out, count, drawing = arguments.out, arguments.n, None
    model = load_model(arguments)
    if signer is not None:
        from multimodal.origin.credentials import Drawing

        drawing = Drawing.of(model.fingerprint, arguments.prompt)
    drawn = model.draw_each(arguments.prompt, count, **options)
    shown = []
    for number, image in enumerate(with_progress(drawn, count, "multimodal draw", "images")):
        path = out if count == 1 else numbered(out, number)
        save_image(image, path, signer, drawing)
        print(path, flush=True)
        if number < MAX_IN_GRID:
            shown.append(image)
    if count > 1:
        save_image(grid_of(shown), out, signer, drawing)
        print(out)
    return 0
