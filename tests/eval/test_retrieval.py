"""Recall by hand on small sets."""

import pytest
import torch
from torch.nn.functional import normalize

from multimodal.eval.metrics.retrieval import score_retrieval


def test_own_and_others() -> None:
    images = torch.eye(3)
    texts = normalize(torch.tensor([[1, 0.1, 0], [0.2, 0, 1], [0, 1, 0.5], [0, 0.3, 1.0]]), dim=-1)
    owners = [0, 0, 1, 2]  # the second text is nearer to the third image than to its own
    found = score_retrieval(images, texts, owners, ks=(1, 2, 3))
    assert found["text_to_image@1"] == 0.75 and found["text_to_image@2"] == 1
    # Image 2: the nearest text is that of image 0 or its own?
    order = (texts @ images[2]).argsort(descending=True).tolist()
    assert order[:2] == [1, 3]
    assert found["image_to_text@1"] == pytest.approx(2 / 3)
    assert found["image_to_text@2"] == 1


def test_chance_on_random_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (normalize(torch.randn(n, 16, generator=generator), dim=-1) for n in (500, 500))
    found = score_retrieval(images, texts, range(500), ks=(10,))
    assert found["text_to_image@10"] == pytest.approx(0.02, abs=0.02)
    assert found["image_to_text@10"] == pytest.approx(0.02, abs=0.02)


def test_a_model_that_says_the_same_of_all_finds_nothing() -> None:
    rows = torch.ones(20, 4) / 2
    assert set(score_retrieval(rows, rows, range(20), ks=(1, 10)).values()) == {0.0}


@pytest.mark.parametrize("owners", [[0, 1], [0, 0, 1], [0, 1, 3]])
def test_an_image_without_a_text_is_an_error(owners: list[int]) -> None:
    with pytest.raises(ValueError, match="each needs one of its own"):
        score_retrieval(torch.eye(3), torch.eye(3), owners)
