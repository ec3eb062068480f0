"""`furiosa-build`: the command line. Every command is a thin face over functions that Python code can call as well."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from furiosa_build.cli import cache
from furiosa_build.core.errors import BuildError, UserError
from furiosa_build.core.text import size_text

app = typer.Typer(
    help="Builds a large language model into a versioned artifact, and runs it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(cache.app, name="cache")

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
    check: Annotated[
        bool, typer.Option("--check", help="Then build again without the store, and compare every file.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one event a line, as JSON.")] = False,
) -> None:
    """Build a recipe's artifact, doing only the steps that are not done yet."""
    from furiosa_build.build import graph
    from furiosa_build.build.build import open_build

    flags = ["verify_inputs=true"] if verify_inputs else []
    opened = open_build(name, [*(overrides or []), *flags])
    status = graph.run(opened, as_json=as_json)
    if check and status == 0:
        from furiosa_build.build.reproduce import check_reproducible

        check_reproducible(opened, graph.run, as_json)
    sys.exit(status)


@app.command()
def shard(
    name: RecipeName,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the files go: a new or empty directory.")],
    overrides: Overrides = None,
    tensor_parallelism_size: Annotated[
        int | None, typer.Option(help="How many ranks; as parallel.tensor_parallel_size=N.")
    ] = None,
) -> None:
    """Write a model's sharded parameters and one file of metadata alone: no programs. Needs no compiler."""
    from furiosa_build.build import export_shards, graph
    from furiosa_build.build.build import open_build

    export_shards.check_output(output.absolute())
    ranks = tensor_parallelism_size
    more = [] if ranks is None else [f"parallel.tensor_parallel_size={ranks}"]
    opened = open_build(name, [*(overrides or []), *more])
    sys.exit(graph.run(opened, "shard", shards=output.absolute()))


@app.command()
def plan(
    name: RecipeName,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object.")] = False,
) -> None:
    """Show the steps with their state, what each bucket compiles, and what a build needs: bytes, memory, disk, time."""
    from furiosa_build.build.build import open_build
    from furiosa_build.ui.describe import plan_data, plan_text

    opened = open_build(name, overrides or [])
    try:
        print(json.dumps(plan_data(opened)) if as_json else plan_text(opened))
    finally:
        opened.close()


@app.command()
def explain(
    name: RecipeName,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line, for each step.")] = False,
) -> None:
    """Say for each step whether it is up to date, and if not, what has changed since it was done."""
    from dataclasses import asdict

    from furiosa_build.build.build import open_build
    from furiosa_build.ui.describe import explain_text

    opened = open_build(name, overrides or [])
    try:
        if as_json:
            for explanation in opened.explain():
                print(json.dumps(asdict(explanation)))
        else:
            print(explain_text(opened.explain()))
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
    from furiosa_build.ui.describe import artifact_text

    opened = open_artifact(artifact)
    print(artifact_text(opened.artifact, opened.directory))


@app.command()
def verify(
    artifact: ArtifactPath,
    public_key: Annotated[Path | None, typer.Option(help="The signer's elliptic key, PEM.")] = None,
    identity: Annotated[str | None, typer.Option(help="Who must have signed (Sigstore), such as an email.")] = None,
    identity_provider: Annotated[str | None, typer.Option(help="The OpenID issuer who vouches for it, a URL.")] = None,
) -> None:
    """Read every byte of an artifact, and name every file that is not as it was published. Exit status 5 if any is."""
    from furiosa_build.artifact import signing
    from furiosa_build.artifact.reader import open_artifact

    if (identity is None) != (identity_provider is None):
        raise UserError("--identity and --identity-provider belong together", where="command line")
    directory = signing.verify(artifact)
    if public_key is not None or identity is not None:
        signing.verify_signature(directory, public_key, identity or "", identity_provider or "")
    files = open_artifact(directory).manifest.files
    signed = "" if public_key is None and identity is None else ", and signed so"
    print(f"whole{signed}: {directory}, {len(files)} files, {size_text(sum(r.size for r in files.values()))}")


@app.command()
def sign(
    artifact: ArtifactPath,
    private_key: Annotated[Path, typer.Option(help="An elliptic key, PEM.")],
) -> None:
    """Sign an artifact with a key; `verify --public-key` tells whether it was signed with it, and not changed since."""
    from furiosa_build.artifact import signing

    print(f"signed: {signing.sign(artifact, private_key)}")


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


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context) -> None:
    """Serve an artifact, or a recipe's, over HTTP: OpenAI's routes and others. What is not built yet is built first."""
    import argparse

    from furiosa_build.server import options
    from furiosa_build.server.launch import launch

    parser = argparse.ArgumentParser(prog="furiosa-build serve", description="Serve an artifact over HTTP.")
    parser.add_argument(
        "target", metavar="ARTIFACT-or-RECIPE", help="An artifact's directory, or a recipe: it is built if it must be."
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="Hydra overrides of the recipe.")
    options.add_cli_args(parser)
    arguments = parser.parse_intermixed_args(context.args)
    given = options.from_cli_args(arguments)  # before anything is built
    launch(lambda: _artifact_of(arguments.target, arguments.overrides), given)


def _artifact_of(target: str, overrides: list[str]) -> Path:
    """An artifact's directory; of a recipe, that of its artifact, which is built if it is not there."""
    if (Path(target) / "artifact.json").is_file():
        if overrides:
            raise UserError(
                f"{target} is an artifact, which is built already", where=overrides[0], hint="name a recipe"
            )
        return Path(target)
    from furiosa_build.build import graph
    from furiosa_build.build.build import open_build

    opened = open_build(target, overrides)
    if status := graph.run(opened):
        sys.exit(status)
    return opened.version_directory


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
