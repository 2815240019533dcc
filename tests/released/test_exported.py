"""An export comes back: as it was, or as others trained it further."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from multimodal.api import Model, load
from multimodal.cli import main
from multimodal.export.hf import export_hf
from multimodal.model.templates import Templates
from multimodal.provenance import Provenance
from multimodal.tokenizers.text import ChatFormat, TextTokenizer
from tests.export.test_hf import our_logits

CHAT = ChatFormat(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}", "z", "a"
)


@pytest.fixture
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(noise=0.3)


def test_an_export_is_the_model_again(model: Model, tmp_path: Path) -> None:
    model.text_tokenizer = TextTokenizer.from_json(model.text_tokenizer.to_json(), CHAT, ["z", "y"])
    object.__setattr__(model.config, "templates", Templates(question="Q {text} A"))
    model.provenance = Provenance(("Apache",), ({"kind": "data", "name": "photos"},))
    model.save(tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "stock")
    assert main(["import", str(tmp_path / "stock"), str(tmp_path / "again")]) == 0
    first, again = load(tmp_path / "ours"), load(tmp_path / "again")
    weights = first.network.transformer.state_dict()
    found = again.network.transformer.state_dict()
    assert weights.keys() == found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert again.text_tokenizer.to_json() == first.text_tokenizer.to_json()
    assert again.text_tokenizer.chat == CHAT
    assert again.text_tokenizer.ends == ("z", "y")
    vocabulary = first.text_tokenizer.vocabulary()
    stopping = json.loads((tmp_path / "stock/generation_config.json").read_text("utf-8"))
    expected = [first.vocabulary.eos, vocabulary["z"], vocabulary["y"]]
    assert stopping["eos_token_id"] == expected
    assert again.config.templates == first.config.templates
    assert (again.config.reads, again.config.draws) == (first.config.reads, first.config.draws)
    assert again.image_tokenizer.fingerprint == first.image_tokenizer.fingerprint
    assert again.provenance == first.provenance
    export_hf(tmp_path / "again", tmp_path / "twice")
    for file in (tmp_path / "stock").rglob("*"):
        if file.is_file() and file.name != "README.md":  # it has the fingerprint
            twice = tmp_path / "twice" / file.relative_to(tmp_path / "stock")
            assert twice.read_bytes() == file.read_bytes(), file.name


def test_what_transformers_saved_comes_back(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other weights, and the files as transformers writes them."""
    model.save(tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "stock")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "tuned")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "stock").save_pretrained(
        tmp_path / "tuned"
    )
    line = ["import", str(tmp_path / "tuned"), str(tmp_path / "again")]
    assert main(line) == 1
    assert "image_tokenizer" in capsys.readouterr().err and not (tmp_path / "again").exists()
    (tmp_path / "stock/image_tokenizer").rename(tmp_path / "tuned/image_tokenizer")
    assert main([*line, "--image-size", "64"]) == 1
    assert "has the image size and the fit of its image tokenizer" in capsys.readouterr().err
    assert main(line) == 0
    again = load(tmp_path / "again")
    ids = torch.randint(0, again.vocabulary.image_end, (2, 24))
    with torch.no_grad():
        logits = our_logits(again.network.transformer, ids)
        torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=0)
    assert again.text_tokenizer.encode("a red bus 123") == model.text_tokenizer.encode(
        "a red bus 123"
    )
    assert len(again.caption([Image.new("RGB", (9, 9))], max_tokens=5)) == 1


def test_a_training_does_not_start_from_an_export_as_if_it_were_texts(
    model: Model, tmp_path: Path
) -> None:
    model.save(tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "stock")
    with pytest.raises(ValueError, match=r"stock: has image codes, .*`multimodal import .* MODEL`"):
        Model.new(str(tmp_path / "stock"), model.text_tokenizer, model.image_tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_levels": []}, "its config.json has no image_levels"),
        ({"image_levels": {"reads": ["sound"]}}, "sound"),
        ({"image_levels": {"reads": 5}}, "does not fit"),
        ({"templates": {"question": "no place"}}, "template question"),
        ({"chat_format": {"template": 5, "end": ""}}, "chat_format"),
        ({"vocab_size": 2}, "ids"),
    ],
)
def test_a_config_that_lies_is_one_line(
    change: dict[str, object], message: str, model: Model, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model.save(tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "stock")
    file = tmp_path / "stock/config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | change), "utf-8")
    assert main(["import", str(tmp_path / "stock"), str(tmp_path / "again")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "again").exists()
