"""The commands about artifacts: inspect, verify, sign, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from furiosa_build.cli import streams
from furiosa_build.core.errors import UserError
from furiosa_build.core.text import argument_text, size_text

ArtifactPath = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="An artifact's directory, such as artifacts/NAME/latest.")
]


def inspect(artifact: ArtifactPath) -> None:
    """Show what an artifact is: model, devices, buckets, quantization, sizes, versions, programs."""
    from furiosa_build.artifact.reader import open_artifact
    from furiosa_build.ui.artifact_text import artifact_text

    opened = open_artifact(artifact)
    print(artifact_text(opened.artifact, opened.directory))


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


def sign(
    artifact: ArtifactPath,
    private_key: Annotated[Path, typer.Option(help="An elliptic key, PEM.")],
) -> None:
    """Sign an artifact with a key; `verify --public-key` tells whether it was signed with it, and not changed since."""
    from furiosa_build.artifact import signing

    print(f"signed: {signing.sign(artifact, private_key)}")


def generate(
    artifact: ArtifactPath,
    prompt: Annotated[str, typer.Option(parser=argument_text, metavar="TEXT", help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens of this probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 or -1: from all.")] = -1,
    seed: Annotated[int | None, typer.Option(help="For the same text every time.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(parser=argument_text, metavar="TEXT", help="End before this text; may be given several times."),
    ] = None,
) -> None:
    """Generate text from an artifact, printed as it comes."""
    from furiosa_build.runtime import LLMEngine, SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop or []
    )
    engine = LLMEngine(artifact)
    engine.add_request("0", prompt, params)
    shown = 0
    while engine.has_unfinished_requests() and streams.stdout_failure() is None:
        for output in engine.step():
            text = output.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print()
