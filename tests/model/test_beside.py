"""What lies beside a language model: its licence goes along, its tokens must be those given."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers

from multimodal.api import Model, load
from multimodal.export.gguf import export_gguf
from multimodal.provenance import Provenance
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.tokenizers.language_model import read_beside
from multimodal.tokenizers.text import TextTokenizer
from multimodal.train.joint import JointModule

TERMS = "Only on Sundays.\n\nThe long text."


@pytest.fixture(scope="module")
def images(tiny_model_folder: Path) -> str:
    return str(tiny_model_folder / "image_tokenizer")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, sentences: tuple[str, ...]) -> Path:
    """A Llama with a licence. Tests only read it."""
    folder = tmp_path_factory.mktemp("stock")
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    TextTokenizer.train(sentences * 4, 300).save(folder / "tokenizer.json")
    (folder / "LICENSE").write_text(TERMS, "utf-8")
    return folder


@pytest.fixture(scope="module")
def others() -> TextTokenizer:
    """A text tokenizer that learned other words."""
    return TextTokenizer.train(["other words entirely, of other letters: xylophone quiz"] * 9, 300)


def test_what_starts_from_a_language_model_has_its_licence(
    stock: Path, images: str, tmp_path: Path
) -> None:
    model = Model.new(str(stock), TextTokenizer.load(stock), load_image_tokenizer(images))
    model.save(tmp_path / "ours")
    about: dict[str, Any] = {"kind": "model", "name": str(stock), "license": "Only on Sundays."}
    assert Provenance.read(tmp_path / "ours") == Provenance((TERMS,), (about,))
    trained = JointModule(str(stock), images, str(stock))
    assert trained.provenance() == Provenance((TERMS,), (about,))
    # And what starts from that one.
    ours = str(tmp_path / "ours")
    again = JointModule(ours, images, ours).provenance()
    assert again.licenses == (TERMS,) and again.sources[0] == about
    assert again.sources[1]["fingerprint"] == load(ours).fingerprint
    assert JointModule(ours, images, "tiny").provenance() == Provenance()


def test_a_gguf_file_has_a_licence_too(
    images: str, tiny_model_folder: Path, others: TextTokenizer, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "ours")
    terms = Provenance((TERMS, "Another."), ({"kind": "data", "name": "photos"},))
    terms.write(tmp_path / "ours")
    file = tmp_path / "model.gguf"
    export_gguf(tmp_path / "ours", file)
    codes = load_image_tokenizer(images)
    model = Model.new(str(file), TextTokenizer.load(file), codes)
    assert model.provenance == terms.of_model(str(file))
    with pytest.raises(ValueError, match=r"model\.gguf: its token \d+ is '.+', and that of the"):
        Model.new(str(file), others, codes)


def test_the_licence_that_other_tools_name_in_a_gguf_file(
    tmp_path: Path, others: TextTokenizer
) -> None:
    for number, given in enumerate(({}, {"": "apache-2.0"}, {"": "other", ".link": "https://a.b"})):
        file = tmp_path / f"{number}.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        for end, text in given.items():
            writer.add_string(f"general.license{end}", text)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        licenses = ("\n\n".join(given.values()),) if given else ()
        assert read_beside(file, "m", others) == Provenance(licenses).of_model("m")


def test_the_text_tokenizer_of_another_model_is_refused(
    stock: Path, images: str, others: TextTokenizer, tmp_path: Path
) -> None:
    codes = load_image_tokenizer(images)
    with pytest.raises(ValueError, match=r"its token \d+ is '.+': is it that of the same model\?"):
        Model.new(str(stock), others, codes)
    Model.new(str(stock), TextTokenizer.load(stock), codes).save(tmp_path / "ours")
    with pytest.raises(ValueError, match="is it that of the same model"):
        Model.new(str(tmp_path / "ours"), others, codes)
    # Control tokens may be renamed, and a model may have no tokenizer of its own.
    stored = json.loads((stock / "tokenizer.json").read_text("utf-8"))
    control = {"id": 300, "content": "<|a|>", "special": True, "normalized": False}
    control |= {"single_word": False, "lstrip": False, "rstrip": False}
    shutil.copytree(stock, tmp_path / "named")
    for name, file in (("<|a|>", "named/tokenizer.json"), ("<|b|>", "text.json")):
        stored["added_tokens"] = [control | {"content": name}]
        (tmp_path / file).write_text(json.dumps(stored), "utf-8")
    Model.new(str(tmp_path / "named"), TextTokenizer.load(tmp_path / "text.json"), codes)
    (tmp_path / "named/tokenizer.json").unlink()
    Model.new(str(tmp_path / "named"), others, codes)
