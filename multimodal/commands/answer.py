"""``multimodal answer``: a question about an image."""

import json

from multimodal.commands.options import add_sampling, at_least_one, load_model, parser, sampling_of

EPILOG = """examples:
  multimodal answer cat.jpg "what colour is the cat?"
  multimodal answer --json cat.jpg "is there a dog?"
"""


def main(argv: list[str]) -> int:
    made = parser("answer", "Answer a question about an image.", EPILOG)
    made.add_argument("image", metavar="IMAGE", help="a JPEG, PNG or WebP file")
    made.add_argument("question", metavar="QUESTION")
    made.add_argument("--json", action="store_true", help='{"image", "question", "answer"}')
    made.add_argument("--max-tokens", type=int, default=32, help="longest answer (default 32)")
    add_sampling(made, 0.0, texts=True)
    arguments = made.parse_args(argv)
    at_least_one(arguments, "max_tokens")

    from multimodal.generation import answer_codes, encode_images, read_images

    sampling = sampling_of(arguments)
    model = load_model(arguments)
    model.config.templates.ask(arguments.question)  # an empty one is an error before any work
    codes = encode_images(model, read_images(model, [arguments.image]))
    (answer,) = answer_codes(model, codes, [arguments.question], arguments.max_tokens, sampling)
    if arguments.json:
        said = {"image": arguments.image, "question": arguments.question, "answer": answer}
        print(json.dumps(said))
    else:
        print(" ".join(answer.split()))
    return 0
