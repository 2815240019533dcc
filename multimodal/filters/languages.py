"""The language of a text, by py3langid: naive Bayes over its bytes, 139 languages, offline.

Short texts have no sure language, and neighbours (Russian, Bulgarian) share the probability. So a
text is in another language only if one is SURE times as likely as each that is asked for.
"""

from collections.abc import Collection
from functools import lru_cache
from typing import Any

SURE = 20.0
NONE = "zxx"  # numbers, addresses, code
NEEDS = "languages needs: pip install 'multimodal[filters]'"


@lru_cache
def _identifier() -> Any:
    """Raises ``ValueError`` without the library."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ValueError(f"{NEEDS} ({error})") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def is_another(text: str, codes: Collection[str]) -> bool:
    """Whether a text is surely in another language than these (ISO 639, as ``en``)."""
    likely = dict(_identifier().rank(text))
    best = max(likely, key=lambda code: likely[code])
    return best != NONE and likely[best] > SURE * max(likely[code] for code in codes)


def check_languages(codes: Collection[str]) -> None:
    """Raises ``ValueError`` for codes that are not known."""
    known = set(_identifier().labels)
    if not codes or (unknown := sorted(set(codes) - known)):
        named = f"{unknown} unknown" if codes else "is empty"
        raise ValueError(f"languages: {named}, expected some of {', '.join(sorted(known))}")
