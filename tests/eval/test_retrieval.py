"""Recall of retrieval, compared with values computed by hand on small sets."""

import pytest
import torch
from torch.nn.functional import normalize

from multimodal.eval.metrics.retrieval import count_ahead, score_retrieval


def test_recall_in_both_directions() -> None:
    images = torch.eye(3)
    texts = normalize(torch.tensor([[1, 0.1, 0], [0.2, 0, 1], [0, 1, 0.5], [0, 0.3, 1.0]]), dim=-1)
    image_of_text = [0, 0, 1, 2]  # the second text is nearer to image 2 than to image 0
    ahead_of_image, ahead_of_text = count_ahead(images, texts, image_of_text)
    assert ahead_of_image.tolist() == [0, 1, 0, 0] and ahead_of_text.tolist() == [0, 0, 1]
    scores = score_retrieval(images, texts, image_of_text, ks=(1, 2, 3))
    assert scores["text_to_image@1"] == 0.75 and scores["text_to_image@2"] == 1
    # The text nearest to image 2 is a text of image 0.
    order = (texts @ images[2]).argsort(descending=True).tolist()
    assert order[:2] == [1, 3]
    assert scores["image_to_text@1"] == pytest.approx(2 / 3)
    assert scores["image_to_text@2"] == 1


def test_random_embeddings_give_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (normalize(torch.randn(n, 16, generator=generator), dim=-1) for n in (500, 500))
    scores = score_retrieval(images, texts, range(500), ks=(10,))
    assert scores["text_to_image@10"] == pytest.approx(0.02, abs=0.02)
    assert scores["image_to_text@10"] == pytest.approx(0.02, abs=0.02)


def test_constant_embeddings_have_a_recall_of_zero() -> None:
    rows = torch.ones(20, 4) / 2
    assert set(score_retrieval(rows, rows, range(20), ks=(1, 10)).values()) == {0.0}


@pytest.mark.parametrize("image_of_text", [[0, 1], [0, 0, 1], [0, 1, 3]])
def test_an_image_without_a_text_is_an_error(image_of_text: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one text for each image"):
        score_retrieval(torch.eye(3), torch.eye(3), image_of_text)
