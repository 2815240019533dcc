"""What a language model has beside its weights: its tokens, its licence and its sources."""

from pathlib import Path

from multimodal.provenance import Provenance
from multimodal.tokenizers.gguf import gguf_alone
from multimodal.tokenizers.text import TextTokenizer
from multimodal.tokenizers.weights import read_config_file

# Of Hugging Face, and of a model folder of ours.
TOKENIZERS = ("tokenizer.json", "text_tokenizer.json")
TOKENS = "tokenizer.ggml.tokens"  # of GGUF


def read_beside(path: Path, name: str, tokenizer: TextTokenizer) -> Provenance:
    """The licence and the sources of what is made of a language model and a text tokenizer.

    Args:
        path: of the language model: a folder, or a GGUF file.
        name: of it, as a source and in errors.
        tokenizer: has to give the ids that the language model learned. Control tokens may have
            other names: no text becomes one. A tokenizer of the language model that cannot be read
            is not compared.

    Raises:
        ValueError: names the first token that differs, or what is damaged.
    """
    if path.is_file():
        try:
            tokens, provenance = _read_gguf(path)
        except Exception as error:  # the readers of others raise what comes
            raise ValueError(f"{path}: not a readable GGUF model: {error}") from error
        fingerprint = ""
    else:
        tokens, provenance = _tokens_of(path), Provenance.read(path)
        stored = read_config_file(path / "config.json").get("fingerprints")
        fingerprint = str(stored.get("model") or "") if isinstance(stored, dict) else ""
    controls = tokenizer.controls()
    for token, number in sorted(tokenizer.vocabulary().items(), key=lambda item: item[1]):
        if token not in controls and tokens.get(number, token) != token:
            raise ValueError(
                f"{name}: its token {number} is {tokens[number]!r:.80}, and that of the text "
                f"tokenizer is {token!r:.80}: is it that of the same model?"
            )
    return provenance.of_model(name, fingerprint)


def _tokens_of(folder: Path) -> dict[int, str]:
    """The tokens by their ids. Empty: there is no tokenizer that can be read."""
    for name in TOKENIZERS:
        if (folder / name).is_file():
            try:
                found = TextTokenizer.load(folder / name).vocabulary()
            except ValueError:
                return {}
            return {number: token for token, number in found.items()}
    return {}


def _read_gguf(path: Path) -> tuple[dict[int, str], Provenance]:
    """The tokens by their ids, as they are listed, however it splits texts. And its licence."""
    with gguf_alone(path):
        import gguf

        fields = gguf.GGUFReader(path).fields
        found = {
            key: field.contents()
            for key, field in fields.items()
            if key.startswith(("general.license", "multimodal.")) or key == TOKENS
        }
    # The texts that our export writes. Other tools name a licence, and say where its text is.
    names = ("LICENSE", "sources.json")
    texts = {each: found[f"multimodal.{each}"] for each in names if f"multimodal.{each}" in found}
    named = [found.get(f"general.license{end}") for end in ("", ".name", ".link")]
    texts.setdefault("LICENSE", "\n\n".join(dict.fromkeys(each for each in named if each)))
    return dict(enumerate(found.get(TOKENS, ()))), Provenance.of_texts(texts, path)
