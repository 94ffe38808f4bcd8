"""The arguments that the ops are timed with, what they have to move, and whether an answer is right.

Knows no clock. Sizes are those of a round: K = 4 drafted tokens, N = 4 attribute models that differ little from the
anchor, all of one batch of B sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import mpg_ext
import plain
import reference
from mpg.models.linear import pack

N, K, WINDOW = 4, 4, 20
RANK = 16
MOST_TOKENS = 2**15  # of a text: more than what the calls of one timing commit
SCORE = "arithmetic"
CONSTANTS = {"constants": [0.7, 0.18, 0.01]}
NUCLEUS = {"temperature": 0.7, "top_p": 0.9}


@dataclass(frozen=True)
class Case:
    """One op on given arguments. `read` is what it has to read of them; what it writes is measured."""

    op: Callable[..., Any]
    plain: Callable[..., Any]
    twin: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    read: tuple[Tensor, ...] = ()
    masses: Callable[..., Tensor] | None = None  # of a draw: what its tokens are drawn from, from the arguments
    is_random: bool = False  # plain torch draws other numbers

    def run(self, function: Callable[..., Any]) -> Any:
        return function(*self.arguments, **self.options)

    def num_bytes(self) -> int:
        written = [tensor for tensor in as_tuple(self.run(self.op)) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.read, *written))

    def check(self) -> None:
        """Op and plain torch against the twin, on copies: the bound is updated in place."""
        runs = {}
        for name, function in (("op", self.op), ("plain", self.plain), ("twin", self.twin)):
            arguments = tree_map_only(Tensor, Tensor.clone, self.arguments)
            out = function(*arguments, **self.options)
            runs[name] = [tensor for tensor in tree_leaves((out, arguments)) if isinstance(tensor, Tensor)]
        for name in ("op",) if self.is_random else ("op", "plain"):
            if self.masses is not None:
                self.check_draw(runs[name][0])
                continue
            for got, wanted in zip(runs[name], runs["twin"], strict=True):
                # By row, not by element: rounding may move a cut of top-p by a token.
                error = (got.double() - wanted.double()).abs().sum(-1)
                # plain torch rounds on the way, too
                relative = 2**-8 if name == "plain" and wanted.dtype == torch.bfloat16 else 1e-3
                assert (error <= 1e-4 + relative * wanted.double().abs().sum(-1)).all(), (name, error.max())

    def check_draw(self, tokens: Tensor) -> None:
        """Rounding may well take the neighbour of the token that it should be: by cumulated mass."""
        assert self.masses is not None
        masses = self.run(self.masses).double()
        uniforms = next(t for t in self.arguments if isinstance(t, Tensor) and t.dtype == torch.float64)
        cumulated = masses.cumsum(-1) / masses.sum(-1, keepdim=True)
        up_to = cumulated.gather(1, tokens[:, None])[:, 0]
        before = up_to - masses.gather(1, tokens[:, None])[:, 0] / masses.sum(-1)
        assert ((before <= uniforms + 1e-3) & (uniforms <= up_to + 1e-3)).all()


def as_tuple(out: Any) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else (out,)


class Cases:
    """Builds the case of an op by its name, for B sequences, V tokens, logits of a dtype, on a device."""

    def __init__(self, B: int, V: int, dtype: torch.dtype, device: str) -> None:
        self.B, self.V, self.dtype, self.device = B, V, dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def uniforms(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device, dtype=torch.float64)

    def full(self, value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, value, device=self.device, dtype=dtype)

    def logits(self, positions: int) -> tuple[Tensor, Tensor]:
        """Logits of the anchor and of the attribute models, (B, positions, V) and (N, B, positions, V)."""
        anchor = 3 * self.normal(self.B, positions, self.V)
        attributes = torch.empty(N, self.B, positions, self.V, device=self.device, dtype=self.dtype)
        for attribute in attributes:  # one at a time: the largest fill half a GPU
            attribute.copy_(anchor + 0.3 * self.normal(self.B, positions, self.V))
        return anchor.to(self.dtype), attributes

    def tokens(self) -> Tensor:
        return self.integers(0, self.V, self.B, K)

    def lengths(self) -> Tensor:
        return self.full(K, self.B, dtype=torch.int64)

    def bound(self) -> tuple[Tensor, ...]:
        counts = (self.full(0, self.B, dtype=torch.int64), self.full(0, self.B, dtype=torch.int64))
        return self.full(0, self.B, WINDOW), *counts, self.full(0.7, self.B), self.full(0, self.B, dtype=torch.bool)

    def gather_logprobs(self) -> Case:
        logits, _ = self.logits(K)
        arguments = (logits, self.tokens())
        return self.case("gather_logprobs", arguments, read=(logits,))

    def score_prefixes(self) -> Case:
        arguments = (self.normal(N, self.B, K), self.normal(self.B, K), self.full(1 / N, self.B, N))
        return self.case("score_prefixes", arguments, {"score": SCORE}, read=arguments)

    def accept_prefixes(self) -> Case:
        arguments = (self.normal(self.B, K), self.full(0, self.B), self.uniforms(self.B, K), self.lengths())
        return self.case("accept_prefixes", arguments, read=arguments)

    def update_bound_(self) -> Case:
        bound = self.bound()
        arguments = (bound, self.normal(self.B, 1), self.full(1, self.B, dtype=torch.bool))
        return self.case("update_bound_", arguments, CONSTANTS, read=(*arguments[0], *arguments[1:]))

    def verify_chunks(self) -> Case:
        logits, bound = self.logits(K), self.bound()
        weights = self.full(1 / N, self.B, N)
        arguments = (*logits, self.tokens(), self.lengths(), weights, self.uniforms(self.B, K), bound)
        return self.case("verify_chunks", arguments, {"score": SCORE} | CONSTANTS, read=logits)

    def draw_fallback(self) -> Case:
        anchor, attributes = (logits.select(-2, 0) for logits in self.logits(1))
        draft_probs = mpg_ext.warp_rows(anchor.float(), **NUCLEUS)
        rest = (self.full(1 / N, self.B, N), self.full(0.1, self.B), self.uniforms(self.B))
        arguments = (anchor, attributes, draft_probs, *rest, self.full(1, self.B, dtype=torch.bool))

        def masses(*arguments: Tensor, score: str) -> Tensor:
            return reference.fallback_masses(*arguments[:5], score=score)[0]

        return self.case("draw_fallback", arguments, {"score": SCORE}, read=arguments[:3], masses=masses)

    def draw_uniforms(self) -> Case:
        seeds = self.full(7, self.B, dtype=torch.int64)
        options = {"purpose": 1, "count": K}
        return self.case("draw_uniforms", (seeds, seeds), options, read=(seeds, seeds), is_random=True)

    def combine_geometric(self) -> Case:
        anchor, attributes = self.logits(K + 1)
        arguments = (attributes, self.full(0.5, self.B, K + 1, N), anchor, anchor)
        return self.case("combine_rows", arguments, {"target": "geometric"}, read=(anchor, attributes))

    def combine_arithmetic(self) -> Case:
        _, attributes = self.logits(K + 1)
        arguments = (attributes, self.full(1 / N, self.B, K + 1, N), None, None)
        return self.case("combine_rows", arguments, {"target": "arithmetic"}, read=(attributes,))

    def rows(self) -> Tensor:
        return (3 * self.normal(self.B, self.V)).log_softmax(-1)

    def warp_temperature(self) -> Case:
        rows = self.rows()
        return self.case("warp_rows", (rows,), {"temperature": 0.7}, read=(rows,))

    def warp_top_p(self) -> Case:
        rows = self.rows()
        return self.case("warp_rows", (rows,), NUCLEUS, read=(rows,))

    def draw_tokens(self) -> Case:
        probs = self.rows().exp()
        arguments = (probs, self.uniforms(self.B))
        return self.case("draw_tokens", arguments, read=(probs,), masses=lambda probs, uniforms: probs)

    def draw_top_p(self) -> Case:
        """Two ops against a sort: the warped row is written and read once more."""
        rows = self.rows()

        def draw(ops: Any) -> Callable[..., Tensor]:
            return lambda rows, uniforms, **options: ops.draw_tokens(ops.warp_rows(rows, **options), uniforms)

        def masses(rows: Tensor, uniforms: Tensor, **options: float) -> Tensor:
            return reference.warp_rows(rows, **options)

        functions = (draw(mpg_ext), plain.draw_from_nucleus, draw(reference))
        arguments = (rows, self.uniforms(self.B))
        return Case(*functions, arguments, NUCLEUS, read=(rows, rows, rows), masses=masses, is_random=True)

    def block(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = 3 * self.normal(self.B, K + 1, self.V)
        target = (logits + 0.3 * self.normal(self.B, K + 1, self.V)).softmax(-1)
        draft = logits[:, :K].softmax(-1)
        tokens = torch.multinomial(draft.view(-1, self.V), 1, generator=self.generator).view(self.B, K)
        return target, draft, tokens, self.lengths()

    def verify_block(self) -> Case:
        target, draft, tokens, lengths = self.block()
        arguments = (target, draft, tokens, lengths, self.uniforms(self.B, K))
        return self.case("verify_block", arguments, read=(target[:, 1:K], draft[:, 1:]))

    def draw_residual(self) -> Case:
        block = self.block()
        accepted = self.full(1, self.B, dtype=torch.int64)
        arguments = (*block, accepted, self.full(0.9, self.B), self.uniforms(self.B))

        def masses(*arguments: Tensor) -> Tensor:
            return reference.residual_rows(*arguments[:6])

        return self.case("draw_residual", arguments, read=(block[0][:, 1], block[1][:, 1]), masses=masses)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def texts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Lengths, limits, tokens that end a text, and a chunk. No text ends, however often the op is called."""
        lengths, limits = self.integers(1, 9, self.B), self.full(2**40, self.B, dtype=torch.int64)
        return lengths, limits, self.full(self.V, 1, dtype=torch.int64), self.tokens()

    def flags(self, *values: bool) -> list[Tensor]:
        return [self.full(value, self.B, dtype=torch.bool) for value in values]

    def count_usable_(self) -> Case:
        texts, probs = self.texts(), self.normal(self.B, K, self.V).exp()
        arguments = (self.flags(True, False), *texts, probs, self.integers(0, K + 1, self.B))
        # of the probabilities those of the chunk alone
        return self.case("count_usable_", arguments, read=(*texts, texts[-1]))

    def commit_block_(self) -> Case:
        lengths, *texts = self.texts()
        tokens, numbers = self.integers(0, self.V, self.B, MOST_TOKENS), self.integers(0, self.V, 2, self.B)
        rows = [tokens, lengths, *numbers, *self.flags(True, False, False)]
        accepted, token = self.integers(0, K + 1, self.B), self.integers(0, self.V, self.B)
        arguments = (rows, *texts, accepted, token, self.normal(self.B, K + 1))
        return self.case("commit_block_", arguments, read=(lengths, *numbers, *texts, accepted, token))

    def adapters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features of a size V, factors and groups of N rows a sequence, each of one token and another adapter."""
        x = self.normal(N * self.B, 1, self.V).to(self.dtype)
        down, up = (self.normal(N + 1, RANK, self.V).to(self.dtype) for _ in range(2))
        groups = torch.arange(1, N + 1, device=self.device).repeat_interleave(self.B)
        return x, down, up, groups

    def lora_shrink(self) -> Case:
        x, down, _, groups = self.adapters()
        return self.case("lora_shrink", (x, down, groups), read=(x, down[1:]))

    def lora_expand_(self) -> Case:
        out, _, up, groups = self.adapters()
        hidden = self.normal(N * self.B, 1, RANK).to(self.dtype)
        return self.case("lora_expand_", (out, hidden, up, groups), read=(out, out, hidden, up[1:]))

    def attend_rows(self) -> Case:
        """One query a row, of N rows a sequence; as many keys in the longest as V, and evenly fewer in the others."""
        num_rows, heads, size, longest = N * self.B, 4, 64, self.V
        query, key, value = (self.normal(num_rows, heads, n, size).to(self.dtype) for n in (1, longest, longest))
        ends = torch.linspace(longest / num_rows, longest, num_rows, device=self.device).long()
        read = [held[row, :, :end] for held in (key, value) for row, end in enumerate(ends.tolist())]
        return self.case("attend_rows", (query, key, value, ends[:, None] - 1), read=(query, ends, *read))

    def linear_panels(self) -> Case:
        """B rows of V features and as many outputs, beside torch's product of a plain weight."""
        x, weight = self.normal(self.B, self.V), self.normal(self.V, self.V)

        def product(x: Tensor, panels: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, weight)

        functions = mpg_ext.linear_panels, product, reference.linear_panels
        return Case(*functions, (x, pack(weight)), read=(x, weight))

    def rms_norm(self) -> Case:
        """B rows of V features, with the roundings of Llama."""
        x, weight = (self.normal(*shape).to(self.dtype) for shape in ((self.B, self.V), (self.V,)))
        return self.case("rms_norm", (x, weight), {"eps": 1e-6, "rounds_first": True}, read=(x, weight))

    def case(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any] | None = None, **more: Any) -> Case:
        functions = (getattr(library, name) for library in (mpg_ext, plain, reference))
        return Case(*functions, arguments, options or {}, **more)
