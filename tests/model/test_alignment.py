"""The loss of alignment is open_clip's, and what is no negative pulls at nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad

from multimodal.model.alignment import Alignment


def embeddings(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = (torch.randn(count, 24, generator=generator) for _ in range(2))
    images, texts = (F.normalize(x, dim=-1).requires_grad_() for x in pair)
    return images, texts


@pytest.mark.parametrize("form", ["siglip", "clip"])
def test_without_a_mask_it_is_the_loss_of_open_clip(form: str) -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    images, texts = embeddings(9)
    ours = Alignment(8, 24, form)
    with torch.no_grad():
        ours.log_scale.fill_(1.7)
        ours.bias.fill_(-2.5 if form == "siglip" else 0.0)
    ids = torch.arange(9)
    loss, _ = ours(images, texts, ids, ids + 100)
    scale = ours.log_scale.exp()
    if form == "siglip":
        expected = SigLipLoss()(images, texts, scale, ours.bias)
    else:
        expected = ClipLoss()(images, texts, scale)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    learned = [images, texts, ours.log_scale] + ([ours.bias] if form == "siglip" else [])
    for a, b in zip(grad(loss, learned), grad(expected, learned), strict=True):
        assert b.abs().max() > 1e-3
        assert (a - b).abs().max() < 1e-5


def pair_by_pair(
    ours: Alignment, images: Tensor, texts: Tensor, image_ids: list[int], text_ids: list[int]
) -> Tensor:
    """The masked loss, written out: which pairs count, one after the other."""
    logits = ours.log_scale.exp() * images @ texts.T + ours.bias
    kept = [i for i, text in enumerate(text_ids) if text >= 0]
    rivals = [
        (i, j)
        for i in kept
        for j in kept
        if i != j and image_ids[i] != image_ids[j] and text_ids[i] != text_ids[j]
    ]
    if ours.form == "siglip":
        terms = [F.softplus(-logits[i, i]) for i in kept] + [F.softplus(logits[r]) for r in rivals]
        return torch.stack(terms).sum() / len(kept)
    terms = []
    for i in kept:
        row = [logits[i, i], *(logits[r] for r in rivals if r[0] == i)]
        column = [logits[i, i], *(logits[r] for r in rivals if r[1] == i)]
        terms += [torch.stack(side).logsumexp(0) - logits[i, i] for side in (row, column)]
    return torch.stack(terms).sum() / 2 / len(kept)


@pytest.mark.parametrize("form", ["siglip", "clip"])
def test_same_images_same_captions_and_dropped_ones_are_no_negatives(form: str) -> None:
    images, texts = embeddings(8)
    ours = Alignment(8, 24, form)
    image_ids = [1, 1, 2, 3, 4, 5, 6, 7]  # 0 and 1 show the same
    text_ids = [1, 2, 3, 4, 3, -1, -1, 8]  # 2 and 4 say the same; 5 and 6 say nothing
    loss, _ = ours(images, texts, torch.tensor(image_ids), torch.tensor(text_ids))
    expected = pair_by_pair(ours, images, texts, image_ids, text_ids)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    ours_d, expected_d = (grad(each, (images, texts)) for each in (loss, expected))
    for a, b in zip(ours_d, expected_d, strict=True):
        assert (a - b).abs().max() < 1e-5
        assert (a[[5, 6]] == 0).all() and (a[[0, 1, 2, 3, 4, 7]].abs().sum(1) > 0).all()
    full, _ = ours(images, texts, torch.arange(8), torch.arange(8))
    assert abs(full.item() - loss.item()) > 1e-2, "the mask makes a difference here"


@pytest.mark.parametrize("form", ["siglip", "clip"])
def test_a_batch_of_dropped_conditions_has_no_alignment_loss(form: str) -> None:
    images, texts = embeddings(3)
    loss, accuracy = Alignment(8, 24, form)(images, texts, torch.arange(3), torch.full((3,), -1))
    assert loss == 0 and accuracy == 0
    assert all((gradient == 0).all() for gradient in grad(loss, (images, texts)))


def test_accuracy_counts_the_own_text_among_true_negatives() -> None:
    ours = Alignment(8, 4, "clip")
    images = F.one_hot(torch.tensor([0, 1, 2, 2]), 4).float()
    texts = F.one_hot(torch.tensor([0, 0, 2, 2]), 4).float()
    ids = torch.arange(4)
    assert ours(images, texts, ids, ids)[1] == 0.5  # 1 is wrong, 3 finds the equal text of 2 first
    assert ours(images, texts, torch.tensor([0, 1, 2, 2]), ids)[1] == 0.75
    assert ours(images, texts, torch.tensor([0, 1, 2, 2]), torch.tensor([0, -1, 2, 3]))[1] == 1
