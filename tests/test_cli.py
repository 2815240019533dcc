"""The command line: what it imports, what it prints to stdout and stderr, how it exits."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import multimodal
from multimodal.cli import VERBS, main

Verb = Callable[[list[str]], int]
Install = Callable[[str, Verb], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a function in the place of a verb's module."""
    monkeypatch.delenv("MULTIMODAL_TRACEBACK", raising=False)

    def put(verb: str, function: Verb) -> None:
        module = ModuleType(VERBS[verb][0])
        module.main = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


def raiser(error: BaseException) -> Verb:
    def verb(argv: list[str]) -> int:
        raise error

    return verb


def run_python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, **options}
    return subprocess.run([sys.executable, "-c", code], **options)  # type: ignore[call-overload]


def test_help_names_every_verb_and_imports_nothing_heavy() -> None:
    code = """
import sys
from multimodal.cli import main
status = main(["--help"])
heavy = {"torch", "torchvision", "lightning", "numpy", "PIL", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
raise SystemExit(status)
"""
    run = run_python(code)
    assert (run.returncode, run.stderr) == (0, "")
    listed = [line[2:].split("  ")[0] for line in run.stdout.splitlines() if line.startswith("  ")]
    assert set(VERBS) <= set(listed)


def test_every_verb_has_its_module() -> None:
    # Not imported, only looked up. A verb in the help without a module fails here.
    code = "import sys, importlib.util as u; print([m for m in sys.argv[1:] if not u.find_spec(m)])"
    modules = sorted({module for module, _ in VERBS.values()})
    command = [sys.executable, "-c", code, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_python_m_is_the_command() -> None:
    command = [sys.executable, "-m", "multimodal", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("multimodal ")


def test_a_folder_of_that_name_does_not_hide_the_package(tmp_path: Path) -> None:
    """Such as that of a clone, where Python is started beside it."""
    (tmp_path / "multimodal").mkdir()
    code = "import multimodal, tokenizers; print(multimodal.load.__name__, tokenizers.Tokenizer)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("load <class")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["caption", "cat.jpg", "--sede", "1"], "arguments: --sede 1; did you mean --seed?"),
        (["caption", "cat.jpg", "--beam=5"], "arguments: --beam=5; did you mean --beams?"),
        (["data", "scenes", "out", "--count", "3", "--sede=1"], "did you mean --seed?"),
        (["info", "starter", "--zzzzz"], "unrecognized arguments: --zzzzz\n"),
    ],
)
def test_an_option_is_given_whole_and_a_wrong_one_brings_the_closest(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    assert message in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"multimodal {multimodal.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["captoin", "cat.jpg"], "unknown verb 'captoin'; did you mean 'caption'?"),
        (["zzzzz"], "unknown verb 'zzzzz'; 'multimodal --help'"),
        (["--seed", "3"], "unknown option '--seed'; options follow the verb"),
        ([], "usage: multimodal VERB"),
    ],
)
def test_wrong_usage_is_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err


def test_verb_gets_its_arguments_and_its_status_is_returned(install: Install) -> None:
    seen: list[list[str]] = []

    def verb(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    install("info", verb)
    install("validate", verb)
    assert main(["info", "--model", "x"]) == 7
    assert main(["validate", "--config", "x"]) == 7  # one Lightning CLI serves four verbs
    assert seen == [["--model", "x"], ["validate", "--config", "x"]]


def test_arguments_come_from_the_process_by_default(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("info", lambda argv: len(argv))
    monkeypatch.setattr(sys, "argv", ["multimodal", "info", "a", "b"])
    assert main() == 2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("codes: expected 4, got 5"), "codes: expected 4, got 5"),
        (ValueError("two\n  lines"), "two lines"),
        (ValueError(), "ValueError"),
        (FileNotFoundError(2, "No such file", "a b.jpg"), "a b.jpg: No such file"),
        (FileNotFoundError(2, "No such file", b"\xff.jpg"), r"\xff.jpg: No such file"),
        (OSError("image file is truncated"), "image file is truncated"),
        (ValueError("lone \ud800 \x1b[2J surrogate"), r"lone \ud800 \x1b[2J surrogate"),
        (ValueError("Bär 日本"), "Bär 日本"),
    ],
)
def test_error_is_one_line_without_traceback(
    error: Exception, line: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("info", raiser(error))
    assert main(["info"]) == 1
    assert capsys.readouterr() == ("", f"multimodal info: error: {line}\n")


def test_traceback_on_request(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install("info", raiser(ValueError("what was wrong")))
    monkeypatch.setenv("MULTIMODAL_TRACEBACK", "1")
    assert main(["info"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("multimodal info: error: what was wrong\n")


def test_a_bug_is_not_hidden(install: Install) -> None:
    install("info", raiser(KeyError("ours")))
    with pytest.raises(KeyError):
        main(["info"])


def test_interrupt_is_status_130(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("fit", raiser(KeyboardInterrupt()))
    assert main(["fit"]) == 130
    assert capsys.readouterr() == ("", "multimodal fit: interrupted\n")


# A verb in another process, for what depends on the streams of a process.
VERB = """
import sys, types
from multimodal import cli
module = sys.modules["multimodal.commands.folders.info"] = types.ModuleType("info")
def verb(argv):
    {body}
module.main = verb
sys.exit(cli.main(["info"]))
"""


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the last flush", "while printing"])
def test_closed_pipe_is_quiet(lines: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    body = f"for _ in range({lines}): print('x')\n    return 0"
    run = run_python(VERB.format(body=body), capture_output=False, stdout=writer, stderr=-1)
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, "")


def test_a_pipe_that_broke_elsewhere_is_an_error() -> None:
    run = run_python(VERB.format(body="raise BrokenPipeError(32, 'Broken pipe')"))
    assert (run.returncode, run.stderr) == (
        1,
        "multimodal info: error: [Errno 32] Broken pipe\n",
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_and_not_a_success() -> None:
    with open("/dev/full", "w") as full:
        run = run_python(
            VERB.format(body="print('x'); return 0"), capture_output=False, stdout=full, stderr=-1
        )
    assert run.returncode == 1
    assert run.stderr.startswith("multimodal info: error: ") and run.stderr.count("\n") == 1


def test_a_path_goes_out_with_the_bytes_it_came_in() -> None:
    code = VERB.format(body=r"print('\udcff.jpg'); return 0")
    run = run_python(code, text=False, env={**os.environ, "PYTHONUTF8": "1"})
    assert run.stdout == b"\xff.jpg\n"  # type: ignore[comparison-overlap]


def test_errors_print_where_the_terminal_is_ascii() -> None:
    code = VERB.format(body=r"raise ValueError('B\xe4r \ud800')")
    run = run_python(code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (run.returncode, run.stderr) == (1, "multimodal info: error: B\\xe4r \\ud800\n")


def test_load_is_imported_on_first_use() -> None:
    code = (
        "import sys, multimodal; assert 'load' in dir(multimodal); sys.exit('torch' in sys.modules)"
    )
    assert run_python(code).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        multimodal.lod  # noqa: B018
