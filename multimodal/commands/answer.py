"""``multimodal answer``: a question about an image, or about what an index has."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal.commands.options import (
    add_index,
    at_least_one,
    given_options,
    load_model,
    make_parser,
)
from multimodal.files import read_json
from multimodal.options import AnswerOptions

if TYPE_CHECKING:
    from multimodal.index.hits import Hit

MAX_SCHEMA = 2**20  # bytes

EPILOG = """examples:
  multimodal answer cat.jpg "what colour is the cat?"
  multimodal answer --json cat.jpg "is there a dog?"
  multimodal answer cat.jpg "is there a dog?" --choices yes no
  multimodal answer cat.jpg "is it a dog?" --prompt yes_or_no
  multimodal answer cat.jpg "what is there?" --schema animals.json --max-tokens 80
  multimodal answer "who made it?" --index docs.index --retrieve 3
  multimodal answer cat.jpg "what breed is it?" --index breeds.index --json
"""


def read_schema(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ``ValueError`` for anything else."""
    content = read_json(path, MAX_SCHEMA)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def main(argv: list[str]) -> int:
    about = "Answer a question about an image, or about the texts and images of an index."
    parser = make_parser("answer", about, EPILOG, AnswerOptions)
    parser.add_argument(
        "image", nargs="?", metavar="IMAGE", help="an image file; with --index it may be left out"
    )
    parser.add_argument("question", nargs="?", metavar="QUESTION")
    parser.add_argument(
        "--json", action="store_true", help='{"image", "question", "answer", "sources"}'
    )
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
    add_index(parser, "go before the question, each with its source", retrieve=3)
    arguments = parser.parse_args(argv)
    if arguments.index is not None and arguments.question is None:
        arguments.image, arguments.question = None, arguments.image
    at_least_one(arguments, "retrieve")
    for name in ("question", "image"):  # --choices yes no IMAGE QUESTION: the list took them, too
        if getattr(arguments, name) is None and len(arguments.choices or ()) > 2:
            setattr(arguments, name, arguments.choices.pop())
    if arguments.question is None or (arguments.image is None and arguments.index is None):
        parser.error("the following arguments are required: IMAGE, QUESTION")

    from multimodal.inference.json_schema import BadSchema
    from multimodal.inference.prompt_files import find_prompt

    options = given_options(arguments, AnswerOptions)
    prompt = find_prompt(arguments.prompt, arguments.prompts)
    prompt.answer_options(**options)  # what does not fit the file is an error at once
    schema = read_schema(arguments.schema) if arguments.schema else None
    model = load_model(arguments)
    how = {"prompt": prompt, "choices": arguments.choices, "schema": schema, **options}
    facts: dict[str, Any] = {"image": arguments.image, "question": arguments.question}
    sources: list[Hit] = []
    try:
        if arguments.index is None:
            answer = model.answer(arguments.image, arguments.question, **how)
            facts["answer"] = answer
        else:
            from multimodal.index.index import Index

            index = Index.open(arguments.index, model)
            result = index.answer(
                arguments.question, arguments.image, retrieve=arguments.retrieve, **how
            )
            answer, sources = result.text, result.sources
            facts |= {"answer": answer, "sources": [hit.to_json() for hit in sources]}
    except BadSchema as error:
        raise ValueError(f"{arguments.schema}: {error}") from error
    if arguments.json:
        print(json.dumps(facts))
    else:
        print(answer if schema else " ".join(answer.split()))
        for hit in sources:
            print(f"{hit.score:.3f}\t{hit.source}")
    return 0
