"""Few-shot captioning: other images and their captions come first in the prompt."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, Subject, Value
from multimodal.eval.metrics.captioning import score_captions
from multimodal.eval.metrics.yardsticks import shuffled
from multimodal.inference.text import few_shot_prompt, generate_ids
from multimodal.model.lessons import descriptions_of
from multimodal.model.sequences import image_tokens
from multimodal.options import TextOptions

SHOTS = (0, 1, 2, 4)
MAX_TOKENS = TextOptions().max_tokens


@dataclass
class FewShot:
    """Captions after examples in the prompt."""

    name: ClassVar[str] = "few_shot"
    protocol: ClassVar[str] = (
        f"captions after {', '.join(map(str, SHOTS))} examples: the next samples of the data, each "
        f"with its first caption; greedy, at most {MAX_TOKENS} tokens; CIDEr_..._shuffled: the "
        "same captions, each for another image: their style alone"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return bool(descriptions_of(sample.record))

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model, count = subject.model, len(subject.samples)
        codes = model.read(subject.codes)
        first_captions = [descriptions_of(sample.record)[0] for sample in subject.samples]
        keys = [sample.key for sample in subject.samples]
        references = {sample.key: descriptions_of(sample.record) for sample in subject.samples}
        limit = model.config.transformer.max_position_embeddings
        per_image: dict[str, dict[str, float]] = {}
        captions = dict[str, str]()
        for shots in (shots for shots in SHOTS if shots < count):
            prompts = []
            for row in range(count):
                others = [(row + 1 + shot) % count for shot in range(shots)]
                texts = [first_captions[other] for other in others]
                prompt = few_shot_prompt(model, codes[others], texts)
                prompts.append([*prompt, *image_tokens(model.vocabulary, codes[row].tolist())])
            if max(map(len, prompts)) + MAX_TOKENS > limit:
                break  # the prompt would be longer than the model can read
            ids = subject.map_batches(prompts, lambda batch: generate_ids(model, batch))
            texts = [model.text_tokenizer.decode(tokens).strip() for tokens in ids]
            captions = dict(zip(keys, texts, strict=True))
            per_image = score_captions(captions, references)["per_image"]
            yield f"CIDEr_{shots}", [per_image[key]["CIDEr"] for key in references]
            if count > 1:
                moved = dict(zip(keys, shuffled(texts, subject.seed), strict=True))
                of_others = score_captions(moved, references)["per_image"]
                yield f"CIDEr_{shots}_shuffled", [of_others[key]["CIDEr"] for key in references]
        for sample, image in zip(subject.samples, subject.images, strict=True):
            if sample.key in per_image:
                score = per_image[sample.key]["CIDEr"]
                self.examples.append(Example(sample.key, captions[sample.key], score, image))
