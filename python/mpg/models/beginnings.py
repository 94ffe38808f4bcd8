"""Texts that begin alike, of which only one need be read from its first token on. Knows token ids alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import itemgetter
from typing import Any

# Tokens. At 64 two prompts of SmolLM2 are read in .82 of the time, eight in .37, on one thread of a CPU, where 16 pay
# already; a forward more costs more on a GPU, where it has not been measured.
MIN_SHARED = 64

Text = tuple[Hashable, tuple[int, ...]]  # what reads it, and its tokens


def find_beginnings(
    texts: Mapping[int, Text],
    unread: Sequence[int],
    known: Sequence[int],
    held: Sequence[tuple[int, ...]],
    find_kept: Callable[[Hashable, tuple[int, ...]], tuple[Any, int] | None] = lambda reader, text: None,
) -> dict[int, tuple[Any, int]]:
    """Which of the unread texts begin as another one does: the place of that one, and how many positions they share.

    texts: by place; unread: places to be read, in order; known: places that are held already
    held:  of every place, the tokens that it has had so far
    find_kept: of a reader and a text what is kept elsewhere, in place of a place, and how many positions it shares

    The other one is known, or unread and read before it, from its first token on; or it is what the place has had.
    """
    begun = dict[int, tuple[Any, int]]()
    alike = defaultdict[tuple[Hashable, tuple[int, ...]], list[int]](list)  # places of texts that may share enough
    for place in known:
        alike[opening(*texts[place])].append(place)
    for place in unread:
        reader, own = texts[place]
        places = alike[opening(*texts[place])]
        others = {place: held[place], **{other: texts[other][1] for other in places}}
        found: list[tuple[Any, int]] = [(at, count_common(own, other)) for at, other in others.items()]
        kept = find_kept(reader, own) or (None, 0)
        source, shared = max((*found, kept), key=itemgetter(1))
        if shared >= MIN_SHARED or 0 < len(own) - 1 == kept[1]:  # a short text may have been read ahead too
            begun[place] = source, shared
        else:
            places.append(place)
    return begun


def opening(reader: Hashable, text: tuple[int, ...]) -> Text:
    """What texts have in common that share enough."""
    return reader, text[:MIN_SHARED]


def count_common(text: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Positions that both begin with. The last token of neither is one, as it is not held."""
    least, most = 0, max(min(len(text), len(other)) - 1, 0)
    while least < most:  # by halves, as slices are compared sooner than tokens are
        middle = (least + most + 1) // 2
        least, most = (middle, most) if text[least:middle] == other[least:middle] else (least, middle - 1)
    return least
