"""What the matrices of a network read, measured on samples, so that 4 bits keep their products."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.inference.codec import encode_images, read_images
from multimodal.inference.shard_jobs import check_codes_fit
from multimodal.model.checkpoint import ModelParts
from multimodal.model.layers.attention import without_cudnn_attention
from multimodal.model.lessons import descriptions_of
from multimodal.model.network import MultimodalLM
from multimodal.model.training_batch import TrainingBatch, TrainingSample
from multimodal.seeds import sample_seed

ROOM_FOR_TEXT = 128  # tokens of a row besides the codes of an image
BATCH = 8  # samples at a time


def calibration_batches(
    model: ModelParts, shards: Shards, count: int, on_problem: Callable[[str], object]
) -> Iterator[TrainingBatch]:
    """Batches of images with captions, as in training: images that are read, and drawn.

    Args:
        count: of samples, the first that can be used.
        on_problem: is told each sample that cannot be read, in one line.

    Raises:
        ValueError: for codes that the model does not read, or if there is no image with a caption.
    """
    check_codes_fit(model, shards)
    limit = model.config.transformer.max_position_embeddings
    builder = model.batch_builder(min(limit, model.codes_per_image + ROOM_FOR_TEXT))
    batch: list[TrainingSample] = []
    found = 0
    for sample in shards:
        if found == count:
            break
        try:
            if not descriptions_of(sample.record):
                continue
            codes = _codes_of(model, sample, shards.encoding is not None)
        except ValueError as error:
            on_problem(f"left out: {error}")
            continue
        seed = sample_seed(0, 0, sample.key)
        batch.append(TrainingSample(sample.key, sample.record, codes.numpy(), seed))
        found += 1
        if len(batch) == BATCH:
            yield builder.build(batch)
            batch = []
    if batch:
        yield builder.build(batch)
    if not found:
        raise ValueError(f"{shards.folder}: has no image with a caption to calibrate by")


def _codes_of(model: ModelParts, sample: Sample, encoded: bool) -> Tensor:
    """int64[1, n]. Raises ``ValueError`` for an image or codes that cannot be read."""
    if not encoded:
        return encode_images(model, read_images(model, [sample.image], [sample.key])).cpu()
    codes = torch.from_numpy(sample.codes[:1])
    size = model.config.layout.codebook_size
    if codes.shape[1] != model.codes_per_image or int(codes.max()) >= size:
        raise ValueError(
            f"sample {sample.key}: expected {model.codes_per_image} codes below {size}, found "
            f"{codes.shape[1]} up to {int(codes.max())}"
        )
    return codes


def _same_view(x: Tensor, other: Tensor) -> bool:
    """Whether both tensors have the same numbers at the same place in memory."""
    layout, theirs = ((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (x, other))
    return layout == theirs


@torch.inference_mode()
@without_cudnn_attention()
def input_moments(network: MultimodalLM, batches: Iterable[TrainingBatch]) -> dict[str, Tensor]:
    """The second moments of the inputs of all linear layers of the transformer's layers.

    Returns:
        By the name of the layer the sum of x x^T over all tokens that are not padding:
        float32[K, K]. Layers that read the same have the same tensor. What never ran has none.

    Raises:
        ValueError: if a layer reads what is not finite.
    """
    moments = dict[str, Tensor]()
    latest: tuple[Tensor, str] | None = None  # an input, and the first layer that read it
    tokens = torch.empty(0, dtype=torch.bool)

    def add(name: str, x: Tensor) -> None:
        nonlocal latest
        if latest is not None and _same_view(latest[0], x):
            moments[name] = moments[latest[1]]
            return
        latest = (x, name)
        rows = x.flatten(0, -2)
        if len(rows) == len(tokens):  # of an expert: some tokens, and no padding
            rows = rows[tokens]
        product = rows.float().T @ rows.float()
        if name in moments:
            moments[name] += product
        else:
            moments[name] = product

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and ".layers." in name
    ]
    try:
        for batch in batches:
            tokens = (batch.packed.documents > 0).flatten()
            network.hidden(batch.packed.to(network.device))
            latest = None
    finally:
        for hook in hooks:
            hook.remove()
    if broken := [name for name, each in moments.items() if not each.isfinite().all()]:
        raise ValueError(f"{broken[0]}: reads numbers that are not finite")
    return moments
