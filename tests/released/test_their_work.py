"""What users do with an imported model: answers, evaluation, fine-tuning, a server."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from multimodal.api import load
from multimodal.cli import main
from multimodal.data.images import to_image
from multimodal.scenes.dataset import write_scenes
from tests.released.theirs import Pair, chameleon, emu3, images
from tests.serve.conftest import running

PAIRS: dict[str, Callable[..., Pair]] = {"chameleon": chameleon, "emu3": emu3}


@pytest.fixture(scope="module", params=PAIRS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
    sentences: tuple[str, ...],
) -> Pair:  # fmt: skip
    return PAIRS[request.param](tmp_path_factory.mktemp("released"), sentences)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 24, 0, 32)
    return folder


def test_it_is_fine_tuned_by_the_command_line_and_evaluated(
    pair: Pair, scenes: Path, tmp_path: Path
) -> None:
    ours = str(pair.out)
    module = {
        "text_tokenizer": ours, "image_tokenizer": ours, "size": ours, "row_length": 192,
        "warmup_steps": 0, "captions_in_validation": 0, "drawings_in_validation": 0,
        "learning_rate": 2e-3,
    }  # fmt: skip
    config = {
        "model": {"class_path": "multimodal.train.joint.JointModule", "init_args": module},
        "data": {"folders": [str(scenes)], "global_batch_size": 8, "workers": 0},
        "trainer": {"max_steps": 8, "accelerator": "cpu", "enable_progress_bar": False,
                    "limit_val_batches": 0},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run = ["fit", "--config", str(tmp_path / "run.yaml"), "--init_from", ours]
    assert main([*run, "--output", str(tmp_path / "run")]) == 0
    tuned = load(tmp_path / "run/model")
    before, after = (m.network.transformer.state_dict() for m in (load(ours), tuned))
    assert before.keys() == after.keys()
    moved = [float((after[name] - before[name]).abs().max()) for name in before]
    assert all(0 < change < 0.1 for change in moved), "it began where the imported model was"
    likelihoods = []
    for model in (ours, str(tmp_path / "run/model")):
        results = tmp_path / "results.json"
        line = ["eval", "likelihood", "--model", model, "--data", str(scenes), "--split", "train"]
        assert main([*line, "--output", str(results)]) == 0
        scores = json.loads(results.read_text("utf-8"))["results"][0]["scores"]
        likelihoods.append(scores["caption_bits_per_byte"]["value"])
    assert likelihoods[1] < likelihoods[0]


def test_it_answers_and_is_served(pair: Pair) -> None:
    model = load(pair.out)
    picture = to_image(images(1)[0])
    answers = model.answer(picture, ["What is it?", "How many?"], max_tokens=4)
    assert len(answers) == 2 and any(answers)
    assert model.answer(picture, "Is it red?", choices=["yes", "no"]) in ("yes", "no")
    caption = model.caption(picture, max_tokens=4)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content: Any = [{"type": "image_url", "image_url": {"url": url}}]
    with running(model) as server:
        client = server.client()
        ask = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
        reply = client.chat.completions.create(**ask, max_tokens=4)
        assert reply.choices[0].message.content.strip() == caption.strip()
        rows = client.embeddings.create(model="tiny", input=["a red bus", "a dog"]).data
        assert len(rows) == 2 and torch.tensor(rows[0].embedding).norm() > 0.99
        if model.image_tokenizer.can_draw:
            drawn = client.images.generate(model="tiny", prompt="a red bus", extra_body={"seed": 1})
            data = base64.b64decode(drawn.data[0].b64_json)
            assert Image.open(io.BytesIO(data)).size == model.draw("a red bus", seed=1)[0].size
