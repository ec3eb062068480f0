"""The commands about builds: build, shard, plan, explain, recipes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from furiosa_build.cli import running
from furiosa_build.core.errors import UserError

RecipeName = Annotated[str, typer.Argument(metavar="NAME", help="A recipe; `furiosa-build recipes` lists them.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE ...]",
        help="Hydra overrides, such as quantization=int8 or buckets.decode_buckets=[[1,512]].",
    ),
]


Multirun = Annotated[
    bool,
    typer.Option(
        "--multirun", "-m", help="All points of a sweep: overrides take several values, such as quantization=none,int8."
    ),
]


def build(
    name: RecipeName,
    overrides: Overrides = None,
    verify_inputs: Annotated[
        bool, typer.Option("--verify-inputs", help="Read all inputs again, even those that look unchanged.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Then build again without the store, and compare every file.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one event a line, as JSON.")] = False,
    multirun: Multirun = False,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="With --multirun: begin no step once one has failed.")
    ] = False,
) -> None:
    """Build a recipe's artifact, doing only the steps that are not done yet."""
    if multirun:
        from furiosa_build.cli import sweeping

        if check:
            raise UserError("--check builds one artifact again", where="--check", hint="leave out --multirun")
        flags = ["verify_inputs=true"] if verify_inputs else []
        sys.exit(sweeping.build(name, [*(overrides or []), *flags], as_json, fail_fast))
    flags = ["verify_inputs=true"] if verify_inputs else []
    opened = running.open_build(name, [*(overrides or []), *flags], as_json)
    status = running.run(opened)
    if check and status == 0:
        from furiosa_build.build.reproduce import check_reproducible

        status = check_reproducible(opened, running.listeners(as_json), running.SIGNALS)
    sys.exit(status)


def shard(
    name: RecipeName,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the files go: a new or empty directory.")],
    overrides: Overrides = None,
    tensor_parallelism_size: Annotated[
        int | None, typer.Option(help="How many ranks; as parallel.tensor_parallel_size=N.")
    ] = None,
) -> None:
    """Write a model's sharded parameters and one file of metadata alone: no programs. Needs no compiler."""
    from furiosa_build.build import export_shards

    export_shards.check_output(output.absolute())
    ranks = tensor_parallelism_size
    more = [] if ranks is None else [f"parallel.tensor_parallel_size={ranks}"]
    opened = running.open_build(name, [*(overrides or []), *more])
    sys.exit(running.run(opened, "shard", shards=output.absolute()))


def plan(
    name: RecipeName,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object.")] = False,
    multirun: Multirun = False,
) -> None:
    """Show the steps with their state, what each bucket compiles, and what a build needs: bytes, memory, disk, time."""
    if multirun:
        from furiosa_build.cli import sweeping

        if as_json:
            raise UserError("a sweep's plan is text", where="--json", hint="leave out --json or --multirun")
        print(sweeping.plan(name, overrides or []))
        return
    from furiosa_build.ui.plan_text import plan_data, plan_text

    opened = running.open_to_look(name, overrides or [])
    try:
        print(json.dumps(plan_data(opened)) if as_json else plan_text(opened))
    finally:
        opened.close()


def explain(
    name: RecipeName,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line, for each step.")] = False,
) -> None:
    """Say for each step whether it is up to date, and if not, what has changed since it was done."""
    from dataclasses import asdict

    from furiosa_build.ui.explain_text import explain_text

    opened = running.open_to_look(name, overrides or [])
    try:
        if as_json:
            for explanation in opened.explain():
                print(json.dumps(asdict(explanation)))
        else:
            print(explain_text(opened.explain()))
    finally:
        opened.close()


def recipes() -> None:
    """List the recipes: those of the current directory, then the shipped ones."""
    from furiosa_build.recipe.compose import list_recipes

    for recipe in list_recipes():
        print(f"{recipe.name:24} {recipe.description}")
