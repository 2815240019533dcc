"""Weights of open_clip in a file are fed pixels as they were in training."""

import open_clip
import pytest
from open_clip.pretrained import get_pretrained_cfg

from multimodal.tokenizers.encoder import _normalisation

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
