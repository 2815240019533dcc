"""SwiGLU (Shazeer 2020, arXiv:2002.05202), linear layers of one token, and dropout.

Shapes: B batch, L tokens, D width, N outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_STATIC_ROWS = 2  # rows of a static compiled step: one prompt, or a drawing and its guidance


def token_product(x: Tensor, linear: nn.Module) -> Tensor:
    """A linear layer for one token of each row: float[B, D] -> float[B, N].

    Compiled for few rows on a CPU it is a sum: such a product only waits for its weights, and the
    compiler's loop reads them three times as fast (docs/decisions/decoding_speed.md).
    """
    if not isinstance(linear, nn.Linear):  # quantized and adapted layers have their own products
        return linear(x)
    weight, bias = linear.weight, linear.bias
    if torch.compiler.is_compiling() and not x.is_cuda and len(x) <= MAX_STATIC_ROWS:
        product = (x[:, None].float() * weight.float()).sum(-1)
        return (product if bias is None else product + bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


def add_dropped(x: Tensor, branch: Tensor, dropout: float) -> Tensor:
    """x + branch, without a random share of the branch (dropout, Srivastava et al. 2014).

    On a CPU the share is rounded to 1/256 and decided by random bytes: random floats take long.
    """
    if not dropout:
        return x + branch
    if not branch.is_cpu or torch.compiler.is_compiling():
        return x + F.dropout(branch, dropout)
    words = torch.empty(-(-branch.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    dropped = min(255, round(256 * dropout))  # of 256 bytes
    kept = words.view(torch.uint8)[: branch.numel()].view(branch.shape) >= dropped
    return torch.addcmul(x, branch, kept.to(branch.dtype), value=256 / (256 - dropped))


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def forward_token(self, x: Tensor) -> Tensor:
        gated = F.silu(token_product(x, self.gate_proj)) * token_product(x, self.up_proj)
        return token_product(gated, self.down_proj)
