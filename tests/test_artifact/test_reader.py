"""Every way an artifact can be wrong is one message that names the file."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from furiosa_build.artifact.reader import find_artifact, find_damage, open_artifact
from furiosa_build.artifact.schema import Timestamp, to_json
from furiosa_build.backends import cpu
from furiosa_build.core.errors import UserError

from .corruptions import (
    CORRUPTIONS,
    damaged_draft,
    drafted,
    resealed,
)
from .sound import PARAMETERS, PROGRAM, seal


@pytest.mark.parametrize("verify", ["fast", "full"])
def test_a_sound_artifact_opens(root: Path, verify: Any) -> None:
    opened = open_artifact(root, verify)
    assert opened.directory == root
    assert opened.artifact.metadata.name == "small"
    assert opened.path(PROGRAM).read_bytes() == b"machine code"


def test_it_opens_through_latest_and_by_links_that_stay_inside(root: Path) -> None:
    (root.parent / "latest").symlink_to(root.name)
    (root / "programs" / "shared.so").write_bytes(b"machine code")
    (root / PROGRAM).unlink()
    (root / PROGRAM).symlink_to("shared.so")
    seal(root)
    assert open_artifact(str(root.parent / "latest")).directory == root


def test_it_opens_through_the_directory_that_a_build_saved_one_in(tmp_path: Path, root: Path) -> None:
    saved = tmp_path / "saved"
    for name in ("one", "two"):
        (saved / name).mkdir(parents=True)
    (saved / "one" / "latest").symlink_to(root)
    (saved / "two" / "latest").symlink_to("gone")
    assert find_artifact(saved) == open_artifact(saved).directory == root
    (saved / "two" / "latest").unlink()
    (saved / "two" / "latest").symlink_to(root)
    assert find_artifact(saved) is None
    with pytest.raises(UserError, match="has several artifacts") as refused:
        open_artifact(saved)
    assert refused.value.valid == f"{saved}/one/latest, {saved}/two/latest"


def test_the_time_is_not_part_of_the_content(root: Path) -> None:
    id_ = open_artifact(root).artifact.metadata.artifact_id
    (root / "timestamp.json").write_bytes(to_json(Timestamp.of(id_, 99)))
    assert open_artifact(root).artifact.metadata.timestamp == 99
    assert find_damage(root) == []


def test_a_signature_is_the_one_file_that_no_list_has(root: Path) -> None:
    (root / "model.sig").write_bytes(b"signed")
    open_artifact(root, "full")
    assert find_damage(root) == []


def test_a_draft_model_opens_as_a_part(root: Path) -> None:
    drafted()(root)
    opened = open_artifact(root, "full")
    assert opened.draft is not None
    assert opened.draft.artifact == opened.artifact.draft
    [program] = opened.draft.artifact.programs.values()
    assert opened.draft.path(program.file) == root / "draft" / PROGRAM
    assert opened.draft.draft is None
    assert find_damage(root) == []


def test_of_a_draft_too_only_full_verification_reads_parameters(root: Path) -> None:
    damaged_draft(f"draft/{PARAMETERS}")(root)
    open_artifact(root, "fast")
    with pytest.raises(UserError, match=r"sha256 of draft/params/p\.safetensors"):
        open_artifact(root, "full")
    assert [Path(error.where).name for error in find_damage(root)] == ["p.safetensors"]


def test_only_full_verification_reads_parameters(root: Path) -> None:
    content = bytearray((root / PARAMETERS).read_bytes())
    content[-1] ^= 1
    (root / PARAMETERS).write_bytes(content)
    open_artifact(root, "fast")
    with pytest.raises(UserError, match=r"sha256 of params/p\.safetensors"):
        open_artifact(root, "full")


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupt_artifact_is_refused_in_one_message(root: Path, name: str) -> None:
    corrupt, message = CORRUPTIONS[name]
    corrupt(root)
    with pytest.raises(UserError) as caught:
        open_artifact(root)
    assert message in str(caught.value)
    assert str(root) in caught.value.where
    assert len(str(caught.value)) < 1000


def test_a_path_that_is_no_directory(root: Path) -> None:
    for path in (root / "artifact.json", root / "nowhere"):
        with pytest.raises(UserError, match="is not a directory"):
            open_artifact(path)


def test_unreadable_files_are_one_message(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # the tests may run as root, who may read everything
    with pytest.raises(UserError, match=r"cannot be read: .*Permission denied"):
        open_artifact(root)


@pytest.mark.parametrize("torch", ["any", "", version("torch").partition("+")[0] + "+cu999"])
def test_torch_that_is_not_needed_or_differs_in_its_local_part_only(root: Path, torch: str) -> None:
    resealed(lambda data: data["target"].update(torch=torch))(root)
    open_artifact(root)


def test_an_instruction_set_this_host_lacks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resealed(lambda data: data["target"].update(isa="x86-64-v4"))(root)
    monkeypatch.setattr(cpu, "host_isa", lambda: "x86-64-v4")
    open_artifact(root)
    monkeypatch.setattr(cpu, "host_isa", lambda: "x86-64-v3")
    with pytest.raises(UserError, match="instruction set 'x86-64-v4', this is 'x86-64-v3'"):
        open_artifact(root)


def test_an_artifact_of_a_backend_that_is_not_installed_can_be_read(root: Path) -> None:
    """Its target means something to that backend only; loading its programs is refused."""
    resealed(lambda data: (data.update(backend="elsewhere"), data["target"].update(isa="z")))(root)
    assert open_artifact(root).artifact.target.isa == "z"


def test_opening_does_not_import_torch(root: Path) -> None:
    code = (
        "import sys; from furiosa_build.artifact.reader import find_artifact, find_damage, open_artifact; "
        f"open_artifact({str(root)!r}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
