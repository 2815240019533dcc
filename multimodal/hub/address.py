"""Names of repositories of the Hugging Face Hub: user/name, user/name@revision, and addresses."""

import re
from dataclasses import dataclass

# What an address of the Hub begins with. Path() makes one slash of two.
HUB_ADDRESS = re.compile(r"(?:hf:/{1,2}|https?:/{1,2}(?:www\.)?(?:huggingface\.co|hf\.co)/)")
PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
REPOSITORY = re.compile(rf"{PART}/{PART}")
# A path that ends like this was meant as a file, and is missing.
FILES = (".json", ".yaml", ".gguf", ".safetensors", ".pt", ".pth", ".ckpt")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")


@dataclass(frozen=True)
class HubName:
    """A repository of the Hub.

    Attributes:
        repository: ``user/name``.
        revision: a branch, a tag or a commit.
    """

    repository: str
    revision: str = "main"

    @classmethod
    def parse(cls, name: str) -> "HubName | None":
        """None for what is no name on the Hub, such as a path of three parts, or of a file.

        Raises:
            ValueError: for an address of something else, or a revision that is none.
        """
        rest = HUB_ADDRESS.sub("", name, count=1) if HUB_ADDRESS.match(name) else name
        if re.match(r"[a-z][a-z0-9+.-]*:/", rest):
            raise ValueError(
                f"{name}: models are read from folders and from the Hugging Face Hub "
                "(user/name); download it, and give the folder"
            )
        if rest == name and name.lower().endswith(FILES):
            return None
        repository, at, revision = rest.rstrip("/").partition("@")
        if rest != name and not at:  # as a browser shows it
            repository, at, revision = repository.partition("/tree/")
        if not REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
            if rest == name:
                return None
            raise ValueError(f"{name}: expected user/name")
        if at and (not REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
            raise ValueError(f"{name}: expected a branch, a tag or a commit after {at}")
        return cls(repository, revision) if at else cls(repository)

    @classmethod
    def parse_dataset(cls, address: str) -> "tuple[HubName, str | None] | None":
        """A data set of the Hub and the name of its subset, if the address has one.

        Args:
            address: ``hf://datasets/user/name``, ``hf://datasets/user/name/subset@revision``, or
                ``https://huggingface.co/datasets/user/name``. None for anything else.

        Raises:
            ValueError: for what begins like that, and is no such name.
        """
        rest = HUB_ADDRESS.sub("", address, count=1)
        if rest == address or not rest.startswith("datasets/"):
            return None
        path, at, revision = rest.removeprefix("datasets/").rstrip("/").partition("@")
        parts = path.split("/")
        subset = parts.pop() if len(parts) == 3 else None
        if subset is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,99}", subset):
            parts = []
        name = cls.parse("/".join(parts) + at + revision) if len(parts) == 2 else None
        if name is None:
            raise ValueError(
                f"{address}: expected hf://datasets/user/name, hf://datasets/user/name/subset, "
                "and @revision after it if need be"
            )
        return name, subset

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision != "main" else "")
