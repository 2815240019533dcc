"""``multimodal generate``: any mix of images and texts in, text or images out."""

import argparse
import json
from pathlib import Path
from typing import Any

from multimodal.commands.options import (
    add_sampling,
    at_least_one,
    check_output,
    load_model,
    parser,
    sampling_of,
    save_image,
)

EPILOG = """The prompt is what --image and --text say, in the order given. Images that the model
draws are written to --out (with -0, -1, ... before the suffix where there are several).

examples:
  multimodal generate --image cat.jpg --text "a cat that"
  multimodal generate --text "a red bus" --output image --out bus.png
  multimodal generate --image a.jpg --text "a dog" --image b.jpg --json
"""


USAGE = ("prompt_tokens", "text_tokens", "image_tokens", "log_probability", "ended")


class _Part(argparse.Action):
    """Collect --image and --text in one list, in their order."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
        parts = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*parts, Path(value) if option == "--image" else value])


def main(argv: list[str]) -> int:
    made = parser("generate", "Go on after any mix of images and texts.", EPILOG)
    made.add_argument("--image", dest="parts", action=_Part, metavar="FILE", help="JPEG, PNG, WebP")
    made.add_argument("--text", dest="parts", action=_Part, metavar="TEXT")
    made.add_argument("--output", choices=("text", "image", "any"), default="text",
                      help="what to make; any: what the model wants (default text)")  # fmt: skip
    made.add_argument("--out", type=Path, metavar="FILE", help="where images go")
    made.add_argument(
        "--json", action="store_true", help='{"output": [{"text"}, {"image"}, ...], "usage"}'
    )
    made.add_argument("--max-tokens", type=int, default=64, help="longest text (default 64)")
    add_sampling(made, 0.0, texts=True)
    arguments = made.parse_args(argv)
    if not arguments.parts:
        made.error("the prompt is empty: give --image and --text")
    if arguments.output != "text" and arguments.out is None:
        made.error(f"--output {arguments.output} needs --out FILE for images")
    at_least_one(arguments, "max_tokens")
    if arguments.out is not None:
        check_output(arguments.out)

    from multimodal.inference.mixed import reply

    sampling = sampling_of(arguments)
    model = load_model(arguments)
    (one,) = reply(
        model,
        [arguments.parts],
        output=arguments.output,
        max_tokens=arguments.max_tokens,
        sampling=sampling,
        stop=arguments.stop,
    )
    if isinstance(one, ValueError):
        raise one
    found = one.parts or [""]
    images = sum(not isinstance(part, str) for part in found)
    said, number = [], 0
    for part in found:
        if isinstance(part, str):
            said.append({"text": part})
            continue
        out: Path = arguments.out
        if images > 1:
            out = out.with_name(f"{out.stem}-{number}{out.suffix}")
        number += 1
        save_image(part, out)
        said.append({"image": str(out)})
    if arguments.json:
        usage = {name: getattr(one, name) for name in USAGE}
        print(json.dumps({"output": said, "usage": usage}))
    else:
        for item in said:
            print(" ".join(next(iter(item.values())).split()))
    return 0
