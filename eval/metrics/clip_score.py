"""How well an image fits a text, judged by a CLIP whose weights are at hand.

CLIPScore (Hessel et al. 2021, arXiv:2104.08718): 2.5 times the cosine of the two embeddings, at
least 0.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

SCALE = 2.5


class ClipScore:
    """Args:
    named: ``MODEL=FILE``: a name of open_clip's models, and its weights as safetensors.

    Errors: ``ValueError`` for a model that is not known, and for weights that are not its own.
    """

    def __init__(self, named: str) -> None:
        import open_clip

        name, _, file = named.partition("=")
        if not name or Path(file).suffix != ".safetensors" or not Path(file).is_file():
            raise ValueError(f"--clip {named}: expected MODEL=FILE, the weights as .safetensors")
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                name, pretrained=file
            )
            self.tokenize = open_clip.get_tokenizer(name)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"--clip {named}: {reason}") from error
        self.name = f"{name} ({Path(file).name})"
        self.model.eval()

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """N images, N texts -> N scores in [0, 2.5]"""
        pixels = torch.stack([self.preprocess(image) for image in images])
        seen = F.normalize(self.model.encode_image(pixels).float(), dim=-1)
        meant = F.normalize(self.model.encode_text(self.tokenize(list(texts))).float(), dim=-1)
        scores: list[float] = (SCALE * (seen * meant).sum(-1).clamp(min=0)).tolist()
        return scores
