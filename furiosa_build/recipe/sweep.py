"""The points of a sweep: Hydra's multirun expands the overrides, and each point is a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from furiosa_build.core.errors import UserError
from furiosa_build.recipe.compose import (
    composition_error,
    find_recipe,
    hydra_alone,
    load_recipe,
    recipe_roots,
    search_directories,
)
from furiosa_build.recipe.defaults import groups
from furiosa_build.recipe.explain_mistakes import Locator
from furiosa_build.recipe.overrides import Override, parse_sweep
from furiosa_build.recipe.schema import Recipe


@dataclass(frozen=True)
class Point:
    """One of the recipes of a sweep.

    Attributes:
        overrides: What makes it differ from the others.
        recipe: The recipe.
    """

    overrides: tuple[str, ...]
    recipe: Recipe

    @property
    def title(self) -> str:
        """The overrides, as one text."""
        return " ".join(self.overrides)


class Mistakes:
    """Collects the mistakes of points, of which there are `total`, to tell all of them at once."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._titles: dict[str, list[str]] = {}

    @contextmanager
    def of(self, title: str) -> Iterator[None]:
        """A UserError within is a mistake of the point with this title."""
        try:
            yield
        except UserError as error:
            self._titles.setdefault(str(error), []).append(title)

    def refuse(self) -> None:
        """Raises UserError if there are any: those of every point once, each other with the points that have it."""
        if self._titles:
            told = (
                text if len(titles) == self._total else f"in {', '.join(titles)}: {text}"
                for text, titles in self._titles.items()
            )
            raise UserError("\n".join(told))


def sweep_points(name: str, overrides: Sequence[str], *, cwd: Path | None = None) -> list[Point]:
    """The points that Hydra's multirun makes of a recipe and overrides such as ``quantization=none,int8``.

    Points whose recipes build the same are one.

    Raises:
        UserError: A mistake in the recipe or the overrides. One error lists all of them, with their points.
    """
    expanded = _expand(name, overrides, recipe_roots(cwd))
    varied = [place for place, texts in enumerate(zip(*expanded, strict=True)) if len(set(texts)) > 1]
    points: list[Point] = []
    mistakes = Mistakes(len(expanded))
    for texts in expanded:
        chosen = tuple(texts[place] for place in varied)
        with mistakes.of(" ".join(chosen)):
            recipe = load_recipe(name, texts, cwd=cwd)
            if all(recipe != point.recipe for point in points):
                points.append(Point(chosen, recipe))
    mistakes.refuse()
    _refuse_other_options(points)
    return points


def _expand(name: str, overrides: Sequence[str], roots: tuple[Path, ...]) -> list[list[str]]:
    """The overrides of each point, as they would be typed for a build."""
    path, search = find_recipe(name, roots), search_directories(roots)
    parsed = parse_sweep(overrides, groups(search))
    found = [
        [text.removeprefix("++" * one.is_forced) for text, one in zip(texts, parsed, strict=True)]
        for texts in _swept(path, search, parsed)
    ]
    if not found:
        where = f"command line: {' '.join(overrides)}"
        raise UserError("there is nothing to build: a key is given no value", where=where)
    return found


def _swept(path: Path, search: Sequence[Path], overrides: Sequence[Override]) -> list[Sequence[str]]:
    """What Hydra's basic sweeper would launch. It composes nothing: that is done for each point, with its mistakes."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.plugins import Plugins
    from hydra.errors import HydraException

    # Made up front: with hydra.searchpath as an override, glob(*) silently finds nothing (Hydra 1.3).
    paths = ConfigSearchPathImpl()
    for each in (path.parent, *search):
        paths.append("furiosa_build", f"file://{each}")
    with hydra_alone():
        Plugins.instance()  # registers what reads files
        try:
            parser = OverridesParser.create(config_loader=ConfigLoaderImpl(paths))
            parsed = parser.parse_overrides([one.for_hydra for one in overrides])
            batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        except HydraException as error:
            raise composition_error(error, Locator(path, [], overrides)) from None
    return [texts for batch in batches for texts in batch]


def _refuse_other_options(points: Sequence[Point]) -> None:
    first = points[0].recipe.options
    for point in points:
        if point.recipe.options != first:
            differing = [key for key, value in point.recipe.options if value != getattr(first, key)]
            raise UserError(
                f"{', '.join(differing)} cannot be swept: it changes nothing of an artifact",
                where=f"command line: {point.title}",
                hint="give it one value for all points",
            )
