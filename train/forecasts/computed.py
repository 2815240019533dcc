"""What a training run on many graphics cards will need, computed from its configuration."""

import math
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from multimodal.adapters.lora import LoraConfig, inject
from multimodal.data.documents import document_of
from multimodal.hub.names import find_model, levels_of, part_of
from multimodal.model.batches import BatchBuilder
from multimodal.model.layers.experts import ExpertsConfig
from multimodal.model.layers.transformer import SIZES, named_config
from multimodal.model.network import ModelConfig, MultimodalLM
from multimodal.model.objectives import ObjectivesConfig
from multimodal.model.stock import read_sizes
from multimodal.model.training_batch import TrainingBatch, TrainingSample
from multimodal.model.vocabulary import Vocabulary
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.tokenizers.text import TextTokenizer
from multimodal.train.cost import (
    PEAKS,
    muon_bytes,
    muon_flops,
    recomputed_layers,
    training_flops,
)
from multimodal.train.data import ShardData
from multimodal.train.forecasts.budget import Memory, Step, optimizer_of, step_memory
from multimodal.train.optim import parameters_named

MODULE = "multimodal.train.joint.JointModule"
SAMPLES = 256  # of the data, the first ones, of which rows are made
CARD, MFU = "H100", 0.35  # of the expected time; what was measured is in docs/training/gpus.md
BETWEEN_MACHINES = 50e9  # bytes/s of a rank: one link of 400 Gbit/s for each card


def ranks_of(trainer: Any) -> int:
    """How many ranks a Trainer's options start. ``auto`` and -1 are the cards that are here."""
    devices, cards = str(trainer.devices), max(1, torch.cuda.device_count())
    if devices in ("auto", "-1"):
        count = 1 if trainer.accelerator in ("cpu", "mps") else cards
    elif devices.isdecimal():
        count = int(devices)
    else:  # [0, 1] or "0,1"
        count = len(devices.split(","))
    return count * int(trainer.num_nodes)


def is_computed(trainer: Any) -> bool:
    """Whether a run cannot be tried here in one process."""
    absent = trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available()
    return absent or ranks_of(trainer) > 1


def computed(config: Any) -> list[str]:
    """The forecast of a run, as lines.

    Args:
        config: the options of ``multimodal fit``.

    Raises:
        ValueError: for another module than ``JointModule``, and for what a run would refuse.
    """
    if config.model.class_path != MODULE:
        raise ValueError(
            f"model.class_path={config.model.class_path}: several ranks are computed for {MODULE} "
            "alone; with --trainer.devices 1 any run is measured"
        )
    options, trainer = config.model.init_args, config.trainer
    text = TextTokenizer.load(part_of(options.text_tokenizer, "text_tokenizer.json"))
    images = load_image_tokenizer(part_of(options.image_tokenizer, "image_tokenizer"))
    network = network_without_weights(options, text, images)
    ranks = ranks_of(trainer)
    samples = math.ceil(config.data.global_batch_size / ranks)
    batch, share = first_batch(network, options, config.data, text, samples)
    step = Step(
        rows=math.ceil(len(batch.packed.ids) / share),
        row_length=options.row_length,
        ranks=ranks,
        strategy=_strategy(trainer.strategy, ranks),
        device="cpu" if trainer.accelerator == "cpu" else "cuda",
        bfloat16=str(trainer.precision).startswith(("bf16", "16")),
        recompute=recomputed_layers(options.recompute, len(network.transformer.layers)),
        attention=options.attention,
        compiled=options.compile,
        dropout=options.dropout,
        images=sum(p.numel() * p.element_size() for p in images.parameters()),
    )
    flops = training_flops(network.config.transformer, batch.packed) / share
    flops *= int(trainer.accumulate_grad_batches or 1)
    return forecast_lines(network, step, step_memory(network, step), flops, int(trainer.max_steps))


def forecast_lines(
    network: MultimodalLM, step: Step, memory: Memory, flops: float, steps: int
) -> list[str]:
    """The forecast in words; flops: of one step of one rank; steps: of the run, -1: no limit."""
    phase = max(memory.phases, key=memory.phases.__getitem__)
    parts = {
        "weights": memory.weights,
        "optimizer": memory.optimizer,
        "gradients": memory.gradients,
        "image tokenizer": memory.images,
        "activations": memory.activations,
    }
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    all_weights = sum(p.numel() for p in network.parameters())
    floor = flops / (1e12 * PEAKS[CARD])
    # A second forward pass counts as none.
    mfu = MFU * 3 / (3 + step.recompute / len(network.transformer.layers))
    compute, exchange = floor / mfu, memory.exchanged / BETWEEN_MACHINES
    optimizer = optimizer_of(network)
    products, sent = muon_flops(optimizer, step.parts), muon_bytes(optimizer, step.parts)
    update = products / (1e12 * PEAKS[CARD] * MFU) + sent / BETWEEN_MACHINES
    rows = {
        "computed": f"for {step.ranks} ranks on {step.device} ({step.strategy}); nothing was run",
        "parameters": f"{trained:,} to train, {all_weights - trained:,} frozen",
        "memory": f"{memory.peak / 1e9:.2f} GB at most, on each rank ({phase})",
        "of that": ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items()),
        "rows": f"{step.rows:,} of {step.row_length:,} tokens on each rank",
    }
    if step.device == "cuda":
        rows["step"] = (
            f"{compute:.2f} s at {mfu:.0%} MFU of an {CARD} ({floor:.2f} s at 100 %); each rank "
            f"sends {memory.exchanged / 1e9:.1f} GB, {exchange:.2f} s at "
            f"{BETWEEN_MACHINES / 1e9:.0f} GB/s"
        )
        if products:
            rows["update"] = (
                f"{update:.2f} s more for Muon: {products / 1e12:.1f} TFLOP on each rank"
                + f", which sends {sent / 1e9:.1f} GB" * bool(sent)
            )
        if steps > 0:
            hours = steps * (max(compute, exchange) + update) / 3600
            rows["run"] = (
                f"{steps:,} steps in {hours:,.1f} hours, {hours * step.ranks:,.0f} GPU hours, "
                "without validations, if sending hides behind computing"
            )
    return [f"{name + ':':<12}{value}" for name, value in rows.items()]


def network_without_weights(options: Any, text: TextTokenizer, images: Any) -> MultimodalLM:
    """The network of ``JointModule``'s options on ``meta``."""
    experts = options.experts and ExpertsConfig(**vars(options.experts))
    vocabulary = Vocabulary(len(text), images.layout.codebook_size)
    if options.size in SIZES:
        sizes = named_config(options.size, vocabulary.size)
    else:
        sizes = read_sizes(find_model(options.size))
    sizes = replace(sizes, vocab_size=vocabulary.size, experts=experts or sizes.experts)
    reads, draws = levels_of(options.image_tokenizer)
    config = ModelConfig(
        sizes,
        len(text),
        images.layout,
        ObjectivesConfig(**vars(options.objectives)),
        reads=tuple(options.reads or reads),
        draws=tuple(options.draws or draws),
    )
    if options.lora is not None:
        config = config.with_bits(options.lora.bits)
    with torch.device("meta"):
        network = MultimodalLM(config)
        module = nn.ModuleDict({"network": network})  # as JointModule names it
        for name in options.freeze or ():
            for parameter in parameters_named(module, name):
                parameter.requires_grad_(False)
        if options.lora is not None:
            network.requires_grad_(False)
            inject(network.transformer, LoraConfig(**vars(options.lora)))
    return network


def first_batch(
    network: MultimodalLM, options: Any, data: Any, text: TextTokenizer, samples: int
) -> tuple[TrainingBatch, float]:
    """Rows of the first training samples, with other codes.

    Args:
        options: of ``JointModule``.
        data: the options of ``ShardData``.
        samples: of a rank.

    Returns:
        The batch, and which share of the rank's batch it is.
    """
    config = network.config
    builder = BatchBuilder(
        network.vocabulary,
        config.objectives,
        config.templates,
        text.encode,
        config.layout,
        config.reads,
        config.draws,
        options.row_length,
        options.question_share,
        options.captions_per_image,
    )
    shards = ShardData(**vars(data)).shards(data.train_split)
    each = math.ceil(min(samples, SAMPLES) / len(shards))
    examples = [
        _example(sample, number, config.layout.codes_per_image)
        for source in shards
        for number, sample in enumerate(islice(source, each))
    ][:samples]
    if not examples:
        raise ValueError(f"{shards[0].folder}: no training samples")
    only_draws = not config.objectives.alignment_weight
    return builder.build(examples, skip_untaught=only_draws), len(examples) / samples


def _example(sample: Any, seed: int, codes: int) -> TrainingSample:
    document = document_of(sample)
    images = document.count(None) if document else 1
    zeros = np.zeros((images, codes), np.int64)
    return TrainingSample(sample.key, sample.record, zeros, seed, document)


def _strategy(strategy: Any, ranks: int) -> Any:
    if ranks == 1:
        return "one"
    name = strategy if isinstance(strategy, str) else strategy.class_path
    if "ModelParallel" not in name and "fsdp" not in name:
        return "ddp"
    size = getattr(getattr(strategy, "init_args", None), "data_parallel_size", "auto")
    if size not in ("auto", ranks):
        raise ValueError(
            f"data_parallel_size={size}: expected {ranks}, all ranks of this run "
            "(trainer.num_nodes times trainer.devices)"
        )
    return "fsdp"
