"""The quantizers by name.

To add one, write a subclass of ``Quantizer`` in a file of its own, and name it here.
"""

from collections.abc import Callable
from typing import Any

from multimodal.tokenizers.fsq import FSQ
from multimodal.tokenizers.ibq import IBQ
from multimodal.tokenizers.lfq import LFQ
from multimodal.tokenizers.quantizer import Quantizer
from multimodal.tokenizers.vq import VQ

QUANTIZERS: dict[str, Callable[..., Quantizer]] = {"fsq": FSQ, "ibq": IBQ, "lfq": LFQ, "vq": VQ}


def make_quantizer(name: str, **options: Any) -> Quantizer:
    """Make a quantizer.

    Args:
        name: one of QUANTIZERS.
        options: arguments of its class, such as ``levels`` or ``codebook_size``.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in QUANTIZERS:
        raise ValueError(f"quantizer {name!r}: expected one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name](**options)
