"""Replies to many prompts are those of each prompt alone, and streams are the same in pieces."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal.api import Model
from multimodal.cli import main
from multimodal.inference.batch import DecodeBatch
from multimodal.inference.mixed import Output, Preview, Reply, prompt_ids
from multimodal.inference.text import generate_ids
from multimodal.options import TextOptions
from multimodal.tokenizers.text import ChatFormat, TextTokenizer

Make = Callable[..., Model]


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Model:
    return tiny_model(noise=0.1)


@pytest.fixture(scope="module")
def eager(tiny_model: Make) -> Model:
    """A model that often draws in the middle of a text, and sometimes ends."""
    eager = tiny_model(seed=3, noise=0.1, tied=False)
    v, logits = eager.vocabulary, eager.network.transformer.logits

    def with_images(hidden: torch.Tensor, *ids: slice) -> torch.Tensor:
        scores = logits(hidden, *ids)
        if scores.shape[-1] > v.boi:  # else only codes can be chosen
            scores[..., v.boi] += 6
            scores[..., v.eos] += 3
        return scores

    eager.network.transformer.logits = with_images  # type: ignore[method-assign]
    return eager


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def prompts() -> list[list[str | Image.Image]]:
    return [["a red"], [picture(0), "is it"], [picture(1), "a", picture(2)], [picture(3)]]


def contents_of(parts: Sequence[Output]) -> list[str | bytes]:
    assert not any(isinstance(part, Preview) for part in parts)
    return [part if isinstance(part, str) else part.tobytes() for part in parts]  # type: ignore[union-attr]


def same(a: Reply | ValueError, b: Reply | ValueError) -> bool:
    assert isinstance(a, Reply) and isinstance(b, Reply)
    names = ("prompt_tokens", "text_tokens", "image_tokens", "ended")
    assert a.log_probability == pytest.approx(b.log_probability, abs=1e-2)
    counts = all(getattr(a, name) == getattr(b, name) for name in names)
    return counts and contents_of(a.parts) == contents_of(b.parts)


@pytest.mark.parametrize("output", ["text", "image", "any"])
def test_a_batch_is_each_prompt_alone(eager: Model, output: str) -> None:
    options = {"output": output, "max_tokens": 12}
    together = eager.reply(prompts(), **options)  # type: ignore[arg-type]
    for prompt, reply in zip(prompts(), together, strict=True):
        (alone,) = eager.reply([prompt], **options)  # type: ignore[arg-type]
        assert same(reply, alone)
        assert isinstance(reply, Reply) and reply.text_tokens <= 12
        images = [part for part in reply.parts if isinstance(part, Image.Image)]
        assert reply.image_tokens == 16 * len(images)
        assert all(image.size == (32, 32) for image in images)
    kinds = {type(part) for reply in together if isinstance(reply, Reply) for part in reply.parts}
    assert (Image.Image in kinds, str in kinds) == (output != "text", output != "image")


def test_random_numbers_belong_to_the_prompt_and_not_to_the_batch(eager: Model) -> None:
    hot = {"temperature": 1.0, "seed": 4, "max_tokens": 12}
    together = eager.reply(prompts(), output="any", **hot)  # type: ignore[arg-type]
    again = eager.reply(prompts()[:2], output="any", **hot)  # type: ignore[arg-type]
    assert all(same(a, b) for a, b in zip(together, again, strict=False))
    other = eager.reply(prompts(), output="any", **{**hot, "seed": 5})  # type: ignore[arg-type]
    assert not all(same_texts(a, b) for a, b in zip(together, other, strict=True))


def same_texts(a: Reply | ValueError, b: Reply | ValueError) -> bool:
    assert isinstance(a, Reply) and isinstance(b, Reply)
    return [p for p in a.parts if isinstance(p, str)] == [p for p in b.parts if isinstance(p, str)]


def test_an_error_of_one_prompt_leaves_the_others_alone(model: Model, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"?")
    rows = [["a red"], [], [tmp_path / "broken.png"], ["word " * 9_999], [picture(0)]]
    replies = model.reply(rows, max_tokens=9)  # type: ignore[arg-type]
    errors = [str(reply) if isinstance(reply, ValueError) else "" for reply in replies]
    assert "empty" in errors[1] and "broken.png" in errors[2] and "reads at most" in errors[3]
    good = model.reply([rows[0], rows[4]], max_tokens=9)  # type: ignore[arg-type]
    assert same(replies[0], good[0]) and same(replies[4], good[1])
    assert model.reply([]) == []


def test_a_stream_is_the_same_in_pieces(eager: Model) -> None:
    for prompt in prompts():
        pieces = list(eager.stream(prompt, output="any", max_tokens=12))
        parts = eager.generate(prompt, output="any", max_tokens=12)
        joined: list[str | Image.Image] = []
        for piece in pieces:
            if isinstance(piece, str) and joined and isinstance(joined[-1], str):
                joined[-1] += piece
            else:
                assert not isinstance(piece, Preview)
                joined.append(piece)
        stripped = [p.strip() if isinstance(p, str) else p for p in joined]
        assert contents_of(stripped) == contents_of(parts)
        assert not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces[:-1] if isinstance(p, str))


@torch.inference_mode()
def test_the_log_probability_is_the_sum_over_the_tokens(model: Model) -> None:
    (reply,) = model.reply([["a red"]], max_tokens=7)
    assert isinstance(reply, Reply)
    v, total = model.vocabulary, 0.0
    batch = DecodeBatch(model.network, [prompt_ids(model, ["a red"])], 7)
    for _ in range(reply.text_tokens + (reply.ended == "end")):
        allowed = torch.cat([batch.logits()[0, : v.text_size], batch.logits()[0, v.eos :][:1]])
        best = int(allowed.argmax())
        total += float(allowed.log_softmax(-1)[best])
        batch.step(torch.tensor([v.eos if best == v.text_size else best]))
    assert reply.log_probability == pytest.approx(total, abs=1e-3)


def test_a_reply_and_its_stream_end_before_a_stop(model: Model) -> None:
    (whole,) = model.reply([["a red"]], max_tokens=24)
    assert isinstance(whole, Reply) and isinstance(whole.parts[0], str)
    text = whole.parts[0]
    stop = [text[6:9], "nowhere"]
    (reply,) = model.reply([["a red"]], max_tokens=24, stop=stop)
    assert isinstance(reply, Reply) and reply.ended == "stop"
    assert reply.parts == [text[: text.find(stop[0])].strip()]
    assert reply.text_tokens < whole.text_tokens
    # No piece holds the stop text, not even its beginning.
    pieces = list(model.stream(["a red"], max_tokens=24, stop=stop))
    assert "".join(map(str, pieces)).strip() == reply.parts[0]


def test_a_stream_has_previews_of_an_image(eager: Model) -> None:
    options = {"output": "image", "temperature": 1.0, "seed": 3}
    plain = list(eager.stream(["a red"], **options))  # type: ignore[arg-type]
    *previews, image = eager.stream(["a red"], previews=True, **options)  # type: ignore[arg-type]
    assert isinstance(image, Image.Image) and [image] == plain
    assert [p.share for p in previews if isinstance(p, Preview)] == [0.25, 0.5, 0.75]
    for number, preview in enumerate(previews, start=1):
        assert isinstance(preview, Preview)
        pixels = np.asarray(preview.image)
        assert (pixels[8 * number :] == 128).all() and (pixels[: 8 * number] != 128).any()


@pytest.mark.parametrize(("method", "calls"), [("causal", 4), ("masked", 6)])
def test_drawings_have_previews(model: Model, method: str, calls: int) -> None:
    seen: list[tuple[list[int], list[Image.Image]]] = []
    options: Any = {"method": method, "steps": 6, "seed": 1}

    def on_preview(numbers: Sequence[int], images: list[Image.Image]) -> None:
        seen.append((list(numbers), images))

    drawn = model.draw("a red bus", 3, on_preview=on_preview, **options)
    assert drawn == model.draw("a red bus", 3, **options)
    assert [numbers for numbers, _ in seen] == [[0, 1, 2]] * calls
    assert seen[-1][1] == drawn and seen[0][1] != drawn
    seen.clear()
    texts = ["a red bus", "two dogs", "a red bus"]
    several = sum(model.draw(texts, 2, **options), [])
    assert sum(model.draw(texts, 2, on_preview=on_preview, **options), []) == several
    last = dict(pair for places, images in seen for pair in zip(places, images, strict=True))
    assert [last[place] for place in range(6)] == several and several[:2] == several[4:]
    with pytest.raises(ValueError, match="nothing to see before the end"):
        model.draw("a red bus", candidates=2, on_preview=lambda n, images: None)


def test_messages_are_read_in_the_chat_template(
    tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(seed=5, noise=0.1, tied=False)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    end = next(token for token, number in model.text_tokenizer.vocabulary().items() if number == 40)
    text = model.text_tokenizer.to_json()
    model.text_tokenizer = TextTokenizer.from_json(text, ChatFormat(template, end))
    said = ["a red bus", "yes", "why"]
    messages = [
        {"role": role, "content": content}
        for role, content in zip(("user", "assistant", "user"), said, strict=True)
    ]
    ids = model.text_tokenizer.encode("user: a red bus\nassistant: yes\nuser: why\nassistant: ")
    assert prompt_ids(model, messages) == ids
    options = TextOptions(max_tokens=12, temperature=1.0, seed=4)
    (expected,) = generate_ids(model, [ids], options)
    given = {"max_tokens": 12, "temperature": 1.0, "seed": 4}
    answer = model.text_tokenizer.decode(expected).strip()
    assert answer and model.generate(messages, **given) == [answer]
    assert "".join(str(part) for part in model.stream(messages, **given)).strip() == answer
    (answered, refused) = model.reply([messages, [*messages[:1], "a bus"]], **given)
    assert "not both" in str(refused) and isinstance(answered, Reply) and answered.parts == [answer]
    (wrong,) = model.reply([[{"role": "user", "content": ["a"]}]])
    assert str(wrong) == "message 0: expected role and content, both texts"
    model.save(tmp_path / "talks")
    texts = [part for text in said for part in ("--text", text)]
    how = ["--max-tokens", "12", "--temperature", "1", "--seed", "4"]
    assert main(["generate", "--model", str(tmp_path / "talks"), "--chat", *texts, *how]) == 0
    assert capsys.readouterr().out == answer + "\n"
