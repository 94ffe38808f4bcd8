"""`mpg info`: the build, the models, the methods, the options."""

from __future__ import annotations

import json

import mpg
from mpg.options import OPTIONS
from mpg.paper.methods import METHODS


def test_info_names_the_build_and_describes_models(run):
    done = run("info", "--models", "demo", "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["mpg"] == mpg.__version__
    assert facts["build"]["torch"].split("+")[0] == facts["torch"].split("+")[0]
    assert set(facts["models"]) == {"base", "anchor", "draft", "E", "J", "S", "T"}
    assert set(facts["statistics"]) == set(mpg.STATISTICS)


def test_info_lists_the_options(run):
    listed = json.loads(run("info", "--options", "--json").stdout)["options"]
    assert list(listed) == list(OPTIONS)
    assert "Default: 4 (exact, scr)" in listed["chunk_size"]["meaning"]
    shown = run("info", "--options").stdout
    assert all(name in shown for name in OPTIONS)


def test_info_lists_the_methods_with_what_they_need(run):
    listed = json.loads(run("info", "--methods", "--json").stdout)["methods"]
    assert list(listed) == list(METHODS)
    assert "specialised base" in listed["pp-specialized"]["needs"]
    shown = run("info", "--methods").stdout
    assert all(name in shown for name in METHODS)
