"""How a pool reads new prompts. Knows places and tokens; nothing of which prompts are known from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from mpg.models.pool import Pool
from mpg.models.stack import Layout
from mpg.models.upload import Numbers, Upload

if TYPE_CHECKING:
    from mpg.models.ensemble import Ensemble

PREFILL_TOKENS = 512  # of a prompt, read at once: what a forward needs beside the cache does not grow with the prompt


class _Part(NamedTuple):
    """Prompts that are read at once.

    groups  of the layout, where it names them
    numbers (R, 1 + q), where each begins, and its tokens from there on
    longest of the beginnings
    """

    fed: slice | Numbers
    layout: Layout
    groups: Numbers | None
    numbers: Numbers
    longest: int


class Reading:
    """What is read and copied of new prompts: laid out on the host, and run once all have been.

    unread  places whose prompts the pool has to read
    begun   of these, as `find_beginnings` has it, what some begin as
    copied  (from, to), places of equal prompts
    is_whole  whether last tokens are read too
    """

    def __init__(
        self,
        pool: Pool,
        unread: Sequence[int],
        begun: Mapping[int, tuple[Any, int]],
        copied: Sequence[tuple[int, int]],
        is_whole: bool,
        upload: Upload,
    ) -> None:
        self.pool = pool
        self._whole = self._lay_out({place: 0 for place in unread if place not in begun}, is_whole, upload)
        self._rest = self._lay_out({place: shared for place, (_, shared) in begun.items()}, is_whole, upload)
        within = [(source, place, shared) for place, (source, shared) in begun.items() if isinstance(source, int)]
        others = [(source, place, shared) for place, (source, shared) in begun.items() if not isinstance(source, int)]
        moves, longest = [(source, place) for source, place, _ in within], max((each[2] for each in within), default=0)
        self._begins = [(upload.add(columns(moves)), longest, None)]
        self._begins += [(upload.add([[0], [place]]), shared, source) for source, place, shared in others]
        self._copied = upload.add(columns(copied))

    def run(self, ensemble: Ensemble, num_positions: int, longest: int) -> Tensor | None:
        """Read and copy. out: the logits (R, 1, V) behind prompts that were read from the first token on, None without

        num_positions: that rows have; longest: of the prompts, to copy
        """
        logits = self._read(self._whole, ensemble, num_positions)
        for begin in self._begins:
            self.pool.runner.cache.copy(*begin)
        self._read(self._rest, ensemble, num_positions)
        self.pool.runner.cache.copy(self._copied, longest)
        return logits

    def _lay_out(self, begins: Mapping[int, int], is_whole: bool, upload: Upload) -> _Part | None:
        lengths = {place: len(self.pool.pairs[place].prompt) for place in begins}
        begins = {place: begin for place, begin in begins.items() if is_whole or begin < lengths[place] - 1}
        if not begins:
            return None
        places = list(begins)
        prompts = [self.pool.pairs[place].prompt[begin:] for place, begin in begins.items()]
        width = max(map(len, prompts)) - (not is_whole)
        # right-padded: what a short row writes behind its end is written again before it is seen
        padded = [[*prompt, *[0] * (width - len(prompt))][:width] for prompt in prompts]
        numbers = [[begin, *own] for begin, own in zip(begins.values(), padded, strict=True)]
        is_run = places == list(range(places[0], places[-1] + 1))
        fed = slice(places[0], places[-1] + 1) if is_run else upload.add(places)
        layout = self.pool.layout(places, "cpu")
        groups = None if layout.groups is None else upload.add(layout.groups)
        return _Part(fed, layout, groups, upload.add(numbers), max(begins.values()))

    def _read(self, part: _Part | None, ensemble: Ensemble, num_positions: int) -> Tensor | None:
        if part is None:
            return None
        logits, runner = None, self.pool.runner
        start, tokens = part.numbers.on(ensemble.device).tensor_split([1], 1)
        fed = part.fed if isinstance(part.fed, slice) else part.fed.on(ensemble.device)
        groups = None if part.groups is None else part.groups.on(runner.loaded.model.device)
        layout = part.layout._replace(groups=groups)
        for first in range(0, tokens.shape[1], PREFILL_TOKENS):
            fed_now = tokens[:, first : first + PREFILL_TOKENS]
            with ensemble.observer(True):
                kv_length = min(part.longest + first + fed_now.shape[1], num_positions)
                logits = runner.forward(fed, layout, fed_now, start[:, 0] + first, kv_length, logits_to_keep=1)
        return logits


def columns(moves: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [source for source, _ in moves], [target for _, target in moves]
