"""All quantizers by name. To add one, write a file like those, and name its class here."""

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
    """``fsq`` (levels), ``lfq`` (channels), ``vq`` or ``ibq`` (codebook_size, channels, ...).

    Errors: ``ValueError`` for an unknown name.
    """
    if name not in QUANTIZERS:
        raise ValueError(f"quantizer {name!r}: expected one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name](**options)
