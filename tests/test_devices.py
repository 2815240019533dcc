"""The device and the dtype that ``auto`` means, and what is said when memory is not enough."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from multimodal import Model, devices, load
from multimodal.cli import main
from multimodal.devices import (
    choose_device,
    choose_dtype,
    full_float32,
    has_slow_bfloat16,
    warn_of_slow_bfloat16,
)
from multimodal.inference.codec import encode_as_drawn, encode_images, encode_to_read
from multimodal.tokenizers.detail import VQTokenizer

HERE = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
BEST_HERE = next((name for name, there in HERE.items() if there), "cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, *there: str, broken: str = "") -> None:
    """Let torch have these devices. ``broken``: is there, and does not compute."""

    def tried(device: str) -> torch.device:
        if device.split(":")[0] == broken:
            raise ValueError(f"device={device!r}: cannot be used here (no kernel image)")
        return torch.device(device)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    monkeypatch.setattr(devices, "_tried", tried)


@pytest.mark.parametrize(
    ("there", "expected"), [(("cuda", "mps"), "cuda"), (("mps",), "mps"), ((), "cpu")]
)
def test_auto_is_cuda_then_mps_then_the_cpu(
    there: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, *there)
    assert str(choose_device()) == expected
    assert str(choose_device("cpu")) == "cpu"  # what is named is what is meant


def test_under_torchrun_each_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(choose_device(name)) for name in ("auto", "cuda", "cuda:0", "cpu")] == [
        *("cuda:3", "cuda:3", "cuda:0", "cpu")
    ]


def test_a_rank_that_sees_one_gpu_alone_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [str(choose_device(name)) for name in ("auto", "cuda")] == ["cuda:0", "cuda:0"]


def test_a_gpu_that_does_not_compute_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, "cuda", broken="cuda")
    assert str(choose_device("auto")) == "cpu"
    said = capsys.readouterr().err
    assert "'cuda': cannot be used here (no kernel image)" in said and said.count("\n") == 1
    with pytest.raises(ValueError, match="device='cuda': cannot be used here"):
        choose_device("cuda")


def test_auto_is_bfloat16_only_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    native = True
    assert choose_dtype("auto", "cuda:0") == torch.bfloat16
    native = False  # before Ampere it is emulated, and slow
    assert choose_dtype("auto", "cuda:0") == torch.float32
    assert choose_dtype("auto", "cpu") == choose_dtype("auto", "mps") == torch.float32
    assert choose_dtype("bfloat16", "cpu") == choose_dtype(torch.bfloat16) == torch.bfloat16


def test_a_model_is_where_auto_says(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder)
    assert model.device.type == BEST_HERE
    assert next(model.network.parameters()).dtype == choose_dtype("auto", BEST_HERE)


@pytest.mark.parametrize(
    ("error", "on_a_gpu"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB, max allowed: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), False),
    ],
)
def test_a_full_memory_says_what_to_lower(
    error: Exception,
    on_a_gpu: bool,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    model, picture = load(tiny_model_folder), Image.new("RGB", (32, 32), "red")
    monkeypatch.setattr("multimodal.inference.batch.DecodeBatch.__init__", fail)
    for call in (lambda: model.caption(picture), lambda: list(model.draw_each("a bus"))):
        with pytest.raises(type(error)) as raised:
            call()
        (note,) = raised.value.__notes__
        assert "lower batch_size" in note and ('device="cpu"' in note) == on_a_gpu
    picture.save(path := tmp_path / "red.png")
    assert main(["caption", str(path), "--model", str(tiny_model_folder)]) == 1
    said = capsys.readouterr().err
    assert "not enough memory: lower --batch-size" in said and said.count("\n") == 1
    assert ("--device cpu" in said) == on_a_gpu
    monkeypatch.setattr("multimodal.train.cli.main", fail)
    assert main(["fit"]) == 1
    assert "not enough memory: lower --data.global_batch_size" in capsys.readouterr().err


def test_a_processor_without_instructions_for_bfloat16_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for capability, slow in (("AVX2", True), ("AVX512", False), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert has_slow_bfloat16("cpu") is slow and not has_slow_bfloat16("meta")
        warn_of_slow_bfloat16("cpu", "--precision float32")
        assert ("give --precision float32" in capsys.readouterr().err) is slow


def precisions() -> list[str]:
    """In which numbers torch computes float32 convolutions and products."""
    settings = attrgetter("cudnn.conv", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul")
    return [each.fp32_precision for each in settings(torch.backends)]


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 is allowed: for convolutions by torch, for products by who trains on a GPU."""
    cudnn, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    yield
    torch.backends.cudnn.allow_tf32 = cudnn
    torch.set_float32_matmul_precision(products)


@pytest.mark.parametrize("encode", [encode_images, encode_to_read, encode_as_drawn])
def test_images_are_encoded_in_all_bits_of_float32_whatever_is_allowed(
    tf32: None,
    encode: Callable[[Model, Tensor], Tensor],
    tiny_model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, plain = list[list[str]](), VQTokenizer.encode

    def noted(self: VQTokenizer, images: Tensor) -> Tensor:
        seen.append(precisions())
        return plain(self, images)

    monkeypatch.setattr(VQTokenizer, "encode", noted)
    before = precisions()
    assert before[:2] == ["tf32", "tf32"]
    encode(tiny_model(), torch.zeros(1, 3, 32, 32))
    assert seen == [["ieee"] * 4] and precisions() == before
    assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"


def test_the_last_of_several_threads_restores_the_precision(tf32: None) -> None:
    before, inside, leave = precisions(), threading.Event(), threading.Event()

    def other() -> None:
        with full_float32():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    with full_float32():
        leave.set()
        thread.join()
        assert precisions() == ["ieee"] * 4, "though the first one has left"
    assert precisions() == before
