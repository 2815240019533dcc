"""The option ``--sign``: drawn images with content credentials."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from multimodal.files import local_path
from multimodal.terminal import print_error

if TYPE_CHECKING:
    from multimodal.origin.credentials import Signer


def add_sign(parser: argparse.ArgumentParser) -> None:
    """Add --sign."""
    parser.add_argument(
        "--sign",
        type=Path,
        metavar="DIR",
        help="drawn images say that they are, by signed content credentials; DIR has key.pem and "
        "certificates.pem. A new DIR: keys are made, which prove nothing about who signs",
    )


def signer_of(folder: Path | None) -> "Signer | None":
    """The signer of ``--sign``, made if there is none. Raises ``ValueError``."""
    if folder is None:
        return None
    from multimodal.origin.credentials import Signer, make_signer

    if local_path(folder).exists():
        return Signer.read(folder)
    signer = make_signer(folder)
    print_error(
        f"{folder}: made a key; it shows changes of images, and proves nothing about who signs"
    )
    return signer
