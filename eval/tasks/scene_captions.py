"""Captions of synthetic scenes, checked claim by claim against the ground truth."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, Subject, Value, value_of
from multimodal.eval.metrics.scene_captions import hallucinated, judge_scene_captions
from multimodal.inference.text import caption_codes
from multimodal.model.lessons import descriptions_of
from multimodal.options import TextOptions
from multimodal.scenes.checking import check_caption
from multimodal.scenes.scene import Scene, scene_of


@dataclass
class SceneCaptions:
    """Which claims of captions of scenes are true."""

    name: ClassVar[str] = "scene_captions"
    from_codes: ClassVar[bool] = True  # it needs no pixels
    protocol: ClassVar[str] = (
        f"greedy, at most {TextOptions().max_tokens} tokens; each claim is checked against the "
        "scene by program; recall: the share of the facts of a kind that is said, of those that "
        "can be said of the scenes; said: claims of a kind in a caption; ..._references: of the "
        "references, one by one; hallucinated: captions that name a shape that the scene does not "
        "have"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return scene_of(sample.record) is not None

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model, codes = subject.model, subject.codes
        texts = subject.map_batches(
            range(len(subject.samples)), lambda batch: caption_codes(model, codes[list(batch)])
        )
        scenes = [Scene.from_json(sample.record["scene"]) for sample in subject.samples]
        for name, cases in judge_scene_captions(texts, scenes).items():
            yield name, value_of(cases)
        references = [
            (row, caption)
            for row, sample in enumerate(subject.samples)
            for caption in descriptions_of(sample.record)
        ]
        if references:
            rows, captions = zip(*references, strict=True)
            judged = judge_scene_captions(captions, [scenes[row] for row in rows])
            for name, cases in judged.items():
                if name.startswith(("recall_", "said_")):
                    yield f"{name}_references", value_of(cases, rows)
        pairs = list(zip(texts, scenes, strict=True))
        yield "hallucinated", [float(hallucinated(*pair)) for pair in pairs]
        for sample, (text, scene), image in zip(
            subject.samples, pairs, subject.images, strict=True
        ):
            score = check_caption(text, scene)
            quality = (score.precision + score.recall) / 2
            self.examples.append(Example(sample.key, text, quality, image))
