"""Attributes that come and go while the server runs. Knows recipes and folders.

Requests that run keep the models that they began with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Lock

from mpg.model import Model
from mpg.models.ensemble import ANCHOR, BASE, DRAFT, MERGED
from mpg.recipe import Recipe
from mpg.serve.engine import Engine
from mpg.serve.errors import ApiError, of_library


class Attributes:
    """Loads the models anew with one attribute more or less, and lets new requests have them.

    load  the models of a recipe, on the device and in the type that the server was started with
    """

    def __init__(self, engine: Engine, load: Callable[[Recipe], Model]):
        self.engine, self.load = engine, load
        self._lock = Lock()

    def add(self, name: str, source: str) -> None:
        """Raises ApiError for a name that is taken, and for a folder that may not be read or holds no such thing."""
        with self._lock:
            recipe = self.engine.model.recipe
            taken = {BASE, ANCHOR, DRAFT, MERGED, self.engine.settings.name, *self._known(), *recipe.presets}
            if name in taken:
                raise ApiError(409, f"name: expected one that is not taken, got {name!r}", "name", "name_taken")
            folder = self._place(source)
            self._load(replace(recipe, attributes={**(recipe.attributes or {}), name: str(folder)}))

    def remove(self, name: str) -> None:
        """Raises ApiError for a name that there is not, and for one that the recipe needs."""
        with self._lock:
            recipe = self.engine.model.recipe
            if name not in self._known():
                raise ApiError(404, f"name: expected one of {', '.join(self._known())}, got {name!r}", "name")
            users = [preset for preset, weights in recipe.presets.items() if name in weights]
            users += [role for role in ("draft", "anchor") if getattr(recipe, role) == name]
            users += ["weights"] if name in (recipe.weights or {}) else []
            if users:
                raise ApiError(409, f"name: {name!r} is needed by {', '.join(users)}", "name", "name_in_use")
            kept = {other: source for other, source in (recipe.attributes or {}).items() if other != name}
            self._load(replace(recipe, attributes=kept))

    def _known(self) -> tuple[str, ...]:
        return self.engine.model.models.attribute_names

    def _place(self, source: str) -> Path:
        """The folder that is meant, below one that the server was started with."""
        folders = [folder.resolve() for folder in self.engine.settings.attribute_folders]
        for candidate in (Path(source), *(folder / source for folder in folders)):
            try:
                place = candidate.resolve()
                if any(place.is_relative_to(folder) for folder in folders) and place.is_dir():
                    return place
            except (OSError, RuntimeError, ValueError):  # a link to itself, a name that is too long, a NUL
                continue
        raise ApiError(400, f"source: expected a folder below those of --attribute-folder, got {source!r}", "source")

    def _load(self, recipe: Recipe) -> None:
        try:
            model = self.load(recipe)
        except ValueError as error:
            raise of_library(error, {"attributes": "source"}) from error
        model.models.reuse_weights(self.engine.model.models)
        self.engine.replace(model)
