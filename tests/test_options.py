"""Options and weights: what is refused, and that the message names the argument, what was expected and what came."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpg import options
from mpg.options import OPTIONS, SAMPLERS, Options, check_weights, describe, has_option, parse_weights

SOURCE = Path(options.__file__)

NAMES = ("E", "S", "T", "J")


def test_each_sampler_has_its_own_defaults():
    scr, direct, exact = (Options(sampler=name) for name in ("scr", "direct", "exact"))
    assert Options() == exact
    assert (exact.target, exact.temperature, exact.top_p, exact.chunk_size) == ("geometric", 1.0, 1.0, 4)
    assert (scr.target, scr.temperature, scr.top_p, scr.chunk_size, scr.window, scr.gamma, scr.tau) == (
        "arithmetic", 0.7, 0.9, 4, 20, 1.2, 0.01,
    )  # fmt: skip
    assert (direct.target, direct.temperature, direct.top_p, direct.chunk_size) == ("geometric", 1.0, 1.0, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samplr": "scr"}, "samplr: unknown option; did you mean 'sampler'"),
        ({"zzz": 1}, "zzz: unknown option; expected one of sampler, target"),
        ({"sampler": "beam"}, "sampler: expected one of exact, direct, auto, scr.*, got 'beam'"),
        ({"target": "harmonic"}, "target: expected one of .*, got 'harmonic'"),
        ({"target": "base", "sampler": "scr"}, "target: expected one of arithmetic, geometric, got 'base'"),
        ({"top_k": 2**70}, "top_k: expected an integer 0"),
        ({"top_k": -1}, r"top_k: expected an integer 0\.\.2147483647, got -1"),
        ({"min_p": 1.1}, r"min_p: expected a number in \[0, 1\], got 1.1"),
        ({"min_p": 0.1, "sampler": "scr"}, "min_p: not an option of sampler 'scr', got 0.1"),
        (
            {"mixture_span": 0, "target": "arithmetic"},
            "mixture_span: expected 'token', 'sequence' or an integer 1.*, got 0",
        ),
        ({"mixture_span": 2}, "mixture_span: expected 'token' unless the target is 'arithmetic', got 2"),
        ({"draft": "beam"}, "draft: expected one of .*, got 'beam'"),
        ({"adaptive": "no"}, "adaptive: expected True or False, got 'no'"),
        ({"verify": "none"}, "verify: expected one of block, token, got 'none'"),
        ({"chunk_size": 0}, r"chunk_size: expected an integer 1\.\.32, got 0"),
        ({"chunk_size": 33}, r"chunk_size: expected an integer 1\.\.32, got 33"),
        ({"chunk_size": 2.5}, "chunk_size: expected an integer .*, got 2.5"),
        ({"chunk_size": 4, "sampler": "direct"}, "chunk_size: not an option of sampler 'direct', got 4"),
        ({"temperature": -0.1}, "temperature: expected a number .*, got -0.1"),
        ({"temperature": 0, "sampler": "scr"}, "temperature: scr .* expected > 0, got 0; use sampler 'direct'"),
        ({"temperature": math.nan}, "temperature: .*got nan"),
        ({"top_p": 0}, r"top_p: expected a number in \(0, 1\], got 0"),
        ({"top_p": 1.01}, r"top_p: expected a number in \(0, 1\], got 1.01"),
        ({"gamma": 0.99, "sampler": "scr"}, "gamma: expected a number .*, got 0.99"),
        ({"gamma": 1.5}, "gamma: not an option of sampler 'exact', got 1.5"),
        ({"tau": -1, "sampler": "scr"}, "tau: .*got -1"),
        ({"window": 0, "sampler": "scr"}, r"window: expected an integer 1\.\.65536, got 0"),
        ({"initial_bound": 0, "sampler": "scr"}, "initial_bound: .*got 0"),
        ({"initial_bound": 1e40, "sampler": "scr"}, "initial_bound: .*got 1e[+]40"),
        ({"empty": "retry", "sampler": "scr"}, "empty: expected one of raise, base, got 'retry'"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1, got 0"),
        ({"seed": -1}, "seed: expected an integer .*, got -1"),
        ({"seed": True}, "seed: expected an integer .*, got True"),
    ],
)
def test_bad_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options.of(options)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_option_is_checked_and_has_its_default_or_is_refused(sampler):
    """The default is given as None and is a value that the check takes; a sampler without one refuses every value."""
    options = Options.of({"sampler": sampler})
    assert options == Options(sampler=sampler, **{name: None for name in OPTIONS if name != "sampler"})
    for name, option in OPTIONS.items():
        has_it = sampler in option.metadata["defaults"]
        assert has_option(sampler, name) == has_it
        if has_it and getattr(options, name) is not None:
            option.metadata["check"](name, getattr(options, name))
        with pytest.raises(ValueError, match=f"^{name}: {'expected' if has_it else 'not an option of sampler'}"):
            Options.of({"sampler": sampler, name: object()})


def test_docstring_has_every_option_with_its_meaning_and_defaults():
    for name, option in OPTIONS.items():
        assert f"\n{name:<16}" in Options.__doc__
        assert " ".join(describe(name).split()) in " ".join(Options.__doc__.split())
        assert option.metadata["meaning"] in describe(name)
    assert describe("top_p").endswith("Default: 1.0 (exact, direct, auto), 0.9 (scr, token-rs, seq-rs)")
    assert describe("trace").endswith("Default: False")
    assert max(map(len, Options.__doc__.splitlines())) <= 120


def test_types_say_what_none_is(tmp_path):
    """None is every option's default and is read as what the default is."""
    given = ", ".join(f"{name}=None" for name in OPTIONS)
    lines = ["from mpg.options import Options", f"Options({given})", "heat: float = Options().temperature"]
    (tmp_path / "given.py").write_text("\n".join([*lines, "Options(top_p='much')"]))
    command = [sys.executable, "-m", "mypy", "--follow-imports=skip", "--no-incremental", tmp_path / "given.py", SOURCE]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"MYPYPATH": str(SOURCE.parents[1])}
    )
    errors = [line for line in done.stdout.splitlines() if "given.py" in line]
    assert len(errors) == 1, done.stdout
    assert 'given.py:4: error: Argument "top_p" to "Options" has incompatible type "str"' in errors[0]


def test_seeds_may_be_one_per_prompt(model):
    both = model.generate(["a", "b"], weights={"E": 1}, seed=[9, 4], max_new_tokens=4, num_return_sequences=2)
    assert [result.seed for result in both] == [9, 10, 4, 5]
    assert both[2].tokens == model.generate("b", weights={"E": 1}, seed=4, max_new_tokens=4).tokens
    with pytest.raises(ValueError, match=r"seed: expected one number, or one per prompt \(2\), got 1"):
        model.generate(["a", "b"], weights={"E": 1}, seed=[9])
    with pytest.raises(ValueError, match=r"seed: expected an integer .*, got -1"):
        model.generate(["a"], weights={"E": 1}, seed=[-1])


def test_weights_are_parsed():
    assert parse_weights(" E=1, T = -0.5 ,S=2e-1") == {"E": 1.0, "T": -0.5, "S": 0.2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("E", "weights: expected NAME=NUMBER, got 'E'"),
        ("E=", "weights: expected NAME=NUMBER, got 'E='"),
        ("=1", "weights: expected NAME=NUMBER, got '=1'"),
        ("E=much", "weights: expected a number for 'E', got 'much'"),
        ("E=1,T=1,E=2", "weights: 'E' is given twice"),
    ],
)
def test_bad_weight_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_weights(text)


def test_attributes_not_named_weigh_nothing():
    assert check_weights({"T": 2, "E": -1}, NAMES, "geometric") == (-1.0, 0.0, 2.0, 0.0)


@pytest.mark.parametrize(
    ("weights", "target", "message"),
    [
        ({"X": 1}, "geometric", "weights: expected some of E, S, T, J, got 'X'"),
        ({}, "geometric", "weights: expected a number for some of E, S, T, J .such as E=1., got {}"),
        (None, "arithmetic", "weights: expected .*, got None"),
        ([1, 2], "arithmetic", r"weights: expected .*, got \[1, 2\]"),
        ({"E": 0, "T": 0.0}, "geometric", "weights: expected at least one that is not 0"),
        ({"E": math.nan}, "geometric", "weights: expected 0, or a number .* for 'E', got nan"),
        ({"E": math.inf}, "geometric", "weights: expected 0, or a number .* for 'E', got inf"),
        ({"E": 1e30}, "geometric", "weights: expected 0, or a number of size 1e-06 to 10000 for 'E', got 1e[+]30"),
        ({"E": -1e-30}, "geometric", "weights: expected 0, or a number .* for 'E', got -1e-30"),
        ({"E": "1"}, "geometric", "weights: expected 0, or a number .* for 'E', got '1'"),
        ({"E": True}, "geometric", "weights: expected 0, or a number .* for 'E', got True"),
        ({"E": 1, "T": -1}, "arithmetic", "weights: .* positive sum, got 0 .* 'geometric' .or 'anchored'"),
        ({"E": 1, "T": -2}, "arithmetic", "weights: .* positive sum, got -1"),
        ({"E": 1}, "base", "weights: expected none, or 0 for each, as target 'base' is the base alone, got {'E': 1}"),
        ({"X": 0}, "base", "weights: expected some of E, S, T, J, got 'X'"),
        ({}, "geometric", "got {}; target='base' is the base alone"),
        ({"E": 0}, "geometric", "got {'E': 0}; target='base' is the base alone"),
    ],
)
def test_bad_weights_are_refused(weights, target, message):
    with pytest.raises(ValueError, match=message):
        check_weights(weights, NAMES, target)


@pytest.mark.parametrize("weights", [None, {}, {"E": 0, "T": 0.0}])
def test_the_base_takes_no_weights_or_weights_of_nothing(weights):
    assert check_weights(weights, NAMES, "base") == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("target", ["geometric", "anchored"])
def test_other_targets_take_any_sign(target):
    assert check_weights({"E": -1}, NAMES, target) == (-1.0, 0.0, 0.0, 0.0)


def test_numbers_of_numpy_are_numbers():
    assert check_weights({"E": np.float32(0.5)}, NAMES, "geometric")[0] == 0.5
    assert Options(seed=np.int64(3)).seed == 3


def test_attribute_names_may_hold_an_equals_sign():
    assert parse_weights("a=b=1") == {"a=b": 1.0}
