"""A chat: what its commands do without a terminal, and one conversation through a pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

import mpg
from longer import long
from mpg.app.chat import COMMANDS, Chat, run
from mpg.app.colours import colours_of, legend, strongest_push
from mpg.demo import MODELS

SHORT = {"max_new_tokens": 6, "seed": 2}
QUESTION = "What do you do about the weekend?"


@pytest.fixture
def chat(model):
    return Chat(model, "E=1,T=0.5", SHORT)


def ask(chat, text, on_token=lambda token: None):
    return chat.answer(chat.prompt(text)[0], on_token)


def state(chat):
    return chat.weights, chat.options, chat.system, list(chat.history)


def test_every_answer_continues_the_conversation(chat, model):
    first = ask(chat, QUESTION)
    asked = {"role": "user", "content": QUESTION}
    assert chat.history == [asked, {"role": "assistant", "content": first.text}]
    second = ask(chat, "And then?")
    whole = [*chat.history[:2], {"role": "user", "content": "And then?"}]
    assert second.tokens == model.generate(whole, weights={"E": 1, "T": 0.5}, **SHORT).tokens
    assert second.log_ratios  # for the colours


def test_weights_change_by_numbers_and_by_preset(chat):
    assert chat.command("/weights").startswith("weights E=1,T=0.5  (presets: ESTJ, INFP)")
    assert chat.command("/weights T=-0.5").startswith("weights T=-0.5")
    assert ask(chat, QUESTION).weights == {"T": -0.5}
    chat.command("/weights INFP")
    assert ask(chat, "And?").weights == chat.model.recipe.presets["INFP"]


def test_a_chat_without_weights_asks_for_them_and_goes_on(model):
    chat = Chat(model, options=SHORT)
    assert "not chosen yet, of E, S, T, J" in chat.command("/weights")
    with pytest.raises(ValueError, match="weights: expected a number for some of E, S, T, J"):
        ask(chat, QUESTION)
    assert chat.history == []
    chat.command("/weights E=1")
    assert ask(chat, QUESTION).weights == {"E": 1}


def test_the_base_alone_answers_under_target_base_and_the_weights_stay(chat):
    chat.command("/set target=base")
    assert ask(chat, QUESTION).weights == {}
    chat.command("/set target=null")
    assert ask(chat, "And?").weights == {"E": 1, "T": 0.5}


def test_another_sampler_gives_up_the_options_that_it_has_not(chat):
    chat.command("/set verify=token")
    chat.command("/set temperature=0.7")
    for line in ("/sampler direct", "/set sampler=direct"):
        assert "sampler=direct  target=geometric  " in chat.command(line)
        assert chat.options == {**SHORT, "temperature": 0.7, "sampler": "direct"}
    assert chat.command("/set temperature = null") == chat.command("/sampler")
    assert "temperature" not in chat.options


def test_what_transformers_honours_is_set_too_and_stays_through_samplers(chat, model):
    assert "repetition_penalty=1.5" in chat.command("/set repetition_penalty=1.5")
    chat.command("/sampler direct")
    expected = model.generate(QUESTION, weights={"E": 1, "T": 0.5}, sampler="direct", repetition_penalty=1.5, **SHORT)
    assert ask(chat, QUESTION).tokens == expected.tokens


def test_undo_and_reset_take_turns_back(chat):
    ask(chat, QUESTION)
    before = list(chat.history)
    ask(chat, "And?")
    assert chat.command("/undo") == "took back: And?"
    assert chat.history == before
    assert chat.command("/history") == f"user: {QUESTION}\nassistant: {before[1]['content']}"
    chat.command("/reset")
    assert state(chat) == ({"E": 1, "T": 0.5}, SHORT, "", [])
    assert chat.command("/history") == "nothing said yet"


def test_a_system_prompt_goes_before_the_conversation(chat, model):
    assert chat.command("/system Be brief.") == "system: Be brief."
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    assert ask(chat, QUESTION).tokens == model.generate(prompt, weights={"E": 1, "T": 0.5}, **SHORT).tokens
    assert chat.command("/history").startswith("system: Be brief.\nuser: ")
    assert chat.command("/system") == "no system prompt"


def test_a_system_prompt_that_the_template_refuses_is_not_taken(chat, monkeypatch):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no such role') }}{% endif %}hello"
    monkeypatch.setattr(chat.model.models.tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match=r"prompt: expected messages that the chat template takes, .*no such role"):
        chat.command("/system Be brief.")
    assert chat.system == ""


def test_save_writes_what_continues_the_conversation(chat, tmp_path):
    chat.command("/system Be brief.")
    ask(chat, QUESTION)
    assert chat.command(f"/save {tmp_path}/chat.json") == f"saved 1 turns to {tmp_path}/chat.json"
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert saved["messages"] == [{"role": "system", "content": "Be brief."}, *chat.history]
    assert (saved["weights"], saved["options"]) == ({"E": 1, "T": 0.5}, SHORT)


def test_help_names_every_command_and_quit_ends(chat):
    assert all(f"/{name} " in chat.command("/help") for name in COMMANDS)
    assert not chat.is_over
    chat.command("/quit")
    assert chat.is_over


def test_weights_that_a_new_target_refuses_keep_the_old_target(chat):
    chat.command("/weights E=-1")
    with pytest.raises(ValueError, match="weights: the arithmetic target needs a positive sum"):
        chat.command("/set target=arithmetic")
    with pytest.raises(ValueError, match="weights: the arithmetic target needs a positive sum"):
        chat.command("/sampler scr")
    assert chat.options == SHORT


def test_an_answer_that_fails_leaves_the_history(chat):
    ask(chat, QUESTION)
    before = state(chat)
    with pytest.raises(ValueError, match="prompt: the model has 256 positions"):
        ask(chat, "word " * 300)
    assert state(chat) == before


def test_an_answer_that_memory_cannot_hold_is_reported_and_the_conversation_goes_on(chat, monkeypatch):
    def refuse(*_):
        raise MemoryError("batch_size, max_new_tokens: too many")

    lines = iter([QUESTION, "/weights E=2", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(chat, "answer", refuse)
    printed = io.StringIO()
    run(chat, Console(file=printed))
    assert "mpg: batch_size, max_new_tokens: too many" in printed.getvalue()
    assert chat.is_over and chat.weights == {"E": 2}


def test_a_stopped_answer_stays_as_far_as_it_came(chat):
    seen = []

    def stop_at_the_third(token):
        seen.append(token.text)
        if len(seen) == 3:
            raise KeyboardInterrupt

    assert ask(chat, QUESTION, stop_at_the_third) is None
    assert chat.history[1]["content"] == "".join(seen)
    assert len(ask(chat, "And?").tokens) == 6

    def stop_at_once(token):
        raise KeyboardInterrupt

    before = state(chat)
    chat.model = _EmptyAnswer(chat.model)
    assert ask(chat, "And?", stop_at_once) is None
    assert state(chat) == before


class _EmptyAnswer:
    """A model that ends before it has said a word."""

    def __init__(self, model):
        self.models, self.recipe = model.models, model.recipe
        self.encode, self.encode_contexts = model.encode, model.encode_contexts

    def generate(self, messages, on_token, **_):
        on_token(mpg.Token(0, 1, "", None))


def test_the_oldest_turns_are_left_out_where_positions_run_short_and_stay_in_the_history(model):
    chat = Chat(model, "E=1", {"seed": 0, "max_new_tokens": 60}, "Be brief.")
    for turn in range(8):
        messages, num_left_out = chat.prompt(QUESTION)
        assert messages[0]["role"] == "system"
        assert messages[1:-1] == chat.history[2 * num_left_out :]
        assert len(model.encode(messages)) + 60 <= 256
        if num_left_out:  # and one more would not have fitted
            more = [messages[0], *chat.history[2 * num_left_out - 2 :], messages[-1]]
            assert len(model.encode(more)) + 60 > 256
        chat.answer(messages, lambda token: None)
        assert len(chat.history) == 2 * (turn + 1)
    assert num_left_out
    neutral = mpg.Context(system="You are a person. " * 20)
    anchored = mpg.load(MODELS, {"E": MODELS / "adapters" / "E"}, anchor=neutral, device=model.models.device)
    chat = Chat(anchored, "E=1", {"seed": 0, "max_new_tokens": 60})
    for _ in range(3):  # the anchor reads the longest text
        chat.answer(chat.prompt(QUESTION)[0], lambda token: None)
    assert chat.prompt(QUESTION)[1]


def test_models_without_a_chat_template_are_refused():
    bare = mpg.load(AutoModelForCausalLM.from_pretrained(MODELS), {"E": MODELS}, dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="models: expected a tokenizer with a chat template"):
        Chat(bare, "E=1")


def test_a_token_takes_the_colour_of_the_attribute_that_pushed_it_most():
    colours = colours_of("ABCDEFGHI")
    assert len(set(colours.values())) == 8
    assert colours["A"] == colours["I"]
    token = mpg.Token(0, 5, "word", {"A": 1.0, "B": 0.8, "C": -2.0})
    assert strongest_push(token, {"A": 1, "B": 1, "C": 1}) == "A"
    assert strongest_push(token, {"A": 1, "B": 2, "C": 1}) == "B"
    assert strongest_push(token, {"A": 1, "B": 1, "C": -1}) == "C"
    assert strongest_push(token, {"A": 0.05, "B": 0, "C": 1}) == ""
    assert strongest_push(mpg.Token(0, 5, "word", None), {"A": 1}) == ""
    shown = legend({"A": "red", "B": "green"})
    assert shown.plain.endswith(": A B")
    assert [span.style for span in shown.spans if span.style] == ["red", "green"]


# `mpg chat` as the owner of its terminal, on a model so slow that an answer can be stopped
SLOW_CHAT = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import mpg
from mpg.app.cli.command import app
generate = mpg.Model.generate
def slow(self, prompt, on_token, **options):
    return generate(self, prompt, on_token=lambda token: (on_token(token), time.sleep(0.1)), **options)
mpg.Model.generate = slow
app(sys.argv[1:])
"""


class Terminal:
    """A program on a pseudo-terminal: what it has printed, and waiting for more of it."""

    def __init__(self, *command: str) -> None:
        self.master, slave = os.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "300"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment,
            # a suite that runs in the background of a shell ignores Ctrl-C, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(slave)
        self.unread = ""

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, pattern: str, seconds: float = 120) -> str:
        """What was printed up to the end of the pattern."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self.unread)) is None:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.unread!r}"
            try:
                self.unread += os.read(self.master, 4096).decode(errors="replace")
            except OSError:  # the program has left
                raise AssertionError(f"no {pattern!r} in {self.unread!r}, and the end") from None
        before, self.unread = self.unread[: found.end()], self.unread[found.end() :]
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@long
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_conversation_through_a_terminal():
    pytest.importorskip("pty")
    device = os.environ.get("MPG_DEVICE", "cpu")
    options = ["--set", "sampler=direct", "--set", "max_new_tokens=4", "--set", "seed=0"]
    terminal = Terminal(sys.executable, "-c", SLOW_CHAT, "chat", "--device", device, *options)
    try:
        assert "not chosen yet, of E, S, T, J" in terminal.expect(r"> $")
        terminal.send("Hello?\n")
        assert "mpg: weights: expected a number for some of" in terminal.expect(r"got None.*\n[^\n]*> $")
        terminal.send("/wieghts ESTJ\n")
        assert "did you mean '/weights'?" in terminal.expect(r"weights'\?.*\n[^\n]*> $")
        terminal.send("/weights E=4\n")
        terminal.expect(r"weights E=4.*\n[^\n]*> $")
        terminal.send(f"{QUESTION}\n")
        answer = terminal.expect(r"tokens_per_second.*\n[^\n]*> $")
        assert "length, 4 tokens, seed 0" in answer
        assert "\x1b[38;5;208m" in answer  # what E pushed, in its colour
        terminal.send("/set max_new_tokens=150\n")
        terminal.expect(r"max_new_tokens=150.*\n[^\n]*> $")
        terminal.send("/set temperature=9\n")  # nonsense, which hardly ever ends
        terminal.expect(r"temperature=9.*\n[^\n]*> $")
        terminal.send("And the party?\n")
        terminal.expect(r"party\?\r?\n(.*\w){3}")
        terminal.send("\x03")
        assert "tokens_per_second" not in terminal.expect(r"\(stopped\).*\n[^\n]*> $")
        terminal.send("/histroy\x7f\x7f\x7fory\n")  # with the terminal's editing
        history = terminal.expect(r"user: And the party\?.*\n.*assistant: \w.*\n[^\n]*> $")
        assert f"user: {QUESTION}" in history
        terminal.send("half a line")
        terminal.expect("half a line")
        terminal.send("\x03")
        terminal.send("\n")  # CPython's input() can sleep over a signal that comes just before it waits
        terminal.expect(r"\n[^\n]*> $")
        terminal.send("/weights INFP\n")
        terminal.expect(r"weights E=-0.5,S=-0.5.*\n[^\n]*> $")
        terminal.send("\x04")
        assert terminal.process.wait(timeout=120) == 0
    finally:
        terminal.close()


def test_a_context_is_an_attribute_from_then_on(chat, model):
    assert chat.command("/context") == "no contexts"
    assert chat.command('/context calm "Be calm."') == "calm: Be calm."
    chat.command("/weights calm=1")
    answer = ask(chat, QUESTION)
    how = {"weights": {"calm": 1}, "contexts": {"calm": "Be calm."}, **SHORT}
    assert answer.tokens == model.generate([{"role": "user", "content": QUESTION}], **how).tokens
    with pytest.raises(ValueError, match="/context: 'calm' has a weight"):
        chat.command("/context calm")
    for line, message in {
        "/context E Be calm.": "'E' is an adapter or a model already",
        "/context loud": "/context: expected one of calm, got 'loud'",
    }.items():
        with pytest.raises(ValueError, match=message):
            chat.command(line)
    chat.command("/weights E=1")
    assert chat.command("/context calm") == "no contexts"
