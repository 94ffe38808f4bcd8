"""A conversation with a combination: its history, weights and options, the commands that change them, and its terminal.

Knows how a line is understood and shown; how an answer comes about is the model's business.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from mpg.app.colours import colours_of, legend, strongest_push
from mpg.files import whole_file
from mpg.frontend.contexts import contexts_of
from mpg.frontend.hf_generate import check_options
from mpg.model import Model, Weights
from mpg.models.ensemble import ROLES
from mpg.options import DEFAULT_NEW_TOKENS, OPTIONS, Options, check_weights, has_option, hint
from mpg.recipe import parse_setting
from mpg.results import Result, Token

Message = dict[str, str]


class Chat:
    """A conversation without its terminal. A command or message that raises ValueError or OSError changes nothing.

    weights  alpha by attribute, or None while none are chosen
    options  of `Model.generate`, as far as they were chosen here; the recipe's and the sampler's own come after
    system   the system prompt, or ""
    contexts attributes that are a text, by name
    history  messages of the user and the assistant in turn
    is_over  whether the user has asked to quit
    """

    def __init__(
        self,
        model: Model,
        weights: Weights | None = None,
        options: Mapping[str, Any] | None = None,
        system: str = "",
        contexts: Mapping[str, str] | None = None,
    ) -> None:
        if model.models.tokenizer is None or not model.models.tokenizer.chat_template:
            raise ValueError("models: expected a tokenizer with a chat template, as a conversation needs, got none")
        self.model = model
        self.weights: Mapping[str, float] | None = None
        self.options: dict[str, Any] = {}
        self.system = ""
        self.contexts = dict(contexts or {})
        self.history: list[Message] = []
        self.is_over = False
        self._choose(model.recipe.weigh(weights), dict(options or {}))
        self.set_system(system)

    def command(self, line: str) -> str:
        """Do what a line "/NAME ..." says. out: what to show"""
        name, _, words = line.removeprefix("/").partition(" ")
        if name not in COMMANDS:
            known = [f"/{command}" for command in COMMANDS]
            raise ValueError(f"/{name}: unknown command; {hint(f'/{name}', known)}")
        return COMMANDS[name].run(self, words.strip())

    def prompt(self, text: str) -> tuple[list[Message], int]:
        """The conversation with a new message of the user, and how many of its oldest turns are left out of it.

        They are where the model's positions would not leave room for `max_new_tokens`, or for 128 (at most half of the
        positions) where that is not set. The history keeps them.
        """
        limit = self.model.models.max_positions
        if limit is None:
            return [*self._system(), *self.history, {"role": "user", "content": text}], 0
        room = self._checked().max_new_tokens or min(DEFAULT_NEW_TOKENS, limit // 2)
        for first in range(0, len(self.history) + 1, 2):
            messages = [*self._system(), *self.history[first:], {"role": "user", "content": text}]
            if self._count_positions(messages, self.contexts) + room <= limit:
                break
        return messages, first // 2

    def answer(self, messages: list[Message], on_token: Callable[[Token], None]) -> Result | None:
        """Answer what `prompt` returned, and add both to the history.

        out: the result, or None where Ctrl-C stopped it: the history then has what there is of the text, and nothing
             where there is none
        """
        pieces: list[str] = []

        def listen(token: Token) -> None:
            pieces.append(token.text)
            on_token(token)

        weights = None if self._checked().target == "base" else self.weights
        result = None
        with suppress(KeyboardInterrupt):
            options = {**self.options, "trace": True}
            result = self.model.generate(messages, weights=weights, contexts=self.contexts, on_token=listen, **options)
        if text := "".join(pieces):
            self.history += [messages[-1], {"role": "assistant", "content": text}]
        return result

    def set_weights(self, text: str) -> str:
        if text:
            self._choose(self.model.recipe.weigh(text), self.options)
        chosen = ",".join(f"{name}={weight:g}" for name, weight in (self.weights or {}).items())
        presets = f"  (presets: {', '.join(self.model.recipe.presets)})" if self.model.recipe.presets else ""
        names = ", ".join(self.names())
        return f"weights {chosen or f'not chosen yet, of {names}'}{presets}"

    def set_sampler(self, name: str) -> str:
        """Options that only the sampler before had are given up."""
        if name:
            kept = {o: value for o, value in self.options.items() if o not in OPTIONS or has_option(name, o)}
            self._choose(self.weights, {**kept, "sampler": name})
        return self.set_option("")

    def set_option(self, text: str) -> str:
        if text:
            name, value = parse_setting(text)
            if name == "sampler" and value is not None:
                return self.set_sampler(value)
            options = {**self.options, name: value}
            self._choose(self.weights, {name: value for name, value in options.items() if value is not None})
        checked = self.options | asdict(self._checked())
        return "  ".join(f"{name}={value}" for name, value in checked.items() if value is not None and name != "trace")

    def set_system(self, text: str) -> str:
        before, self.system = self.system, text
        try:
            self.model.encode([*self._system(), {"role": "user", "content": "Hello"}])
        except ValueError:
            self.system = before
            raise
        return f"system: {text}" if text else "no system prompt"

    def set_context(self, text: str) -> str:
        name, _, sentence = text.partition(" ")
        sentence = sentence.strip().strip('"')
        if name and sentence:
            contexts = {**self.contexts, name: sentence}
            self.names(contexts)
            self._count_positions([{"role": "user", "content": "Hello"}], contexts)
            self.contexts = contexts
        elif name:
            if name not in self.contexts:
                raise ValueError(f"/context: expected one of {', '.join(self.contexts) or 'none'}, got {name!r}")
            if (self.weights or {}).get(name):
                raise ValueError(f"/context: {name!r} has a weight; /weights can take it away")
            del self.contexts[name]
        return "\n".join(f"{name}: {sentence}" for name, sentence in self.contexts.items()) or "no contexts"

    def show_history(self, _: str) -> str:
        return "\n".join(f"{message['role']}: {message['content']}" for message in self._all()) or "nothing said yet"

    def undo(self, _: str) -> str:
        if not self.history:
            raise ValueError("/undo: expected a turn to take back, got an empty history")
        question = self.history[-2]["content"]
        del self.history[-2:]
        return f"took back: {question}"

    def reset(self, _: str) -> str:
        self.history.clear()
        return "history cleared; weights, options and system prompt stay"

    def save(self, path: str) -> str:
        if not path:
            raise ValueError("/save: expected the name of a file, got none")
        state = {
            "weights": self.weights and dict(self.weights), "contexts": self.contexts, "options": self.options,
            "messages": self._all(),
        }  # fmt: skip
        with whole_file("/save", path) as file:
            file.write_text(json.dumps(state, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        return f"saved {len(self.history) // 2} turns to {path}"

    def help(self, _: str) -> str:
        usages = {f"/{name} {command.words}": command.summary for name, command in COMMANDS.items()}
        width = max(map(len, usages))
        lines = [f"{usage:<{width}}  {summary}" for usage, summary in usages.items()]
        return "\n".join([*lines, "Ctrl-C stops an answer, Ctrl-D quits. A space before / makes it a message."])

    def quit(self, _: str) -> str:
        self.is_over = True
        return ""

    def _choose(self, weights: Mapping[str, float] | None, options: dict[str, Any]) -> None:
        """Take weights and options, unless a call would refuse them."""
        if options.get("num_return_sequences", 1) != 1:
            raise ValueError(f"num_return_sequences: expected 1 in a chat, got {options['num_return_sequences']!r}")
        target = check_options(options, self.model.recipe.options).target
        if weights is not None and target != "base":
            check_weights(weights, self.names(), target)
        self.weights, self.options = weights, options

    def _count_positions(self, messages: list[Message], contexts: Mapping[str, str]) -> int:
        """Positions of the longest text that a model reads."""
        names = {*ROLES, *contexts, *(name for name, weight in (self.weights or {}).items() if weight)}
        texts = self.model.encode_contexts(messages, contexts, names=names)
        return max(map(len, [self.model.encode(messages), *texts.values()]))

    def names(self, contexts: Mapping[str, str] | None = None) -> tuple[str, ...]:
        """Names of all attributes, with the contexts that there are, or with these."""
        contexts = self.contexts if contexts is None else contexts
        return self.model.models.with_contexts([contexts_of(contexts)]).attribute_names

    def _checked(self) -> Options:
        return check_options(self.options, self.model.recipe.options)

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _all(self) -> list[Message]:
        return [*self._system(), *self.history]


@dataclass(frozen=True)
class Command:
    """What follows its name, what it does, and how."""

    words: str
    summary: str
    run: Callable[[Chat, str], str]


COMMANDS = {
    "weights": Command("[E=1,T=-0.5 | PRESET]", "weigh the attributes, or show how they are weighed", Chat.set_weights),
    "sampler": Command("[NAME]", "change the sampler, or show the options", Chat.set_sampler),
    "set": Command("[NAME=VALUE]", "change an option (null: give it up), or show them all", Chat.set_option),
    "system": Command("[TEXT]", "change the system prompt, or have none", Chat.set_system),
    "context": Command(
        "[NAME [TEXT]]", "let an attribute be the base under a text, give one up, or show all", Chat.set_context
    ),
    "history": Command("", "show the conversation", Chat.show_history),
    "undo": Command("", "take the last question and its answer back", Chat.undo),
    "reset": Command("", "begin anew with the same weights, options and system prompt", Chat.reset),
    "save": Command("FILE", "write the conversation, weights and options as JSON", Chat.save),
    "help": Command("", "show this", Chat.help),
    "quit": Command("", "leave", Chat.quit),
}


def run(chat: Chat, console: Console) -> None:
    """Talk on the terminal until the user leaves."""
    with suppress(ImportError):
        importlib.import_module("readline")  # gives input() editing, where there is one
    colours = colours_of(chat.names())
    console.print(legend({name: colour for name, colour in colours.items() if name in (chat.weights or colours)}))
    _say(console, f"{chat.set_weights('')}\n/help lists the commands.")
    while not chat.is_over:
        try:
            line = input("> ")
            if line.startswith("/"):
                _say(console, chat.command(line))
            elif line.strip():
                _answer(chat, line.strip(), console)
        except EOFError:
            console.print()
            break
        except KeyboardInterrupt:  # while nothing was being answered
            console.print()
        except (ValueError, OSError, MemoryError) as error:
            console.print(f"mpg: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


def _answer(chat: Chat, text: str, console: Console) -> None:
    messages, num_left_out = chat.prompt(text)
    if num_left_out:
        _say(console, f"(turns that no longer fit and are left out, the oldest: {num_left_out})")
    weights, colours = chat.weights or {}, colours_of(chat.names())

    def show(token: Token) -> None:
        console.out(token.text, style=colours.get(strongest_push(token, weights)), highlight=False, end="")

    try:
        result = chat.answer(messages, show)
    finally:
        console.print()
    _say(console, result.summary() if result else "(stopped)")


def _say(console: Console, text: str) -> None:
    if text:
        console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
