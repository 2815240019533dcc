"""``multimodal generate``: any mix of images and texts in, text or images out."""

import argparse
import json
from pathlib import Path
from typing import Any

from multimodal.commands.options import (
    check_output,
    given_options,
    load_model,
    make_parser,
    save_images,
)
from multimodal.options import TextOptions

EPILOG = """The prompt is what --image and --text say, in the order given. With --chat the texts are
messages, the user's first, then in turn the model's and the user's, in the model's chat template:
for language models that were taught to talk. Images that the model
draws are written to --out (with -0, -1, ... before the suffix where there are several).

examples:
  multimodal generate --image cat.jpg --text "a cat that"
  multimodal generate --text "a red bus" --output image --out bus.png
  multimodal generate --image a.jpg --text "a dog" --image b.jpg --json
  multimodal generate --model MODEL --chat --text "Write a limerick about a dog." --max-tokens 60
"""


ROLES = ("user", "assistant")
USAGE = ("prompt_tokens", "text_tokens", "image_tokens", "log_probability", "ended")


class _Part(argparse.Action):
    """Collects --image and --text in one list, in their order."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
        parts = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*parts, Path(value) if option == "--image" else value])


def main(argv: list[str]) -> int:
    parser = make_parser("generate", "Continue any mix of images and texts.", EPILOG, TextOptions)
    parser.add_argument("--image", dest="parts", action=_Part, metavar="FILE", help="an image file")
    parser.add_argument("--text", dest="parts", action=_Part, metavar="TEXT")
    parser.add_argument("--chat", action="store_true", help="the texts are messages of a chat")
    parser.add_argument(
        "--output",
        choices=("text", "image", "any"),
        default="text",
        help="what to make; any: what the model chooses (default text)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where images go")
    parser.add_argument(
        "--json", action="store_true", help='{"output": [{"text"}, {"image"}, ...], "usage"}'
    )
    arguments = parser.parse_args(argv)
    if not arguments.parts:
        parser.error("the prompt is empty: give --image and --text")
    if arguments.output != "text" and arguments.out is None:
        parser.error(f"--output {arguments.output} needs --out FILE for images")
    prompt = arguments.parts
    if arguments.chat:
        if any(isinstance(part, Path) for part in prompt):
            parser.error("--chat is for texts alone, not for --image")
        if len(prompt) % 2 == 0:
            parser.error("--chat: the last --text is the user's: give 1, 3, 5, ... of them")
        prompt = [
            {"role": ROLES[number % 2], "content": text} for number, text in enumerate(prompt)
        ]
    options = given_options(arguments, TextOptions)
    if arguments.out is not None:
        check_output(arguments.out)
    model = load_model(arguments)
    (reply,) = model.reply([prompt], output=arguments.output, **options)
    if isinstance(reply, ValueError):
        raise reply
    parts = reply.parts or [""]
    images = [part for part in parts if not isinstance(part, str)]
    paths = iter(save_images(images, arguments.out) if images else ())
    output = [
        {"text": part} if isinstance(part, str) else {"image": str(next(paths))} for part in parts
    ]
    if arguments.json:
        usage = {name: getattr(reply, name) for name in USAGE}
        print(json.dumps({"output": output, "usage": usage}))
    else:
        for item in output:
            text = next(iter(item.values()))
            print(text if arguments.chat else " ".join(text.split()))
    return 0
