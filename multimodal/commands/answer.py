"""``multimodal answer``: a question about an image."""

import json
from pathlib import Path
from typing import Any

from multimodal.commands.options import add_sampling, at_least_one, load_model, parser, sampling_of

EPILOG = """examples:
  multimodal answer cat.jpg "what colour is the cat?"
  multimodal answer --json cat.jpg "is there a dog?"
  multimodal answer cat.jpg "is there a dog?" --choices yes no
  multimodal answer cat.jpg "is it a dog?" --prompt yes_or_no
  multimodal answer cat.jpg "what is there?" --schema animals.json --max-tokens 80
"""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Errors: ``ValueError`` for anything else."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object")
    return found


def main(argv: list[str]) -> int:
    made = parser("answer", "Answer a question about an image.", EPILOG)
    made.add_argument("image", metavar="IMAGE", help="a JPEG, PNG or WebP file")
    made.add_argument("question", metavar="QUESTION")
    made.add_argument("--json", action="store_true", help='{"image", "question", "answer"}')
    made.add_argument("--max-tokens", type=int, default=32, help="longest answer (default 32)")
    asked = made.add_mutually_exclusive_group()
    asked.add_argument("--choices", nargs="+", metavar="TEXT", help="answer with one of these")
    asked.add_argument("--schema", type=Path, metavar="FILE",
                       help="answer in JSON that follows this JSON schema")  # fmt: skip
    kept = made.add_argument_group("prompts", "the words around the question, and the options above"
                                   " where they are not given: multimodal prompts")  # fmt: skip
    kept.add_argument("--prompt", default="question", metavar="NAME", help="one that is kept")
    kept.add_argument("--prompts", metavar="DIR", help="a folder with prompts of your own")
    add_sampling(made, 0.0, texts=True)
    arguments = made.parse_args(argv)

    from multimodal.inference.prompt_files import find_prompt

    prompt = find_prompt(arguments.prompt, arguments.prompts)
    made.set_defaults(temperature=prompt.temperature, top_p=prompt.top_p,
                      max_tokens=prompt.max_tokens)  # fmt: skip
    arguments = made.parse_args(argv)
    at_least_one(arguments, "max_tokens")
    if not arguments.schema and not arguments.choices:
        arguments.choices = list(prompt.choices) or None

    from multimodal.inference.text import answer_codes, encode_images, read_images

    sampling = sampling_of(arguments)
    schema = read_json(arguments.schema) if arguments.schema else None
    model = load_model(arguments)
    prompt.fill(arguments.question, model.config.templates)  # an empty one is an error at once
    codes = encode_images(model, read_images(model, [arguments.image]))
    stop = arguments.stop or (() if schema else prompt.stop)
    (answer,) = answer_codes(model, codes, [arguments.question], arguments.max_tokens, sampling,
                             arguments.choices, schema, stop, prompt)  # fmt: skip
    if arguments.json:
        said = {"image": arguments.image, "question": arguments.question, "answer": answer}
        print(json.dumps(said))
    else:
        print(answer if schema else " ".join(answer.split()))
    return 0
