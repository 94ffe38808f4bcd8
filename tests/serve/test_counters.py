"""What /metrics counts, beside what the answers themselves say of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from mpg.serve.metrics import SHORT
from serving import serving
from test_engine import CALM, TEXT, completion, counted, slowed

NAMES = ("read_prompt", "reused_prompt", "drafted", "accepted")


def test_drafts_prompts_and_latencies_are_those_of_the_answers(precise_model):
    system = range(10, 110)
    prompts = [CALM, [*system, 200], [*system, 201, 202], [*system, 200]]
    precise_model.models.kept.clear()
    stats, counts = [], [[0] * len(NAMES)]
    with serving(precise_model, prefill_tokens=64) as served:
        for prompt in prompts:
            answer = served.post(TEXT, completion(prompt, max_tokens=20)).json()
            stats.append(answer["choices"][0]["mpg"]["stats"])
            counts.append([counted(served, f"mpg_{name}_tokens_total") for name in NAMES])
        name = "mpg_first_token_seconds"
        buckets = [counted(served, f'{name}_bucket{{le="{float(most)}"}}') for most in SHORT]
        whole = [counted(served, f"{name}_{what}") for what in ("sum", "count")]
        assert counted(served, "mpg_queue_seconds_count") == len(prompts)
    found = [[after - before for before, after in zip(*pair, strict=True)] for pair in pairwise(counts)]
    # base and adapter: each reads a prompt but for its last token, the second one in parts, or has its beginning
    assert [each[:2] for each in found] == [[4, 0], [200, 0], [2, 200], [0, 200]]
    for each, own in zip(found, stats, strict=True):
        rounds = own["rounds"]
        assert each[2:] == pytest.approx([own["drafted_per_round"] * rounds, own["accepted_per_round"] * rounds])
        assert each[3] / each[2] == pytest.approx(own["accept_rate"])
    assert counts[-1][2] > counts[-1][3] > 0
    times = [own["time_to_first_token"] for own in stats]
    assert whole == pytest.approx([sum(times), len(times)])
    assert buckets == [sum(time <= most for time in times) for most in SHORT]


def test_the_first_token_is_told_from_when_the_request_came(precise_model):
    with serving(precise_model, max_rows=1) as served, slowed(precise_model, 0.02), ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: served.post(TEXT, completion(CALM)).json(), range(4)))
        waited = counted(served, "mpg_queue_seconds_sum")
    assert sum(answer["choices"][0]["mpg"]["stats"]["time_to_first_token"] for answer in answers) > waited > 0.02


def test_bytes_of_caches_are_told_while_requests_run(precise_model, monkeypatch):
    monkeypatch.setattr(precise_model.models, "eos_token_ids", ())  # it runs for longer than it takes to look
    with serving(precise_model) as served, slowed(precise_model, 0.01), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.post, TEXT, completion(CALM, sampler="direct", max_tokens=40))
        served.wait_until(lambda engine: counted(served, "mpg_cache_bytes ") > 0)
        assert answer.result().status_code == 200 and served.is_idle()
        assert counted(served, "mpg_cache_bytes ") == 0
