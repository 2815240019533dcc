"""One id space: text ids first, untouched; then the specials; then the image codes.

Padded to a multiple of 128 for the matrix units; padding rows are never a target, never sampled.
"""

from dataclasses import dataclass

SPECIALS = ("<bos>", "<eos>", "<pad>", "<boi>", "<eoi>", "<mask>", "<null>")


@dataclass(frozen=True)
class Vocabulary:
    """Args: text_size: ids of the text tokenizer; codebook_size: codes of the image tokenizer."""

    text_size: int
    codebook_size: int

    def __post_init__(self) -> None:
        if self.text_size < 1 or self.codebook_size < 1:
            raise ValueError(
                f"text_size={self.text_size}, codebook_size={self.codebook_size}: must be >= 1"
            )

    def special(self, name: str) -> int:
        return self.text_size + SPECIALS.index(name)

    @property
    def bos(self) -> int:
        return self.special("<bos>")

    @property
    def eos(self) -> int:
        return self.special("<eos>")

    @property
    def pad(self) -> int:
        return self.special("<pad>")

    @property
    def boi(self) -> int:
        """Begin of image."""
        return self.special("<boi>")

    @property
    def eoi(self) -> int:
        """End of image."""
        return self.special("<eoi>")

    @property
    def mask(self) -> int:
        """Stands where a code is to be reconstructed."""
        return self.special("<mask>")

    @property
    def null(self) -> int:
        """Stands for a dropped condition."""
        return self.special("<null>")

    @property
    def image_start(self) -> int:
        """The id of image code 0."""
        return self.text_size + len(SPECIALS)

    @property
    def image_end(self) -> int:
        """One past the id of the last image code."""
        return self.image_start + self.codebook_size

    @property
    def size(self) -> int:
        """Rows of the embedding."""
        return -(-self.image_end // 128) * 128
