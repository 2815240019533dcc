"""Caption metrics: CIDEr, BLEU and ROUGE-L of pycocoevalcap, without its Java tokenizer.

CIDEr: Vedantam et al. 2015 (arXiv:1411.5726); what pycocoevalcap calls CIDEr clips counts and
compares lengths, as CIDEr-D does. BLEU: Papineni et al. 2002. ROUGE-L: Lin 2004. METEOR and SPICE
need Java and are left out.
"""

import contextlib
import io
import re
import string
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from multimodal.eval.metrics.penn_treebank import ptb_tokenize

PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")


def normalise(text: str) -> str:
    """Lower case, without punctuation ("t-shirt" becomes "tshirt"), single spaces."""
    return " ".join(PUNCTUATION.sub("", text.lower()).split())


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


# Words that no sentence ends with.
_OPEN_WORDS = frozenset(
    "a an the in on of at with and or to from by for near while as his her its their".split()
)


def sentence_health(captions: Sequence[str]) -> dict[str, float]:
    """Whether captions are still sentences, which a reward for words alone does not see.

    Args:
        captions: at least one.

    Returns:
        - ``distinct``: the share of different captions.
        - ``words``: the mean number of words.
        - ``bad_endings``: the share that ends in a word like "a" or "with", or is empty.
        - ``repetitions``: the share that has the same word twice in a row.
    """
    texts = [ptb_tokenize(caption).split() for caption in captions]
    count = len(texts)
    return {
        "distinct": len(set(map(tuple, texts))) / count,
        "words": sum(map(len, texts)) / count,
        "bad_endings": sum(not words or words[-1] in _OPEN_WORDS for words in texts) / count,
        "repetitions": sum(any(a == b for a, b in pairwise(words)) for words in texts) / count,
    }
