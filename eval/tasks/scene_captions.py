"""Captions of synthetic scenes, checked claim by claim against the ground truth."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, Subject, Value
from multimodal.eval.metrics.scene_captions import hallucinated, score_scene_captions
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
        keys = [sample.key for sample in subject.samples]
        texts = subject.map_batches(
            range(len(keys)), lambda batch: caption_codes(model, codes[list(batch)])
        )
        captions = dict(zip(keys, texts, strict=True))
        scenes = {s.key: Scene.from_json(s.record["scene"]) for s in subject.samples}
        for name, value in score_scene_captions(captions, scenes).items():
            if name != "n":
                yield name, value
        references = {
            f"{sample.key} {number}": (caption, scenes[sample.key])
            for sample in subject.samples
            for number, caption in enumerate(descriptions_of(sample.record))
        }
        if references:
            of_references = score_scene_captions(
                {key: caption for key, (caption, _) in references.items()},
                {key: scene for key, (_, scene) in references.items()},
            )
            for name, value in of_references.items():
                if name.startswith(("recall_", "said_")):
                    yield f"{name}_references", value
        yield "hallucinated", [float(hallucinated(captions[key], scenes[key])) for key in keys]
        for key, image in zip(keys, subject.images, strict=True):
            score = check_caption(captions[key], scenes[key])
            quality = (score.precision + score.recall) / 2
            self.examples.append(Example(key, captions[key], quality, image))
