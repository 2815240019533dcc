"""What can be known before the first step: whether the data hold what is to be learned, and fit."""

from itertools import chain, islice

from multimodal.data.documents import document_of
from multimodal.data.shards import Shards
from multimodal.model.lessons import descriptions_of, exchanges_of
from multimodal.model.network import Multimodal

PEEK = 256  # samples of each folder, the first ones
AROUND_IMAGE = 4  # <bos> <boi> and <eoi> around the codes, and <eos> at the end
MEANT = {
    "caption": "a caption", "answer": "a question or a statement with its answer",
    "text": "a text", "image": "an image (next_token_share says how many are drawn)",
    "reconstruct": "an image of its own (reconstruct_share says how many are masked)",
}  # fmt: skip


def check_data(
    model: Multimodal,
    shards: list[Shards],
    row_length: int,
    question_share: float,
    resumed: bool = False,
) -> None:
    """Errors: ``ValueError`` where a sequence does not fit a row, or an objective that the
    configuration names has nothing to learn from in the first samples; resumed: a run whose
    configuration has been found good, and may name what it has no use for."""
    goals, codes = model.config.objectives, model.image_tokenizer.config.grid**2
    if row_length > (limit := model.config.transformer.max_position_embeddings):
        raise ValueError(f"row_length={row_length}: the model reads at most {limit} tokens")
    if codes + AROUND_IMAGE > row_length:
        raise ValueError(
            f"row_length={row_length}: an image of {codes} codes needs {codes + AROUND_IMAGE}"
        )
    found, seen = set[str](), 0
    for folder in {one.folder: one for one in shards}.values():
        for sample in islice(folder, PEEK):
            seen += 1
            record, parts = sample.record, document_of(sample)
            if parts:
                found |= _of_document(parts)
                continue
            descriptions = descriptions_of(record)
            exchanges = exchanges_of(record, model.config.templates)
            if descriptions and not question_share:
                exchanges = []
            drawn = {"image"} if goals.next_token_share else set()
            masked = {"reconstruct"} if goals.reconstruct_share else set()
            found |= drawn | masked | ({"caption", "text"} if descriptions else set())
            found |= {"answer"} if exchanges else set()
            texts = chain(descriptions, (f"{prompt} {said}" for prompt, said in exchanges))
            longest = max((len(model.text_tokenizer.encode(text)) for text in texts), default=0)
            if (needed := longest + codes + AROUND_IMAGE) > row_length:
                raise ValueError(
                    f"{folder.folder}: sample {sample.key} makes a sequence of {needed} tokens, "
                    f"more than row_length={row_length}: raise it, or cut the text"
                )
    where = f"none of the first {seen:,} training samples has"
    for name, weight in goals.weights.items():
        if weight and name not in found and not resumed:
            raise ValueError(
                f"objectives.weights has {name}: {weight}, but {where} {MEANT[name]}; "
                f"give such data, or leave {name} out"
            )
    if not (goals.alignment_weight or any(map(goals.weight_of, found))):
        raise ValueError(f"{where} anything that an objective with a weight could learn from")


def _of_document(parts: list[str | None]) -> set[str]:
    """The objectives that a document has something for."""
    first = parts.index(None) if None in parts else len(parts)
    found = {"image"} if None in parts else set()
    return found | ({"text"} if first else set()) | ({"caption"} if any(parts[first:]) else set())
