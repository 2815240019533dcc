"""Put a model folder on the Hugging Face Hub: one commit, with all of it or nothing."""

from pathlib import Path

from multimodal.files import read_json, read_text
from multimodal.hub.address import HubName
from multimodal.hub.card import DEFAULT_CARD, make_card, read_results
from multimodal.hub.listing import readable

RESULTS = "results.json"


def push(
    folder: str | Path,
    name: str,
    results: str | Path | None = None,
    license: str = "",
    private: bool = False,
    message: str = "",
) -> str:
    """Make the repository what the folder is. Its files that are not in the folder are deleted.

    Only what ``download`` reads is pushed: safetensors, JSON, README.md, LICENSE, a chat template.

    Args:
        folder: a model folder.
        name: ``user/name`` or ``user/name@branch``. What does not exist is made.
        results: what ``multimodal eval --output`` wrote about this model, for the card.
        license: its name on the Hub, such as ``apache-2.0``. By default that of the README.md, or
            the file LICENSE.
        private: of a new repository.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: for a folder that is no model, results of another model, or what the Hub
            refuses.
    """
    folder, target = Path(folder), HubName.parse(name)
    if target is None:
        raise ValueError(f"{name!r}: expected user/name, where the model will be on the Hub")
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and readable(path.relative_to(folder).as_posix())
    }
    try:
        config = read_json(files["config.json"])
        fingerprint = config["fingerprints"]["model"]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{folder}: not a model folder: its config.json") from error
    about = None if results is None else read_results(results, fingerprint)
    text = read_text(files["README.md"]) if "README.md" in files else DEFAULT_CARD
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    except ImportError as error:
        raise ValueError(f"push needs: pip install multimodal[hub] ({error})") from error
    try:
        card = make_card(text, target.repository, about, license, "LICENSE" in files)
    except Exception as error:  # YAML has errors of its own
        raise ValueError(
            f"{folder / 'README.md'}: its metadata is not readable: {error}"
        ) from error
    contents: dict[str, Path | bytes] = {**files, "README.md": card.encode()}
    if results is not None:
        contents[RESULTS] = Path(results)
    repository, branch = target.repository, target.revision
    api = HfApi(library_name="multimodal")
    try:
        api.create_repo(repository, exist_ok=True, private=private or None)
        if branch != "main":
            api.create_branch(repository, branch=branch, exist_ok=True)
        there = api.list_repo_files(repository, revision=branch)
        gone = [path for path in there if readable(path) and path not in contents]
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(path, content) for path, content in contents.items()),
                *(CommitOperationDelete(path) for path in gone),
            ],
            commit_message=message or f"Model {fingerprint}",
            revision=branch,
        )
    except Exception as error:  # its client raises what comes
        raise ValueError(f"{name}: not pushed: {_reason(error)}") from error
    return str(commit.commit_url)


def _reason(error: Exception) -> str:
    """What the Hub says, and what to do about it."""
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    status = getattr(getattr(error, "response", None), "status_code", None)
    words = " ".join(str(error).split())[:300] or type(error).__name__
    if status in (401, 403):
        words += ". A token that may write is needed: hf auth login, or HF_TOKEN"
    return words
