"""A recipe: a YAML file that names the models of a combination, and what `generate` takes where its caller is silent.

Knows the keys of the file and the line of every mistake; loads no model.
"""

from __future__ import annotations

import difflib
import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mpg.options import Options, check_weights, parse_weights

FILE = "mpg.yaml"  # what a folder is searched for
SUFFIXES = (".yaml", ".yml")
KEYS = (
    "base", "anchor", "draft", "tokenizer", "attributes", "device_map", "allow_other_base", "weights", "presets",
    "options",
)  # fmt: skip
ROLES = ("base", "anchor", "draft")  # names that no attribute has


@dataclass(frozen=True)
class Recipe:
    """The models of a combination and its defaults, as `mpg.load` was given them or read them from a file.

    base, anchor, draft, tokenizer, attributes, device_map, allow_other_base  as `mpg.load` takes them
    weights  alpha by attribute where the caller gives no weights, or None
    presets  alpha by attribute, by a name that stands for it
    options  of `Options`, where the caller is silent and his sampler has them
    lines    "FILE:LINE" of the models, by the argument of `mpg.load` that they are, where there is a file
    """

    base: Any = None
    attributes: Mapping[str, Any] | None = None
    anchor: Any = None
    draft: Any = None
    tokenizer: Any = None
    device_map: Mapping[str, Any] | None = None
    allow_other_base: bool = False
    weights: Mapping[str, float] | None = None
    presets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, base: Any, attributes: Mapping[str, Any] | None = None, **given: Any) -> Recipe:
        """What the arguments of `mpg.load` say: read from a file where the base is one, or is a folder that holds one
        and no attributes are given. What else is given goes before the file.

        Raises ValueError, with file and line, for a file that is no recipe, and for attributes beside one.
        """
        given = {name: source for name, source in given.items() if source is not None}
        file = _find(base)
        if file is None or (attributes is not None and file != Path(base)):
            return cls(base, attributes, **given)
        if attributes is not None:
            raise ValueError(f"attributes: expected none beside the recipe {file}, which names them, got {attributes}")
        recipe = _read(file)
        lines = {argument: line for argument, line in recipe.lines.items() if argument.partition("[")[0] not in given}
        return replace(recipe, **given, lines=lines)

    def weigh(self, weights: Any, target: str | None = None) -> Any:
        """The weights that a caller means by a preset's name, by NAME=NUMBER,... or by nothing; others as they are.

        target  under "base" nothing means no weights, else it means the recipe's own

        Raises ValueError for text that is neither.
        """
        if weights is None:
            return None if target == "base" else self.weights
        if not isinstance(weights, str):
            return weights
        if weights in self.presets:
            return self.presets[weights]
        if "=" not in weights:
            presets = f" or a preset among {', '.join(self.presets)}" if self.presets else ""
            raise ValueError(f"weights: expected NAME=NUMBER,...{presets}, got {weights!r}")
        return parse_weights(weights)

    @contextmanager
    def locate_errors(self) -> Iterator[None]:
        """Put file and line before a ValueError about a model that the file names."""
        try:
            yield
        except ValueError as error:
            line = self.lines.get(str(error).partition(": ")[0])  # every message begins with its argument
            if line is None:
                raise
            raise ValueError(f"{line}: {error}") from error

    def pin(self, roles: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """The same models wherever the process goes: paths absolute, a default written out, and of an object in memory
        no more than its type, so that it can be freed.

        roles  `Ensemble.describe()`
        """
        names = [name for name in roles if name not in ROLES]
        attributes = self.attributes or {name: roles[name]["adapter"] for name in names}
        return replace(
            self,
            base=_pin(self.base),
            attributes={name: _pin(source) for name, source in attributes.items()},
            anchor=_pin(self.anchor, names),
            draft=_pin(self.draft, names),
            tokenizer=_pin(self.tokenizer),
            device_map=self.device_map and _plain(self.device_map),
        )

    def write(self, target: str | Path) -> None:
        """Write the recipe to a .yaml file, or to mpg.yaml in a folder that is made where there is none.

        Models below its folder are named relative to it, so that they move with it, others by their absolute path.

        Raises ValueError, naming the argument of `mpg.load`, for a model that lies in no folder and on no hub.
        """
        file = Path(target).absolute()
        file = file if file.suffix in SUFFIXES else file / FILE

        def place(argument: str, source: Any) -> str:
            if not isinstance(source, str):
                got = f"a {source.__name__} in memory" if source else "none"
                remedy = "save it with its own save_pretrained() and load it from there"
                raise ValueError(f"{argument}: expected a folder or a hub name, got {got}; {remedy}")
            is_below = Path(source).is_relative_to(file.parent)
            return Path(source).relative_to(file.parent).as_posix() if is_below else source

        document: dict[str, Any] = {"base": place("base", self.base)}
        for name in ("anchor", "draft", "tokenizer"):
            if getattr(self, name) is not None:
                document[name] = place(name, getattr(self, name))
        attributes = self.attributes or {}
        document["attributes"] = {name: place(f"attributes[{name!r}]", at) for name, at in attributes.items()}
        document["device_map"] = self.device_map
        document["allow_other_base"] = self.allow_other_base
        document["weights"] = self.weights and dict(self.weights)
        document["presets"] = {name: dict(weights) for name, weights in self.presets.items()}
        document["options"] = dict(self.options)
        file.parent.mkdir(parents=True, exist_ok=True)
        document = {key: value for key, value in document.items() if value}
        file.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")


def parse_value(text: str) -> Any:
    """A value as a recipe would have it: "0.7" is a number, "true" a truth, "merged" a text, "null" nothing.

    Raises ValueError for text that is no YAML value.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ValueError(f"expected a number, true, false or a word, got {text!r}") from None


def _find(source: Any) -> Path | None:
    """The recipe's file that a source is or holds."""
    if not isinstance(source, str | Path):
        return None
    path = Path(source)
    if path.suffix in SUFFIXES:
        return path
    return path / FILE if (path / FILE).is_file() else None


def _pin(source: Any, names: Sequence[str] = ()) -> Any:
    if source is None or source in names:
        return source
    if not isinstance(source, str | Path):
        return type(source)
    return str(Path(source).absolute()) if Path(source).exists() else str(source)


def _plain(place: Any) -> Any:
    """A place of a device map as a file has it: a device by its name."""
    if isinstance(place, Mapping):
        return {name: _plain(part) for name, part in place.items()}
    return place if isinstance(place, int) else str(place)


def _read(file: Path) -> Recipe:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected a recipe in UTF-8, got {error}") from error
    try:
        return _Reader(file).recipe(yaml.compose(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{file}:{mark.line + 1 if mark else 1}: expected YAML: {error.problem}") from error
    except yaml.YAMLError as error:  # a character that YAML does not have
        raise ValueError(f"{file}: expected YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number: YAML 1.1 wants a dot and a sign."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?e[-+]?\d+$", re.I), [*"-+0123456789"]
)


class _Reader:
    """Reads the nodes of one file, so that every mistake has its line."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def recipe(self, root: yaml.Node | None) -> Recipe:
        if root is None:
            raise ValueError(f"{self.file}:1: expected the keys base and attributes, got an empty file")
        nodes = self.entries(root, "recipe", "key", KEYS)
        for key in ("base", "attributes"):
            if key not in nodes:
                raise self.mistake(root, f"{key}: expected in every recipe, got {', '.join(nodes) or 'none'}")
        of_attributes = self.entries(nodes["attributes"], "attributes", "attribute")
        if not of_attributes:
            raise self.mistake(nodes["attributes"], "attributes: expected at least one, got none")
        sources = {key: nodes[key] for key in ("base", "anchor", "draft", "tokenizer") if key in nodes}
        places = {key: self.source(key, node, of_attributes) for key, node in sources.items()}
        attributes = {name: self.source(f"attributes[{name!r}]", node) for name, node in of_attributes.items()}
        device_map = self.places("device_map", nodes.get("device_map"), [*attributes, *ROLES])
        allows_other_base = nodes.get("allow_other_base")
        presets = {}
        for name, node in self.entries(nodes.get("presets"), "presets", "preset").items():
            if not name or "=" in name:
                raise self.mistake(node, f"presets: expected a name without '=', got {name!r}")
            presets[name] = self.weights(f"presets[{name!r}]", node, attributes)
        weights = nodes.get("weights")
        if isinstance(weights, yaml.ScalarNode):
            if weights.value not in presets:
                wanted = f"a mapping or a preset{' among ' + ', '.join(presets) if presets else ''}"
                raise self.mistake(weights, f"weights: expected {wanted}, got {weights.value!r}")
            default: Mapping[str, float] | None = presets[weights.value]
        else:
            default = self.weights("weights", weights, attributes) if weights is not None else None
        lines = {key: self.line(node) for key, node in nodes.items()}
        lines |= {f"attributes[{name!r}]": self.line(node) for name, node in of_attributes.items()}
        of_devices = self.entries(nodes.get("device_map"), "device_map", "name")
        lines |= {f"device_map[{name!r}]": self.line(node) for name, node in of_devices.items()}
        return Recipe(
            attributes=attributes,
            device_map=device_map,
            allow_other_base=False if allows_other_base is None else self.value(allows_other_base),
            weights=default,
            presets=presets,
            options=self.options(nodes.get("options")),
            lines=lines,
            **places,
        )

    def entries(
        self, node: yaml.Node | None, what: str, kind: str, known: Sequence[str] | None = None
    ) -> dict[str, yaml.Node]:
        """The values of a mapping by key. Refuses what is no mapping, and unknown and doubled keys."""
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise self.mistake(node, f"{what}: expected a mapping, got {self.got(node)}")
        values: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.mistake(key, f"{what}: expected names as keys, got {self.got(key)}")
            name = key.value
            if known is not None and name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
                raise self.mistake(key, f"{what}: unknown {kind} {name!r}; {hint}")
            if name in values:
                raise self.mistake(key, f"{what}: expected every {kind} once, got {name!r} twice")
            values[name] = value
        return values

    def source(self, argument: str, node: yaml.Node, names: Sequence[str] | Mapping[str, Any] = ()) -> str:
        """The absolute path of what lies beside the recipe, else a hub's name or an attribute's."""
        value = self.value(node)
        if not isinstance(value, str) or not value:
            raise self.mistake(node, f"{argument}: expected a folder or a hub name, got {self.got(node)}")
        if argument in ("anchor", "draft") and value in names:
            return value
        folder = self.file.parent.absolute()
        path = folder / Path(value).expanduser()
        if path.exists():
            return str(path)
        owner, slash, _ = value.partition("/")
        if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value) and not (slash and (folder / owner).is_dir()):
            return value
        raise self.mistake(node, f"{argument}: expected a folder that exists or a hub name, got {value!r} ({path})")

    def places(self, what: str, node: yaml.Node | None, known: Sequence[str] | None = None) -> dict[str, Any] | None:
        """Devices by name; that of a name may be a mapping too, which splits its model."""
        if node is None:
            return None
        places: dict[str, Any] = {}
        for name, place in self.entries(node, what, "name", known).items():
            if isinstance(place, yaml.MappingNode) and known is not None:
                places[name] = self.places(f"{what}[{name!r}]", place)
                continue
            places[name] = self.value(place) if isinstance(place, yaml.ScalarNode) else None
            if not isinstance(places[name], str | int) or isinstance(places[name], bool):
                raise self.mistake(place, f"{what}: expected a device for {name!r}, got {self.got(place)}")
        return places

    def weights(self, what: str, node: yaml.Node, attributes: Mapping[str, Any]) -> dict[str, float]:
        nodes = self.entries(node, what, "attribute", list(attributes))
        weights = {}
        for name, value in nodes.items():
            weights[name] = self.value(value)
            if not isinstance(weights[name], numbers.Real) or isinstance(weights[name], bool):
                raise self.mistake(value, f"{what}: expected a number for {name!r}, got {self.got(value)}")
        try:
            check_weights(weights, list(attributes), "geometric")
        except ValueError as error:
            raise self.mistake(node, str(error).replace("weights", what, 1)) from None
        return {name: float(weight) for name, weight in weights.items()}

    def options(self, node: yaml.Node | None) -> dict[str, Any]:
        if node is None:
            return {}
        nodes = self.entries(node, "options", "option")
        options = {name: self.value(value) for name, value in nodes.items()}
        try:
            Options.of(options)
        except ValueError as error:
            wrong = nodes.get(str(error).partition(": ")[0], node)  # every message begins with its option
            raise self.mistake(wrong, f"options: {error}") from None
        return options

    def value(self, node: yaml.Node) -> Any:
        try:
            return _Loader("").construct_object(node, deep=True)
        except ValueError as error:  # a date that there is not
            raise self.mistake(node, f"expected YAML: {error}") from error

    def got(self, node: yaml.Node) -> str:
        if isinstance(node, yaml.ScalarNode):
            return repr(self.value(node))
        return "a mapping" if isinstance(node, yaml.MappingNode) else "a list"

    def line(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"

    def mistake(self, node: yaml.Node, message: str) -> ValueError:
        return ValueError(f"{self.line(node)}: {message}")
