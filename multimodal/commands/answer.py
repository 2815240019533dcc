"""``multimodal answer``: a question about an image."""

import json
from pathlib import Path
from typing import Any

from multimodal.commands.options import given_options, load_model, make_parser
from multimodal.files import read_json
from multimodal.options import AnswerOptions

MAX_SCHEMA = 2**20  # bytes

EPILOG = """examples:
  multimodal answer cat.jpg "what colour is the cat?"
  multimodal answer --json cat.jpg "is there a dog?"
  multimodal answer cat.jpg "is there a dog?" --choices yes no
  multimodal answer cat.jpg "is it a dog?" --prompt yes_or_no
  multimodal answer cat.jpg "what is there?" --schema animals.json --max-tokens 80
"""


def read_schema(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ``ValueError`` for anything else."""
    content = read_json(path, MAX_SCHEMA)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def main(argv: list[str]) -> int:
    parser = make_parser("answer", "Answer a question about an image.", EPILOG, AnswerOptions)
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="an image file")
    parser.add_argument("question", nargs="?", metavar="QUESTION")
    parser.add_argument("--json", action="store_true", help='{"image", "question", "answer"}')
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--choices", nargs="+", metavar="TEXT", help="answer with one of these")
    kinds.add_argument(
        "--schema", type=Path, metavar="FILE", help="answer in JSON that follows this JSON schema"
    )
    kept = parser.add_argument_group(
        "prompt files",
        "the words around the question, and the other options where they are not given: "
        "multimodal prompts",
    )
    kept.add_argument("--prompt", default="question", metavar="NAME", help="the name of one")
    kept.add_argument("--prompts", metavar="DIR", help="a folder with prompt files of your own")
    arguments = parser.parse_args(argv)
    for name in ("question", "image"):  # --choices yes no IMAGE QUESTION: the list took them, too
        if getattr(arguments, name) is None and len(arguments.choices or ()) > 2:
            setattr(arguments, name, arguments.choices.pop())
    if arguments.image is None or arguments.question is None:
        parser.error("the following arguments are required: IMAGE, QUESTION")

    from multimodal.inference.prompt_files import find_prompt

    options = given_options(arguments, AnswerOptions)
    prompt = find_prompt(arguments.prompt, arguments.prompts)
    prompt.answer_options(**options)  # what does not fit the file is an error at once
    schema = read_schema(arguments.schema) if arguments.schema else None
    answer = load_model(arguments).answer(
        arguments.image,
        arguments.question,
        prompt=prompt,
        choices=arguments.choices,
        schema=schema,
        **options,
    )
    if arguments.json:
        facts = {"image": arguments.image, "question": arguments.question, "answer": answer}
        print(json.dumps(facts))
    else:
        print(answer if schema else " ".join(answer.split()))
    return 0
