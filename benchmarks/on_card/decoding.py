"""Decode steps of ``1b`` in bf16: ms a token, and the share of the memory's bandwidth."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from multimodal.inference.batch import DecodeBatch
from multimodal.model.network import MultimodalLM
from on_card.sizes import Figure, Sizes, bytes_per_second, kernels, seconds_of, synchronize
from on_card.training import their_config

FORMS = ("eager", "graphs")


def figures(sizes: Sizes) -> list[str]:
    steps = [f"decode/{form}/batch {batch}" for batch in sizes.batches for form in FORMS]
    return [*steps, "decode/ready", "decode/kernels"]


def their_figures(sizes: Sizes) -> list[str]:
    return [f"decode/transformers/batch {batch}" for batch in sizes.batches]


def prompts_of(sizes: Sizes, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 300, (count, sizes.prompt), generator=generator).tolist()


def bytes_of_step(network: MultimodalLM, rows: int, length: int) -> int:
    """What a step has to read: every weight, and the keys and values of all rows."""
    c = network.config.transformer
    weights = sum(weight.nbytes for weight in network.transformer.parameters())
    size = network.transformer.norm.weight.element_size()
    kept = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size
    return weights + rows * length * kept


@torch.inference_mode()
def decode(sizes: Sizes) -> Iterator[Figure]:
    """Greedy steps, logits and choice included, each without and with CUDA graphs."""
    network = sizes.network("1b", torch.bfloat16).eval()
    bandwidth = bytes_per_second(sizes)
    graphs = sizes.graphs()
    for rows in sizes.batches:
        prompts = prompts_of(sizes, rows)
        for form in FORMS:
            network.graphs = graphs if form == "graphs" else None
            batch = DecodeBatch(network, prompts, 3 * sizes.tokens)

            def step(batch: DecodeBatch = batch) -> None:
                batch.step(batch.logits().argmax(-1))

            synchronize()
            start = time.perf_counter()
            for _ in range(3):  # the first step is run, the second one recorded
                step()
            synchronize()
            ready = time.perf_counter() - start
            if form == "graphs" and rows == 1:
                yield Figure("decode/ready", ready, "s", {"steps": 3})
            seconds = seconds_of(step, sizes.tokens, 0)
            needed = bytes_of_step(network, rows, sizes.prompt + sizes.tokens // 2)
            yield Figure(
                f"decode/{form}/batch {rows}",
                1e3 * seconds,
                "ms a step",
                {
                    "tokens_per_second": rows / seconds,
                    "GB_per_second": needed / seconds / 1e9,
                    "share of the bandwidth": needed / seconds / bandwidth,
                    "floor_ms": 1e3 * needed / bandwidth,
                    "ready_s": ready,
                },
            )
            if form == "graphs" and rows == 1:
                yield Figure("decode/kernels", 1e3 * needed / bandwidth, "ms at the floor",
                             kernels(step, 4))  # fmt: skip
            del batch, step


@torch.inference_mode()
def their_decode(sizes: Sizes) -> Iterator[Figure]:
    """transformers' ``generate`` of a Qwen3 of the same sizes, greedy, eager."""
    from transformers import Qwen3ForCausalLM

    network = sizes.network("1b", torch.bfloat16)
    with torch.device(sizes.device):
        theirs: Any = Qwen3ForCausalLM(their_config(network)).bfloat16().eval()
    bandwidth = bytes_per_second(sizes)
    for rows in sizes.batches:
        ids = torch.tensor(prompts_of(sizes, rows), device=sizes.device)

        def write(tokens: int, ids: torch.Tensor = ids) -> None:
            theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )

        # The difference of two lengths leaves out the prompt.
        short, long = sizes.tokens // 4, sizes.tokens
        taken = {n: seconds_of(lambda n=n: write(n), 1) for n in (short, long)}
        seconds = max((taken[long] - taken[short]) / (long - short), 1e-9)
        needed = bytes_of_step(network, rows, sizes.prompt + sizes.tokens // 2)
        more = {
            "tokens_per_second": rows / seconds,
            "share of the bandwidth": needed / seconds / bandwidth,
        }
        yield Figure(f"decode/transformers/batch {rows}", 1e3 * seconds, "ms a step", more)
