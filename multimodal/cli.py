"""The command line: `multimodal VERB ...`.

This is the one file that may name every part of the package. The module of a verb is imported by
name when the verb is called: `multimodal --help` must answer at once, and torch takes seconds.
Every such module has `main(argv) -> exit status`. A mistake of the user (ValueError, OSError)
becomes one line on stderr and exit status 1. Wrong usage is exit status 2.
"""

import contextlib
import difflib
import importlib
import os
import select
import signal
import sys
import traceback
from types import FrameType

from multimodal import __version__
from multimodal.memory import is_out_of_memory, keep_freed_memory, of_a_device
from multimodal.terminal import print_any_text, print_error
from multimodal.torchrun import end_with_launcher, rank_and_world_size

VERBS: dict[str, tuple[str, str]] = {
    "caption": ("multimodal.commands.caption", "describe images in words"),
    "answer": ("multimodal.commands.answer", "answer a question about an image"),
    "generate": ("multimodal.commands.generate", "go on after any mix of images and texts"),
    "draw": ("multimodal.commands.draw", "draw images after a text"),
    "edit": ("multimodal.commands.edit", "draw a part of an image anew"),
    "embed": ("multimodal.commands.vectors.embed", "turn images or texts into vectors"),
    "search": ("multimodal.commands.vectors.search", "find the images that fit a text or an image"),
    "index": ("multimodal.commands.vectors.index", "embed many images or texts, to search them"),
    "serve": ("multimodal.serve.cli", "answer requests in the shape of OpenAI's API"),
    "log": ("multimodal.commands.folders.log", "check the record of a server, and read it"),
    "provenance": ("multimodal.commands.provenance", "what the credentials of a picture say"),
    "drift": ("multimodal.commands.drift", "whether the requests of a server have changed"),
    "prompts": ("multimodal.commands.prompts", "list the prompts that are kept as files"),
    "data": (
        "multimodal.commands.folders.data",
        "build, index and check shards of images and text",
    ),
    "data report": ("multimodal.eval.data_report", "what is in shard folders, as a page"),
    "tokenizer": (
        "multimodal.commands.folders.tokenizer",
        "train a text tokenizer, import a released one",
    ),
    "tokenizer compare": ("multimodal.eval.compare", "measure image tokenizers side by side"),
    "fit": ("multimodal.train.cli", "train, from a recipe"),
    "validate": ("multimodal.train.cli", "measure a training checkpoint on validation data"),
    "test": ("multimodal.train.cli", "measure a training checkpoint on test data"),
    "predict": ("multimodal.train.cli", "run a training checkpoint over a dataset"),
    "prefer": ("multimodal.train.preferences.prefer", "make preferences of what a model makes"),
    "eval": ("multimodal.eval.evaluate", "measure what a model can do, with the protocol"),
    "export": (
        "multimodal.commands.folders.export",
        "carry a model to other engines, or make it smaller",
    ),
    "quantize": (
        "multimodal.commands.folders.quantize",
        "make a model smaller: weights of 8 or 4 bits",
    ),
    "export model": ("multimodal.train.export", "make a model folder of a training checkpoint"),
    "push": ("multimodal.commands.folders.push", "put a model on the Hugging Face Hub"),
    "demo": ("multimodal.eval.demo", "do all of it on pictures that need no download"),
    "import": (
        "multimodal.commands.folders.imports",
        "turn a released unified model into a model folder",
    ),
    "info": ("multimodal.commands.folders.info", "what a model folder or a shard folder holds"),
    "info --config": ("multimodal.train.forecasts.forecast", "what a training run will need"),
}

# The exit statuses a shell expects of a program that a signal ended: 128 + SIGINT, 128 + SIGPIPE.
INTERRUPTED = 130
READER_GONE = 141
# What takes memory, in the verbs that may take too much of it.
TRAINING = ("fit", "validate", "test", "predict")
LOWER = "--batch-size, --workers, --beams, --candidates, --max-tokens"
LOWER_IN_TRAINING = "--data.global_batch_size or --model.init_args.row_length"


def help_text() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {about}" for verb, (_, about) in VERBS.items())
    return f"""\
usage: multimodal VERB [options]
       multimodal VERB --help

One model for text and images: train it, measure it, use it.

verbs:
{verbs}

options:
  -h, --help  show this text
  --version   show the version

examples:
  multimodal caption --model runs/photos-joint/model cat.jpg dog.png
  multimodal data index shards/
  multimodal fit --config recipe.yaml
  multimodal fit --config recipe.yaml --trainer.max_steps 100

MULTIMODAL_TRACEBACK=1 in the environment shows where an error was raised."""


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit status."""
    verb, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    name = _name(verb)  # Lightning forgets the rank at its end
    print_any_text()
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        try:
            status = _run(verb, rest)
        except SystemExit:  # argparse: --help or wrong usage
            _flush_stdout()
            raise
        _flush_stdout()  # here and not at the interpreter's exit, where a failure cannot be handled
        return status
    except KeyboardInterrupt:
        if argv is None:  # a second one would end in a traceback
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print_error(f"{name}: interrupted")
        return INTERRUPTED
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if not isinstance(error, ValueError | OSError) and not is_out_of_memory(error):
            raise
        if isinstance(error, BrokenPipeError) and _stdout_reader_is_gone():  # `... | head`
            _abandon_stdout()
            return READER_GONE
        if os.environ.get("MULTIMODAL_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        print_error(f"{name}: error: {_describe(error, verb)}")
        try:
            _flush_stdout()
        except OSError:  # a full disk, say, which may be what was just reported
            _abandon_stdout()
        return 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C. In the middle of an import the process ends at once, where nothing is half done.

    Libraries swallow the exception there, in a bare ``except`` or in a callback from C, and the job
    would go on to its end.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, f"{_name(sys.argv[1])}: interrupted\n".encode())
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _run(verb: str, rest: list[str]) -> int:
    if verb in ("-h", "--help"):
        print(help_text())
        return 0
    if verb == "--version":
        print(f"multimodal {__version__}")
        return 0
    if not verb:
        print(help_text(), file=sys.stderr)
        return 2
    if verb not in VERBS:
        print_error(_wrong_verb(verb))
        return 2
    word, equals, value = (rest or [""])[0].partition("=")  # info --config=recipe.yaml
    if f"{verb} {word}" in VERBS:
        verb, rest = f"{verb} {word}", [*([value] if equals else []), *rest[1:]]
    keep_freed_memory()
    end_with_launcher()
    module_name, _ = VERBS[verb]
    if module_name == "multimodal.train.cli":  # one Lightning CLI serves four verbs
        rest = [verb, *rest]
    status: int = importlib.import_module(module_name).main(rest)
    return status


def _wrong_verb(verb: str) -> str:
    more = "'multimodal --help' lists the verbs"
    if verb.startswith("-"):
        return f"multimodal: error: unknown option {verb!r}; options follow the verb; {more}"
    close = difflib.get_close_matches(verb.lower(), VERBS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"multimodal: error: unknown verb {verb!r}; {hint}{more}"


def _name(verb: str) -> str:
    name = f"multimodal {verb}" if verb in VERBS else "multimodal"
    rank, ranks = rank_and_world_size()
    return f"{name} (rank {rank} of {ranks})" if ranks > 1 else name


def _describe(error: Exception, verb: str) -> str:
    if not isinstance(error, ValueError | OSError):
        reason = (str(error).splitlines() or ["MemoryError"])[0][:200]
        lower, other = LOWER, ", or give --dtype bfloat16 or --device cpu"
        if verb in TRAINING:
            lower, other = LOWER_IN_TRAINING, ", or give --trainer.precision bf16-mixed"
        return f"not enough memory: lower {lower}{other * of_a_device(error)} ({reason})"
    if isinstance(error, OSError) and error.strerror and error.filename2 is None:
        if isinstance(error.filename, str | bytes):
            return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


def _flush_stdout() -> None:
    print(end="", flush=True)  # unlike sys.stdout.flush(), this allows for stdout being None


def _stdout_reader_is_gone() -> bool:
    """Whether the broken pipe is stdout's: a worker process that died breaks one too."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError):  # no poll() here, or stdout is not a file
        return True


def _abandon_stdout() -> None:
    """Point stdout at nothing, or the interpreter's last flush would fail again."""
    with contextlib.suppress(AttributeError, OSError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


if __name__ == "__main__":
    sys.exit(main())
