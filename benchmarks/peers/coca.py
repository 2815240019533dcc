"""open_clip's CoCa (Yu et al. 2022, arXiv:2205.01917), small, to train beside ours on one machine.

What open_clip leaves to do, as of 3.3:

- Its tower of a network of timm gives one vector, and CoCa needs tokens, too: ``TimmTokens``.
- It never initialises the head of the text decoder: ``make_coca`` does.
- ``CoCa.generate`` needs transformers 4, and its beams add up logits, not log probabilities:
  ``CocaTexts`` lets our ``beam_search`` write.

Shapes: N photos, B of them, H W pixels, h w positions of a network's last map, D its channels.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from open_clip.coca_model import CoCa
from torch import Tensor, nn
from tqdm import tqdm

from multimodal.inference.beams import beam_search
from multimodal.options import TextOptions
from multimodal.tokenizers.encoder import Encoder, EncoderName

WIDTH, HEADS, LAYERS, CONTEXT = 256, 4, 2, 32  # of the tower for text and of the decoder each
PIXELS, PATCH, VIT_LAYERS = 112, 16, 4  # of the tower for images that starts from nothing
LEARNING_RATE = 1e-3
WEIGHT_DECAY, BETAS, EPSILON = 0.2, (0.9, 0.98), 1e-6  # open_clip's defaults, as the next ones
CAPTION_WEIGHT, CONTRASTIVE_WEIGHT = 2.0, 1.0
CHECKS, AT_ONCE = 8, 50


class Words:
    """open_clip's BPE with the ids of some captions only: 0 pads, the last two start and end."""

    def __init__(self, captions: Sequence[str]) -> None:
        self.bpe = open_clip.SimpleTokenizer()
        self.ids = sorted({number for text in captions for number in self.bpe.encode(text)})
        self.place = {number: place for place, number in enumerate(self.ids, start=1)}
        self.start, self.end = len(self.ids) + 1, len(self.ids) + 2
        self.size = len(self.ids) + 3

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """int64[B, CONTEXT]. Ids that none of the captions had are left out."""
        rows = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.place[number] for number in self.bpe.encode(text) if number in self.place]
            ids = [self.start, *ids[: CONTEXT - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        return self.bpe.decode([self.ids[place - 1] for place in ids]).strip()


@dataclass
class Photos:
    """What CoCa reads.

    Args:
        crops: crops of N photos, uint8[N, crops, H, W, 3], or their features,
            float16[N, crops, h * w, D].
        texts: all captions of each photo, int64[captions, CONTEXT].
    """

    crops: NDArray[Any]
    texts: list[Tensor]

    def images(self, rows: Any, crops: Any) -> Tensor:
        """float32[B, 3, H, W] in [-1, 1], or features: float32[B, h * w, D]."""
        chosen = torch.from_numpy(np.array(self.crops[rows, crops]))
        return to_pixels(chosen) if chosen.dtype == torch.uint8 else chosen.float()

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A random crop and caption of each photo, without end, in a new order each epoch."""
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(len(self.texts))
            for start in range(0, max(1, len(order) - size + 1), size):
                rows = order[start : start + size]
                crops = rng.integers(self.crops.shape[1], size=len(rows))
                texts = [self.texts[row][rng.integers(len(self.texts[row]))] for row in rows]
                yield self.images(rows, crops), torch.stack(texts)

    def parts(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """The first crop of every photo, with its captions."""
        for start in range(0, len(self.texts), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            yield self.images(rows, 0), self.texts[rows]


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8[B, H, W, 3] -> float32[B, 3, H, W] in [-1, 1]."""
    return rearrange(pictures, "b h w c -> b c h w").float() / 127.5 - 1


class TimmTokens(nn.Module):
    """open_clip's tower of a network of timm, locked, with tokens for CoCa.

    It reads features, so that they can be computed once. The pooled vector is that of the tower.
    Tokens are a linear layer and a norm of each position, and a learned vector for the position.

    Args:
        tower: a ``TimmModel`` that pools by the mean.
        positions: h * w.
    """

    def __init__(self, tower: Any, positions: int) -> None:
        super().__init__()
        tower.lock()  # without freeze_bn_stats, which would drop the activations of timm's norms
        self.tower = tower
        self.project = nn.Linear(tower.trunk.num_features, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.places = nn.Parameter(torch.zeros(positions, WIDTH))

    @torch.inference_mode()
    def features(self, pictures: NDArray[np.uint8]) -> NDArray[np.float16]:
        """uint8[B, H, W, 3] -> [B, h * w, D]."""
        images = to_pixels(torch.from_numpy(pictures)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            maps = self.tower.trunk.eval().forward_features(images)
        return rearrange(maps, "b d h w -> b (h w) d").half().numpy()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """float32[B, h * w, D] -> (pooled: [B, WIDTH], tokens: [B, h * w, WIDTH])."""
        pooled = self.tower.head(features.mean(1))
        return pooled, self.norm(self.project(features)) + self.places


def make_coca(vocabulary_size: int, encoder: Encoder | None = None) -> CoCa:
    """A small CoCa with random weights.

    Args:
        vocabulary_size: of its texts.
        encoder: the final features of a network of timm. The image tower becomes this network,
            with the same weights, locked. It must expect images in [-1, 1]. None: a ViT.

    Raises:
        ValueError: for another encoder.
    """
    text = {
        "context_length": CONTEXT,
        "vocab_size": vocabulary_size,
        "width": WIDTH,
        "heads": HEADS,
        "layers": LAYERS,
    }
    vision: dict[str, Any] = {
        "image_size": PIXELS,
        "patch_size": PATCH,
        "layers": VIT_LAYERS,
        "width": WIDTH,
        "head_width": WIDTH // HEADS,
        "output_tokens": True,
    }
    if encoder is not None:
        name = EncoderName.parse(encoder.name)
        usual = bool((encoder.mean == 0.5).all() and (encoder.std == 0.5).all())
        if name.kind != "timm" or encoder.stages != () or not usual:
            raise ValueError(f"{name}: expected final features of timm, mean and deviation 0.5")
        vision = {"timm_model_name": name.model, "image_size": encoder.image_size}
    coca = CoCa(WIDTH, text, {**text, "embed_cls": True, "output_tokens": True}, vision)
    # The deviation is the one in its init_parameters, which open_clip never calls.
    nn.init.normal_(coca.text_decoder.text_projection, std=WIDTH**-0.5)
    if encoder is not None:
        coca.visual.trunk.load_state_dict(encoder.network.network.state_dict())
        coca.visual = TimmTokens(coca.visual, encoder.grid(encoder.image_size) ** 2)
    return coca


@torch.inference_mode()
def caption_loss(coca: CoCa, photos: Photos) -> float:
    """Of the first caption of each photo, in nats a token."""
    total, tokens = 0.0, 0
    for images, captions in photos.parts():
        texts = torch.stack([each[0] for each in captions])
        with torch.autocast("cpu", torch.bfloat16):
            logits = coca(images, texts)["logits"].float()
        targets = texts[:, 1:].flatten()
        total += float(
            F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=0, reduction="sum")
        )
        tokens += int((targets != 0).sum())
    return total / tokens


def train_coca(
    coca: CoCa,
    train: Photos,
    val: Photos,
    batch_size: int,
    seconds: float,
    rate: Callable[[float], float],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train for some seconds of steps, with the losses and the optimizer of open_clip.

    Args:
        rate: share of the time -> share of the learning rate.

    Returns:
        Figures, and the weights with the lowest caption loss on val. ``coca`` has the last ones.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in coca.named_parameters():
        if parameter.requires_grad:
            kept = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias"))
            (others if kept else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, BETAS, EPSILON)
    loss = open_clip.CoCaLoss(CAPTION_WEIGHT, CONTRASTIVE_WEIGHT)
    batches = train.batches(batch_size, seed=0)
    spent, steps, losses, best = 0.0, 0, list[float](), dict[str, Tensor]()
    bar = tqdm(total=round(seconds), unit="s", disable=None)
    coca.train()
    while spent < seconds:
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate(spent / seconds)
        images, texts = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            parts = loss(**coca(images, texts))
        optimizer.zero_grad()
        sum(parts).backward()
        nn.utils.clip_grad_norm_(decayed + others, 1.0)
        optimizer.step()
        with torch.no_grad():
            coca.logit_scale.clamp_(0, math.log(100))
        spent, steps = spent + time.perf_counter() - start, steps + 1
        bar.update(round(spent) - bar.n)
        if spent >= seconds * (len(losses) + 1) / CHECKS:
            coca.eval()
            losses.append(caption_loss(coca, val))
            if losses[-1] == min(losses):
                best = copy.deepcopy(coca.state_dict())
            coca.train()
    coca.eval()
    figures = {
        "learning_rate": LEARNING_RATE,
        "trained_parameters": sum(p.numel() for p in decayed + others),
        "steps": steps,
        "captions_a_step": batch_size,
        "seconds": spent,
        "caption_loss_on_val": losses,
    }
    return figures, best


class CocaTexts:
    """Texts that CoCa writes, as the batch of our ``beam_search``. CoCa has no cache."""

    def __init__(self, coca: CoCa, images: Tensor, start: int) -> None:
        self.coca = coca
        self.latent, self.embedded = coca._encode_image(images)
        self.hidden = torch.full((len(images), 1), start)  # ids so far

    def keep(self, rows: list[int]) -> None:
        self.hidden, self.latent = self.hidden[rows], self.latent[rows]
        self.embedded = self.embedded[rows]

    def logits(self) -> Tensor:
        known = {"image_latent": self.latent, "image_embs": self.embedded}
        return self.coca(None, self.hidden, output_labels=False, **known)["logits"][:, -1]

    def step(self, ids: Tensor) -> None:
        self.hidden = torch.cat([self.hidden, ids[:, None]], 1)


@torch.inference_mode()
def write_captions(coca: CoCa, words: Words, photos: Photos, beams: int) -> list[str]:
    """A caption of each photo. One beam is greedy."""
    allowed = torch.ones(words.size, dtype=torch.bool)
    allowed[[0, words.start]] = False
    penalty = TextOptions().length_penalty
    texts: list[list[int]] = []
    for images, _ in photos.parts():
        batch: Any = CocaTexts(coca, images, words.start)
        texts += beam_search(batch, allowed, words.end, CONTEXT - 1, beams, penalty)
    return [words.decode(ids) for ids in texts]
