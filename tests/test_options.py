"""Options and weights: what is refused, and that the message names the argument, what was expected and what came."""

from __future__ import annotations

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


def test_attributes_not_named_weigh_nothing():
    assert check_weights({"T": 2, "E": -1}, NAMES, "geometric") == (-1.0, 0.0, 2.0, 0.0)


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
