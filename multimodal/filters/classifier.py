"""A classifier of images in an ONNX file, as a rule.

    onnx:
      file: nudity.onnx        # in the folder of the rules
      labels: [safe, nude]     # of its scores, in their order
      refuse: {nude: 0.5}      # the probability from which a label refuses
      mean: [0.5, 0.5, 0.5]    # of the pixels, in [0, 1]; by default 0
      std: [0.5, 0.5, 0.5]     # by default 1
      size: 224                # of the images, if the file does not say it
      scores: softmax          # what makes probabilities of its scores: softmax, sigmoid or none

It gets one image, float32[1, 3, H, W] in RGB, squeezed to H x W, and gives scores, float32[1, C].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image

from multimodal.files import open_file
from multimodal.schemas import Between


@dataclass(frozen=True, kw_only=True)
class ClassifierFile:
    """What a rule says about its classifier. See the text of this module."""

    file: str
    labels: tuple[str, ...]
    refuse: Mapping[str, float]
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    size: Annotated[int, Between(1, 4096)] | None = None
    scores: Literal["softmax", "sigmoid", "none"] = "softmax"

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.refuse) - set(self.labels)):
            raise ValueError(f"refuse: {unknown} are not among the labels")
        if not self.refuse or not all(0 <= limit <= 1 for limit in self.refuse.values()):
            raise ValueError("refuse: expected labels with probabilities from 0 to 1")
        if not len(self.mean) == len(self.std) == 3 or 0 in self.std:
            raise ValueError("mean, std: expected three numbers each, and no std of 0")


class Classifier:
    """Looks at images.

    Raises:
        ValueError: for a file that is no such classifier.
    """

    def __init__(self, about: ClassifierFile, folder: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(f"onnx needs: pip install 'multimodal[filters]' ({error})") from error
        self.about = about
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # the others are the model's
        options.log_severity_level = 3
        open_file(folder / about.file).close()  # a regular file
        try:
            self._session = onnxruntime.InferenceSession(
                folder / about.file, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its errors have no common class but this one
            raise ValueError(f"{about.file}: {str(error):.200}") from error
        inputs = self._session.get_inputs()
        shape = inputs[0].shape if len(inputs) == 1 else []
        if len(shape) != 4 or shape[1] != 3 or inputs[0].type != "tensor(float)":
            raise ValueError(f"{about.file}: expected one input, float32[1, 3, H, W]")
        height, width = (side if isinstance(side, int) else about.size or 0 for side in shape[2:])
        if not height or not width:
            raise ValueError(f"{about.file}: says no size: give size")
        self._input, self._size = inputs[0].name, (width, height)
        found = self.probabilities(Image.new("RGB", (8, 8)))
        if len(found) != len(about.labels):
            raise ValueError(
                f"{about.file}: gives {len(found)} scores, and there are {len(about.labels)} labels"
            )

    def probabilities(self, image: Image.Image) -> list[float]:
        """Those of the labels, in their order."""
        small = image.convert("RGB").resize(self._size, Image.Resampling.BICUBIC)
        mean, std = (np.asarray(each, np.float32) for each in (self.about.mean, self.about.std))
        pixels = (np.asarray(small, np.float32) / 255 - mean) / std
        (scores, *_) = self._session.run(None, {self._input: pixels.transpose(2, 0, 1)[None]})
        scores = np.asarray(scores, np.float64).reshape(-1)
        if self.about.scores == "softmax":
            scores = np.exp(scores - scores.max())
            scores = scores / scores.sum()
        elif self.about.scores == "sigmoid":
            scores = 1 / (1 + np.exp(-scores))
        return [float(score) for score in scores]

    def __call__(self, image: Image.Image) -> str | None:
        """The labels that refuse an image, and how likely they are. None: none does."""
        found = dict(zip(self.about.labels, self.probabilities(image), strict=True))
        over = [label for label, limit in self.about.refuse.items() if found[label] >= limit]
        return ", ".join(f"{label} {found[label]:.2f}" for label in over) or None
