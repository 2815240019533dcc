"""``multimodal prompts``: the prompts that are kept as files."""

import json

from multimodal.inference.prompt_files import prompt_files, read_prompt
from multimodal.terminal import Parser

EPILOG = """A prompt of your own is a file NAME.yaml in a folder of yours:

  version: 1
  about: What is wrong with the plant, in one word.
  template: "Question: which disease does this leaf have: {text}? Answer:"
  temperature: 0.0
  max_tokens: 8
  stop: ["."]

examples:
  multimodal prompts
  multimodal prompts --prompts mine/ --json
  multimodal answer leaf.jpg "rust or blight" --prompt disease --prompts mine/
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="multimodal prompts",
        description="List the prompts that answer --prompt takes.",
        epilog=EPILOG,
    )
    parser.add_argument("--prompts", metavar="DIR", help="a folder of your own, before the library")
    parser.add_argument("--json", action="store_true", help="all fields, a prompt a line")
    arguments = parser.parse_args(argv)
    for path in prompt_files(arguments.prompts).values():
        prompt = read_prompt(path)
        if arguments.json:
            print(json.dumps(prompt.to_json()))
        else:
            print(f"{prompt}\t{prompt.about}")
    return 0
