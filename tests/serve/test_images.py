"""The openai SDK draws, edits and embeds."""

import asyncio
import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multimodal.serve.endpoints import drawings, replies
from tests.serve.test_chat import about, picture


def opened(data: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data or "")))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"guidance_scale": 2.0}, {"guidance_scale": 2.0}),
        ({"steps": 4}, {"method": "masked", "steps": 4}),
        ({"negative_prompt": "two dogs", "temperature": 1.0},
         {"negative": "two dogs", "temperature": 1.0}),
    ],
)  # fmt: skip
def test_drawings_are_those_of_the_model_itself(
    server: Any, asked: dict[str, Any], options: dict[str, Any]
) -> None:
    drawn = server.client().images.generate(
        model="tiny", prompt="a red bus", n=2, extra_body={"seed": 3, **asked}
    )
    expected = server.model.draw("a red bus", 2, seed=3, **options)
    assert len(drawn.data) == 2
    for one, image in zip(drawn.data, expected, strict=True):
        assert opened(one.b64_json).tobytes() == image.tobytes()
    assert drawn.usage.output_tokens == 2 * 16


def test_a_drawing_is_seen_as_it_grows(server: Any) -> None:
    how: dict[str, Any] = {"model": "tiny", "prompt": "a red bus", "extra_body": {"seed": 3}}
    events = list(server.client().images.generate(**how, stream=True, partial_images=2))
    *partial, last = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert [event.partial_image_index for event in partial] == [0, 1]
    whole = server.client().images.generate(**how)
    assert last.type == "image_generation.completed"
    assert last.b64_json == whole.data[0].b64_json != partial[1].b64_json
    assert last.usage.output_tokens == 16


def test_masked_drawings_and_edits_are_seen_as_they_grow(server: Any) -> None:
    client, before = server.client(), picture().resize((40, 40))
    image = before.copy()
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 20, 20))
    image.putalpha(alpha)
    how: dict[str, Any] = {"model": "tiny", "prompt": "a red bus"}
    how["extra_body"] = {"seed": 3, "steps": 4}
    whole = client.images.generate(**how)
    *partial, last = client.images.generate(**how, stream=True, partial_images=2)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert last.b64_json == whole.data[0].b64_json != partial[0].b64_json
    how["image"] = ("a.png", png(image))
    whole = client.images.edit(**how)
    *partial, last = client.images.edit(**how, stream=True, partial_images=2)
    assert [event.type for event in partial] == ["image_edit.partial_image"] * 2
    assert last.b64_json == whole.data[0].b64_json
    for event in partial:
        pixels = np.asarray(opened(event.b64_json))
        assert (pixels[20:] == np.asarray(before)[20:]).all()
        assert (pixels[:20, :20] != np.asarray(before)[:20, :20]).any()


def test_pictures_are_sent_and_noted_in_threads(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stream, too: what takes long keeps no other request waiting."""
    called = dict[str, list[bool]]()

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def noted(*arguments: Any, **more: Any) -> Any:
            try:
                found = bool(asyncio.get_running_loop())
            except RuntimeError:
                found = False
            called.setdefault(name, []).append(found)
            return function(*arguments, **more)

        monkeypatch.setattr(owner, name, noted)

    watch(drawings.Look, "send")
    watch(drawings, "digests_of")
    watch(replies, "to_base64")
    how: dict[str, Any] = {"model": "tiny", "prompt": "a red bus", "extra_body": {"seed": 3}}
    events = list(server.client().images.generate(**how, stream=True, partial_images=2))
    edited(server, 0)
    assert len(called["send"]) == len(events) + 1 == 4
    for stream in (False, True):
        asked = {"model": "tiny", "messages": about(picture()), "modalities": ["image"]}
        server.client().post("/chat/completions", body={**asked, "stream": stream}, cast_to=object)
    assert len(called["to_base64"]) == 2
    assert not any(called["send"] + called["digests_of"] + called["to_base64"])


def edited(server: Any, number: int) -> str:
    """A part of a picture drawn anew, in base64."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (40, 40 + number, 3), dtype=np.uint8))
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 20, 20))
    image.putalpha(alpha)
    how = {"seed": number, "steps": 4}
    made = server.client().images.edit(
        image=("a.png", png(image)), model="tiny", prompt="a red bus", extra_body=how
    )
    return str(made.data[0].b64_json)


def answered(server: Any, number: int) -> str:
    """A question about a picture, asked as a stream where the number is odd."""
    made = server.client().chat.completions.create(
        model="tiny", messages=about(picture(number), "where?"), temperature=1.0, seed=number,
        max_tokens=12, stream=bool(number % 2),
    )  # fmt: skip
    if not number % 2:
        return str(made.choices[0].message.content)
    return "".join(chunk.choices[0].delta.content or "" for chunk in made)


def streamed(server: Any, number: int) -> str:
    """A drawing and its previews, in base64."""
    events = server.client().images.generate(
        model="tiny", prompt="two dogs", stream=True, partial_images=number % 3,
        extra_body={"seed": number},
    )  # fmt: skip
    return "\n".join(event.b64_json for event in events)


def test_same_seed_same_bytes_of_edits_picture_prompts_and_streams(server: Any) -> None:
    """Whatever else is asked at the same time (texts and drawings: test_scheduler.py)."""
    work = [(ask, number) for number in range(4) for ask in (edited, answered, streamed)]
    alone = [ask(server, number) for ask, number in work]
    with ThreadPoolExecutor(len(work)) as pool:
        together = list(pool.map(lambda each: each[0](server, each[1]), work))
    assert together == alone and len(set(alone)) == len(alone)


def test_a_drawing_in_another_size_and_format(server: Any) -> None:
    drawn = server.client().images.generate(
        model="tiny", prompt="a bus", size="64x48", output_format="webp"
    )
    image = opened(drawn.data[0].b64_json)
    assert image.size == (64, 48) and image.format == "WEBP" and drawn.output_format == "webp"


def test_what_is_transparent_is_drawn_anew(server: Any) -> None:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 20, 20))
    mask = Image.new("RGBA", image.size)
    mask.putalpha(alpha)
    how: dict[str, Any] = {
        "model": "tiny", "prompt": "a red bus", "extra_body": {"seed": 3, "steps": 4}
    }  # fmt: skip
    edited = server.client().images.edit(
        image=("a.png", png(image)), mask=("m.png", png(mask)), **how
    )
    result = opened(edited.data[0].b64_json)
    expected = server.model.edit(image, (0, 0, 20, 20), "a red bus", seed=3, steps=4)
    assert result.tobytes() == expected.tobytes()
    pixels, before = np.asarray(result), np.asarray(image)
    assert (pixels[20:] == before[20:]).all() and (pixels[:20, :20] != before[:20, :20]).any()
    # An image that is transparent itself needs no mask.
    image.putalpha(alpha)
    again = server.client().images.edit(image=("a.png", png(image)), **how)
    assert (np.asarray(opened(again.data[0].b64_json))[20:] == before[20:]).all()


def test_a_mask_is_turned_as_its_image_is(server: Any) -> None:
    """Cameras write how they were held: here an image of 24 x 40 pixels that lies on its side."""
    rng = np.random.default_rng(2)
    image = Image.fromarray(rng.integers(0, 256, (40, 24, 3), dtype=np.uint8))
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 24, 10))
    image.putalpha(alpha)
    lying, exif, file = image.transpose(Image.Transpose.ROTATE_90), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    lying.save(file, "PNG", exif=exif)
    how: dict[str, Any] = {
        "model": "tiny",
        "prompt": "a bus",
        "extra_body": {"seed": 3, "steps": 4},
    }
    edited = server.client().images.edit(image=("a.png", file.getvalue()), **how)
    upright = server.client().images.edit(image=("a.png", png(image)), **how)
    assert edited.data[0].b64_json == upright.data[0].b64_json
    assert opened(edited.data[0].b64_json).size == (24, 40)


def test_embeddings_are_those_of_the_model_itself(server: Any) -> None:
    client, texts = server.client(), ["a red bus", "two dogs"]
    expected = server.model.embed(texts=texts).numpy()
    as_base64 = client.embeddings.create(model="tiny", input=texts)
    as_floats = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for found in (as_base64, as_floats):
        rows = np.array([item.embedding for item in found.data])
        assert rows == pytest.approx(expected, abs=1e-6)
    short = client.embeddings.create(model="tiny", input=texts[0], dimensions=8).data[0].embedding
    cut = expected[0, :8] / np.linalg.norm(expected[0, :8])
    assert short == pytest.approx(cut, abs=1e-6)
    assert as_base64.usage.prompt_tokens == as_floats.usage.total_tokens > 0


def test_an_image_and_its_text_share_a_space(server: Any) -> None:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    url = f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    answer = server.client().post("/embeddings", body=body, cast_to=object)
    expected = server.model.embed(image).numpy()
    assert answer["data"][0]["embedding"] == pytest.approx(expected, abs=1e-6)
