"""The stand-in of the Hub as the one that the library huggingface_hub talks to."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.stand_in import StandIn


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A stand-in with no repositories, and an empty cache at ``tmp_path/cache``."""
    from huggingface_hub import constants

    stand_in = StandIn()
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    yield stand_in
    stand_in.close()


@pytest.fixture
def tiny(hub: StandIn, tiny_model_folder: Path) -> StandIn:
    """The Hub with a model: me/tiny."""
    hub.add("me/tiny", tiny_model_folder)
    return hub
