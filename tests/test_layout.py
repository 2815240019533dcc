"""The root folders are the code, multimodal/<name> links to them, nothing shadows Hugging Face, and
a wheel built from either kind of checkout is complete and works on its own."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tokenizers", "train", "eval")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BACKEND = PYPROJECT["build-system"]["build-backend"]


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_linked_into_the_package(name: str) -> None:
    link = ROOT / "multimodal" / name
    assert link.resolve() == ROOT / name
    assert not os.path.isabs(os.readlink(link)), "an absolute link breaks in every other checkout"
    # A namespace folder loses to an installed package of the same name; a regular one would win.
    assert not (ROOT / name / "__init__.py").exists()


def test_huggingface_tokenizers_wins_from_the_root() -> None:
    code = "import tokenizers; tokenizers.Tokenizer"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_nothing_top_level_is_installed() -> None:
    dists = packages_distributions()
    assert all("multimodal" not in dists.get(name, []) for name in FOLDERS)


def test_every_folder_with_code_is_packaged() -> None:
    found = {".".join(Path(name).parent.parts) for name in files_of_the_package()}
    assert found <= set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_constraints_pin_every_dependency_within_its_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    # No addresses, no paths, no local versions such as +cpu: any index may serve them.
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin)] == []
    versions = dict(pin.split("==") for pin in pins)
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"].values()
    for requirement in map(Requirement, [*project["dependencies"], *sum(extras, [])]):
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(versions[name]), f"{requirement} != {versions[name]}"


def files_of_the_package() -> set[str]:
    """What a wheel must hold: all code, the type marker, the recipes and the page of the server."""
    homes = {ROOT / "multimodal": Path("multimodal")}
    homes |= {ROOT / name: Path("multimodal", name) for name in FOLDERS}
    paths = {
        str(home / path.relative_to(folder))
        for folder, home in homes.items()
        for path in folder.rglob("*.py")  # does not follow the links
    }
    recipes = {f"multimodal/train/recipes/{p.name}" for p in ROOT.glob("train/recipes/*.yaml")}
    page = {f"multimodal/serve/page/{p.name}" for p in ROOT.glob("multimodal/serve/page/*")}
    return paths | recipes | page | {"multimodal/py.typed"}


def build_wheel(folder: Path, *, links: bool) -> Path:
    """Build from a copy, so that nothing that git ignores (build/, egg-info) leaks into it."""
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("multimodal", *FOLDERS):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=skip)
    if not links:  # as on a system where git writes a link as a file with the target's name in it
        for name in FOLDERS:
            (tree / "multimodal" / name).unlink()
            (tree / "multimodal" / name).write_text(f"../{name}")
    # As pip does without isolation, but in one process, not in four.
    code = f"import sys, {BACKEND}; {BACKEND}.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_wheel_is_complete_and_works_on_its_own(tmp_path: Path, links: bool) -> None:
    wheel = build_wheel(tmp_path, links=links)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert files_of_the_package() <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"multimodal"}

    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)  # all that pip does with a wheel of Python code
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in files_of_the_package()
        if name.endswith(".py")
    )
    # Finding a module runs its parents only: no torch is imported here.
    code = f"""
import importlib.util, multimodal
from multimodal.cli import main
for name in {modules!r}:
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin.startswith({str(target)!r}), (name, spec)
raise SystemExit(main(["--help"]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: multimodal VERB")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shim = tmp_path / "bin" / "python3"  # exists, and does not start
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    make = shutil.which("make")
    assert make is not None
    env = {"PATH": str(shim.parent)}
    run = subprocess.run([make, "install"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode != 0
    assert "Python 3.11 or newer is needed" in run.stderr
    assert not (tmp_path / ".venv").exists()
