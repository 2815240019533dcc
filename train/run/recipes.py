"""The recipes of the package, found by name, and the help that lists them."""

from collections.abc import Mapping
from importlib.resources import files

from multimodal.files import local_path

VERBS = ("fit", "validate", "test", "predict")
HELP = """\
usage: multimodal {verb} --config RECIPE [--KEY VALUE ...]

{about}

options:
  --config FILE        a YAML file, or a recipe of the package: {recipes}
  --output DIR         the folder of the run: logs/, checkpoints/, model/ (with LoRA adapter/)
  --overwrite          replace another run in --output
  --ckpt_path FILE     {checkpoint}; "last" and "best" are those of --output
  --init_from MODEL    start from the weights of this model folder
  --checkpoint_every N training steps between checkpoints
  --keep N             how many of the newest checkpoints stay, beside the best (default 1; 0: all)
  --checkpoint_in_background true
                       train on while a checkpoint is written
  --checkpoint_copy ADDRESS
                       copy every checkpoint there, such as s3://bucket/run
  --best_by NAME:max   which validation makes model/, such as val/CIDEr:max; last: the newest
  --rank_timeout S     seconds after which a rank that does not answer ends the run
  --threads N          CPU threads
  --model.KEY, --data.KEY, --trainer.KEY
                       override a value of the recipe
  --model.size SIZE    with the parameters in its layers:
                       {sizes}
  --print_config       print the full configuration, each option with what it is for, and stop
  --help-all           all options of the model, the data and Lightning's Trainer

examples:
  multimodal {verb} --config scenes_joint.yaml{example}
  multimodal {verb} --config scenes_joint.yaml --data.workers 0 --trainer.precision 32-true
{more}"""
ABOUT = {
    "fit": "Train, from a recipe.",
    "validate": "Measure a checkpoint on the validation split; scores go to OUTPUT/validate.",
    "test": "Measure a checkpoint as validate does; scores go to OUTPUT/test.",
    "predict": "Caption the validation split with a checkpoint, to OUTPUT/predictions.jsonl.",
}


def recipe_names() -> list[str]:
    """File names of the recipes of this package, sorted."""
    folder = files("multimodal.train") / "recipes"
    return sorted(item.name for item in folder.iterdir() if item.name.endswith(".yaml"))


def find_recipes(argv: list[str]) -> list[str]:
    """Replace ``--config NAME`` by the path of the recipe if no file has that name."""
    arguments = list(argv)
    recipes = files("multimodal.train") / "recipes"
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-c") and not equals and i + 1 < len(arguments):
            value, position = arguments[i + 1], i + 1
        elif flag == "--config" and equals:
            position = i
        else:
            continue
        if local_path(value).exists():
            continue
        if not (recipe := recipes / value).is_file():
            names = ", ".join(name.removesuffix(".yaml") for name in recipe_names())
            raise ValueError(
                f"--config {value}: no such file, and no recipe of that name; recipes, each with "
                f".yaml at its end, are {names}"
            )
        arguments[position] = f"--config={recipe}" if equals else str(recipe)
    return arguments


def help_text(verb: str, sizes: Mapping[str, int]) -> str:
    """The text of ``multimodal VERB --help``; sizes: names and numbers of parameters."""
    fit = verb == "fit"
    run = "runs/scenes-joint"
    resume = "resume this run, exactly (auto: if there is something to resume)"
    more = f"""  multimodal fit --config scenes_joint.yaml --ckpt_path {run}/checkpoints/last.ckpt
  multimodal fit --config my.yaml --init_from {run}/model
  multimodal fit --config finetune.yaml --init_from starter --model.lora.r 16"""
    return HELP.format(
        verb=verb,
        about=ABOUT[verb],
        sizes=", ".join(f"{name} {rounded(count)}" for name, count in sizes.items()),
        recipes=", ".join(recipe_names()),
        checkpoint=resume if fit else "weights (default: the last of --output)",
        example=" --trainer.max_steps 100" if fit else "",
        more=more if fit else "",
    ).rstrip()


def rounded(count: int) -> str:
    """Such as 74 k, 3.1 M, or 6.2 B."""
    unit, name = next((u, n) for u, n in ((10**9, "B"), (10**6, "M"), (1000, "k")) if count >= u)
    return f"{count / unit:.{0 if count >= 10 * unit else 1}f} {name}"
