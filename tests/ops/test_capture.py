"""Ops inside a captured graph: replayed, they compute from what lies in their inputs then, and wait for nothing.

The graphs are CUDA's where there is a GPU. What holds without one: a traced round has no step that reads a value on the
host, follows its inputs when run again, and no source of a kernel or of the binding calls anything that waits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import mpg_ext
from calls import CONSTANTS, ON_CPU_ALONE, OPS, calls, clone, outputs_of, written_by

CSRC = Path(__file__).parents[2] / "csrc"
NUM_REPLAYS = 5

needs_graphs = pytest.mark.skipif(
    not (torch.cuda.is_available() and mpg_ext.build_info()["cuda"]), reason="no CUDA build or no GPU"
)


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of one step, after the step itself on another stream, as capture demands; and what the graph fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def assert_same_bits(out: list[Tensor], wanted: list[Tensor]) -> None:
    for tensor, expected in zip(out, wanted, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)


@needs_graphs
@pytest.mark.parametrize("op", [op for op in OPS if op not in ON_CPU_ALONE])
def test_replayed_op_follows_its_inputs(op):
    run = getattr(mpg_ext, op)
    static = clone(calls("cuda", seed=0, V=9000)[op])
    graph, result = captured(lambda: run(**static))
    for seed in range(1, 1 + NUM_REPLAYS):
        fresh = clone(calls("cuda", seed=seed, V=9000)[op])
        for tensor, value in zip(tree_leaves(static), tree_leaves(fresh), strict=True):
            if isinstance(value, Tensor):
                tensor.copy_(value)
        graph.replay()
        wanted = outputs_of(run(**fresh))
        assert_same_bits(outputs_of(result), wanted)
        assert_same_bits(written_by(static), written_by(fresh))


def round_of(state: dict[str, Any], chunk: dict[str, Tensor]) -> list[Tensor]:
    """Keys, acceptance, fallback and bound of one round on shared state: every number of it is on the device."""
    state["rounds"] += 1
    draw = {"seeds": state["seeds"], "rounds": state["rounds"]}
    uniforms = mpg_ext.draw_uniforms(**draw, purpose=0, count=chunk["tokens"].shape[1])
    bound = state["bound"]
    verified = mpg_ext.verify_chunks(*chunk.values(), uniforms, bound, score="arithmetic", constants=CONSTANTS)
    needs_fallback = verified[2] == 0
    drawn = mpg_ext.draw_fallback(
        chunk["anchor_logits"][:, 0],
        chunk["attribute_logits"][:, :, 0],
        chunk["anchor_logits"][:, 0].softmax(-1),
        chunk["weights"],
        bound[3],
        mpg_ext.draw_uniforms(**draw, purpose=1, count=1)[:, 0],
        needs_fallback,
        score="arithmetic",
    )
    mpg_ext.update_bound_(bound, drawn[1][:, None], needs_fallback, constants=CONSTANTS)
    return [uniforms, *verified, *drawn]


def round_inputs(device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    call = calls(device, V=200)["verify_chunks"]
    keys = {"seeds": torch.tensor([5, 9], device=device), "rounds": torch.zeros(2, dtype=torch.int64, device=device)}
    chunk = {name: value for name, value in call.items() if isinstance(value, Tensor) and name != "uniforms"}
    return clone({"bound": call["bound"], **keys}), chunk


def assert_rounds_agree(replay: Callable[[], list[Tensor]], state: dict[str, Any], device: str) -> None:
    """Rounds by replay on `state` equal rounds by calls; each draws uniforms that no other has drawn."""
    by_calls, chunk = clone(state), round_inputs(device)[1]
    uniforms = []
    for _ in range(NUM_REPLAYS):
        out = replay()
        assert_same_bits(out, round_of(by_calls, chunk))
        assert_same_bits(tree_leaves(state), tree_leaves(by_calls))
        uniforms.append(out[0].clone())
    drawn = torch.stack(uniforms)
    assert len(drawn.unique()) == drawn.numel()


@needs_graphs
def test_replayed_rounds_draw_with_new_keys():
    state, chunk = round_inputs("cuda")
    graph, result = captured(lambda: round_of(state, chunk))

    def replay() -> list[Tensor]:
        graph.replay()
        return result

    assert_rounds_agree(replay, state, "cuda")


def test_traced_rounds_draw_with_new_keys():
    """What a graph would replay, on the CPU: one recorded round, run again on the state that it left."""
    state, chunk = round_inputs("cpu")
    traced = make_fx(round_of)(clone(state), chunk)
    assert_rounds_agree(lambda: traced(state, chunk), state, "cpu")


def test_a_round_never_reads_a_value_on_the_host():
    traced = make_fx(round_of)(*round_inputs("meta"))
    targets = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
    assert {"mpg.draw_uniforms.default", "mpg.verify_chunks.default", "mpg.draw_fallback.default"} <= targets
    assert not {target for target in targets if re.search(r"local_scalar_dense|nonzero|masked_select|_to_copy", target)}


@pytest.mark.parametrize("file", [*CSRC.glob("kernels/*.cu*"), CSRC / "bindings.cpp"], ids=lambda file: file.name)
def test_no_launcher_waits_for_the_device_or_allocates_outside_torch(file):
    """Synchronisation, blocking copies and raw allocations end a capture."""
    assert not re.findall(r"Synchronize|cudaMemcpy\b|cudaMalloc|cudaFree|\.item\b|\.cpu\(", file.read_text())
