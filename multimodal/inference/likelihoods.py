"""How likely a text is: as the caption of an image, or among the answers to a question.

Shapes: B images, n codes of each, C choices of an image.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.inference.batch import DecodeBatch, check_length
from multimodal.inference.codec import encode_text
from multimodal.model.checkpoint import ModelParts
from multimodal.model.layers.attention import without_cudnn_attention
from multimodal.model.lessons import answer_text
from multimodal.model.sequences import NO_LOSS, describe, describe_prompt, pack

AFTER_THE_END = -1


@torch.inference_mode()
@without_cudnn_attention()
def text_likelihoods(model: ModelParts, codes: Tensor, texts: Sequence[str]) -> Tensor:
    """Log probabilities of texts as captions, to their ends.

    Args:
        codes: int64[B, n].
        texts: B captions, none of them empty.

    Returns:
        float32[B] in nats, on the CPU.
    """
    vocabulary = model.vocabulary
    sequences = [
        describe(vocabulary, image, [encode_text(model, text)])
        for image, text in zip(model.read(codes).tolist(), texts, strict=True)
    ]
    check_length(model.network, sequences, 0)
    packed = pack(sequences, max(map(len, sequences)), vocabulary.pad).to(model.device)
    predicted = [torch.from_numpy((s.objectives != NO_LOSS).nonzero()[0]) for s in sequences]
    index = torch.cat(
        [
            state - sequence.state + positions
            for state, sequence, positions in zip(
                packed.states.tolist(), sequences, predicted, strict=True
            )
        ]
    ).to(model.device)
    hidden = model.network.hidden(packed).flatten(0, 1)
    logits = model.network.transformer.logits(hidden[index])
    losses = F.cross_entropy(logits, packed.targets.flatten()[index], reduction="none")
    of_texts = torch.split(losses, list(map(len, predicted)))
    return -torch.stack([text.sum() for text in of_texts]).cpu()


@torch.inference_mode()
def choice_likelihoods(
    model: ModelParts,
    codes: Tensor,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
) -> list[Tensor]:
    """Log probabilities of answers, to their ends.

    An image and its prompt are read once for all of their choices.

    Args:
        codes: int64[B, n].
        prompts: B texts that follow the images.
        choices: for each prompt C answers. C may differ.

    Returns:
        For each prompt float32[C] in nats, on the CPU.
    """
    vocabulary, encode = model.vocabulary, model.text_tokenizer.encode
    ids = [
        describe_prompt(vocabulary, image) + encode(prompt)
        for image, prompt in zip(model.read(codes).tolist(), prompts, strict=True)
    ]
    answers = [
        [*encode(answer_text(text.strip())), vocabulary.eos]
        for several in choices
        for text in several
    ]
    longest = max(map(len, answers))
    counts = [len(several) for several in choices]
    batch = DecodeBatch(model.network, ids, longest)
    batch.keep([row for row, count in enumerate(counts) for _ in range(count)])
    targets = torch.tensor([text + [AFTER_THE_END] * (longest - len(text)) for text in answers])
    totals = torch.zeros(len(answers))
    for step, column in enumerate(targets.unbind(1)):
        tokens = column.clamp(min=0).to(model.device)
        scores = batch.logits().log_softmax(-1).gather(1, tokens[:, None])[:, 0].cpu()
        totals += scores.where(column != AFTER_THE_END, 0.0)
        if step < longest - 1:
            batch.step(tokens)
    return list(torch.split(totals, counts))
