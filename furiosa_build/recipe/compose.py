"""Composing a recipe: find it by its name, compose it with Hydra, validate it with pydantic.

A recipe is a function of its files and the overrides: nothing is read from the environment, nothing executed.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from furiosa_build.core.errors import UserError, nearest
from furiosa_build.recipe.config_files import Key, YamlError, dotted, parse_key
from furiosa_build.recipe.defaults import chosen_groups, groups, included_files
from furiosa_build.recipe.draft import draft_spec
from furiosa_build.recipe.explain_mistakes import Locator, combine, user_errors
from furiosa_build.recipe.overrides import Override, choices, parse_overrides
from furiosa_build.recipe.schema import BuildOptions, BuildSpec, Recipe
from furiosa_build.recipe.schema.spec import joined_devices
from furiosa_build.recipe.targets import is_of_npu, target_with

_PACKAGE = Path(__file__).resolve().parent.parent
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESOLVER = re.compile(r"\$\{(?:[^{}]|\$\{[^{}]*\})*?:")  # `${name:`; the name may be an interpolation itself.
_hydra_lock = threading.Lock()


@dataclass(frozen=True)
class RecipeFile:
    """A recipe that can be built by its name. `description` is the file's first comment line."""

    name: str
    path: Path
    description: str


def list_recipes(cwd: Path | None = None) -> list[RecipeFile]:
    """The available recipes, by name. One in the current directory hides a shipped one of the same name."""
    files = _recipe_files(recipe_roots(cwd))
    return [RecipeFile(name, path, _description(path)) for name, path in sorted(files.items())]


def recipe_roots(cwd: Path | None = None) -> tuple[Path, ...]:
    """Where recipes/, conf/ and model paths are looked up: the current directory, then the shipped files."""
    shipped = _PACKAGE / "shipped"
    roots = ((cwd or Path.cwd()).resolve(), shipped if shipped.is_dir() else _PACKAGE.parent)
    return tuple(dict.fromkeys(roots))


def search_directories(roots: tuple[Path, ...]) -> list[Path]:
    """Where the files are that a recipe may include, those that hide others first."""
    return [root / part for part in ("conf", "recipes") for root in roots if (root / part).is_dir()]


def load_recipe(name: str, overrides: Sequence[str] = (), *, cwd: Path | None = None) -> Recipe:
    """Compose and validate the recipe called `name`.

    Args:
        name: A recipe's name, as in `list_recipes`.
        overrides: Hydra overrides: ``model.num_hidden_layers=2``, ``quantization=int8``, ``~model.revision``.
        cwd: Looked up first; the current directory by default.

    Raises:
        UserError: A mistake in the name, a file or an override. One error lists all of them.
    """
    try:
        return _load(name, overrides, recipe_roots(cwd))
    except OSError as error:
        raise UserError(f"cannot read a recipe's file: {error.strerror}", where=str(error.filename)) from None


def validate(interface: str, spec: Mapping[str, Any], options: Mapping[str, Any], roots: tuple[Path, ...]) -> Recipe:
    """A recipe made without a file. `interface` is what messages call the caller. Raises UserError."""
    locate = Locator(Path(interface), [], [])
    return _validate(str(spec["name"]), {**spec, **options}, locate, roots)


def _load(name: str, overrides: Sequence[str], roots: tuple[Path, ...]) -> Recipe:
    config, locate = _composed(find_recipe(name, roots), overrides, roots)
    return _validate(name, config, locate, roots)


def _composed(path: Path, overrides: Sequence[str], roots: tuple[Path, ...]) -> tuple[dict[str, Any], Locator]:
    search = search_directories(roots)
    parsed = parse_overrides(overrides, groups(search))

    def composed() -> tuple[dict[str, Any], Locator]:
        files = included_files(path, [path.parent, *search], choices(parsed))
        locate = Locator(path, files, parsed)
        return _compose(search, locate), locate

    config, locate = composed()
    if (target := _target_of_devices(config, locate, roots)) is not None:
        parsed.append(target)
        return composed()
    return config, locate


def _target_of_devices(config: dict[str, Any], locate: Locator, roots: tuple[Path, ...]) -> Override | None:
    """The choice of a target that a recipe for an NPU leaves open: base's is a CPU."""
    devices, target = config.get("devices"), config.get("target")
    if not isinstance(devices, str | list) or not isinstance(target, dict) or is_of_npu(target):
        return None
    if "target" in choices(locate.overrides) or "target" in chosen_groups(locate.recipe, locate.files):
        return None
    name = target_with(joined_devices(devices), roots, locate(("devices",)).where)
    return None if name is None else Override(f"target={name}", ("target",), name, True, f"target={name}")


def _recipe_files(roots: tuple[Path, ...]) -> dict[str, Path]:
    files = {
        path.stem: path
        for root in reversed(roots)  # The first root wins.
        for path in (root / "recipes").glob("*.yaml")
    }
    return {name: path for name, path in files.items() if _NAME.fullmatch(name) and path.is_file()}


def _description(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline().strip()
    except OSError as error:
        return f"(cannot be read: {error.strerror})"
    return first.lstrip("# ") if first.startswith("#") else ""


def find_recipe(name: str, roots: tuple[Path, ...], where: str = "") -> Path:
    """The file of the recipe `name`. `where`: what names it; by default the directories that are searched."""
    files = _recipe_files(roots)
    if name in files:
        return files[name]
    where = where or ", ".join(str(root / "recipes") for root in roots)
    if not _NAME.fullmatch(name) or name.endswith((".yaml", ".yml")):
        valid = "the name of a file in recipes/, without its directory and without .yaml"
        hint = nearest(Path(name).stem, files)
        raise UserError(f"{name!r} is not a recipe's name", where=where, valid=valid, hint=hint)
    hint = nearest(name, files) or "a recipe is a file recipes/NAME.yaml in the current directory"
    raise UserError(f"there is no recipe {name!r}", where=where, valid=", ".join(sorted(files)), hint=hint)


def _compose(search: list[Path], locate: Locator) -> dict[str, Any]:
    """The recipe as plain data, every interpolation resolved."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if any(file.find(("hydra",)) for file in locate.files):
        where = locate(("hydra",)).where
        raise UserError("a recipe cannot configure Hydra", where=where, hint="remove the key `hydra`")
    paths = ",".join("'file://" + str(directory).replace("'", "\\'") + "'" for directory in search)
    arguments = [f"hydra.searchpath=[{paths}]", *(override.for_hydra for override in locate.overrides)]
    with hydra_alone():
        try:
            with initialize_config_dir(str(locate.recipe.parent), version_base="1.3"):
                config = compose(locate.recipe.stem, overrides=arguments)
            for key, text in _strings(OmegaConf.to_container(config, resolve=False)):
                _refuse_resolver(key, text, locate)
            return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
        except (HydraException, OmegaConfBaseException, YamlError, ValueError) as error:
            raise composition_error(error, locate) from None


@contextmanager
def hydra_alone() -> Iterator[None]:
    """Hydra's state, which is global to the process, is that of the caller alone, and as before at the end."""
    from hydra.core.global_hydra import GlobalHydra

    with _hydra_lock, warnings.catch_warnings():
        # Hydra warns of its own changes over time, such as where `_self_` stands when it is not named (last).
        warnings.simplefilter("ignore")
        outer = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            yield
        finally:
            GlobalHydra.instance().hydra = outer


def _strings(value: object, key: Key = ()) -> Iterator[tuple[Key, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, (*key, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, (*key, index))
    elif isinstance(value, str):
        yield key, value


def _refuse_resolver(key: Key, text: str, locate: Locator) -> None:
    if _RESOLVER.search(text):
        raise UserError(
            f"{dotted(key)}: {text!r} refers to a value outside the recipe",
            where=locate(key).where,
            valid="${key}, the value of another key",
            hint="a recipe builds the same artifact anywhere: give such a value as an override, key=value",
        )


def composition_error(error: BaseException, locate: Locator) -> UserError:
    """An error of Hydra or OmegaConf as a UserError. Its first line says what is wrong, the rest is advice."""
    error = error.__cause__ if error.__cause__ and not str(error) else error
    what, _, rest = str(error).strip().partition("\n")
    advice = " ".join(rest.split("full_key:")[0].split())
    if "appears more than once in the final defaults list" in what:
        advice = "write `- override GROUP: CHOICE` to change what another file of the defaults list chose"
    if full_key := getattr(error, "full_key", None):
        return UserError(what, where=locate(parse_key(full_key)).where, hint=advice)
    for item in locate.overrides:
        if f"'{dotted(item.key)}'" in what or item.for_hydra in what:
            return UserError(what.replace(item.for_hydra, item.text), where=item.where, hint=advice)
    return UserError(what, where=str(locate.recipe), hint=advice)


def _validate(name: str, config: dict[str, Any], locate: Locator, roots: tuple[Path, ...]) -> Recipe:
    spec, options = _parts(name, config, locate)
    recipe = Recipe(spec=spec, options=options, roots=roots)
    if (draft := spec.speculative.recipe) is None:
        return recipe
    return recipe.model_copy(update={"draft": _draft(draft, recipe, locate(("speculative", "recipe")).where)})


def _draft(name: str, recipe: Recipe, where: str) -> Recipe:
    """The recipe of the draft model, as it is built for `recipe`. `where`: what names it."""
    draft, _ = _parts(name, *_composed(find_recipe(name, recipe.roots, where), (), recipe.roots))
    return recipe.model_copy(update={"spec": draft_spec(draft, recipe.spec, where)})


def _parts(name: str, config: dict[str, Any], locate: Locator) -> tuple[BuildSpec, BuildOptions]:
    options = {key: config.pop(key) for key in BuildOptions.model_fields if key in config}
    config.setdefault("name", name)
    mistakes: list[UserError] = []
    try:
        spec = BuildSpec.model_validate(config)
    except ValidationError as error:
        mistakes += user_errors(error, locate)
    try:
        build_options = BuildOptions.model_validate(options)
    except ValidationError as error:
        mistakes += user_errors(error, locate)
    if mistakes:
        raise combine(mistakes, name, str(locate.recipe))
    return spec, build_options
