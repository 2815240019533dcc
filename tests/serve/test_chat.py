"""The openai SDK talks to /v1/chat/completions."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

ASK = [{"role": "user", "content": "what is in the snow?"}]


def picture(seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def about(image: Image.Image, text: str = "") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    parts.append({"type": "image_url", "image_url": {"url": data_uri(image)}})
    return [{"role": "user", "content": parts}]


def test_models_and_health(server: Any) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_that_of_the_model_itself(server: Any, temperature: float) -> None:
    """Captions, questions about images, questions alone."""
    model, image = server.model, picture()
    options: dict[str, Any] = {"max_tokens": 12, "temperature": temperature, "seed": 5}
    for messages, expected in (
        (about(image), model.caption(image, **options)),
        (about(image, "where?"), model.answer(image, "where?", **options)),
        (ASK, model.generate(["Question: what is in the snow? Answer:"], **options)[0]),
    ):
        answer = server.client().chat.completions.create(model="tiny", messages=messages, **options)
        assert answer.choices[0].message.content == expected
        assert answer.usage.total_tokens > answer.usage.completion_tokens == 12
        assert answer.choices[0].finish_reason == "length"


def test_a_stream_is_the_same_text(server: Any) -> None:
    client = server.client()
    how: dict[str, Any] = {"model": "tiny", "messages": about(picture(), "where?"), "n": 2,
        "temperature": 1.0, "seed": 3, "max_tokens": 20}  # fmt: skip
    whole = client.chat.completions.create(**how)
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    pieces = 0
    for chunk in client.chat.completions.create(
        **how, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            pieces += bool(choice.delta.content)
            reasons[choice.index] = choice.finish_reason
    assert [choice.message.content for choice in whole.choices] == list(texts.values())
    assert texts[0] != texts[1] and pieces > 4
    assert reasons == {0: "length", 1: "length"} and usage == whole.usage
