"""Presence for synthetic scenes: the shapes of the ground truth."""

from dataclasses import dataclass
from typing import ClassVar

from multimodal.data.samples import Sample
from multimodal.eval.trust.presence import MAX_PRESENT, Presence
from multimodal.scenes.scene import scene_of


@dataclass
class ScenePresence(Presence):
    """Yes or no to "is there a X?", about shapes of the scene and about others."""

    name: ClassVar[str] = "scene_presence"
    protocol: ClassVar[str] = (
        "POPE: is there a X, the more likely of yes and no; for each scene at most "
        f"{MAX_PRESENT} of its shapes, and as many absent ones: random, the most frequent, and "
        "those that most often occur together with the present ones; chance: always the answer "
        "that is right more often"
    )

    def objects_of(self, sample: Sample) -> set[str]:
        scene = scene_of(sample.record)
        return set() if scene is None else {item.shape for item in scene.objects}
