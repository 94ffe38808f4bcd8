"""How many texts fit on a GPU, by arithmetic from shapes: writes the table in scale.md. Or what a million tokens cost
on a machine that has a price and was measured. No GPU is asked.

    python docs/tabulate_capacity.py
    python docs/tabulate_capacity.py --price 2.50 --tokens-per-second 900
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parent / "scale.md"
BEGIN, END = "<!-- written by docs/tabulate_capacity.py -->", "<!-- end -->"
NUMBERS = (1, 2, 4, 8)  # of attributes
CONTEXTS = (2048, 8192, 32768)  # positions: prompt and answer
RANK = 16  # of adapters, on every linear layer
FREE = 0.1  # of the memory, for forwards and what torch keeps


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder of the Llama family.

    width    of a hidden state
    kv_heads whose keys and values are kept
    inner    width inside a layer's feed-forward part
    bytes    of a number, of weights and of caches
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int
    is_tied: bool = False
    bytes: int = 2

    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's linear maps."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = [(self.width, queries), (self.width, keys), (self.width, keys), (queries, self.width)]
        return [*attention, (self.width, self.inner), (self.width, self.inner), (self.inner, self.width)]

    def weight_bytes(self) -> int:
        layer = sum(inputs * outputs for inputs, outputs in self.linears()) + 2 * self.width
        ends = (1 if self.is_tied else 2) * self.vocabulary * self.width + self.width
        return self.bytes * (self.layers * layer + ends)

    def adapter_bytes(self, rank: int = RANK) -> int:
        return self.bytes * self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linears())

    def position_bytes(self) -> int:
        """Keys and values of one position of one row."""
        return self.bytes * self.layers * 2 * self.kv_heads * self.head_size

    def texts(self, memory: float, number: int, context: int) -> int:
        """Texts at once under so many adapters, each of which has a row of its own beside the base's; 0 where the
        weights do not fit."""
        left = (1 - FREE) * memory - self.weight_bytes() - number * self.adapter_bytes()
        return max(0, int(left // ((1 + number) * context * self.position_bytes())))


SHAPES = {
    "8B": Shape(layers=32, width=4096, heads=32, kv_heads=8, head_size=128, inner=14336, vocabulary=128256),
    "70B": Shape(layers=80, width=8192, heads=64, kv_heads=8, head_size=128, inner=28672, vocabulary=128256),
}
MACHINES = [("8B", 1, 80), ("8B", 1, 141), ("70B", 1, 141), ("70B", 2, 141), ("70B", 4, 80)]


def table() -> str:
    heads = [f"{name}, {count} x {size} GB" for name, count, size in MACHINES]
    lines = ["| N | positions | " + " | ".join(heads) + " |", "|---:|---:|" + "---:|" * len(heads)]
    for number in NUMBERS:
        for context in CONTEXTS:
            fit = [SHAPES[name].texts(count * size * 1e9, number, context) for name, count, size in MACHINES]
            lines.append(f"| {number} | {context} | {' | '.join(str(texts) for texts in fit)} |")
    return "\n".join(lines)


def cost(price: float, tokens_per_second: float) -> float:
    """The cost of a million tokens, where the machine costs so much an hour."""
    return price / (3600 * tokens_per_second) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--price", type=float, help="of the machine, an hour")
    parser.add_argument("--tokens-per-second", type=float, help="measured: mpg batch says it")
    given = parser.parse_args()
    if given.price is not None and given.tokens_per_second is not None:
        print(f"a million tokens: {cost(given.price, given.tokens_per_second):.2f}")
        return
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
