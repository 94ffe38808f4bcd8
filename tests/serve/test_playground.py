"""The playground and the trace page as a browser shows them. With MPG_SCREENSHOTS, the name of a set of models, also
writes their pictures to docs/, of that set."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

import mpg
from serving import serving

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
DOCS = Path(__file__).parent.parent.parent / "docs"
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}
QUESTION = "How do you like to spend a free weekend?"
NASTY = (
    "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\"> it's \\ \"so\" </b>"
)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, url, viewport=WIDE, **how):
    """A page that must ask nothing but its own server and raise nothing."""
    context = browser.new_context(viewport=viewport, permissions=["clipboard-read", "clipboard-write"], **how)
    page, raised, asked = context.new_page(), [], []
    page.on("pageerror", lambda error: raised.append(error))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    yield page
    assert raised == []
    assert [other for other in asked if not other.startswith(url)] == []
    context.close()


def move(page, name, value):
    page.get_by_label(name, exact=True).evaluate(
        f"(slider) => {{ slider.value = {value}; slider.dispatchEvent(new Event('input')); }}"
    )


def run(page):
    page.get_by_role("button", name="Run").click()
    wait_for_end(page)


def wait_for_end(page):
    page.locator("#run:enabled").wait_for()


def tokens(page, place):
    return "".join(page.locator(f"#{place} .token:not(.silent)").all_text_contents())


def copied(page, kind):
    page.get_by_role("button", name=f"Copy as {kind}").click()
    page.get_by_text(f"Copied as {kind}.").wait_for()
    return page.evaluate("navigator.clipboard.readText()")


def with_answers(page, answer):
    """Let this answer in the server's place from now on."""
    page.unroute("**/chat/completions")
    page.route("**/chat/completions", answer)


def error(message):
    return {"error": {"message": message}}


def background(locator):
    return locator.evaluate("(token) => getComputedStyle(token).backgroundColor")


def is_within(page):
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_slider_moves_the_text_whose_tokens_have_the_colours_and_numbers_of_their_attributes(browser, served):
    how = {"seed": 3, "max_new_tokens": 24, "trace": True}
    wanted = served.model.generate(QUESTION, weights={"E": 2.0, "T": -0.5}, **how)
    with opened(browser, f"{served.url}/") as page:
        page.get_by_label("Seed").fill("3")
        page.get_by_label("Most tokens").fill("24")
        slider = page.get_by_label("E", exact=True)
        slider.focus()
        for _ in range(20):  # by the keyboard
            page.keyboard.press("ArrowRight")
        move(page, "T", -0.5)
        assert page.locator("#sliders").text_content() == "E2.0S0.0T-0.5J0.0"
        page.get_by_label("Prompt", exact=True).press("Control+Enter")
        wait_for_end(page)
        assert page.get_by_role("alert").text_content() == ""
        assert tokens(page, "mixed") == wanted.text
        assert tokens(page, "base") == served.model.generate(QUESTION, target="base", seed=3, max_new_tokens=24).text
        assert re.search(r"^\d+ tokens, [\d.]+ tokens/s, seed 3$", page.locator("#mixed-said").text_content())
        assert page.locator("#mixed-title").text_content() == "E=2, T=-0.5"

        pushes = [{name: wanted.weights[name] * ratio for name, ratio in of.items()} for of in wanted.log_ratios]
        best = [max(push, key=push.get) for push in pushes]
        strongest = [name if push[name] > 0.1 else None for name, push in zip(best, pushes, strict=True)]
        shown = page.locator("#mixed .token")
        assert [shown.nth(i).get_attribute("data-attribute") for i in range(shown.count())] == strongest
        assert {"E", "T", None} == set(strongest)
        colours = {name: background(shown.nth(strongest.index(name))) for name in ("E", "T", None)}
        assert len(set(colours.values())) == 3
        assert page.locator("#base .pushed").count() == 0

        place = strongest.index("E")
        shown.nth(place).hover()
        tip = page.get_by_role("tooltip").text_content()
        for name, ratio in wanted.log_ratios[place].items():
            assert f"{name}{ratio:+.2f}" in tip
        shown.first.focus()
        for _ in range(place):
            page.keyboard.press("ArrowRight")
        assert page.get_by_role("tooltip").text_content() == tip
        page.keyboard.press("Escape")
        assert not page.get_by_role("tooltip").is_visible()
        shares = page.locator("#shares").text_content()
        percent = {name: math.floor(100 * strongest.count(name) / len(strongest) + 0.5) for name in ("E", "T")}
        assert shares == f"E {percent['E']} %T {percent['T']} %"


def test_what_is_copied_asks_for_the_text_that_is_shown(browser, served, capsys):
    """Whatever prompt and system prompt are. None of it becomes markup."""
    with opened(browser, f"{served.url}/") as page:
        page.get_by_label("Preset").select_option("ESTJ")
        assert page.locator("#sliders").text_content() == "E0.5S0.5T0.5J0.5"
        page.get_by_label("System prompt").fill("Be 'brief'.")
        page.get_by_label("Prompt", exact=True).fill(NASTY)
        page.get_by_label("Most tokens").fill("12")
        page.get_by_label("Temperature").fill("0.8")
        page.get_by_label("Target").select_option("arithmetic")
        run(page)
        shown = tokens(page, "mixed")
        assert shown and page.title() == "mpg playground"
        exec(compile(copied(page, "Python"), "copied", "exec"), {})
        assert capsys.readouterr().out == f"{shown}\n"
        _, url, _, kind, _, data = shlex.split(copied(page, "curl"))
        assert kind == "Content-Type: application/json"
        assert httpx.post(url, json=json.loads(data)).json()["choices"][0]["message"]["content"] == shown


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark_and_every_control_has_a_name(browser, served, scheme):
    with opened(browser, f"{served.url}/", PHONE, color_scheme=scheme) as page:
        page.get_by_label("Most tokens").fill("16")
        move(page, "E", 2)
        run(page)
        assert is_within(page)
        page.locator("#mixed .token").last.click()
        assert page.get_by_role("tooltip").is_visible() and is_within(page)
        ink = page.evaluate("getComputedStyle(document.body).color")
        assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 380) == (scheme == "dark")
        controls = page.locator("input:visible, select:visible, textarea:visible, button:visible")
        names = controls.evaluate_all("(all) => all.map((one) => one.labels?.[0]?.textContent || one.textContent)")
        assert len(names) > 12 and all(names)


def test_a_stop_a_refusal_and_a_server_that_is_gone_are_told(browser, precise_model):
    with serving(precise_model, max_rows=2) as served, opened(browser, f"{served.url}/") as page:
        alert = page.get_by_role("alert")
        move(page, "E", -2)
        page.get_by_label("Target").select_option("arithmetic")
        run(page)
        assert "needs a positive sum" in alert.text_content()
        with_answers(page, lambda route: route.fulfill(status=429, headers={"Retry-After": "7"}, json=error("full")))
        run(page)
        assert alert.text_content() == "The server is busy: full (wait 7 s)."
        body = f"data: {json.dumps(error('the models failed'))}\n\n"
        with_answers(page, lambda route: route.fulfill(content_type="text/event-stream", body=body))
        run(page)
        assert alert.text_content() == "the models failed"
        with_answers(page, lambda route: route.fulfill(content_type="text/event-stream", body="data: {"))
        run(page)
        assert alert.text_content() == "The connection ended before the answer did."
        with_answers(page, lambda route: None)  # none comes
        page.get_by_role("button", name="Run").click()
        assert page.get_by_role("button", name="Run").is_disabled()
        page.get_by_role("button", name="Stop").click()
        wait_for_end(page)
        assert page.locator("#mixed-said").text_content() == "0 tokens, stopped" and alert.text_content() == ""
        with_answers(page, lambda route: route.abort())
        run(page)
        assert alert.text_content() == "The server cannot be reached: is it still running?"


def test_a_server_with_a_key_asks_for_it_and_a_copy_does_not_tell_it(browser, precise_model):
    model = mpg.Model(precise_model.models, replace(precise_model.recipe, weights={"E": 1.5}))
    with serving(model, api_keys=("secret",)) as served, opened(browser, f"{served.url}/") as page:
        key = page.get_by_label("API key")
        key.wait_for()
        assert "wants an API key" in page.get_by_role("alert").text_content()
        key.fill("wrong")
        key.press("Enter")
        assert page.get_by_role("button", name="Run").is_disabled()
        key.fill("secret")
        key.press("Enter")
        page.locator("#run:enabled").wait_for()
        assert page.locator("#sliders").text_content() == "E1.5S0.0T0.0J0.0"  # the recipe's
        page.get_by_label("Most tokens").fill("4")
        run(page)
        assert page.get_by_role("alert").text_content() == "" and tokens(page, "mixed")
        for kind in ("Python", "curl"):
            text = copied(page, kind)
            assert "MPG_API_KEY" in text and "secret" not in text
        page.get_by_role("button", name="All 0").click()
        assert page.locator("#sliders").text_content() == "E0.0S0.0T0.0J0.0"
        run(page)  # of no attribute, which is the base
        assert tokens(page, "mixed") == tokens(page, "base")


def test_a_trace_page_shows_tokens_marks_shares_and_options_and_asks_for_nothing(browser, model, tmp_path):
    how = {"seed": 1, "trace": True, "max_new_tokens": 40, "draft": "lookup", "temperature": 0.9}
    result = model.generate(NASTY, weights={"E": 1.0, "T": 0.5}, **how)
    file = tmp_path / "trace.html"
    file.write_text(result.to_html())
    for viewport, scheme in ((WIDE, "light"), (PHONE, "dark")):
        with opened(browser, file.as_uri(), viewport, color_scheme=scheme) as page:
            assert page.title() == "mpg: what pushed which token"
            assert "".join(page.locator(".token:not(.silent)").all_text_contents()) == result.text
            for mark in set(result.trace.marks):
                assert page.locator(f".token.{mark}").count() == result.trace.marks.count(mark) > 0
            thrown = page.locator("main .rejected").all_text_contents()
            assert thrown == [f"✗{number}" for number in result.trace.rejected if number]
            text = page.locator("main").text_content()
            for told in ("E=1, T=0.5", "lookup", "0.9", NASTY, "accept_rate"):
                assert told in text
            page.locator(".token").nth(3).hover()
            assert f"{result.log_ratios[3]['E']:+.2f}" in page.get_by_role("tooltip").text_content()
            assert is_within(page)


@pytest.mark.skipif("MPG_SCREENSHOTS" not in os.environ, reason="writes to docs/")
def test_screenshots(browser):
    model, weights = mpg.load(os.environ["MPG_SCREENSHOTS"]), {"E": 2.0, "T": 1.0}
    with serving(model, name=os.environ["MPG_SCREENSHOTS"]) as served, opened(browser, f"{served.url}/") as page:
        page.set_default_timeout(300_000)
        for name, weight in weights.items():
            move(page, name, weight)
        page.get_by_label("Most tokens").fill("64")
        page.get_by_label("Temperature").fill("0.7")
        page.get_by_label("Seed").fill("0")
        run(page)
        page.locator("#mixed .pushed").nth(5).hover()
        page.screenshot(path=DOCS / "playground.png")
    result = model.generate(QUESTION, weights=weights, seed=0, temperature=0.7, max_new_tokens=64, trace=True)
    page = browser.new_page(viewport={"width": 1000, "height": 640}, color_scheme="dark")
    page.set_content(result.to_html())
    page.locator(".pushed").nth(5).hover()
    page.screenshot(path=DOCS / "trace.png")
    for name in ("playground.png", "trace.png"):
        assert (DOCS / name).stat().st_size < 300_000
