"""Corruptions: what is done to a sound artifact, and what the message must say."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from furiosa_build.artifact.schema import Artifact, Manifest, Timestamp, artifact_id, to_json

from .sound import PARAMETERS, PROGRAM, artifact_data, safetensors, seal, tensor


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: void((root / name).write_bytes(content))


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def link(name: str, target: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(target)

    return change


def fifo(root: Path) -> None:
    (root / "model" / "config.json").unlink()
    os.mkfifo(root / "model" / "config.json")


def manifest(change: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda root: change_json(root / "manifest.json", change)


def listed(name: str) -> Callable[[Path], None]:
    record = {"size": 0, "sha256": "0" * 64}
    return manifest(lambda data: data["files"].update({name: record}))


def edited(change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Edits artifact.json and nothing else: what damage does."""
    return lambda root: change_json(root / "artifact.json", change)


def artifact_of(content: bytes) -> Callable[[Path], None]:
    """Another artifact.json, with the right digest: what an enemy does."""

    def apply(root: Path) -> None:
        (root / "artifact.json").write_bytes(content)
        record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        change_json(root / "manifest.json", lambda data: data["files"].update({"artifact.json": record}))

    return apply


def artifact(change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Edits artifact.json, with the right digest."""

    def apply(root: Path) -> None:
        data = json.loads((root / "artifact.json").read_bytes())
        change(data)
        artifact_of(to_json(data))(root)

    return apply


def resealed(change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Edits artifact.json with all digests right: what a builder's mistake, or another builder, does."""

    def apply(root: Path) -> None:
        data = artifact_data()
        change(data)
        seal(root, data)

    return apply


def header(entries: Any, data: bytes = bytes(8)) -> Callable[[Path], None]:
    """Other parameters, with all digests right."""

    def apply(root: Path) -> None:
        (root / PARAMETERS).write_bytes(safetensors(entries, data))
        seal(root)

    return apply


def raw_parameters(content: bytes) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        (root / PARAMETERS).write_bytes(content)
        seal(root)

    return apply


def draft_data() -> dict[str, Any]:
    """artifact.json's part that tells of a draft model."""
    draft = artifact_data()
    draft["programs"]["first"]["file"] = f"draft/{PROGRAM}"
    draft["parameters"][0]["files"] = [f"draft/{PARAMETERS}"]
    return draft


def drafted(change: Callable[[Any], object] = lambda _: None) -> Callable[[Path], None]:
    """With a draft model, and artifact.json edited; all digests right."""

    def apply(root: Path) -> None:
        for name in (PARAMETERS, PROGRAM):
            (root / "draft" / name).parent.mkdir(parents=True)
            (root / "draft" / name).write_bytes((root / name).read_bytes())
        data = {**artifact_data(), "draft": draft_data()}
        data["generator_config"]["num_speculative_tokens"] = 4
        change(data)
        seal(root, data)

    return apply


def damaged_draft(name: str) -> Callable[[Path], None]:
    """Of a sound artifact with a draft model the last byte of a file is changed."""

    def apply(root: Path) -> None:
        drafted()(root)
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    return apply


def id_of_draft(root: Path) -> None:
    """All is right but the draft's own id."""
    drafted()(root)
    data = json.loads((root / "artifact.json").read_bytes())
    files = Manifest.model_validate_json((root / "manifest.json").read_bytes()).files
    data["draft"]["metadata"]["artifact_id"] = "1" * 64
    data["metadata"]["artifact_id"] = id_ = artifact_id(Artifact.model_validate(data), dict(files))
    artifact_of(to_json(Artifact.model_validate(data)))(root)
    change_json(root / "manifest.json", lambda found: found.update(artifact_id=id_))
    (root / "timestamp.json").write_bytes(to_json(Timestamp.of(id_, 1)))


def truncate(root: Path) -> None:
    content = (root / PARAMETERS).read_bytes()
    (root / PARAMETERS).write_bytes(content[:-1])


def void(_: object) -> None: ...


def write_json(path: Path, value: Any) -> None:
    path.write_bytes(to_json(value))


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_bytes())
    change(data)
    write_json(path, data)


def oversize(root: Path) -> None:
    with (root / "manifest.json").open("r+b") as file:
        file.truncate(2**36)  # sparse: takes no space


CORRUPTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no artifact.json": (remove("artifact.json"), "artifact.json is missing"),
    "no manifest.json": (remove("manifest.json"), "manifest.json is missing"),
    "manifest is no JSON": (write("manifest.json", b"{"), "manifest.json is not valid JSON"),
    "manifest is not UTF-8": (write("manifest.json", b'{"\xff": 1}'), "manifest.json is not valid JSON"),
    "manifest is a list": (write("manifest.json", b"[]"), "manifest.json is not a JSON object"),
    "manifest too large": (oversize, "manifest.json has 68719476736 bytes"),
    "manifest lacks a key": (manifest(lambda data: data.pop("artifact_id")), "manifest.json: artifact_id"),
    "artifact is no JSON": (artifact_of(b"\0"), "artifact.json is not valid JSON"),
    "artifact nested too deep to parse": (artifact_of(b"[" * 10**6), "artifact.json is not valid JSON"),
    "artifact nested deep": (
        artifact(lambda data: data.update(hf_config=json.loads('{"a":' * 80 + "1" + "}" * 80))),
        "artifact.json is nested 81 levels deep",
    ),
    "artifact has an infinite number": (
        artifact_of(b'{"schema_version": 4, "hf_config": 1e999}'),
        "artifact.json is not valid JSON",
    ),
    "artifact has half a surrogate pair": (
        artifact_of(b'{"schema_version": 4, "a": "\\ud800"}'),
        "artifact.json is not valid JSON",
    ),
    "artifact has an enormous number": (artifact_of(b"9" * 5000), "artifact.json is not valid JSON"),
    "artifact of another schema": (artifact(lambda data: data.update(schema_version=1)), "schema version 1"),
    "artifact without schema": (artifact(lambda data: data.pop("schema_version")), "schema version None"),
    "manifest of another schema": (manifest(lambda data: data.update(schema_version=0)), "schema version 0"),
    "artifact with an unknown key": (artifact(lambda data: data.update(surprise=1)), "artifact.json: surprise"),
    "artifact with a wrong type": (artifact(lambda data: data.update(devices=3)), "artifact.json: devices"),
    "artifact written otherwise": (
        artifact_of(json.dumps(artifact_data()).encode()),
        "artifact.json is not written as Artifact is",
    ),
    "program of a draft changed": (damaged_draft(f"draft/{PROGRAM}"), "sha256 of draft/programs/first.so"),
    "draft with another id": (id_of_draft, "artifact_id of the draft is 1111111111111111..., by content"),
    "draft with a draft": (
        drafted(lambda data: data["draft"].update(draft=draft_data())),
        "the draft in artifact.json has a draft itself",
    ),
    "draft that proposes nothing": (
        drafted(lambda data: data["generator_config"].update(num_speculative_tokens=None)),
        "artifact.json has a draft and no num_speculative_tokens",
    ),
    "draft that cannot be verified": (
        drafted(lambda data: data["generator_config"].update(calculate_logit_only_for_last_token=True)),
        "artifact.json has a draft, and the logits of the last token only to verify it by",
    ),
    "draft of another vocabulary": (
        drafted(lambda data: data["draft"]["model_metadata"].update(vocab_size=5)),
        "the draft in artifact.json has a vocabulary of 5 tokens, the model of 4",
    ),
    "draft for another CPU": (
        drafted(lambda data: data["draft"]["target"].update(isa="z80")),
        "programs need instruction set 'z80'",
    ),
    "draft whose program is not there": (
        drafted(lambda data: data["draft"]["programs"]["first"].update(file="draft/programs/none.so")),
        "artifact.json names 'draft/programs/none.so', which is not in manifest.json",
    ),
    "draft that runs the model's program": (
        drafted(lambda data: data["draft"]["programs"]["first"].update(file=PROGRAM)),
        "artifact.json names 'programs/first.so' for what it is not by its directory",
    ),
    "draft whose program is among parameters": (
        drafted(lambda data: data["draft"]["programs"]["first"].update(file=f"draft/{PARAMETERS}")),
        "artifact.json names 'draft/params/p.safetensors' for what it is not by its directory",
    ),
    "program among the parameters of a draft": (
        drafted(lambda data: data["programs"]["first"].update(file=f"draft/{PARAMETERS}")),
        "artifact.json names 'draft/params/p.safetensors' for what it is not by its directory",
    ),
    "draft with the model's parameters": (
        drafted(lambda data: data["draft"]["parameters"][0].update(files=[PARAMETERS])),
        "artifact.json names 'params/p.safetensors' for what it is not by its directory",
    ),
    "draft that runs an unknown program": (
        drafted(lambda data: data["draft"]["pipelines"][0]["supertasks"][0].update(program="none")),
        "pipeline 'prefill-1x8' runs unknown program 'none'",
    ),
    "timestamp gone": (remove("timestamp.json"), "timestamp.json is missing"),
    "timestamp changed": (
        lambda root: change_json(root / "timestamp.json", lambda data: data.update(timestamp=2)),
        "timestamp.json is not of this artifact, or was changed",
    ),
    "timestamp of another artifact": (
        write("timestamp.json", to_json(Timestamp.of("0" * 64, 1))),
        "timestamp.json is not of this artifact",
    ),
    "artifact edited": (edited(lambda data: data.update(devices="npu:0")), "artifact.json has"),
    "artifact edited, same size": (
        edited(lambda data: data.update(devices="gpu")),
        "sha256 of artifact.json",
    ),
    "missing program": (remove(PROGRAM), "programs/first.so is missing"),
    "missing parameters": (remove(PARAMETERS), "params/p.safetensors is missing"),
    "extra file": (write("model/extra.txt", b""), "model/extra.txt is not in manifest.json"),
    "directory for a file": (
        lambda root: ((root / PROGRAM).unlink(), (root / PROGRAM).mkdir()),
        "programs/first.so is missing",
    ),
    "wrong size": (write(PROGRAM, b"machine code."), "programs/first.so has 13 bytes, 12 by"),
    "wrong digest": (write(PROGRAM, b"MACHINE CODE"), "sha256 of programs/first.so"),
    "parameters cut off": (truncate, "params/p.safetensors has"),
    "absolute path": (listed("/etc/passwd"), "'/etc/passwd', which is not a plain path"),
    "path out of it": (listed("params/../../x"), "'params/../../x', which is not a plain path"),
    "path with a dot": (listed("./x"), "'./x', which is not a plain path"),
    "path with a backslash": (listed("a\\..\\x"), "is not a plain path"),
    "path with a NUL": (listed("a\0"), "is not a plain path"),
    "empty path": (listed(""), "is not a plain path"),
    "link to outside": (link(PROGRAM, "/etc/passwd"), "programs/first.so is a link out of the artifact"),
    "relative link to outside": (link(PROGRAM, "../../x"), "programs/first.so is a link out"),
    "artifact.json linked to outside": (link("artifact.json", "/etc/passwd"), "artifact.json is a link out"),
    "directory linked to outside": (link("more", "/etc"), "more is a link out of the artifact"),
    "dangling link": (link(PROGRAM, "nowhere.so"), "programs/first.so is not a regular file"),
    "link to itself": (link(PROGRAM, "first.so"), "programs/first.so is not a regular file"),
    "named pipe": (fifo, "model/config.json is not a regular file"),
    "manifest without artifact.json": (
        manifest(lambda data: data["files"].pop("artifact.json")),
        "does not list artifact.json",
    ),
    "another id in the manifest": (
        manifest(lambda data: data.update(artifact_id="0" * 64)),
        "timestamp.json is not of this artifact",
    ),
    "an id that is not of the content": (
        lambda root: (
            change_json(root / "manifest.json", lambda data: data.update(artifact_id="0" * 64)),
            (root / "timestamp.json").write_bytes(to_json(Timestamp.of("0" * 64, 1))),
        ),
        "artifact_id in manifest.json",
    ),
    "unlisted program file": (
        resealed(lambda data: data["programs"]["first"].update(file="programs/other.so")),
        "'programs/other.so', which is not in manifest.json",
    ),
    "program file outside": (
        resealed(lambda data: data["programs"]["first"].update(file="../first.so")),
        "'../first.so', which is not in manifest.json",
    ),
    "unlisted library": (
        resealed(lambda data: data.update(library="programs/other.so")),
        "'programs/other.so', which is not in manifest.json",
    ),
    "library where nothing is hashed": (
        resealed(lambda data: data.update(library=PARAMETERS)),
        "'params/p.safetensors' for what it is not",
    ),
    "unlisted parameter file": (
        resealed(lambda data: data["parameters"][0]["files"].append("/p.safetensors")),
        "'/p.safetensors', which is not in manifest.json",
    ),
    "program where nothing is hashed": (
        resealed(lambda data: data["programs"]["first"].update(file=PARAMETERS)),
        "'params/p.safetensors' for what it is not",
    ),
    "parameters in another directory": (
        resealed(lambda data: data["parameters"][0]["files"].append(PROGRAM)),
        "'programs/first.so' for what it is not",
    ),
    "unknown program": (
        resealed(lambda data: data["pipelines"][0]["supertasks"][0].update(program="second")),
        "unknown program 'second'",
    ),
    "another torch": (resealed(lambda data: data["target"].update(torch="1.0.0")), "need torch 1.0.0"),
    "another instruction set": (
        resealed(lambda data: data["target"].update(isa="x86-64-v9")),
        "instruction set 'x86-64-v9'",
    ),
    "safetensors: too short": (raw_parameters(b"1234567"), "p.safetensors: 7 bytes"),
    "safetensors: enormous header": (raw_parameters(b"\xff" * 8 + bytes(8)), "a header of 18446744073709551615"),
    "safetensors: header beyond the end": (raw_parameters((9).to_bytes(8, "little") + bytes(8)), "a header of 9"),
    "safetensors: no JSON": (header(b"{]"), "damaged parameter file p.safetensors"),
    "safetensors: nested deep": (header(b'{"a":' * 10**5), "damaged parameter file p.safetensors"),
    "safetensors: a list": (header([]), "the header is not a JSON object"),
    "safetensors: no dtype": (header({"w": {"shape": [2], "data_offsets": [0, 8]}}), "is described by"),
    "safetensors: unknown dtype": (header({"w": tensor(dtype="F31")}), "is described by"),
    "safetensors: negative size": (header({"w": tensor(shape=[-2])}), "is described by"),
    "safetensors: fractional size": (header({"w": tensor(shape=[2.0])}), "is described by"),
    "safetensors: shape and offsets": (header({"w": tensor(shape=[3])}), "does not fill bytes 0 to 8"),
    "safetensors: three offsets": (header({"w": tensor(offsets=[0, 8, 16])}), "is described by"),
    "safetensors: negative offset": (header({"w": tensor(offsets=[-8, 0])}), "does not fill"),
    "safetensors: beyond the data": (
        header({"w": tensor(), "v": tensor(offsets=[8, 16])}),
        "the tensors have 16 bytes, the file has 8",
    ),
    "safetensors: overlap": (header({"w": tensor(), "v": tensor()}), "begins at 0, the one before it ends at 8"),
    "safetensors: gap": (header({"w": tensor(offsets=[8, 16])}, bytes(16)), "begins at 8"),
    "safetensors: bytes left over": (header({"w": tensor()}, bytes(9)), "the file has 9"),
}
