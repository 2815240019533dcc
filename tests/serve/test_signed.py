"""A server with a signer: every picture that it draws has credentials, whatever was asked."""

import base64
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from multimodal.api import Model
from multimodal.origin.credentials import find_credentials, make_signer

PROMPT = "a red circle"
DRAWN = "trainedAlgorithmicMedia"


def check(
    text: str, model: Model, prompt: str = PROMPT, source: str = DRAWN, mime: str = "image/png"
) -> None:
    """Check what a picture, in base64 or a data URI, says of itself."""
    found = find_credentials(base64.b64decode(text.rpartition("base64,")[2]), mime)
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    assert found.state == "valid" and found.source_types == (source,)
    assert found.drawing == {"model": model.fingerprint, "prompt_sha256": digest}


def chat_images(server: Any, stream: bool = False) -> Iterator[str]:
    """The pictures of a chat, as data URIs."""
    made = server.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": PROMPT}],
        extra_body={"modalities": ["image"], "template": "none"},
        stream=stream,
    )
    for chunk in made if stream else [made]:
        for choice in chunk.choices:
            said = choice.delta if stream else choice.message
            for image in (said.model_extra or {}).get("images", ()):
                yield image["image_url"]["url"]


def test_all_that_a_server_draws_is_signed(
    serving: Callable[..., Any], tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    signer = make_signer(tmp_path / "keys")
    with serving(tiny_model(noise=0.1, tied=False), signer=signer) as server:
        client, model = server.client(), server.model
        asked = {"model": "tiny", "prompt": PROMPT}
        for kind in ("png", "jpeg", "webp"):
            made = client.images.generate(**asked, n=2, output_format=kind)
            for image in made.data:
                check(image.b64_json, model, mime=f"image/{kind}")
        events = list(client.images.generate(**asked, stream=True, partial_images=2))
        assert len(events) > 1
        for event in events:
            check(event.b64_json, model)
        picture, mask = io.BytesIO(), io.BytesIO()
        Image.new("RGB", (32, 32), "blue").save(picture, "PNG")
        Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(mask, "PNG")
        edited = client.images.edit(
            **asked, image=("a.png", picture.getvalue()), mask=("m.png", mask.getvalue())
        )
        check(edited.data[0].b64_json, model, source="compositeWithTrainedAlgorithmicMedia")
        for stream in (False, True):
            (image,) = chat_images(server, stream)
            check(image, model)


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_fallback_draws_is_said_to_be_of_it(
    serving: Callable[..., Any],
    tiny_model: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    def fails(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("no memory")

    broken, spare = (tiny_model(noise=0.1, tied=False, seed=seed) for seed in (0, 1))
    monkeypatch.setattr(broken.network.transformer.embed_tokens, "forward", fails)
    with serving(broken, ("spare", spare), make_signer(tmp_path / "keys")) as server:
        (image,) = chat_images(server, stream)
    assert broken.fingerprint != spare.fingerprint
    check(image, spare)
