"""The quantizers by name. To add one, write a file like theirs and name its class here."""

from typing import Any

from multimodal.tokenizers.fsq import FSQ
from multimodal.tokenizers.ibq import IBQ
from multimodal.tokenizers.lfq import LFQ
from multimodal.tokenizers.vq import VQ

QUANTIZERS: dict[str, type[FSQ] | type[IBQ] | type[LFQ] | type[VQ]] = {
    "fsq": FSQ,
    "ibq": IBQ,
    "lfq": LFQ,
    "vq": VQ,
}


def make_quantizer(name: str, **options: Any) -> FSQ | IBQ | LFQ | VQ:
    """Make a quantizer.

    Args:
        name: ``fsq``, ``ibq``, ``lfq`` or ``vq``.
        options: arguments of its class, such as ``levels`` or ``codebook_size``.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in QUANTIZERS:
        raise ValueError(f"quantizer {name!r}: expected one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name](**options)
