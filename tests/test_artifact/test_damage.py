"""Damage to any file of an artifact is found, and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from furiosa_build.artifact.reader import find_damage, open_artifact
from furiosa_build.core.errors import UserError

from .sound import PARAMETERS, PROGRAM, safetensors, seal, tensor


def truncated(size: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with file.open("r+b") as opened:
            opened.truncate(size(file.stat().st_size))

    return damage


def flipped(at: Callable[[int], int], mask: int = 0xFF) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[at(len(content))] ^= mask
        file.write_bytes(content)

    return damage


def swapped(file: Path) -> None:
    """With the file that comes next in its directory, or the first."""
    beside = sorted(path for path in file.parent.iterdir() if path.is_file())
    other = beside[(beside.index(file) + 1) % len(beside)]
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated to 0": truncated(lambda _: 0),
    "truncated to 1": truncated(lambda _: 1),
    "one byte short": truncated(lambda size: size - 1),
    "first byte": flipped(lambda _: 0),
    "middle byte": flipped(lambda size: size // 2),
    "last byte": flipped(lambda size: size - 1),
    "space to tab": flipped(lambda size: size - 1, ord(" ") ^ ord("\t")),
    "missing": Path.unlink,
    "swapped": swapped,
}
FILES = [
    "artifact.json",
    "manifest.json",
    "timestamp.json",
    "model/config.json",
    "model/tokenizer.json",
    PARAMETERS,
    "params/q.safetensors",
    PROGRAM,
    "programs/last.so",
]


@pytest.fixture
def full(root: Path) -> Path:
    """An artifact with two files in every directory."""
    (root / "params" / "q.safetensors").write_bytes(safetensors({"weight": tensor()}))
    (root / "programs" / "last.so").write_bytes(b"other code..")
    (root / "model" / "tokenizer.json").write_text("[]")
    seal(root)
    assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()) == sorted(FILES)
    assert find_damage(root) == []
    return root


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found_by_its_name_and_refused(full: Path, file: str, damage: str) -> None:
    DAMAGES[damage](full / file)
    found = find_damage(full)
    assert any(Path(file).name in problem.what for problem in found)
    with pytest.raises(UserError):
        open_artifact(full, "full")
    data_only = file.startswith("params/") and damage in ("last byte", "space to tab")
    if not data_only:
        with pytest.raises(UserError):
            open_artifact(full, "fast")


def test_all_that_is_damaged_is_named_at_once(full: Path) -> None:
    (full / "model" / "config.json").unlink()
    flipped(lambda size: size - 1)(full / PARAMETERS)
    (full / "programs" / "more.so").touch()
    named = [problem.where.removeprefix(f"{full}/") for problem in find_damage(full)]
    assert named == ["model/config.json", "programs/more.so", PARAMETERS]
