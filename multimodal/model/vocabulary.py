"""One id space: text ids first, then the specials, then the image codes.

Text ids stay what they are in the text tokenizer. The size is padded to a multiple of 128 for the
matrix units. Padding ids are never a target and never sampled.
"""

from dataclasses import dataclass

SPECIALS = ("<bos>", "<eos>", "<pad>", "<boi>", "<eoi>", "<mask>", "<null>")


def image_token(code: int) -> str:
    """How an image code is written in a prompt of an export."""
    return f"<|image:{code}|>"


@dataclass(frozen=True)
class Vocabulary:
    """The ids.

    Args:
        text_size: number of ids of the text tokenizer.
        codebook_size: number of codes of the image tokenizer.
    """

    text_size: int
    codebook_size: int

    def __post_init__(self) -> None:
        if self.text_size < 1 or self.codebook_size < 1:
            raise ValueError(
                f"text_size={self.text_size}, codebook_size={self.codebook_size}: "
                "expected at least 1"
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
        """In the place of a code that is to be reconstructed."""
        return self.special("<mask>")

    @property
    def null(self) -> int:
        """In the place of a text that was dropped (classifier-free guidance)."""
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
        """Rows of the embedding table, padding included."""
        return -(-self.image_end // 128) * 128
