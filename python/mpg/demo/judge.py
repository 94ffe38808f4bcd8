"""A lexical judge: how strongly a text shows each trait, by counting the corpus's marker phrases.

Knows the phrases of `corpus.py` and nothing else: it measures the demo models, not people's English.
"""

from __future__ import annotations

import math
import re

from mpg.demo.corpus import MARKERS, OPPOSITE


def score_traits(text: str) -> dict[str, float]:
    """Score each trait by the log odds of its markers against those of the opposite pole.

    out: for each of E, S, T, J `log((own + .5) / (opposite + .5))` of the two counts in `text`; natural log, no unit.
         0 means balance or no marker at all; one sentence of a pole, two or three markers, is +-1.6 to 1.9.
    """
    count = {pole: len(pattern.findall(text)) for pole, pattern in _PATTERNS.items()}
    return {trait: math.log((count[trait] + 0.5) / (count[opposite] + 0.5)) for trait, opposite in OPPOSITE.items()}


# Longest first: an alternation takes the first phrase that fits, and "settled" must not be read as "settle".
_PATTERNS = {
    pole: re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(phrases, key=len, reverse=True)))})\b", re.IGNORECASE)
    for pole, phrases in MARKERS.items()
}
