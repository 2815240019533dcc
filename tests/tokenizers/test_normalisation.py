"""Weights of open_clip compute what they did in training: the same pixels and activations."""

from contextlib import nullcontext
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.pretrained import get_pretrained_cfg

from multimodal.tokenizers.encoder import Encoder, _check_activation, _normalisation

HALF = [0.5, 0.5, 0.5]


def test_a_file_has_the_normalisation_of_its_tag_or_of_all_tags() -> None:
    assert _normalisation("ViT-B-16-SigLIP", "") == (HALF, HALF)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    assert _normalisation("ViT-B-32", "openai") == (list(mean), list(std))
    with pytest.raises(ValueError, match="ViT-B-32/laion: no such tag; tags: openai, "):
        _normalisation("ViT-B-32", "laion")


def test_a_file_without_a_tag_is_refused_where_tags_differ() -> None:
    refused = set()
    for model in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(model)
        means = {tuple(get_pretrained_cfg(model, tag)["mean"]) for tag in tags}
        if len(means) > 1:
            with pytest.raises(ValueError, match="/TAG=FILE; tags: "):
                _normalisation(model, "")
            refused.add(model)
            assert _normalisation(model, tags[0])
    assert len(refused) < len(open_clip.list_models()) / 2


@pytest.mark.parametrize("weights", ["/openai", "/laion400m_e32", "/metaclip_400m", ""])
def test_weights_that_need_quick_gelu_are_refused_where_there_is_gelu(
    weights: str, tmp_path: Path
) -> None:
    (tmp_path / "vit_b_32.safetensors").touch()
    expected = "need QuickGELU: name them open_clip:ViT-B-32-quickgelu/TAG"
    with pytest.raises(ValueError, match=expected):
        Encoder(f"open_clip:ViT-B-32{weights}={tmp_path / 'vit_b_32.safetensors'}")
    if weights:
        with pytest.raises(ValueError, match=expected):
            Encoder(f"open_clip:ViT-B-32{weights}")


@pytest.mark.parametrize("model", ["RN50", "ViT-B-32", "ViT-B-32-quickgelu"])
def test_only_a_tower_with_gelu_refuses_them(model: str) -> None:
    with torch.device("meta"):
        tower = open_clip.create_model(model, device=torch.device("meta")).visual
    has_gelu = any(isinstance(part, torch.nn.GELU) for part in tower.modules())
    with pytest.raises(ValueError, match="QuickGELU") if has_gelu else nullcontext():
        _check_activation(model, "openai")
    _check_activation("ViT-B-32", "laion2b_s34b_b79k")
    _check_activation("ViT-B-16-SigLIP", "")
