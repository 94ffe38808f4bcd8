"""How the ops appear to torch and to a careless caller: fake kernels, device="meta", torch.compile, error messages."""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import mpg_ext
import reference
from calls import ON_CPU_ALONE, OPS, calls, outputs_of
from longer import IS_LONG, thinned

B, K, N, V, W = 2, 3, 2, 7, 4  # as calls() has them


@pytest.fixture
def opcheck(device, request):
    """opcheck(name, inputs). What traces an op is the same Python where simulated kernels run in place of the CPU's
    code: there, in the short form, only what the kernels return is checked."""
    checks = ["test_schema", "test_faketensor"]
    if IS_LONG or request.node.callspec.params["device"] != "simt":
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]

    def check(name: str, inputs: dict) -> None:
        is_positional = {key: value is None or isinstance(value, Tensor | list) for key, value in inputs.items()}
        is_positional["constants"] = False
        positional = [value for key, value in inputs.items() if is_positional[key]]
        keywords = {key: value for key, value in inputs.items() if not is_positional[key]}
        torch.library.opcheck(getattr(torch.ops.mpg, name).default, positional, keywords, test_utils=checks)

    return check


@pytest.mark.parametrize("name", OPS)
def test_opcheck(device, opcheck, name):
    if device.type == "cuda" and name in ON_CPU_ALONE:
        pytest.skip("on the CPU alone")
    opcheck(name, calls(device)[name])


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("combine_rows", {"base_logits": None, "anchor_logits": None, "target": "arithmetic"}),
        ("verify_block", {"draft_probs": None}),
        ("draw_residual", {"draft_probs": None}),
        ("count_usable_", {"draft_probs": None, "most": None}),
        ("commit_block_", {"token": None, "log_totals": None}),
        ("linear_panels", {"bias": None, "down": None, "up": None, "groups": None}),
    ],
)
def test_opcheck_without_optional_tensors(device, opcheck, name, left_out):
    if device.type == "cuda" and name in ON_CPU_ALONE:
        pytest.skip("on the CPU alone")
    opcheck(name, calls(device)[name] | left_out)


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors_get_the_shapes_and_dtypes_of_real_ones(name):
    real = getattr(mpg_ext, name)(**calls()[name])
    meta = getattr(mpg_ext, name)(**calls("meta")[name])
    for tensor, wanted in zip(outputs_of(meta), outputs_of(real), strict=True):
        assert (tensor.device.type, tensor.shape, tensor.dtype) == ("meta", wanted.shape, wanted.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_meta_results_are_in_the_accumulation_dtype(dtype):
    logits = torch.zeros(B, K, V, dtype=dtype, device="meta")
    out = mpg_ext.gather_logprobs(logits, torch.ones(B, K, dtype=torch.int64, device="meta"))
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", OPS)
def test_op_and_twin_have_one_signature(name):
    assert inspect.signature(getattr(mpg_ext, name)) == inspect.signature(getattr(reference, name))


def test_traced_graph_calls_the_op():
    """Traced without a compiler: the op is one node, not a break in the graph."""
    compiled = torch.compile(mpg_ext.gather_logprobs, backend="eager", fullgraph=True)
    inputs = calls()["gather_logprobs"]
    torch.testing.assert_close(compiled(**inputs), mpg_ext.gather_logprobs(**inputs))


SMALL = torch.zeros(1)
BOUND = calls()["update_bound_"]["bound"]


def bound_with(position: int, tensor: Tensor) -> dict[str, list[Tensor]]:
    return {"bound": [*BOUND[:position], tensor, *BOUND[position + 1 :]]}


ERRORS = [
    # one wrong argument, and the message it earns
    ("gather_logprobs", {"logits": torch.zeros(K, V)}, r"logits must be \(R, K, V\), got \(3, 7\)"),
    ("gather_logprobs", {"logits": torch.zeros(B, K, V).int()}, "logits must be float32, float16, bfloat16 or float64"),
    ("gather_logprobs", {"logits": torch.zeros(B, V, K).mT}, "unit stride in the vocabulary, got 3"),
    ("gather_logprobs", {"logits": torch.zeros(B, K, 0)}, "vocabulary of at least 1 token"),
    ("gather_logprobs", {"logits": torch.zeros(B, 33, V)}, "K must be between 1 and 32, got 33"),
    ("gather_logprobs", {"logits": torch.zeros(B, 0, V)}, "K must be between 1 and 32, got 0"),
    ("gather_logprobs", {"tokens": SMALL.long()}, r"tokens must be \(R, K\) = \(2, 3\), got \(1,\)"),
    ("gather_logprobs", {"tokens": torch.ones(B, K).int()}, "tokens must be int64, got int32"),
    ("gather_logprobs", {"temperature": 0.0}, r"temperature must be in \[2\^-126, 2\^126\], got 0"),
    ("gather_logprobs", {"temperature": 1e-38}, "temperature must be in"),
    ("gather_logprobs", {"temperature": 1e38}, "temperature must be in"),
    ("gather_logprobs", {"temperature": math.nan}, "temperature must be in"),
    ("score_prefixes", {"weights": torch.ones(N + 1, B)}, r"weights must be \(B, N\) = \(2, 2\), got \(3, 2\)"),
    ("score_prefixes", {"weights": torch.ones(B, N).double()}, "weights must be float32, got float64"),
    ("score_prefixes", {"attribute_logprobs": torch.zeros(0, B, K)}, "N, the number of attribute models"),
    ("score_prefixes", {"attribute_logprobs": torch.zeros(N, B, K).half()}, "must be float32 or float64"),
    ("score_prefixes", {"anchor_logprobs": torch.zeros(K, B)}, r"anchor_logprobs must be \(B, K\) = \(2, 3\)"),
    ("score_prefixes", {"score": "harmonic"}, "score must be 'arithmetic' or 'geometric', got 'harmonic'"),
    ("accept_prefixes", {"uniforms": torch.ones(B, K)}, "uniforms must be float64, got float32"),
    ("accept_prefixes", {"lengths": torch.ones(B, 1).long()}, r"lengths must be \(B,\) = \(2,\), got \(2, 1\)"),
    ("accept_prefixes", {"log_bound": SMALL}, r"log_bound must be \(B,\) = \(2,\), got \(1,\)"),
    ("update_bound_", bound_with(0, torch.zeros(W, B).mT), "window is written in place and must be contiguous"),
    ("update_bound_", bound_with(0, torch.zeros(B, 0)), "window must hold at least 1 score"),
    ("update_bound_", bound_with(1, torch.zeros(B, 1).long()), r"num_scores must be \(B,\) = \(2,\), got \(2, 1\)"),
    ("update_bound_", bound_with(2, torch.zeros(B).int()), "num_rounds must be int64, got int32"),
    ("update_bound_", bound_with(3, torch.zeros(B).double()), "log_bound must be float32, got float64"),
    ("update_bound_", bound_with(4, torch.zeros(B)), "frozen must be bool, got float32"),
    ("update_bound_", {"bound": BOUND[:4]}, "5 tensors window, num_scores, num_rounds, log_bound and frozen, got 4"),
    ("update_bound_", {"constants": [0.5] * 4}, "3 numbers log_initial_bound, log_gamma and tau, got 4"),
    ("update_bound_", {"scores": torch.zeros(B, 34)}, "P must be between 1 and 33, got 34"),
    ("update_bound_", {"active": torch.ones(B).long()}, "active must be bool, got int64"),
    ("verify_chunks", {"attribute_logits": torch.zeros(N, B, K, V + 1)}, r"\(N, B, K, V\) = \(2, 2, 3, 7\), got \(2,"),
    ("verify_chunks", {"attribute_logits": torch.zeros(N, B, 33, V)}, r"\(N, B, K, V\) = \(2, 2, 3, 7\), got \(2,"),
    ("verify_chunks", {"attribute_logits": torch.zeros(N, B, K, V).half()}, "must be float32, got float16"),
    ("verify_chunks", {"attribute_logits": torch.zeros(0, B, K, V)}, "must be at least 1, got 0"),
    ("verify_chunks", {"anchor_logits": torch.zeros(B, K, V).double()}, "attribute_logits must be float64"),
    ("verify_chunks", bound_with(1, torch.zeros(B)), "num_scores must be int64, got float32"),
    ("draw_fallback", {"draft_probs": torch.zeros(B, V).half()}, "draft_probs must be float32, got float16"),
    ("draw_fallback", {"uniforms": torch.zeros(B)}, "uniforms must be float64, got float32"),
    ("draw_fallback", {"score": ""}, "score must be"),
    ("draw_uniforms", {"seeds": torch.zeros(B)}, "seeds must be int64, got float32"),
    ("draw_uniforms", {"rounds": torch.zeros(B + 1).long()}, r"rounds must be \(B,\) = \(2,\), got \(3,\)"),
    ("draw_uniforms", {"purpose": -1}, r"purpose must be in \[0, 2\^32\), got -1"),
    ("draw_uniforms", {"count": -1}, r"count must be in \[0, 2\^32\), got -1"),
    ("draw_uniforms", {"first": -1}, r"first must be in \[0, 2\^32 - count\], got -1"),
    ("draw_uniforms", {"first": 2**32 - 4}, r"first must be in \[0, 2\^32 - count\], got 4294967292"),
    ("combine_rows", {"attribute_logits": torch.zeros(N, B, V)}, r"attribute_logits must be \(N, B, P, V\), got"),
    ("combine_rows", {"attribute_logits": torch.zeros(0, B, K, V)}, "must be at least 1, got 0"),
    ("combine_rows", {"attribute_logits": torch.zeros(N, B, 34, V)}, "P must be between 1 and 33, got 34"),
    ("combine_rows", {"weights": torch.ones(B, N)}, r"weights must be \(B, P, N\) = \(2, 3, 2\), got \(2, 2\)"),
    ("combine_rows", {"base_logits": torch.zeros(B, K, V).half()}, "base_logits must be float32, got float16"),
    ("combine_rows", {"anchor_logits": torch.zeros(B, K, 5)}, r"anchor_logits must be \(B, P, V\) = \(2, 3, 7\)"),
    ("combine_rows", {"base_logits": torch.zeros(B, 34, V)}, r"base_logits must be \(B, P, V\) = \(2, 3, 7\)"),
    ("combine_rows", {"anchor_logits": torch.zeros(B, V, K).mT}, "anchor_logits must have unit stride"),
    ("combine_rows", {"base_logits": None}, "must both be given or both be None"),
    ("combine_rows", {"base_logits": None, "anchor_logits": None}, "geometric target needs base_logits and anchor_log"),
    ("combine_rows", {"temperature": 0.0}, r"temperature must be in \[2\^-126, 2\^126\], got 0"),
    ("combine_rows", {"target": "harmonic"}, "target must be 'arithmetic' or 'geometric', got 'harmonic'"),
    ("warp_rows", {"log_rows": torch.zeros(V)}, r"log_rows must be \(R, V\), got \(7,\)"),
    ("warp_rows", {"log_rows": torch.zeros(B, V).half()}, "log_rows must be float32 or float64"),
    ("warp_rows", {"log_rows": torch.zeros(B, 0)}, "vocabulary of at least 1 token"),
    ("warp_rows", {"temperature": -0.1}, "temperature must be finite and not negative, got -0.1"),
    ("warp_rows", {"temperature": math.nan}, "temperature must be finite and not negative"),
    ("warp_rows", {"top_k": -1}, "top_k must not be negative, got -1"),
    ("warp_rows", {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
    ("warp_rows", {"top_p": math.nan}, r"top_p must be in \(0, 1\]"),
    ("warp_rows", {"temperature": torch.ones(B)}, "temperature must be float64, got float32"),
    ("warp_rows", {"top_k": torch.ones(B).double()}, "top_k must be int64, got float64"),
    ("warp_rows", {"top_p": torch.ones(3).double()}, r"top_p must be \(R,\) = \(2,\), got \(3,\)"),
    ("warp_rows", {"min_p": torch.ones(B, 1).double()}, r"min_p must be \(R,\) = \(2,\), got \(2, 1\)"),
    ("warp_rows", {"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
    ("draw_tokens", {"probs": torch.ones(B, 0)}, "vocabulary of at least 1 token"),
    ("draw_tokens", {"uniforms": torch.ones(B)}, "uniforms must be float64, got float32"),
    ("verify_block", {"target_probs": torch.ones(B, 1, V)}, "K must be between 1 and 32, got 0"),
    ("verify_block", {"draft_probs": torch.ones(B, K + 1, V)}, r"draft_probs must be \(B, K, V\) = \(2, 3, 7\), got"),
    ("verify_block", {"tokens": torch.ones(B, K)}, "tokens must be int64, got float32"),
    ("verify_block", {"uniforms": torch.ones(B, K)}, "uniforms must be float64, got float32"),
    ("draw_residual", {"accepted": torch.ones(B)}, "accepted must be int64, got float32"),
    ("draw_residual", {"carry": torch.ones(B).double()}, "carry must be float32, got float64"),
    ("draw_residual", {"lengths": torch.ones(B + 1).long()}, r"lengths must be \(B,\) = \(2,\), got \(3,\)"),
    (
        "commit_block_",
        {"rows": []},
        "7 tensors tokens, lengths, last_tokens, rounds, active, unusable and empty, got 0",
    ),
    ("commit_block_", {"limits": torch.ones(B)}, "limits must be int64, got float32"),
    ("commit_block_", {"chunk": torch.ones(3, K).long()}, r"chunk must be \(B, L\) = \(2, 3\), got \(3, 3\)"),
    ("commit_block_", {"accepted": torch.ones(B, 1).long()}, r"accepted must be \(B,\) = \(2,\), got \(2, 1\)"),
    ("commit_block_", {"token": torch.ones(B)}, "token must be int64, got float32"),
    ("commit_block_", {"log_totals": torch.ones(B, K)}, r"log_totals must be \(B, L \+ 1\) = \(2, 4\), got \(2, 3\)"),
    ("commit_block_", {"log_totals": torch.ones(B, K + 1).half()}, "log_totals must be float32 or float64"),
    ("lora_shrink", {"x": torch.ones(B, V)}, r"x must be \(R, q, in\), got \(2, 7\)"),
    ("lora_shrink", {"x": torch.ones(B, K, 0)}, r"x must have at least 1 feature, got \(2, 3, 0\)"),
    (
        "lora_shrink",
        {"x": torch.ones(B, K, V).int()},
        "x must be float32, float16, bfloat16 or float64 on cpu, got int",
    ),
    ("lora_shrink", {"down": torch.ones(N, V)}, r"down must be \(G, r, in\), got \(2, 7\)"),
    ("lora_shrink", {"down": torch.ones(3, N, 5)}, r"down must be \(G, r, in\) = \(3, 2, 7\), got \(3, 2, 5\)"),
    ("lora_shrink", {"down": torch.ones(3, N, V).half()}, "down must be float32, got float16"),
    ("lora_shrink", {"groups": torch.ones(B).int()}, "groups must be int64, got int32"),
    ("lora_shrink", {"groups": torch.ones(3).long()}, r"groups must be \(R,\) = \(2,\), got \(3,\)"),
    ("lora_expand_", {"out": torch.ones(B, V)}, r"out must be \(R, q, out\), got \(2, 7\)"),
    ("lora_expand_", {"out": torch.ones(B, V, K).mT}, "out is written in place and must have unit stride .*, got 3"),
    ("lora_expand_", {"out": torch.ones(1, K, V).expand(B, K, V)}, "out .* must have memory of its own for every"),
    ("lora_expand_", {"hidden": torch.ones(B, K, 5)}, r"hidden must be \(R, q, r\) = \(2, 3, 2\), got \(2, 3, 5\)"),
    ("lora_expand_", {"hidden": torch.ones(B, K, N).half()}, "hidden must be float32, got float16"),
    ("lora_expand_", {"up": torch.ones(3, N, 5)}, r"up must be \(G, r, out\) = \(3, 2, 7\), got \(3, 2, 5\)"),
    ("lora_expand_", {"groups": torch.ones(B)}, "groups must be int64, got float32"),
    ("lora_expand_", {"blocks": [1, 0, 7]}, r"blocks must be .* of all 2 ranks and 7 outputs, got \(1, 0, 7\)"),
    ("lora_expand_", {"blocks": [1, 0, 3, 1]}, r"blocks must be .*, got \(1, 0, 3, 1\)"),
    ("lora_expand_", {"blocks": [2**63 - 1, 0, 7, 2**63 - 1, 0, 7, 4, 0, 7]}, "blocks must be .* of all 2 ranks"),
    ("lora_expand_", {"blocks": [2, 4, 3]}, r"blocks must be .*, got \(2, 4, 3\)"),
    ("lora_expand_", {"blocks": [2, 0, 8]}, r"blocks must be .*, got \(2, 0, 8\)"),
    ("attend_rows", {"query": torch.ones(B, 3, 7)}, r"query must be \(R, heads, q, D\), got \(2, 3, 7\)"),
    ("attend_rows", {"query": torch.ones(B, 4, 3, 7).int()}, "query must be float32, float16, bfloat16 or float64"),
    ("attend_rows", {"query": torch.ones(B, 5, 3, 7)}, "query must have a multiple of the key's 2 heads, got 5"),
    ("attend_rows", {"query": torch.ones(B, 4, 3, 0)}, "query must have at least 1 feature, got"),
    ("attend_rows", {"key": torch.ones(B, 2, 5, 9)}, r"key must be \(R, H, S, D\) = \(2, 2, 5, 7\), got"),
    ("attend_rows", {"key": torch.ones(3, 2, 5, 7)}, r"key must be \(R, H, S, D\) = \(2, 2, 5, 7\), got"),
    ("attend_rows", {"key": torch.ones(B, 2, 0, 7)}, "key must have at least 1 position, got"),
    ("attend_rows", {"key": torch.ones(B, 2, 5, 7).half()}, "key must be float32, got float16"),
    ("attend_rows", {"value": torch.ones(B, 2, 9, 6)}, r"value must be \(R, H, S, E\) = \(2, 2, 5, 6\), got"),
    ("attend_rows", {"positions": torch.ones(B, 3)}, "positions must be int64, got float32"),
    ("attend_rows", {"positions": torch.ones(B, 7).long()}, r"positions must be \(R, q\) = \(2, 3\), got \(2, 7\)"),
    ("linear_panels", {"x": torch.ones(B, 5)}, r"x must be \(..., in\) = \(2, 7\), got \(2, 5\)"),
    ("linear_panels", {"x": torch.tensor(1.0)}, r"x must be \(..., in\), got \(\)"),
    ("linear_panels", {"x": torch.ones(B, V).double()}, "x must be float32, got float64"),
    ("linear_panels", {"panels": torch.ones(2, V)}, r"panels must be \(T, in, 16\), got \(2, 7\)"),
    ("linear_panels", {"panels": torch.ones(2, V, 8)}, r"panels must be \(T, in, 16\) = \(2, 7, 16\), got \(2, 7, 8\)"),
    ("linear_panels", {"panels": torch.ones(2, V, 16).half()}, "panels must be float32, got float16"),
    ("linear_panels", {"panels": torch.ones(2, 0, 16)}, "panels must have at least 1 feature, got"),
    ("linear_panels", {"bias": torch.ones(5)}, r"bias must be \(out,\) = \(21,\), got \(5,\)"),
    ("linear_panels", {"out_features": 33}, "out_features must be a number that fills 2 panels of 16, .*, got 33"),
    ("linear_panels", {"out_features": 16}, "out_features must be a number that fills 2 panels of 16, .*, got 16"),
    ("linear_panels", {"down": None}, "down, up and groups must all be there, or none of them"),
    ("linear_panels", {"groups": None}, "down, up and groups must all be there, or none of them"),
    (
        "linear_panels",
        {"groups": torch.ones(4).long()},
        r"x .* of as many tokens for each of R = 4 rows, got \(2, 3, 7\)",
    ),
    ("linear_panels", {"up": torch.ones(3, N, 5)}, r"up must be \(G, r, out\) = \(3, 2, 21\), got \(3, 2, 5\)"),
    ("rms_norm", {"x": torch.ones(B, 5)}, r"x must be \(..., in\) = \(2, 7\), got \(2, 5\)"),
    ("rms_norm", {"x": torch.tensor(1.0)}, r"x must be \(..., in\), got \(\)"),
    ("rms_norm", {"x": torch.ones(B, V).bfloat16()}, "x must be float32, got bfloat16"),
    ("rms_norm", {"weight": torch.ones(V).int()}, "weight must be float32, float16, bfloat16 or float64"),
    ("rms_norm", {"weight": torch.ones(0)}, "weight must have at least 1 feature, got"),
    ("rms_norm", {"weight": torch.ones(1, V)}, r"weight must be \(in,\), got \(1, 7\)"),
    ("linear_panels", {"out_features": -1}, "out_features must be a number that fills 2 panels of 16, .*, got -1"),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), ERRORS, ids=[f"{c[0]}-{next(iter(c[1]))}-{i}" for i, c in enumerate(ERRORS)]
)
def test_wrong_argument_is_named_with_what_was_wanted_and_what_came(name, change, message):
    with pytest.raises(ValueError, match=message):
        getattr(mpg_ext, name)(**(calls()[name] | change))


def test_build_info_names_the_torch_it_was_built_for():
    info = mpg_ext.build_info()
    assert set(info) == {"torch", "cuda", "cuda_version", "archs", "compiler", "cpu_capability"}
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert isinstance(info["cuda"], bool)
    assert info["compiler"]


@pytest.mark.parametrize("level", thinned(["avx3", "portable"]))  # `make levels` runs at all of them
def test_level_of_the_processor_is_the_one_that_is_asked_for_or_an_error(level):
    code = "import mpg_ext; print(mpg_ext.build_info()['cpu_capability'])"
    environment = os.environ | {"MPG_CPU_CAPABILITY": level}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if level == "portable":
        assert run.stdout == "portable\n"
    else:
        wrong = run.stderr.strip().splitlines()[-1]
        assert re.fullmatch(r"ValueError: MPG_CPU_CAPABILITY must name a level .* \(portable.*\), got avx3", wrong)
