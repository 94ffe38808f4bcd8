"""Texts that begin alike, of which only one need be read from its first token on. Knows token ids alone."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

# Tokens. At 64 two prompts of SmolLM2 are read in .82 of the time, eight in .37, on one thread of a CPU, where 16 pay
# already; a forward more costs more on a GPU, where it has not been measured.
MIN_SHARED = 64

Text = tuple[Hashable, Sequence[int]]  # what reads it, and its tokens


def find_beginnings(
    texts: Mapping[int, Text], unread: Sequence[int], known: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """Which of the unread texts begin as another one does: that one, and how many positions they share.

    texts: by place; unread: places to be read, in order; known: places that are held already

    The other one is known, or unread and read before it, from its first token on.
    """
    begun, known = dict[int, tuple[int, int]](), list(known)
    for place in unread:
        reader, own = texts[place]
        others = [other for other in known if texts[other][0] == reader]
        shared, source = max(((count_common(own, texts[other][1]), other) for other in others), default=(0, -1))
        if shared >= MIN_SHARED:
            begun[place] = source, shared
        else:
            known.append(place)
    return begun


def count_common(text: Sequence[int], other: Sequence[int]) -> int:
    """Positions that both begin with. The last token of neither is one, as it is not held."""
    most = max(min(len(text), len(other)) - 1, 0)
    return next((place for place in range(most) if text[place] != other[place]), most)
