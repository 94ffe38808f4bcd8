"""A recipe: a YAML file that names the models of a combination, and what `generate` takes where its caller is silent.

Knows the keys of the file and names the one that is mistaken; loads no model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from mpg.context import Context
from mpg.demo import SETS
from mpg.files import refuse_unreadable_text, whole_file
from mpg.options import Options, check_weights, hint, parse_pair, parse_weights, suggest

FILE = "mpg.yaml"  # what a folder is searched for
SUFFIXES = (".yaml", ".yml")
ROLES = ("base", "anchor", "draft")  # names that no attribute has
SWITCHES = ("allow_other_base", "merge_adapters")
NO_KEYS = ("allow_pickle", "files")  # of a recipe: a file from elsewhere may not allow itself to run code


@dataclass(frozen=True)
class Recipe:
    """The models of a combination and its defaults, as `mpg.load` was given them or read them from a file.

    base, anchor, draft, tokenizer, attributes, device_map, quantize, allow_other_base, merge_adapters, allow_pickle
             as `mpg.load` takes them
    weights  alpha by attribute where the caller gives no weights, or None
    presets  alpha by attribute, by a name that stands for it
    options  of `Options`, where the caller is silent and his sampler has them
    files    the recipe's file, by the arguments of `mpg.load` that it names
    """

    base: Any = None
    attributes: Mapping[str, Any] | None = None
    anchor: Any = None
    draft: Any = None
    tokenizer: Any = None
    device_map: Mapping[str, Any] | None = None
    quantize: str | None = None
    allow_other_base: bool = False
    merge_adapters: bool = False
    allow_pickle: bool = False
    weights: Mapping[str, float] | None = None
    presets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, base: Any, attributes: Mapping[str, Any] | None = None, **given: Any) -> Recipe:
        """What the arguments of `mpg.load` say: read from a file where the base is one, or is a folder that holds one
        and no attributes are given. What else is given goes before the file.

        Raises ValueError, with file and key, for a file that is no recipe, and for attributes beside one.
        """
        given = {name: source for name, source in given.items() if source is not None}
        file = _find(base)
        if file is None or (attributes is not None and file != Path(base)):
            return cls(base, attributes, **given)
        if attributes is not None:
            raise ValueError(f"attributes: expected none beside the recipe {file}, which names them, got {attributes}")
        recipe = _read(file)
        return replace(recipe, **given, files={key: file for key in recipe.files if key not in given})

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
            names = f" of {', '.join(self.attributes)}" if self.attributes else ""
            others = (
                f" or a preset among {', '.join(self.presets)}" if self.presets else f"{names} (there are no presets)"
            )
            near = suggest(weights, self.presets)
            raise ValueError(f"weights: expected NAME=NUMBER,...{others}, got {weights!r}{near}")
        return parse_weights(weights)

    @contextmanager
    def locate_errors(self) -> Iterator[None]:
        """Put the file before a ValueError about a model that it names."""
        try:
            yield
        except ValueError as error:
            file = self.files.get(re.split(r"[\[:]", str(error))[0])  # every message begins with its argument
            if file is None:
                raise
            raise ValueError(f"{file}: {error}") from error

    def pin(self, roles: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """The same models wherever the process goes: paths absolute, a default written out, and of an object in memory
        no more than its type, so that it can be freed.

        roles  `Ensemble.describe()`
        """
        names = [name for name in roles if name not in ROLES]
        attributes = self.attributes or {name: roles[name]["adapter"] or roles[name]["source"] for name in names}
        return replace(
            self,
            base=_pin(self.base),
            attributes={
                name: _pin(source, names if isinstance(source, Context | Mapping) else ())
                for name, source in attributes.items()
            },
            anchor=_pin(self.anchor, names),
            draft=_pin(self.draft, names),
            tokenizer=_pin(self.tokenizer),
            device_map=self.device_map and _plain(self.device_map),
        )

    def write(self, target: str | Path) -> None:
        """Write the recipe to a .yaml file, or to mpg.yaml in a folder that is made where there is none.

        Models below its folder are named relative to it, so that they move with it, others by their absolute path.

        Raises ValueError, naming the argument of `mpg.load`, for a model that lies in no folder and on no hub, and
        naming target where nothing can be written.
        """
        file = Path(target).absolute()
        file = file if file.suffix in SUFFIXES else file / FILE

        def place(argument: str, source: Any) -> Any:
            if isinstance(source, Mapping):
                return {key: place(argument, at) if key == "source" else at for key, at in source.items()}
            if not isinstance(source, str):
                got = f"a {source.__name__} in memory" if source else "none"
                remedy = "save it with its own save_pretrained() and load it from there"
                raise ValueError(f"{argument}: expected a folder or a hub name, got {got}; {remedy}")
            is_below = Path(source).is_relative_to(file.parent)
            return Path(source).relative_to(file.parent).as_posix() if is_below else source

        sources = {name: getattr(self, name) for name in ("base", "anchor", "draft", "tokenizer")}
        document: dict[str, Any] = {name: place(name, at) for name, at in sources.items() if at or name == "base"}
        attributes = self.attributes or {}
        document["attributes"] = {name: place(f"attributes[{name!r}]", at) for name, at in attributes.items()}
        document |= {name: getattr(self, name) for name in ("device_map", "quantize", *SWITCHES)}
        document["weights"] = self.weights and dict(self.weights)
        document["presets"] = {name: dict(weights) for name, weights in self.presets.items()}
        document["options"] = dict(self.options)
        document = {key: value for key, value in document.items() if value}
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            wanted = "a folder that there is or that can be made"
            raise ValueError(f"target: expected {wanted}, got {str(file.parent)!r}: {error.strerror}") from error
        with whole_file("target", file) as beside:
            beside.write_text(text, encoding="utf-8")


def parse_setting(text: str) -> tuple[str, Any]:
    """Name and value of an option from "NAME=VALUE", the value as a recipe would have it: "0.7" is a number, "true" a
    truth, "merged" a text, "null" nothing.

    Raises ValueError for text of another form, and for a value that is not one of YAML's.
    """
    name, value = parse_pair("set", "NAME=VALUE", text)
    try:
        return name, yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):  # a ValueError for a date that there is not
        raise ValueError(f"{name}: expected a number, true, false or a word, got {value!r}") from None


def parse_settings(texts: Sequence[str] | None, named: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Options by name from texts that `parse_setting` reads. named: those that were given otherwise, None being none

    Raises ValueError as it does, and for one that is given twice.
    """
    found: dict[str, Any] = {}
    for name, value in map(parse_setting, texts or ()):
        if name in found or named.get(name) is not None:
            other = found.get(name, named.get(name))
            raise ValueError(f"{name}: expected once, got {other!r} and --set {name}={value}")
        found[name] = value
    return found


def _find(source: Any) -> Path | None:
    """The recipe's file that a source is or holds, or that of a set that ships."""
    if not isinstance(source, str | Path):
        return None
    path = Path(source)
    path = path if path.exists() else SETS.get(str(source), path)
    if path.suffix in SUFFIXES:
        return path
    return path / FILE if (path / FILE).is_file() else None


def _pin(source: Any, names: Sequence[str] = ()) -> Any:
    if isinstance(source, Context | Mapping):
        context = vars(Context.of("context", source))
        return {key: _pin(at, names) if key == "source" else at for key, at in context.items() if at is not None}
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


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number (YAML 1.1 wants a dot and a sign), and a key that comes twice a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} comes twice", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?e[-+]?\d+$", re.I), [*"-+0123456789"]
)


def _read(file: Path) -> Recipe:
    with refuse_unreadable_text("recipe", file):
        text = file.read_text(encoding="utf-8-sig")
    try:
        document = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError for a date that there is not
        what = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise ValueError(f"{file}: expected YAML: {what}") from error
    try:
        return _recipe(document, file)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _recipe(document: Any, file: Path) -> Recipe:
    if document is None:
        raise ValueError("expected the keys base and attributes, got an empty file")
    given = _mapping("recipe", document, "key", [key.name for key in fields(Recipe) if key.name not in NO_KEYS])
    for key in ("base", "attributes"):
        if key not in given:
            raise ValueError(f"{key}: expected in every recipe, got {', '.join(given) or 'none'}")
    folder, of_attributes = file.parent.absolute(), _mapping("attributes", given["attributes"], "attribute")
    if not of_attributes:
        raise ValueError("attributes: expected at least one, got none")
    attributes = {
        name: _attribute(f"attributes[{name!r}]", at, folder, of_attributes) for name, at in of_attributes.items()
    }
    sources = {key: given[key] for key in ("base", "anchor", "draft", "tokenizer") if key in given}
    presets = {}
    for name, weights in _mapping("presets", given.get("presets", {}), "preset").items():
        if not name or "=" in name:
            raise ValueError(f"presets: expected a name without '=', got {name!r}")
        presets[name] = _weights(f"presets[{name!r}]", weights, attributes)
    options = _mapping("options", given.get("options", {}), "option")
    try:
        Options.of(options)
    except ValueError as error:
        raise ValueError(f"options: {error}") from None
    own: dict[str, Any] = {key: given[key] for key in ("quantize", *SWITCHES) if key in given}
    for key, at in sources.items():
        own[key] = (_attribute if key == "anchor" else _source)(
            key, at, folder, attributes if key in ("anchor", "draft") else ()
        )
    if "device_map" in given:
        own["device_map"] = _places("device_map", given["device_map"], [*attributes, *ROLES])
    if "weights" in given:
        weights = given["weights"]
        if not isinstance(weights, (dict, list)):
            if weights not in presets:
                wanted = f"a mapping or a preset{' among ' + ', '.join(presets) if presets else ''}"
                raise ValueError(f"weights: expected {wanted}, got {weights!r}")
            weights = presets[weights]
        own["weights"] = _weights("weights", weights, attributes)
    return Recipe(**own, attributes=attributes, presets=presets, options=options, files=dict.fromkeys(given, file))


def _mapping(what: str, value: Any, kind: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    """A mapping by names. Refuses what is none, and unknown names."""
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected a mapping, got {value!r}")
    for name in value:
        if not isinstance(name, str):
            raise ValueError(f"{what}: expected text as names, got {name!r}; put it in quotes")
        if known is not None and name not in known:
            raise ValueError(f"{what}: unknown {kind} {name!r}; {hint(name, known)}")
    return value


def _attribute(argument: str, value: Any, folder: Path, names: Container[str] = ()) -> Any:
    """A source as of `_source`; or a context as a mapping, whose source is one, or the name of an attribute."""
    if not isinstance(value, dict):
        return _source(argument, value, folder, names if argument == "anchor" else ())
    context = vars(Context.of(argument, value))
    if context["source"] is not None:
        context["source"] = _source(f"{argument}: source", context["source"], folder, names)
    return {key: given for key, given in context.items() if given is not None}


def _source(argument: str, value: Any, folder: Path, names: Container[str] = ()) -> str:
    """The absolute path of what lies beside the recipe, else a hub's name or an attribute's."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{argument}: expected a folder or a hub name, got {value!r}")
    path = folder / os.path.expanduser(value)  # which leaves the ~ of a user that there is not
    if value in names:
        return value
    if path.exists():
        return str(path)
    owner, slash, _ = value.partition("/")
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value) and not (slash and (folder / owner).is_dir()):
        return value
    hint = "; a text is a context, {system: ...}" if len(value.split()) > 2 else ""
    place = "" if str(path) == value else f" ({path})"
    raise ValueError(f"{argument}: expected a folder that exists or a hub name, got {value!r}{place}{hint}")


def _places(what: str, value: Any, known: Sequence[str] | None = None) -> dict[str, Any]:
    """Devices by name; that of a name may be a mapping too, which splits its model."""
    places = {}
    for name, place in _mapping(what, value, "name", known).items():
        if isinstance(place, dict) and known is not None:
            place = _places(f"{what}[{name!r}]", place)
        elif not isinstance(place, str | int) or isinstance(place, bool):
            raise ValueError(f"{what}: expected a device for {name!r}, got {place!r}")
        places[name] = place
    return places


def _weights(what: str, value: Any, attributes: Mapping[str, Any]) -> dict[str, float]:
    weights = _mapping(what, value, "attribute", list(attributes))
    try:
        check_weights(weights, list(attributes), "geometric")
    except ValueError as error:
        raise ValueError(str(error).replace("weights", what, 1)) from None
    return {name: float(weight) for name, weight in weights.items()}
