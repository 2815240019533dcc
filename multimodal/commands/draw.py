"""``multimodal draw``: images after a text."""

from pathlib import Path

from multimodal.commands.options import (
    DRAWN_AT,
    add_drawing,
    add_sampling,
    at_least_one,
    check_output,
    drawing_of,
    load_model,
    parser,
    save_image,
)

EPILOG = """With -n over 1 the files are FILE with -0, -1, ... before the suffix, and FILE itself
shows them all in a grid. The same seed draws the same images, however many there are.

examples:
  multimodal draw "a red circle above a blue square" --out drawing.png
  multimodal draw "a dog in the snow" --out dog.png -n 4 --seed 7
  multimodal draw "a blue square" --out square.png --candidates 16
  multimodal draw "a dog" --out dog.png --method causal --top-k 100
"""


def main(argv: list[str]) -> int:
    made = parser("draw", "Draw images after a text.", EPILOG)
    made.add_argument("prompt", metavar="PROMPT")
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="PNG, JPEG or WebP")
    made.add_argument("-n", type=int, default=1, metavar="N", help="how many (default 1)")
    made.add_argument(
        "--method",
        choices=("masked", "causal"),
        default="causal",
        help="many codes at a time, or one after the other (default causal)",
    )
    made.add_argument(
        "--candidates",
        type=int,
        default=1,
        metavar="K",
        help="draw K for each, keep the one that the model would caption so itself (default 1)",
    )
    add_drawing(made)
    add_sampling(made, DRAWN_AT)
    arguments = made.parse_args(argv)
    at_least_one(arguments, "n", "steps", "candidates")
    check_output(arguments.out)

    from multimodal.data.images import grid_of

    model = load_model(arguments)
    images = model.draw(
        arguments.prompt,
        arguments.n,
        method=arguments.method,
        candidates=arguments.candidates,
        **drawing_of(arguments),
    )
    out: Path = arguments.out
    if len(images) > 1:
        for number, image in enumerate(images):
            path = out.with_name(f"{out.stem}-{number}{out.suffix}")
            save_image(image, path)
            print(path)
        save_image(grid_of(images), out)
    else:
        save_image(images[0], out)
    print(out)
    return 0
