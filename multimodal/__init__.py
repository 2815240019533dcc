"""One transformer over one sequence of text and image tokens: train it, measure it, use it.

`multimodal.load(path_or_name)` returns a model folder ready to use, and `multimodal.build_shards`
makes data to train on. They are imported on first use, so that `import multimodal` (and with it
`multimodal --help`) does not pay for torch.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multimodal.api import Model, load
    from multimodal.data.builder.build import build_shards

try:
    __version__ = version("multimodal")
except PackageNotFoundError:  # a checkout on PYTHONPATH, not installed
    __version__ = "0+unknown"

__all__ = ["Model", "__version__", "build_shards", "load"]


def __getattr__(name: str) -> object:
    if name in ("load", "Model"):
        from multimodal import api

        return getattr(api, name)
    if name == "build_shards":
        from multimodal.data.builder.build import build_shards

        return build_shards
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
