"""`furiosa-build`: the command line. Every command is a thin face over functions that Python code can call as well."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from furiosa_build import cache_cli
from furiosa_build.errors import BuildError

app = typer.Typer(
    help="Builds a large language model into a versioned artifact, and runs it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(cache_cli.app, name="cache")

RecipeName = Annotated[str, typer.Argument(metavar="NAME", help="A recipe; `furiosa-build recipes` lists them.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE ...]",
        help="Hydra overrides, such as quantization=int8 or buckets.decode_buckets=[[1,512]].",
    ),
]
ArtifactPath = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="An artifact's directory, such as artifacts/NAME/latest.")
]


@app.command()
def build(
    name: RecipeName,
    overrides: Overrides = None,
    verify_inputs: Annotated[
        bool, typer.Option("--verify-inputs", help="Read all inputs again, even those that look unchanged.")
    ] = False,
) -> None:
    """Build a recipe's artifact, doing only the steps that are not done yet."""
    from furiosa_build import dodo
    from furiosa_build.build import open_build

    flags = ["verify_inputs=true"] if verify_inputs else []
    sys.exit(dodo.run(open_build(name, [*(overrides or []), *flags])))


@app.command()
def plan(name: RecipeName, overrides: Overrides = None) -> None:
    """Show the steps with their state, and what each bucket compiles."""
    from furiosa_build.build import open_build
    from furiosa_build.show import plan_text

    opened = open_build(name, overrides or [])
    try:
        print(plan_text(opened))
    finally:
        opened.close()


@app.command()
def recipes() -> None:
    """List the recipes: those of the current directory, then the shipped ones."""
    from furiosa_build.recipe.compose import list_recipes

    for recipe in list_recipes():
        print(f"{recipe.name:24} {recipe.description}")


@app.command()
def inspect(artifact: ArtifactPath) -> None:
    """Show what an artifact is: model, devices, buckets, quantization, sizes, versions, programs."""
    from furiosa_build.artifact.reader import open_artifact
    from furiosa_build.show import artifact_text

    opened = open_artifact(artifact)
    print(artifact_text(opened.artifact, opened.directory))


@app.command()
def generate(
    artifact: ArtifactPath,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens of this probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 or -1: from all.")] = -1,
    seed: Annotated[int | None, typer.Option(help="For the same text every time.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
) -> None:
    """Generate text from an artifact, printed as it comes."""
    from furiosa_build.runtime import LLMEngine, SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop or []
    )
    engine = LLMEngine(artifact)
    engine.add_request("0", prompt, params)
    shown = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            text = output.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print()


def main() -> None:
    """The console script. Errors that a person is meant to read end it with their exit status."""
    try:
        app()
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("interrupted by SIGINT", file=sys.stderr)
        sys.exit(130)
