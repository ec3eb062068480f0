"""Work for actions of a store, for tests: its keys, its outputs, and how it is obtained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from furiosa_build.core.canonical_json import digest
from furiosa_build.store import ActionRecord, ActionResult, Store

FACTORS = {"step": "test", "reads": {"b": 1, "a": [1, 2]}}
OTHER_FACTORS = {"step": "test", "reads": {"b": 2}}
KEY, OTHER_KEY = digest(FACTORS), digest(OTHER_FACTORS)

Work = Callable[[Path], ActionResult]


def writing(files: Mapping[str, str], made: ActionResult | None = None) -> Work:
    """Work that writes these files."""

    def work(output: Path) -> ActionResult:
        for name, text in files.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_text(text)
        return made or ActionResult()

    return work


def no_work(output: Path) -> ActionResult:
    raise AssertionError(f"the work ran, in {output}")


def obtain(store: Store, work: Work, key: str = KEY) -> tuple[ActionRecord, bool]:
    return store.get_or_run(key, "test", {KEY: FACTORS, OTHER_KEY: OTHER_FACTORS}[key], work)


def blob(store: Store, record: ActionRecord, name: str) -> Path:
    return store.path(record.outputs[name])


def overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


TWO_FILES = writing({"one": "1", "deep/er/two": '{"a": 2}'})
