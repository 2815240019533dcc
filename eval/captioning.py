"""Caption metrics: CIDEr and BLEU by pycocoevalcap, without its Java tokenizer.

CIDEr: Vedantam et al. 2015 (arXiv:1411.5726); BLEU: Papineni et al. 2002.
"""

import contextlib
import io
import re
import string

PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")


def normalise(text: str) -> str:
    """Lower case, punctuation removed ("t-shirt" reads "tshirt"), single spaces."""
    return " ".join(PUNCTUATION.sub("", text.lower()).split())


def score_captions(
    predictions: dict[str, str], references: dict[str, list[str]], tokenize: bool = True
) -> dict[str, float]:
    """Corpus CIDEr (1.0 is the scale of the paper's 100 %) and Bleu_1 to Bleu_4.

    Args:
        predictions: one caption an image; references: all true captions of the same images.
        tokenize: ``normalise`` both sides first; ``False`` if they are tokenized.
    Errors: ``ValueError`` where the keys differ, or there is nothing to score.
    """
    if set(predictions) != set(references):
        missing = sorted(set(references) ^ set(predictions))[:5]
        raise ValueError(f"predictions and references differ in their images: {missing} ...")
    if not predictions:
        raise ValueError("no captions to score")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    ready = normalise if tokenize else str
    keys = sorted(predictions)
    truths = {key: [ready(text) for text in references[key]] for key in keys}
    guesses = {key: [ready(predictions[key])] for key in keys}
    scores = {"CIDEr": float(Cider().compute_score(truths, guesses)[0])}
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, _ = Bleu(4).compute_score(truths, guesses)
    return scores | {f"Bleu_{i + 1}": float(value) for i, value in enumerate(bleu)}
