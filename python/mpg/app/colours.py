"""Which attribute pushed a token most, and the colour that shows it. Knows no model and no terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import cycle

from rich.text import Text

from mpg.results import Token

PALETTE = ("dark_orange", "green", "deep_sky_blue1", "magenta", "yellow3", "cyan3", "red3", "medium_purple1")
FAINT = 0.1  # nats: a token pushed less than this keeps the terminal's own colour


def colours_of(attributes: Iterable[str]) -> dict[str, str]:
    """A colour for every attribute, in the order of the palette, from its beginning again where it ends."""
    return dict(zip(attributes, cycle(PALETTE), strict=False))


def strongest_push(token: Token, weights: Mapping[str, float]) -> str:
    """The attribute whose weighted log-ratio is the largest, or "" if it is faint or the call does not trace."""
    pushes = {name: weights[name] * ratio for name, ratio in (token.log_ratios or {}).items()}
    name = max(pushes, key=pushes.__getitem__, default="")
    return name if name and pushes[name] > FAINT else ""


def legend(colours: Mapping[str, str]) -> Text:
    """What the colours mean, each attribute in its own."""
    names = Text(" ").join(Text(name, style=colour) for name, colour in colours.items())
    return Text("Every token takes the colour of the attribute that pushed it most: ") + names
