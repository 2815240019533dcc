"""Models by their names on the Hub: what arrives is used, and what is wrong is refused."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from multimodal import load
from multimodal.cli import main
from multimodal.hub.address import HubName
from multimodal.hub.names import find_model, levels_of, part_of
from multimodal.provenance import Provenance
from multimodal.tokenizers.text import ChatFormat
from tests.hub.stand_in import TOKEN, Answer, StandIn, cached, requested

# --- what a name means -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("me/tiny", HubName("me/tiny")),
        ("me/tiny@v1.0", HubName("me/tiny", "v1.0")),
        ("me/tiny@refs/pr/3", HubName("me/tiny", "refs/pr/3")),
        ("hf://me/tiny@v1", HubName("me/tiny", "v1")),
        ("https://huggingface.co/me/tiny", HubName("me/tiny")),
        ("https://huggingface.co/me/tiny/tree/v1", HubName("me/tiny", "v1")),
        ("https:/hf.co/Me/ti_ny.2/", HubName("Me/ti_ny.2")),
        ("runs/joint/model", None),
        ("/runs/joint", None),
        ("./joint", None),
        ("../joint", None),
        ("joint", None),
        ("me/..", None),
        ("me/a--b", None),
        ("runs/text.json", None),
        ("models/qwen.GGUF", None),
        ("me/tiny\n", None),
        ("", None),
    ],
)
def test_names_of_the_hub_and_others(name: str, expected: HubName | None) -> None:
    assert HubName.parse(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "https://example.org/me/tiny",
        "s3://bucket/model",
        "file:///etc/passwd",
        "hf://tiny",
        "me/tiny@",
        "me/tiny@../../x",
        "me/tiny@a//b",
        "me/tiny@/etc",
        "https://huggingface.co/me/tiny/blob/main/config.json",
    ],
)
def test_an_address_of_something_else_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="user/name|expected a branch"):
        find_model(name)


def test_a_folder_comes_before_the_hub(
    tiny: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "me/tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("me/tiny") == Path("me/tiny")
    assert tiny.requests == []


# --- what arrives ----------------------------------------------------------------------------


def test_a_model_of_the_hub_is_the_model(tiny: StandIn, tiny_model_folder: Path) -> None:
    assert load("me/tiny").fingerprint == load(tiny_model_folder).fingerprint
    before = len(tiny.requests)
    load("me/tiny")
    assert len(tiny.requests) == before + 1, "only which commit it is"


def test_how_a_model_talks_comes_along(
    hub: StandIn, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = load(tiny_model_folder)
    model.text_tokenizer.chat = ChatFormat("{{ messages[0]['content'] }} \u00e9", "a", "b")
    model.save(tmp_path / "talks")
    hub.add("me/talks", tmp_path / "talks")
    assert load("me/talks").text_tokenizer.chat == model.text_tokenizer.chat


def test_the_cache_has_the_format_of_huggingface_hub(tiny: StandIn, tmp_path: Path) -> None:
    from huggingface_hub import scan_cache_dir, snapshot_download

    folder = find_model("me/tiny")
    again = snapshot_download(
        "me/tiny", local_files_only=True, cache_dir=tmp_path / "cache", revision="main"
    )
    assert Path(again) == folder
    info = scan_cache_dir(tmp_path / "cache")
    assert not info.warnings
    assert [repo.repo_id for repo in info.repos] == ["me/tiny"]


def test_what_the_library_downloaded_is_not_downloaded_again(tiny: StandIn, tmp_path: Path) -> None:
    from huggingface_hub import constants, hf_hub_download

    with pytest.MonkeyPatch.context() as patch:
        address = f"{tiny.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        for name in ("model.safetensors", "heads.safetensors"):
            hf_hub_download("me/tiny", name, cache_dir=tmp_path / "cache")
    tiny.requests.clear()
    load("me/tiny")
    assert not any("heads.safetensors" in path for path in requested(tiny))
    assert any("text_tokenizer.json" in path for path in requested(tiny))


def test_a_revision_is_a_branch_a_tag_or_a_commit(
    hub: StandIn, tiny_model: Callable[..., Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    first = hub.add("me/tiny", tiny_model_folder)
    tiny_model(seed=1).save(tmp_path / "second")
    hub.add("me/tiny", tmp_path / "second")
    hub.repositories["me/tiny"].refs["v1"] = first
    old, new = load(tiny_model_folder).fingerprint, load(tmp_path / "second").fingerprint
    assert old != new
    assert load("me/tiny").fingerprint == new
    for revision in ("v1", first):
        assert load(f"me/tiny@{revision}").fingerprint == old
    with pytest.raises(ValueError, match="me/tiny has no revision 'v2'"):
        load("me/tiny@v2")


def test_without_a_network_the_cache_is_used(
    tiny: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    expected = load("me/tiny").fingerprint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load("me/tiny").fingerprint == expected
    assert capsys.readouterr().err == "", "offline was asked for"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    tiny.close()
    assert load("me/tiny").fingerprint == expected
    assert "this is the copy in the cache" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["offline", "closed", "broken", "no hub"])
def test_without_a_network_and_a_cache_the_words_say_so(
    how: str, hub: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "closed":
        hub.close()
    else:
        hub.add("me/tiny", {})
        hub.list_with = lambda _: Answer(503) if how == "broken" else Answer(200, {}, b"<html>")
    assert main(["caption", "--model", "me/tiny", "cat.png"]) == 1
    error = capsys.readouterr().err
    assert "me/tiny: no such folder" in error and "not in the cache" in error
    assert "Give a folder, or download it where there is a network" in error
    assert ("HF_HUB_OFFLINE is set" in error) == (how == "offline")


def test_without_a_network_a_part_is_not_taken_for_the_whole(
    tiny: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    images = part_of("me/tiny", "image_tokenizer")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert part_of("me/tiny", "image_tokenizer") == images
    for wanted in (lambda: load("me/tiny"), lambda: part_of("me/tiny", "text_tokenizer.json")):
        with pytest.raises(ValueError, match="Only a part of it is in the cache"):
            wanted()


def test_what_does_not_fit_on_the_disk_is_not_begun(
    tiny: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(ValueError, match="me/tiny: needs 0.0 GB, and .* has 0.0 GB free"):
        load("me/tiny")
    assert not any("/resolve/" in path for path in requested(tiny))


def test_what_is_not_there_or_not_open_is_said(hub: StandIn) -> None:
    with pytest.raises(ValueError, match="no such folder, and no such model"):
        load("me/nothing")
    hub.add("me/gated", {"config.json": b"{}"})
    hub.list_with = lambda _: Answer(403, {"X-Error-Code": "GatedRepo"}, b"{}")
    with pytest.raises(ValueError, match="accept its terms at .*me/gated, then: hf auth login"):
        load("me/gated")


def test_an_interrupted_transfer_goes_on_where_it_was(tiny: StandIn, tmp_path: Path) -> None:
    cuts = iter([5000, 70000])
    starts: list[int] = []

    def cut(path: str, answer: Answer) -> Answer:
        if path.startswith("/large/") and len(answer.body) > 100000:
            starts.append(len(answer.body))
            answer.cut = next(cuts, None)
        return answer

    tiny.serve_with = cut
    load("me/tiny")
    assert len(set(starts)) >= 3, "each try asked for the rest"


def test_two_threads_may_download_a_model_at_once(tiny: StandIn, tmp_path: Path) -> None:
    """Both are in the middle of each large file at the same time."""
    both = threading.Barrier(2)

    def wait(path: str, answer: Answer) -> Answer:
        if path.startswith("/large/"):
            both.wait(20)
        return answer

    tiny.serve_with = wait
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(find_model, ["me/tiny"] * 2))
    assert found[0] == found[1] and load(found[0])
    assert not [path.name for path in cached(tmp_path) if path.name.endswith(".part")]


def test_parts_of_a_model_are_downloaded_alone(tiny: StandIn, tiny_model_folder: Path) -> None:
    from multimodal.tokenizers.image import load_image_tokenizer
    from multimodal.tokenizers.text import TextTokenizer

    text = TextTokenizer.load(part_of("me/tiny", "text_tokenizer.json"))
    assert len(text) == 300
    images = load_image_tokenizer(part_of("me/tiny", "image_tokenizer"))
    assert images.codebook_size == 64
    files = [path for path in requested(tiny) if "/resolve/" in path]
    assert not any(path.endswith(("/heads.safetensors", "README.md")) for path in files)
    assert len(files) == 4  # two of the image tokenizer, the text tokenizer, and config.json


def test_a_part_has_what_is_read_beside_it(
    hub: StandIn, tiny_model_folder: Path, tmp_path: Path
) -> None:
    from multimodal.tokenizers.image import load_image_tokenizer
    from multimodal.tokenizers.text import TextTokenizer

    model, folder = load(tiny_model_folder), tmp_path / "whole"
    model.text_tokenizer.chat = ChatFormat("{{ messages }}", "a", "b")
    model.image_tokenizer.provenance = Provenance(("Of the images.",), ({"name": "photos"},))
    model.provenance = Provenance(("Of the texts.",)) + model.image_tokenizer.provenance
    model.save(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0] }}")
    for name in ("me/levels", "me/images", "me/texts"):  # none has what another one brought
        hub.add(name, folder)
    assert levels_of("me/levels") == levels_of(folder) == (("detail",), ())
    images = load_image_tokenizer(part_of("me/images", "image_tokenizer"))
    assert images.provenance == load_image_tokenizer(folder / "image_tokenizer").provenance
    assert set(images.provenance.licenses) == {"Of the texts.", "Of the images."}
    text = TextTokenizer.load(part_of("me/texts", "text_tokenizer.json"))
    assert text.chat == ChatFormat("{{ messages[0] }}", "a", "b")
    texts = [path for path in requested(hub) if path.startswith("/me/texts/")]
    assert not any("safetensors" in path for path in texts)


def test_a_stock_language_model_of_the_hub_starts_a_model(hub: StandIn, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from multimodal.model.network import MultimodalLM
    from multimodal.tokenizers.levels import Layout, Level
    from multimodal.tokenizers.text import TextTokenizer

    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "stock")
    TextTokenizer.train(["a cat on a mat"] * 9, 300).save(tmp_path / "stock/tokenizer.json")
    (tmp_path / "stock/modeling.py").write_text("raise SystemExit")
    hub.add("them/stock", tmp_path / "stock")
    text = TextTokenizer.load(part_of("them/stock", "text_tokenizer.json"))
    assert not any("safetensors" in path for path in requested(hub)), "the tokenizer alone"
    layout = Layout((Level("detail", 4, 1, 64),))
    network = MultimodalLM.new("them/stock", len(text), layout, [torch.randn(64, 3)])
    folder = MultimodalLM.new(str(tmp_path / "stock"), len(text), layout, [torch.randn(64, 3)])
    for name, weight in folder.transformer.layers.state_dict().items():
        assert torch.equal(weight, network.transformer.layers.state_dict()[name])
    assert not any("modeling" in path for path in requested(hub))


def test_the_token_goes_to_the_hub_alone(
    tiny: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Large files come from a second server: refused, or, as a place of the Hub, without token."""
    from multimodal.hub import download

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    other = StandIn()
    other.blobs = tiny.blobs
    port = urlport(other)

    def elsewhere(path: str, answer: Answer) -> Answer:
        if "Location" in answer.headers:
            answer.headers["Location"] = f"http://localhost:{port}" + answer.headers["Location"]
        return answer

    tiny.serve_with = elsewhere
    with pytest.raises(ValueError, match="redirects to http://localhost"):
        load("me/tiny")
    assert other.requests == []
    monkeypatch.setattr(download, "_of_hub", lambda address: True)
    load("me/tiny")
    assert {token for _, _, token in other.requests} == {""}
    assert {token for _, _, token in tiny.requests} == {f"Bearer {TOKEN}"}
    other.close()


def urlport(hub: StandIn) -> str:
    return hub.address.rpartition(":")[2]
