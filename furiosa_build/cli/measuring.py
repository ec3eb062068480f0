"""`furiosa-build measure`: how fast an artifact is on this machine."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Annotated

import typer

from furiosa_build.cli.artifacts import ArtifactPath


def measure(
    artifact: ArtifactPath,
    seconds: Annotated[float, typer.Option(min=0, help="Time for each bucket, at most.")] = 10,
    clients: Annotated[int, typer.Option(min=0, help="Serve a load too: so many requests at a time; 0: none.")] = 0,
    requests: Annotated[int, typer.Option(min=1, help="Requests of the load.")] = 64,
    input_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt of the load.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="New tokens of each request of the load.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON, when they are known.")] = False,
) -> None:
    """Measure an artifact here: its time to load, its memory, the speed of each bucket when it is full, and a load."""
    from furiosa_build.runtime.measurement.buckets import bucket_args, measure_buckets
    from furiosa_build.runtime.measurement.engine import load_engine
    from furiosa_build.runtime.measurement.load import Load, measure_load
    from furiosa_build.ui import measurement_text as text

    load = Load(clients, requests, input_tokens, output_tokens)
    throughput = measure_load(artifact, load) if clients else None
    loaded = load_engine(bucket_args(artifact))
    speeds = []
    if not as_json:
        print(text.loaded_text(loaded), text.HEAD, sep="\n", flush=True)
    with closing(loaded.engine) as engine:
        for speed in measure_buckets(engine, seconds):
            speeds.append(speed)
            if not as_json:
                print(text.bucket_line(speed), flush=True)
    if as_json:
        print(json.dumps(text.measurement_data(loaded, speeds, throughput), indent=1))
    else:
        for line in text.closing_lines(speeds, throughput):
            print(line)
