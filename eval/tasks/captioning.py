"""Captioning: captions compared with references."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, Subject, Value
from multimodal.eval.metrics.captioning import score_captions
from multimodal.eval.metrics.objects import named_objects
from multimodal.inference.text import caption_codes
from multimodal.model.lessons import descriptions_of
from multimodal.options import TextOptions

BEAMS = 5


@dataclass
class Captioning:
    """Captions compared with references."""

    name: ClassVar[str] = "captioning"
    from_codes: ClassVar[bool] = True  # it needs no pixels
    protocol: ClassVar[str] = (
        f"greedy, at most {TextOptions().max_tokens} tokens, and CIDEr_beams with {BEAMS} beams, "
        f"length penalty {TextOptions().length_penalty}; Penn Treebank tokens, pycocoevalcap; "
        "hallucinated: captions that name an object that no reference names (CHAIR, by a list of "
        "words), if references name objects of the list"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return bool(descriptions_of(sample.record))

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model, codes = subject.model, subject.codes
        keys = [sample.key for sample in subject.samples]
        rows = range(len(keys))
        texts = subject.map_batches(rows, lambda batch: caption_codes(model, codes[list(batch)]))
        captions = dict(zip(keys, texts, strict=True))
        references = {sample.key: descriptions_of(sample.record) for sample in subject.samples}
        scores = score_captions(captions, references)
        per_image = scores["per_image"]
        yield "CIDEr", [per_image[key]["CIDEr"] for key in keys]
        for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"):
            yield name, scores[name]  # corpus BLEU is not the mean of per-image BLEU
        yield "ROUGE_L", [per_image[key]["ROUGE_L"] for key in keys]
        beam_search = TextOptions(beams=BEAMS)
        beam_texts = subject.map_batches(
            rows, lambda batch: caption_codes(model, codes[list(batch)], beam_search)
        )
        beam_scores = score_captions(dict(zip(keys, beam_texts, strict=True)), references)
        yield "CIDEr_beams", [beam_scores["per_image"][key]["CIDEr"] for key in keys]
        yield "words", [float(len(text.split())) for text in texts]
        yield "distinct", len(set(texts)) / len(texts)
        for n in (1, 2):
            grams = [gram for text in texts for gram in _ngrams(text.split(), n)]
            yield f"distinct_{n}", len(set(grams)) / max(1, len(grams))
        yield from _hallucinations(captions, references)
        for sample, image in zip(subject.samples, subject.images, strict=True):
            key = sample.key
            text = f"{captions[key]} | {references[key][0]}"
            self.examples.append(Example(key, text, per_image[key]["CIDEr"], image))


def _ngrams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def _hallucinations(
    captions: dict[str, str], references: dict[str, list[str]]
) -> Iterator[tuple[str, Value]]:
    """CHAIR per caption and per object. Nothing if no reference names a known object."""
    true = {key: named_objects(" ".join(texts)) for key, texts in references.items()}
    if not any(true.values()):
        return
    named = {key: named_objects(text) for key, text in captions.items()}
    wrong = {key: named[key] - true[key] for key in captions}
    yield "hallucinated", [float(bool(objects)) for objects in wrong.values()]
    wrong_count, named_count = sum(map(len, wrong.values())), sum(map(len, named.values()))
    yield "hallucinated_objects", wrong_count / max(1, named_count)
