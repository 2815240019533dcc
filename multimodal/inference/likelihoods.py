"""How likely a text is, to its end: as the caption of an image, or among the answers to a question.

Shapes: B images, n codes of each, V vocabulary, R rows: an image with one of its choices.
"""

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.inference.batch import Batch, check_length, text_ids
from multimodal.model.sequences import NO_LOSS, describe, describe_prompt, pack

if TYPE_CHECKING:
    from multimodal.model.network import Multimodal

AFTER_THE_END = -1


@torch.inference_mode()
def text_likelihoods(model: "Multimodal", codes: Tensor, texts: SequenceOf[str]) -> Tensor:
    """Of each text as the caption of its image, log probabilities in nats.

    codes: int64[B, n] -> float32[B], on the CPU
    """
    vocabulary = model.vocabulary
    said = [text_ids(model, text) for text in texts]
    sequences = [describe(vocabulary, *one) for one in zip(codes.tolist(), said, strict=True)]
    check_length(model, sequences, 0)
    packed = pack(sequences, max(map(len, sequences)), vocabulary.pad).to(model.device)
    places = [torch.from_numpy((one.objectives != NO_LOSS).nonzero()[0]) for one in sequences]
    starts = packed.states.tolist()
    where = torch.cat([
        start - one.state + place
        for start, one, place in zip(starts, sequences, places, strict=True)
    ]).to(model.device)  # fmt: skip
    logits = model.transformer.logits(model.hidden(packed).flatten(0, 1)[where])
    losses = F.cross_entropy(logits, packed.targets.flatten()[where], reduction="none")
    return -torch.stack([part.sum() for part in torch.split(losses, list(map(len, places)))]).cpu()


@torch.inference_mode()
def choice_likelihoods(
    model: "Multimodal",
    codes: Tensor,
    prompts: SequenceOf[str],
    choices: SequenceOf[SequenceOf[str]],
) -> list[Tensor]:
    """Of each choice as the answer to the prompt about its image, log probabilities in nats.

    The image and the prompt are read once for all of their choices.
    codes: int64[B, n] -> B times float32[choices], on the CPU
    """
    vocabulary, encode = model.vocabulary, model.text_tokenizer.encode
    images = (codes + vocabulary.image_start).tolist()
    begun = [describe_prompt(vocabulary, image) + encode(prompt)
             for image, prompt in zip(images, prompts, strict=True)]  # fmt: skip
    # An answer follows its prompt after a space, as in training.
    said = [
        [*encode(f" {text.strip()}"), vocabulary.eos] for several in choices for text in several
    ]
    longest = max(map(len, said))
    counts = [len(several) for several in choices]
    batch = Batch(model, begun, longest)
    batch.keep([row for row, count in enumerate(counts) for _ in range(count)])
    targets = torch.tensor([ids + [AFTER_THE_END] * (longest - len(ids)) for ids in said])
    total = torch.zeros(len(said))
    for column in targets.unbind(1):
        here = column.clamp(min=0).to(model.device)
        likely = batch.logits().log_softmax(-1).gather(1, here[:, None])[:, 0].cpu()
        total += likely.where(column != AFTER_THE_END, 0.0)
        if batch.cache.length < batch.cache.room:
            batch.read(here)
    return list(torch.split(total, counts))
