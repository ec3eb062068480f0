"""`furiosa-build cache`: what the store holds, whether it is whole, and how it is made smaller."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from furiosa_build.core.errors import UserError, VerificationError
from furiosa_build.core.files import expand_user
from furiosa_build.core.text import size_text
from furiosa_build.store import Store, default_store_root, gc

app = typer.Typer(
    help="The store of finished steps: list it, verify it, make it smaller.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

CacheDir = Annotated[
    Path | None,
    typer.Option("--cache-dir", help="The store. Default: $FURIOSA_BUILD_CACHE, or ~/.cache/furiosa/llm."),
]

_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@app.command()
def ls(
    cache_dir: CacheDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line.")] = False,
) -> None:
    """List the finished steps, the last used first."""
    store = _store(cache_dir)
    found = gc.entries(store)
    for entry in found:
        record = entry.record
        if as_json:
            print(
                json.dumps(
                    {
                        "key": record.key,
                        "step": record.step,
                        "bytes": entry.size,
                        "seconds": record.seconds,
                        "last_used": datetime.fromtimestamp(entry.last_used, UTC).isoformat(timespec="seconds"),
                        "in_use": entry.pinned,
                    }
                )
            )
        else:
            in_use = "  in use" if entry.pinned else ""
            age = _age_text(time.time() - entry.last_used)
            print(f"{record.key[:12]}  {record.step:36} {size_text(entry.size):>8} {age:>8}{in_use}")
    if not as_json:
        print(f"{len(found)} steps, {size_text(gc.total_size(found))} in {store.root}")


@app.command("gc")
def collect(
    max_size: Annotated[str | None, typer.Option(metavar="SIZE", help="Keep at most this much, such as 20GB.")] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="TIME", help="Remove what was not used for so long: 12h, 30d, 4w.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Remove what killed builds have left, and, if asked to, the steps that were not used for longest.

    What a running build uses stays. Artifacts are not touched: their files are links of their own.
    """
    size = None if max_size is None else _parse_size(max_size, "--max-size")
    age = None if older_than is None else _parse_time(older_than, "--older-than")
    store = _store(cache_dir)
    try:
        done = gc.collect(store, size, age, dry_run)
    except OSError as error:
        raise UserError(f"what is there cannot be removed: {error}", where=str(store.root)) from error
    would = "would remove" if dry_run else "removed"
    for entry in done.actions:
        print(f"{would} {entry.record.key[:12]}  {entry.record.step}")
    print(
        f"{would} {len(done.actions)} steps and {len(done.leftovers)} files or directories, {size_text(done.freed)}; "
        f"{size_text(done.kept)} stay"
    )


@app.command()
def verify(cache_dir: CacheDir = None) -> None:
    """Read every file of the store and compare it with its digest. Exit status 5 when one is damaged or missing."""
    store = _store(cache_dir)
    findings = list(gc.verify(store))
    if findings:
        listed = "".join(f"\n  {finding}" for finding in findings)
        raise VerificationError(f"the store {store.root} is damaged; the next build makes again what it needs{listed}")
    found = gc.entries(store)
    print(f"whole: {len(found)} steps, {size_text(gc.total_size(found))} in {store.root}")


def _store(cache_dir: Path | None) -> Store:
    root = (default_store_root() if cache_dir is None else expand_user(cache_dir, "--cache-dir")).absolute()
    if root.exists() and not root.is_dir():
        raise UserError("the store is not a directory", where=str(root))
    return Store(root)


def _parse_size(text: str, option: str) -> int:
    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError as error:
        valid = "a number and a unit, such as kB, MB, GB, TB or GiB"
        raise UserError(f"{text!r} is not understood", where=option, valid=valid) from error


def _parse_time(text: str, option: str) -> float:
    match = re.fullmatch(rf"(\d{{1,15}}(?:\.\d*)?) ?({'|'.join(_SECONDS)})", text.strip().lower())
    if match is None:
        raise UserError(f"{text!r} is not understood", where=option, valid=f"a number and one of {', '.join(_SECONDS)}")
    return float(match[1]) * _SECONDS[match[2]]


def _age_text(seconds: float) -> str:
    for unit, length in reversed(_SECONDS.items()):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "now"
