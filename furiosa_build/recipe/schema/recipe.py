"""Recipe: a BuildSpec, and how it is to be built."""

from __future__ import annotations

from pathlib import Path

from furiosa_build.recipe.schema.section import PositiveInt, Section
from furiosa_build.recipe.schema.spec import BuildSpec


class BuildOptions(Section):
    """Where and how to build. No option changes the artifact's bytes."""

    save_dir: str = "artifacts"
    cache_dir: str | None = None
    num_compile_workers: PositiveInt = 1
    num_pipeline_builder_workers: PositiveInt = 1
    verify_inputs: bool = False


class Recipe(Section):
    """A composed recipe: what to build, how, and where a relative model path is looked up, in order.

    `draft` is the recipe of the draft model, as it is built for this one (`recipe.draft`).
    """

    spec: BuildSpec
    options: BuildOptions
    roots: tuple[Path, ...]
    draft: Recipe | None = None
