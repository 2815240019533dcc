"""CLIPScore: how well an image fits a text, by a CLIP model with local weights.

CLIPScore (Hessel et al. 2021, arXiv:2104.08718) is 2.5 * max(0, cosine of the two embeddings).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

SCALE = 2.5


class ClipScore:
    """Computes CLIPScore.

    Args:
        model: ``MODEL=FILE``. A model name of open_clip, and its weights as safetensors.

    Raises:
        ValueError: if the model is unknown, or the weights do not fit it.
    """

    def __init__(self, model: str) -> None:
        import open_clip

        name, _, file = model.partition("=")
        if not name or Path(file).suffix != ".safetensors" or not Path(file).is_file():
            raise ValueError(f"--clip {model}: expected MODEL=FILE, the weights as .safetensors")
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                name, pretrained=file
            )
            self.tokenize = open_clip.get_tokenizer(name)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"--clip {model}: {reason}") from error
        self.name = f"{name} ({Path(file).name})"
        self.model.eval()

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """N images and N texts -> N scores in [0, 2.5]."""
        pixels = torch.stack([self.preprocess(image) for image in images])
        image_rows = F.normalize(self.model.encode_image(pixels).float(), dim=-1)
        text_rows = F.normalize(self.model.encode_text(self.tokenize(list(texts))).float(), dim=-1)
        return (SCALE * (image_rows * text_rows).sum(-1).clamp(min=0)).tolist()
