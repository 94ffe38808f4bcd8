"""Attributes that come and go while the server runs. Knows recipes and folders.

Requests that run keep the models that they began with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from threading import Lock

from huggingface_hub import try_to_load_from_cache

from mpg.model import Model
from mpg.models.ensemble import ANCHOR, BASE, DRAFT, MERGED, Ensemble
from mpg.models.sources import ADAPTER_CONFIG, CONFIG
from mpg.recipe import Recipe
from mpg.serve.engine import Engine
from mpg.serve.errors import ApiError, of_library


class Attributes:
    """Puts the loaded models together anew with one attribute more or less, and lets new requests have them.

    load  the models of a recipe beside those that run, on the device and in the type that the server was started with
    """

    def __init__(self, engine: Engine, load: Callable[[Recipe, Ensemble], Model]):
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
        """The folder that is meant, below one that the server was started with: by its path, or where that is a cache
        of the hub by the name of the repository."""
        folders = [folder.resolve() for folder in self.engine.settings.attribute_folders]
        ways = [partial(Path, source), *(partial(Path, folder, source) for folder in folders)]
        names = product(folders, (ADAPTER_CONFIG, CONFIG))
        ways += [partial(_cached, source, folder, name) for folder, name in names]
        for way in ways:
            try:
                place = way().resolve()
                if any(place.is_relative_to(folder) for folder in folders) and place.is_dir():
                    return place
            except (OSError, RuntimeError, ValueError):  # a link to itself, a name that is too long, a NUL
                continue
        wanted = "a folder below those of --attribute-folder, or a repository in one that is a cache of the hub"
        raise ApiError(400, f"source: expected {wanted}, got {source!r}", "source")

    def _load(self, recipe: Recipe) -> None:
        try:
            self.engine.replace(self.load(recipe, self.engine.model.models))
        except ValueError as error:
            raise of_library(error, {"attributes": "source"}) from error


def _cached(repository: str, cache: Path, file: str) -> Path:
    """Where a cache of the hub has a repository that holds a file. Asks no hub; raises ValueError where it is not."""
    found = try_to_load_from_cache(repository, file, cache_dir=cache)
    if not isinstance(found, str):
        raise ValueError(f"{repository}: expected it in {cache}, got none")
    return Path(found).parent
