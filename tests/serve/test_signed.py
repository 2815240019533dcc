"""A server with a signer: every picture that it draws has credentials, whatever was asked."""

import base64
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from multimodal.origin.credentials import find_credentials, make_signer

PROMPT = "a red circle"


def test_all_that_a_server_draws_is_signed(
    serving: Callable[..., Any], tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    signer = make_signer(tmp_path / "keys")
    with serving(tiny_model(noise=0.1, tied=False), signer=signer) as server:
        client, model = server.client(), server.model.fingerprint

        def check(text: str, prompt: str, source: str, mime: str = "image/png") -> None:
            found = find_credentials(base64.b64decode(text), mime)
            digest = hashlib.sha256(prompt.encode()).hexdigest()
            assert found.state == "valid" and found.source_types == (source,)
            assert found.drawing == {"model": model, "prompt_sha256": digest}

        drawn = "trainedAlgorithmicMedia"
        asked = {"model": "tiny", "prompt": PROMPT}
        for kind in ("png", "jpeg", "webp"):
            made = client.images.generate(**asked, n=2, output_format=kind)
            for image in made.data:
                check(image.b64_json, PROMPT, drawn, f"image/{kind}")
        events = list(client.images.generate(**asked, stream=True, partial_images=2))
        assert len(events) > 1
        for event in events:
            check(event.b64_json, PROMPT, drawn)
        picture, mask = io.BytesIO(), io.BytesIO()
        Image.new("RGB", (32, 32), "blue").save(picture, "PNG")
        Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(mask, "PNG")
        edited = client.images.edit(
            **asked, image=("a.png", picture.getvalue()), mask=("m.png", mask.getvalue())
        )
        check(edited.data[0].b64_json, PROMPT, "compositeWithTrainedAlgorithmicMedia")
        chat = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": PROMPT}],
            extra_body={"modalities": ["image"], "template": "none"},
        )
        (image,) = chat.choices[0].message.images
        check(image["image_url"]["url"].partition("base64,")[2], PROMPT, drawn)
