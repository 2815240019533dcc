"""Likelihood: how probable captions and images are for the model."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, Subject, Value
from multimodal.inference.likelihoods import text_likelihoods
from multimodal.model.lessons import descriptions_of
from multimodal.model.sequences import OBJECTIVES, draw, pack


@dataclass
class Likelihood:
    """Bits per byte of captions, and nats per code of images."""

    name: ClassVar[str] = "likelihood"
    protocol: ClassVar[str] = (
        "the first caption given its image; the codes that are drawn, one by one, given the caption"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return bool(descriptions_of(sample.record))

    @torch.inference_mode()
    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model, network, all_codes = subject.model, subject.model.network, subject.codes
        drawn = model.config.layout.indices(model.config.draws)

        def likelihoods(rows: Sequence[int]) -> list[tuple[float, float]]:
            """Of each sample: bits per byte of its caption, nats per code."""
            codes = all_codes[list(rows)]
            captions = [descriptions_of(subject.samples[row].record)[0] for row in rows]
            caption_nats = (-text_likelihoods(model, codes, captions)).tolist()
            results = []
            drawings = codes[:, drawn].numpy()
            for row, caption, nats in zip(drawings, captions, caption_nats, strict=True):
                ids = model.text_tokenizer.encode(caption)
                sequence = draw(model.vocabulary, ids, row)
                packed = pack([sequence], len(sequence), model.vocabulary.pad).to(model.device)
                is_code = packed.objectives == OBJECTIVES.index("image")
                is_code &= (
                    packed.targets != model.vocabulary.eoi
                )  # it is no code and always certain
                logits = network.transformer.logits(network.hidden(packed)[is_code])
                code_nats = F.cross_entropy(logits, packed.targets[is_code])
                size = len(caption.strip().encode()) + 1  # bytes, and the end of the text
                results.append((nats / math.log(2) / size, float(code_nats)))
            return results

        values = subject.map_batches(range(len(subject.samples)), likelihoods)
        yield "caption_bits_per_byte", [bits for bits, _ in values]
        yield "image_nats_per_code", [nats for _, nats in values]
