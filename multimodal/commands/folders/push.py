"""``multimodal push``: put a model folder on the Hugging Face Hub."""

from multimodal.terminal import Parser

EPILOG = """The model is loaded first. Its safetensors, JSON, README.md and LICENSE are pushed, in
one commit. A token that may write is needed: hf auth login, or HF_TOKEN.

examples:
  multimodal push runs/joint/model me/photos
  multimodal eval all --model runs/joint/model --data data/photos --output results.json
  multimodal push runs/joint/model me/photos --results results.json --license apache-2.0
  multimodal caption --model me/photos cat.jpg
"""


def main(argv: list[str]) -> int:
    """Run ``multimodal push ARGV...``. Prints the address of the commit."""
    parser = Parser(
        prog="multimodal push",
        description="Put a model on the Hugging Face Hub, with a card. Everybody can then use it "
        "by its name.",
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="the model folder")
    parser.add_argument("name", metavar="USER/NAME[@BRANCH]", help="where it will be on the Hub")
    parser.add_argument(
        "--results", metavar="JSON", help="of multimodal eval --output, for the card"
    )
    parser.add_argument("--license", default="", help="its name on the Hub, such as apache-2.0")
    parser.add_argument("--private", action="store_true", help="if the repository is new")
    parser.add_argument("--message", default="", help="of the commit")
    arguments = parser.parse_args(argv)

    from multimodal.hub.names import find_model
    from multimodal.hub.push import push
    from multimodal.model.checkpoint import ModelParts

    folder = find_model(arguments.model)
    ModelParts.load(folder)  # what cannot be loaded is not pushed
    print(
        push(
            folder,
            arguments.name,
            arguments.results,
            arguments.license,
            arguments.private,
            arguments.message,
        )
    )
    return 0
