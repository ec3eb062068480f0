"""Signs artifacts and verifies signatures, through the model-signing library (extra `sign`).

The signature covers every file of the artifact. https://github.com/sigstore/model-transparency
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from furiosa_build.artifact.reader import OpenArtifact, artifact_directory, find_damage, open_artifact
from furiosa_build.artifact.schema import SIGNATURE_FILE
from furiosa_build.core.errors import UserError, VerificationError


def verify(artifact: Path) -> Path:
    """Verify an artifact by reading every byte; returns its directory.

    Raises VerificationError, which names every file that is not as it was published, or UserError when it is not an
    artifact.
    """
    directory = artifact_directory(artifact)
    findings = find_damage(directory)
    if findings:
        listed = "".join(f"\n  {finding.what.removeprefix('damaged artifact: ')}" for finding in findings)
        raise VerificationError(f"{artifact} is not as it was published:{listed}\n  hint: {findings[0].hint}")
    return directory


def sign(artifact: Path, private_key: Path) -> Path:
    """Writes the signature with an elliptic key in PEM; returns its file. The artifact must be whole."""
    signing = _library("signing")
    directory = verify(artifact)
    signature = directory / SIGNATURE_FILE
    with _key(private_key, "--private-key"):
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    config.set_hashing_config(_hashing(signature)).sign(directory, signature)
    return signature


def verify_signature(artifact: Path, public_key: Path | None, identity: str = "", identity_provider: str = "") -> None:
    """Verifies by a public key in PEM, or by a Sigstore identity: who signed, and the issuer who vouches for it.

    Raises VerificationError when the artifact is not signed, was signed by somebody else, or has changed since.
    """
    verifying = _library("verifying")
    signature = artifact.resolve() / SIGNATURE_FILE
    if not signature.is_file():
        raise VerificationError(f"{artifact} is not signed: it has no {SIGNATURE_FILE}")
    if public_key is not None:
        with _key(public_key, "--public-key"):
            config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    else:
        config = verifying.Config().use_sigstore_verifier(identity=identity, oidc_issuer=identity_provider)
    try:
        config.set_hashing_config(_hashing(signature)).verify(artifact.resolve(), signature)
    except Exception as error:
        by = public_key or f"{identity} ({identity_provider})"
        reason = str(error).strip() or type(error).__name__
        raise VerificationError(f"the signature of {artifact} is not valid for {by}: {reason}") from error


def open_signed(
    artifact: str | Path | OpenArtifact, public_key: str | Path | None, verify: Literal["fast", "full"] = "fast"
) -> OpenArtifact:
    """Opens an artifact. If a key is given, it must have been signed with that, and not changed since.

    Raises:
        VerificationError: The artifact is not signed, or not so, or any byte of it has changed.
        UserError: As of `open_artifact`; the key cannot be read; model-signing is not installed.
    """
    if public_key is not None:
        directory = artifact.directory if isinstance(artifact, OpenArtifact) else artifact_directory(artifact)
        verify_signature(directory, Path(public_key))
    return artifact if isinstance(artifact, OpenArtifact) else open_artifact(artifact, verify)


def _hashing(signature: Path) -> Any:
    return _library("hashing").Config().set_ignored_paths(paths=[signature], ignore_git_paths=False)


def _library(module: str) -> Any:
    try:
        return import_module(f"model_signing.{module}")
    except ImportError as error:
        raise UserError(
            "signatures need the model-signing library", hint="pip install 'furiosa-build[sign]'"
        ) from error


@contextmanager
def _key(path: Path, option: str) -> Iterator[None]:
    """Reports any error in the block as one of the key file."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path} is not an elliptic key: {error}",
            where=option,
            valid="a PEM file, such as `openssl ecparam -name prime256v1 -genkey` makes",
        ) from error
