"""Engines and servers that take no artifact but one that is signed with a key."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from furiosa_build.artifact import signing
from furiosa_build.artifact.reader import open_artifact
from furiosa_build.cli import furiosa_llm
from furiosa_build.core.errors import UserError, VerificationError
from furiosa_build.runtime import LLM, AsyncEngineArgs, AsyncLLMEngine, EngineArgs, LLMEngine

from .stepping import greedy


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two elliptic keys: `ours` and `another`, each private (.pem) and public (.pub)."""
    directory = tmp_path_factory.mktemp("keys")
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    for name in ("ours", "another"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none)
        (directory / f"{name}.pem").write_bytes(private)
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (directory / f"{name}.pub").write_bytes(public)
    return directory


@pytest.fixture
def ours(keys: Path) -> str:
    return str(keys / "ours.pub")


@pytest.fixture
def signed(toy_artifact: Path, keys: Path) -> Path:
    signing.sign(toy_artifact, keys / "ours.pem")
    return toy_artifact


def by_llm(artifact: Path, key: str) -> None:
    LLM(artifact, public_key=key).engine.close()


def by_engine(artifact: Path, key: str) -> None:
    LLMEngine(artifact, public_key=key).close()


def by_engine_of_opened(artifact: Path, key: str) -> None:
    LLMEngine(open_artifact(artifact), public_key=key).close()


def by_arguments(artifact: Path, key: str) -> None:
    LLMEngine.from_engine_args(EngineArgs(model=str(artifact), public_key=key)).close()


def by_async_arguments(artifact: Path, key: str) -> None:
    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model=str(artifact), public_key=key))
    asyncio.run(engine.shutdown())


WAYS = [by_llm, by_engine, by_engine_of_opened, by_arguments, by_async_arguments]
Load = Callable[[Path, str], None]


@pytest.mark.parametrize("load", WAYS)
def test_what_is_signed_so_is_loaded(signed: Path, ours: str, load: Load) -> None:
    load(signed, ours)


@pytest.mark.parametrize("load", WAYS)
def test_what_is_not_signed_is_refused(toy_artifact: Path, ours: str, load: Load) -> None:
    with pytest.raises(VerificationError, match=r"is not signed: it has no model\.sig"):
        load(toy_artifact, ours)


@pytest.mark.parametrize("load", WAYS)
def test_what_another_has_signed_is_refused(signed: Path, keys: Path, load: Load) -> None:
    with pytest.raises(VerificationError, match=r"the signature of .* is not valid for .*another\.pub"):
        load(signed, str(keys / "another.pub"))


@pytest.mark.parametrize("file", ["params/toy.safetensors", "model/tokenizer.json", "programs/first.toy"])
def test_what_has_changed_since_is_refused(signed: Path, ours: str, file: str) -> None:
    """Parameters too, which are not read when an artifact is opened."""
    content = bytearray((signed / file).read_bytes())
    content[-1] ^= 1
    (signed / file).write_bytes(content)
    with pytest.raises(VerificationError, match="is not valid"):
        by_llm(signed, ours)


def test_the_directory_above_may_be_named(signed: Path, ours: str) -> None:
    """As where no key is asked for: `latest` is found."""
    (signed.parent / "all" / "toy").mkdir(parents=True)
    (signed.parent / "all" / "toy" / "latest").symlink_to(signed)
    engine = LLMEngine(signed.parent / "all", public_key=ours)
    engine.add_request("r", [1], greedy(1))
    engine.step()
    with pytest.raises(UserError, match="is not an artifact"):
        LLMEngine(signed.parent, public_key=ours)


@pytest.mark.parametrize("in_file", [False, True])
def test_a_server_ends_with_status_5(
    toy_artifact: Path, ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], in_file: bool
) -> None:
    (tmp_path / "server.yaml").write_text(f"public_key: {ours}\n")
    option = ["--server-config", str(tmp_path / "server.yaml")] if in_file else ["--public-key", ours]
    with pytest.raises(SystemExit) as ended:
        furiosa_llm.main(["serve", str(toy_artifact), "--port", "0", *option])
    assert ended.value.code == 5
    assert "is not signed: it has no model.sig" in capsys.readouterr().err
