"""Tiny models with random weights, for all tests that need a model.

Tests are imported one by one (import-mode=importlib) and share code as fixtures. Code that the
processes of tests import, too, is in tests/launches.py. Code that is no fixture is in
tests/photos.py and tests/prompts.py.
"""

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from multimodal.devices import add_in_one_order

if TYPE_CHECKING:
    import torch
    from s3fs import S3FileSystem

    from multimodal.api import Model

add_in_one_order()  # as servers do
if "PYTEST_XDIST_WORKER" in os.environ:  # two workers with two threads each wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # nor does a compiler start more processes

# Worker processes are forked from a server. It imports once what each of them would import.
multiprocessing.set_forkserver_preload(["multimodal.train.cli"])

SENTENCES = (
    "a red bus in the snow",
    "two dogs run on the beach",
    "a small blue circle above a green square",
    "the cat sleeps on a yellow chair",
)


@pytest.fixture(scope="session")
def sentences() -> tuple[str, ...]:
    """The texts that the tiny text tokenizer was trained on."""
    return SENTENCES


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 14 files: 7 good images and 7 bad ones."""
    from tests.photos import photo_folder

    return photo_folder(tmp_path / "photos")


@pytest.fixture(scope="session")
def tiny_model() -> "Callable[..., Model]":
    """A factory: ``tiny_model(seed=0, noise=0.0, tied=True, experts=None, **objectives)``, in eval
    mode.

    It has 300 text ids, 64 codes, and 13 ids that fill its vocabulary up. An image has 32 x 32
    pixels and 16 codes. ``noise`` is the standard deviation of the noise on all weights of the
    transformer. All norms start at one, so without noise a wrong norm would not show.
    """
    import torch

    from multimodal.api import Model
    from multimodal.model.layers.transformer import Transformer
    from multimodal.model.objectives import ObjectivesConfig
    from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
    from multimodal.tokenizers.image import ImageTokenizer
    from multimodal.tokenizers.text import TextTokenizer

    text_tokenizer = TextTokenizer.train(SENTENCES * 4, 300)
    quantizer = {"name": "fsq", "levels": [4, 4, 4]}
    vit = {"name": "vit", "dim": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2}
    images = VQTokenizerConfig(32, "squash", 8, vit, quantizer)

    def make(
        seed: int = 0, noise: float = 0.0, tied: bool = True, experts: Any = None, **objectives: Any
    ) -> Model:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = ObjectivesConfig(**{"alignment_dim": 32, **objectives})
            image_tokenizer = ImageTokenizer(detail=VQTokenizer(images))
            model = Model.new("tiny", text_tokenizer, image_tokenizer, config, experts=experts)
            network = model.network
            if not tied:
                sizes = dataclasses.replace(model.config.transformer, tie_word_embeddings=False)
                network.config = dataclasses.replace(network.config, transformer=sizes)
                network.transformer = Transformer(sizes)
            with torch.no_grad():
                for weight in network.transformer.parameters():
                    weight += noise * torch.randn_like(weight)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_model_folder(
    tiny_model: "Callable[..., Model]", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of ``tiny_model(noise=0.1)``. Tests only read it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(noise=0.1).save(folder)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: the last bit of a sum depends on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> "Iterator[S3FileSystem]":
    """An empty bucket ``s3://bucket`` of a local server (moto), which s3 addresses mean now."""
    moto, s3fs = pytest.importorskip("moto.server"), pytest.importorskip("s3fs")
    from moto.moto_api._internal.models import moto_api_backend

    moto_api_backend.reset()  # its buckets belong to the process, not to a server
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        files.mkdir("bucket")
        yield files
    finally:
        server.stop()


@pytest.fixture(scope="session")
def device() -> "torch.device":
    """Of the tests that are marked gpu. TEST_DEVICE=cpu runs them on a CPU, to see that they work.

    Without a GPU they are skipped.
    """
    import torch

    name = os.environ.get("TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (TEST_DEVICE=cpu runs it on a CPU)")
    torch.backends.cudnn.allow_tf32 = False  # or codes of images would be others
    return torch.device(name)


TINY_TOKENIZER: dict[str, Any] = {
    "image_size": 16, "downsample": 8,
    "autoencoder": {"name": "vit", "dim": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2},
    "quantizer": {"name": "fsq", "levels": [5, 5]},
}  # fmt: skip


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, a text tokenizer, two configurations and a run of each: tokenizer/ and joint/."""
    import torch
    import yaml

    from multimodal.cli import main

    folder, threads = tmp_path_factory.mktemp("training"), torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["data", "scenes", str(folder / "scenes"), "--count", "50", "--size", "32"]) == 0
    text = ["--out", str(folder / "text.json"), "--vocabulary-size", "320"]
    assert main(["tokenizer", "text", str(folder / "scenes"), *text]) == 0
    trainer = {
        "max_steps": 14, "log_every_n_steps": 1, "gradient_clip_val": 1.0, "accelerator": "cpu",
        "enable_progress_bar": False, "val_check_interval": 5, "check_val_every_n_epoch": None,
    }  # fmt: skip
    data = {"folders": [str(folder / "scenes")], "global_batch_size": 8, "workers": 0}
    module = "multimodal.train.tokenizers.detail.DetailModule"
    tokenizer = {
        "tokenizer": TINY_TOKENIZER,
        "text_tokenizer": str(folder / "text.json"),
        "semantic_weight": 0.5,
        "warmup_steps": 2,
    }
    crops = {"crop_scale": 0.5, "mirror": True, "val_limit": 8}
    joint = {
        "text_tokenizer": str(folder / "text.json"),
        "image_tokenizer": str(folder / "tokenizer/model"),
        "size": "tiny",
        "row_length": 192,
        "warmup_steps": 2,
        "captions_in_validation": 2,
        "answers_in_validation": 2,
        "drawings_in_validation": 1,
    }
    for name, class_path, arguments, more in (
        ("tokenizer", module, tokenizer, crops),
        ("joint", "multimodal.train.joint.JointModule", joint, {"val_limit": 8}),
    ):
        config = {
            "output": str(folder / name),
            "checkpoint_every": 3,
            "model": {"class_path": class_path, "init_args": arguments},
            "data": data | more,
            "trainer": trainer,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        assert main(["fit", "--config", str(folder / f"{name}.yaml")]) == 0
    torch.set_num_threads(threads)
    return folder
