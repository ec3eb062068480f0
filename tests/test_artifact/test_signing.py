"""`sign` and `verify`: every byte of an artifact, and who vouches for it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from user_directory import UserDirectory, furiosa_build, make_built_directory, steps_in_this_process

from furiosa_build.plan import keys

LATEST = "artifacts/tiny/latest"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """The recipe has been built. Only read."""
    return make_built_directory(tmp_path_factory.mktemp("signing"))


@pytest.fixture
def user(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """The recipe has been built here, in a store of its own."""
    import shutil

    shutil.copytree(built.root, tmp_path / "user", symlinks=True)
    shutil.copytree(built.store, tmp_path / "store")
    return UserDirectory(tmp_path / "user", tmp_path / "store")


def make_keys(directory: Path, name: str) -> tuple[str, str]:
    """Files with a private and a public elliptic key."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = directory / f"{name}.pem", directory / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return str(private), str(public)


def test_a_whole_artifact(built: UserDirectory) -> None:
    ran = furiosa_build(built, "verify", LATEST)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(f"whole: {(built.root / LATEST).resolve()}, ")


def test_of_a_save_dir_the_artifact_is_signed(user: UserDirectory, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path, "ours")
    assert furiosa_build(user, "sign", "artifacts", "--private-key", private).status == 0
    assert ((user.root / LATEST).resolve() / "model.sig").is_file()
    verified = furiosa_build(user, "verify", "artifacts", "--public-key", public)
    assert verified.out.startswith(f"whole, and signed so: {(user.root / LATEST).resolve()}, ")


def test_every_damaged_file_is_named_and_the_status_is_5(user: UserDirectory) -> None:
    directory = (user.root / LATEST).resolve()
    (directory / "provenance.json").unlink()
    (directory / "programs" / "extra.so").touch()
    parameters = next((directory / "params").iterdir())
    content = bytearray(parameters.read_bytes())
    content[-1] ^= 1
    parameters.unlink()
    parameters.write_bytes(content)
    ran = furiosa_build(user, "verify", LATEST)
    assert ran.status == 5
    assert ran.out == ""
    assert ran.err.splitlines()[1:-1] == [
        "  provenance.json is missing",
        "  programs/extra.so is not in manifest.json",
        f"  the sha256 of params/{parameters.name} is not that of manifest.json",
    ]


def test_what_is_signed_verifies_until_it_changes(user: UserDirectory, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path, "ours")
    _, another = make_keys(tmp_path, "another")
    unsigned = furiosa_build(user, "verify", LATEST, "--public-key", public)
    assert (unsigned.status, "is not signed" in unsigned.err) == (5, True)

    assert furiosa_build(user, "sign", LATEST, "--private-key", private).status == 0
    assert furiosa_build(user, "verify", LATEST).status == 0
    verified = furiosa_build(user, "verify", LATEST, "--public-key", public)
    assert verified.status == 0
    assert verified.out.startswith("whole, and signed so: ")
    assert user.latest(), "the runtime opens what is signed"
    wrong = furiosa_build(user, "verify", LATEST, "--public-key", another)
    assert (wrong.status, "is not valid for" in wrong.err) == (5, True)

    stamp = (user.root / LATEST).resolve() / "timestamp.json"
    data = json.loads(stamp.read_text())
    from furiosa_build.artifact.schema import Timestamp, to_json

    stamp.write_bytes(to_json(Timestamp.of(data["artifact_id"], data["timestamp"] + 1)))
    assert furiosa_build(user, "verify", LATEST).status == 0, "nothing but the signature tells"
    assert furiosa_build(user, "verify", LATEST, "--public-key", public).status == 5


def test_a_healed_artifact_is_still_signed(user: UserDirectory, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path, "ours")
    assert furiosa_build(user, "sign", LATEST, "--private-key", private).status == 0
    (user.root / LATEST / "model" / "config.json").unlink()
    with steps_in_this_process():
        assert user.build() == []
    assert furiosa_build(user, "verify", LATEST, "--public-key", public).status == 0


@pytest.mark.parametrize("other", ["provenance", "manifest", "time"])
def test_a_signature_of_other_files_is_removed(
    user: UserDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """One of another provenance is not valid, and would stand in the way of verifying. A line says so."""
    private, public = make_keys(tmp_path, "ours")
    assert furiosa_build(user, "sign", LATEST, "--private-key", private).status == 0
    directory = (user.root / LATEST).resolve()
    if other == "provenance":
        monkeypatch.setattr(keys, "version", lambda package: "9.9" if package == "numpy" else version(package))
    else:
        (directory / {"manifest": "manifest.json", "time": "timestamp.json"}[other]).write_text("{}")
    with steps_in_this_process():
        ran = furiosa_build(user, "build", "tiny")
    assert (ran.status, ran.err) == (0, "")
    assert (user.root / LATEST).resolve() == directory, "the same version"
    assert f"the signature of {directory} is removed: it is not of these files; sign it again\n" in ran.out
    assert furiosa_build(user, "verify", LATEST).status == 0
    assert "is not signed" in furiosa_build(user, "verify", LATEST, "--public-key", public).err
    assert furiosa_build(user, "sign", LATEST, "--private-key", private).status == 0
    assert furiosa_build(user, "verify", LATEST, "--public-key", public).status == 0


def test_a_damaged_artifact_is_not_signed(user: UserDirectory, tmp_path: Path) -> None:
    private, _ = make_keys(tmp_path, "ours")
    (user.root / LATEST / "model" / "config.json").unlink()
    assert furiosa_build(user, "sign", LATEST, "--private-key", private).status == 5
    assert not (user.root / LATEST / "model.sig").exists()


@pytest.mark.parametrize("content", [None, "no key"], ids=["missing", "garbage"])
def test_a_bad_key_is_bad_input(user: UserDirectory, tmp_path: Path, content: str | None) -> None:
    key = tmp_path / "key.pem"
    if content is not None:
        key.write_text(content)
    ran = furiosa_build(user, "sign", LATEST, "--private-key", str(key))
    assert ran.status == 2
    assert "is not an elliptic key" in ran.err


def test_half_an_identity_is_bad_input(built: UserDirectory) -> None:
    assert furiosa_build(built, "verify", LATEST, "--identity", "me@example.org").status == 2


def test_without_the_library_it_says_what_to_install(built: UserDirectory, tmp_path: Path) -> None:
    """In a process that cannot import it."""
    script = "import sys; sys.modules['model_signing'] = None; from furiosa_build.cli.main import main; main()"
    arguments = ["sign", str(built.root / LATEST), "--private-key", str(tmp_path / "key")]
    ran = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "pip install 'furiosa-build[sign]'" in ran.stderr
