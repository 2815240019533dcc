"""The semantic loss of the image tokenizer: its targets, and which codes it trains."""

import math

import pytest
import torch

from multimodal.tokenizers.text import TextTokenizer
from multimodal.train.tokenizers.semantic import NO_TOKEN, REACH, CaptionTargets, SemanticLoss

CAPTIONS = ["red circle", "red square", "blue circle", "blue square", "red star"]


@pytest.fixture(scope="module")
def text_tokenizer() -> TextTokenizer:
    return TextTokenizer.train([" red blue circle square star"] * 9, 300)


def loss(text_tokenizer: TextTokenizer, channels: int = 4) -> SemanticLoss:
    torch.manual_seed(0)
    return SemanticLoss(text_tokenizer, channels, width=32)


def token_of(text_tokenizer: TextTokenizer, word: str) -> int:
    (token,) = text_tokenizer.encode(word)
    return token


def test_a_token_of_every_caption_has_no_weight(text_tokenizer: TextTokenizer) -> None:
    semantic = loss(text_tokenizer)
    semantic.count([" red circle", " red square", " red star"])
    red, star = (token_of(text_tokenizer, word) for word in (" red", " star"))
    assert semantic.rarity[red] == 0
    assert semantic.rarity[star] == pytest.approx(1)
    targets = semantic.targets(["a"], [{"captions": [" red star", " red circle"]}], [0])
    circle = token_of(text_tokenizer, " circle")
    assert targets.bag[0].nonzero().flatten().tolist() == sorted([star, circle])
    assert targets.bag.sum().item() == pytest.approx(1)


def test_the_caption_is_one_of_the_sample_and_padded(text_tokenizer: TextTokenizer) -> None:
    semantic = loss(text_tokenizer)
    captions = [" red star", " blue circle"]
    targets = semantic.targets(["a", "b"], [{"captions": captions}] * 2, [1, 2])
    assert targets.caption.shape == (2, 16)
    for row in targets.caption:
        ids = row[row != NO_TOKEN].tolist()
        assert text_tokenizer.decode(ids) in captions and (row[len(ids) :] == NO_TOKEN).all()


def test_a_sample_without_a_text_is_refused_by_name(text_tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="sample x17 has no captions and no questions"):
        loss(text_tokenizer).targets(["x17"], [{}], [0])


def test_neighbours_leave_out_the_token_itself(text_tokenizer: TextTokenizer) -> None:
    semantic = loss(text_tokenizer)
    none = len(text_tokenizer)
    caption = torch.tensor([[5, 6, 7, NO_TOKEN]])
    assert REACH == 2
    assert semantic._neighbours(caption)[0].tolist() == [
        [none, none, 6, 7],
        [none, 5, 7, none],
        [5, 6, none, none],
        [6, 7, none, none],
    ]


def test_the_codes_that_predict_the_neighbours_are_trained(text_tokenizer: TextTokenizer) -> None:
    """One code predicts "red", one "blue". The caption "red star" trains "star" in the first."""
    semantic = loss(text_tokenizer)
    red, blue, star = (token_of(text_tokenizer, word) for word in (" red", " blue", " star"))
    scores = torch.zeros(1, 2, len(text_tokenizer))
    scores[0, 0, red] = scores[0, 1, blue] = 10.0
    scores.requires_grad_()
    semantic.scores = torch.nn.Sequential(_Fixed(scores))
    caption = torch.tensor([[red, star]])
    parts = semantic(
        torch.zeros(1, 1, 2, 4), CaptionTargets(torch.zeros_like(scores[:, 0]), caption)
    )
    (gradient,) = torch.autograd.grad(parts["context"], scores)
    # The second code gets a gradient only from predicting "red", where "star" is wrong.
    assert gradient[0, 0, star] < -0.1 and gradient[0, 1, star] > 0


class _Fixed(torch.nn.Module):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.value


def test_it_learns_only_what_the_codes_contain(
    text_tokenizer: TextTokenizer,
) -> None:
    """Colour and shape from vectors that hold both. Only word statistics from empty vectors."""
    records = [{"captions": [f" {caption}"]} for caption in CAPTIONS]
    vectors = torch.eye(5)[:, None, None, :].expand(-1, 2, 2, -1)

    def best(vectors: torch.Tensor) -> tuple[float, float]:
        semantic = loss(text_tokenizer, channels=5)
        targets = semantic.targets(list("abcde"), records, [0] * 5)
        optimizer = torch.optim.AdamW(semantic.parameters(), lr=1e-2)
        for _ in range(100):
            parts = semantic(vectors, targets)
            (parts["words"] + parts["context"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return parts["words"].item(), parts["context"].item()

    bag, context = best(vectors)
    assert bag < math.log(2) + 0.05  # the minimum for two tokens of equal share
    assert context < 0.05
    blind_bag, blind_context = best(torch.zeros_like(vectors))
    assert blind_bag > 1.4 and blind_context > 0.5


def test_a_document_of_images_alone_teaches_nothing(text_tokenizer: TextTokenizer) -> None:
    semantic = loss(text_tokenizer, channels=4)
    silent, told = {"content": [{"image": "0.png"}]}, {"captions": ["a red star"]}
    vectors = torch.randn(2, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    alone = semantic(vectors[:1], semantic.targets(["a"], [silent], [0]))
    assert alone["words"] == 0 and alone["context"] == 0
    one = semantic(vectors[1:], semantic.targets(["b"], [told], [0]))
    both = semantic(vectors, semantic.targets(["a", "b"], [silent, told], [0, 0]))
    assert torch.allclose(both["context"], one["context"])
    with pytest.raises(ValueError, match="sample c"):
        semantic.targets(["c"], [{"captions": []}], [0])
