"""``multimodal edit``: a part of an image drawn anew."""

import argparse
from pathlib import Path

from multimodal.commands.options import (
    check_output,
    given_options,
    load_model,
    make_parser,
    save_image,
)
from multimodal.commands.signing import add_sign, signer_of
from multimodal.options import EditOptions
from multimodal.torchrun import check_one_process

EPILOG = """A mask is an image of the same size: what is white in it is drawn anew. Outside the mask
not a pixel changes.

examples:
  multimodal edit --model DIR cat.jpg --box 20,30,120,130 --prompt "a dog" --out dog.png
  multimodal edit --model DIR cat.jpg --mask mask.png --prompt "a dog" --out dog.png
  multimodal edit cat.jpg --margins 0,0,80,0 --prompt "a cat and a dog" --out wider.png
  multimodal edit cat.jpg --vary 0.4 --prompt "a cat" --out another.png
"""


def _box(text: str) -> tuple[int, int, int, int]:
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected four numbers, pixels") from error
    return left, top, right, bottom


def main(argv: list[str]) -> int:
    parser = make_parser("edit", "Draw a part of an image anew, after a text.", EPILOG, EditOptions)
    parser.add_argument("image", metavar="IMAGE", help="an image file")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mask", metavar="FILE", help="an image of the same size, white = draw")
    where.add_argument("--box", type=_box, metavar="X0,Y0,X1,Y1", help="in pixels, from top left")
    where.add_argument("--margins", type=_box, metavar="L,T,R,B", help="pixels to draw around it")
    where.add_argument("--vary", type=float, metavar="SHARE", help="draw this share of it anew")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the image shows then")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="PNG, JPEG or WebP")
    add_sign(parser)
    arguments = parser.parse_args(argv)
    options = given_options(arguments, EditOptions)
    check_output(arguments.out)
    check_one_process("edit")
    signer, drawing = signer_of(arguments.sign), None
    model = load_model(arguments)
    image, prompt = arguments.image, arguments.prompt
    if arguments.margins:
        edited = model.outpaint(image, arguments.margins, prompt, **options)
    elif arguments.vary is not None:
        edited = model.vary(image, arguments.vary, prompt, **options)
    else:
        edited = model.edit(image, arguments.box or arguments.mask, prompt, **options)
    if signer is not None:
        from multimodal.origin.credentials import PARTLY_DRAWN, Drawing

        drawing = Drawing.of(model.fingerprint, prompt, PARTLY_DRAWN)
    save_image(edited, arguments.out, signer, drawing)
    print(arguments.out)
    return 0
