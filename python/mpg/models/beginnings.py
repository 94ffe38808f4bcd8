"""Texts that begin alike, of which only one need be read from its first token on. Knows token ids alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from operator import itemgetter

# Tokens. At 64 two prompts of SmolLM2 are read in .82 of the time, eight in .37, on one thread of a CPU, where 16 pay
# already; a forward more costs more on a GPU, where it has not been measured.
MIN_SHARED = 64

Text = tuple[Hashable, Sequence[int]]  # what reads it, and its tokens


def find_beginnings(
    texts: Mapping[int, Text], unread: Sequence[int], known: Sequence[int], held: Sequence[Sequence[int]]
) -> dict[int, tuple[int, int]]:
    """Which of the unread texts begin as another one does: the place of that one, and how many positions they share.

    texts: by place; unread: places to be read, in order; known: places that are held already
    held:  of every place, the tokens that it has had so far

    The other one is known, or unread and read before it, from its first token on; or it is what the place has had.
    """
    begun = dict[int, tuple[int, int]]()
    alike = defaultdict[tuple[Hashable, tuple[int, ...]], list[int]](list)  # places of texts that may share enough
    for place in known:
        alike[_opening(*texts[place])].append(place)
    for place in unread:
        _, own = texts[place]
        places = alike[_opening(*texts[place])]
        others = {place: held[place], **{other: texts[other][1] for other in places}}
        source, shared = max(((at, count_common(own, other)) for at, other in others.items()), key=itemgetter(1))
        if shared >= MIN_SHARED:
            begun[place] = source, shared
        else:
            places.append(place)
    return begun


def _opening(reader: Hashable, text: Sequence[int]) -> tuple[Hashable, tuple[int, ...]]:
    return reader, tuple(text[:MIN_SHARED])


def count_common(text: Sequence[int], other: Sequence[int]) -> int:
    """Positions that both begin with. The last token of neither is one, as it is not held."""
    most = max(min(len(text), len(other)) - 1, 0)
    return next((place for place in range(most) if text[place] != other[place]), most)
