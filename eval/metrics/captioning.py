"""Caption metrics: CIDEr, BLEU and ROUGE-L of pycocoevalcap, without its Java tokenizer.

CIDEr: Vedantam et al. 2015 (arXiv:1411.5726); what pycocoevalcap calls CIDEr clips counts and
compares lengths, as CIDEr-D does. BLEU: Papineni et al. 2002. ROUGE-L: Lin 2004. METEOR and SPICE
need Java and are left out.
"""

import contextlib
import io
import re
import string
from typing import Any

PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
# Penn Treebank tokens of lower-case text, as Stanford's tokenizer splits captions.
_TOKENS = re.compile(
    r"""
    \.\.\. | --+
    | [a-z]+(?=n't\b) | n't\b | '(?:s|m|d|ll|re|ve)\b  # don't: do n't; dog's: dog 's
    | \d+(?:[.,:]\d+)*(?:-?[a-z]+)*                    # 1,000; 3:30; 2nd
    | (?:[a-z]\.){2,}                                  # u.s.
    | \w+(?:[-&/_.@]\w+)*                              # snow-packed, black/white
    | \S
    """,
    re.VERBOSE,
)
_DROPPED = frozenset("'' ' `` ` \" ( ) { } [ ] . ? ! , : - -- ... ;".split())


def normalise(text: str) -> str:
    """Lower case, without punctuation ("t-shirt" becomes "tshirt"), single spaces."""
    return " ".join(PUNCTUATION.sub("", text.lower()).split())


def ptb_tokenize(text: str) -> str:
    """Lower-case Penn Treebank tokens with single spaces between them, without punctuation.

    COCO's evaluation uses Java's PTBTokenizer. Both agree on all 757 captions of its test.
    """
    return " ".join(token for token in _TOKENS.findall(text.lower()) if token not in _DROPPED)


def score_captions(
    predictions: dict[str, str], references: dict[str, list[str]], tokenize: bool = True
) -> dict[str, Any]:
    """Corpus scores and scores per image, with the names of COCO's evaluation.

    Args:
        predictions: image -> caption, which may be empty.
        references: image -> all its reference captions, at least one, for the same images.
        tokenize: apply ``ptb_tokenize`` to both first. False if they are already tokenized.

    Returns:
        - ``CIDEr``: 1.0 is 100 % in the paper.
        - ``Bleu_1`` to ``Bleu_4``, ``ROUGE_L``: in [0, 1].
        - ``per_image``: image -> the same scores. BLEU is smoothed as in pycocoevalcap.

    Raises:
        ValueError: if the keys differ, an image has no reference, or there is nothing to score.
    """
    if set(predictions) != set(references):
        missing = sorted(set(references) ^ set(predictions))[:5]
        raise ValueError(
            f"predictions and references have different images, expected the same: {missing} ..."
        )
    if not predictions:
        raise ValueError("no captions to score")
    if empty := [key for key, texts in references.items() if not texts]:
        raise ValueError(f"no reference for {empty[0]}, and {len(empty) - 1} more")
    prepare = ptb_tokenize if tokenize else str
    keys = sorted(predictions)
    truths = {key: [prepare(text) for text in references[key]] for key in keys}
    guesses = {key: [prepare(predictions[key])] for key in keys}
    if not any(text.split() for texts in truths.values() for text in texts):
        raise ValueError("no reference has a word")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    with contextlib.redirect_stdout(io.StringIO()):
        bleu, bleus = Bleu(4).compute_score(truths, guesses)
    cider, ciders = Cider().compute_score(truths, guesses)
    rouge, rouges = Rouge().compute_score(truths, guesses)
    names = ("CIDEr", *(f"Bleu_{n}" for n in (1, 2, 3, 4)), "ROUGE_L")
    corpus = zip(names, (cider, *bleu, rouge), strict=True)
    images = zip(keys, zip(ciders, *bleus, rouges, strict=True), strict=True)
    return {
        **{name: float(score) for name, score in corpus},
        "per_image": {
            key: {name: float(score) for name, score in zip(names, scores, strict=True)}
            for key, scores in images
        },
    }
