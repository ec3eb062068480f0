"""Every way an artifact can be wrong is one message that names the file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from furiosa_build.artifact.reader import find_damage, open_artifact
from furiosa_build.artifact.schema import Artifact, FileRecord, Manifest, Timestamp, artifact_id, to_json
from furiosa_build.backends import cpu
from furiosa_build.core.errors import UserError

PARAMETERS = "params/p.safetensors"
PROGRAM = "programs/first.so"


def artifact_data() -> dict[str, Any]:
    return {
        "schema_version": 4,
        "metadata": {
            "artifact_id": "",
            "name": "small",
            "version": {"furiosa_llm": "0", "furiosa_compiler": "none 0"},
        },
        "devices": "cpu",
        "generator_config": {
            "prefill_buckets": [[1, 8]],
            "append_buckets": [],
            "decode_buckets": [],
            "max_seq_len_to_capture": 8,
            "paged_attention_num_blocks": 4,
            "paged_attention_block_size": 1,
            "calculate_logit_only_for_last_token": False,
            "kv_cache_sharing_across_beams_config": None,
            "default_scheduler_config": {
                "npu_queue_limit": 2,
                "max_processing_samples": 8,
                "spare_blocks_ratio": 0.2,
                "is_offline": False,
                "prefill_chunk_size": None,
            },
        },
        "hf_config": {"eos_token_id": 0},
        "model_metadata": {
            "pretrained_id": "small",
            "revision": None,
            "weights_digest": "0",
            "seed_for_random_weight": 1,
            "architecture": "Small",
            "dtype": "float32",
            "num_hidden_layers": 0,
            "layer_prefix": "model.layers.",
            "vocab_size": 4,
            "num_parameters": 4,
            "quantization": "none",
        },
        "model_rewriting_config": {
            "use_blockwise_compile": True,
            "num_blocks_per_supertask": 1,
            "do_decompositions_for_model_rewrite": False,
            "embed_all_constants_into_graph": False,
            "add_prefill_last_block_slice": False,
            "calculate_logit_only_for_last_token": False,
        },
        "parallel_config": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1},
        "backend": "eager",
        "target": {"name": "cpu", "num_elements": 1, "isa": "any", "torch": version("torch")},
        "programs": {"first": {"file": PROGRAM, "kind": "first", "inputs": [], "outputs": []}},
        "pipelines": [
            {
                "name": "prefill-1x8",
                "phase": "prefill",
                "batch_size": 1,
                "query_length": 8,
                "context_length": 8,
                "supertasks": [
                    {
                        "kind": "comp",
                        "program": "first",
                        "stage": 0,
                        "ranks": [0],
                        "inputs": {},
                        "outputs": ["logits"],
                    }
                ],
            }
        ],
        "parameters": [{"stage": 0, "rank": 0, "files": [PARAMETERS]}],
        "kv_cache": [],
    }


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def safetensors(header: Any, data: bytes = bytes(8)) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + data


def seal(root: Path, data: dict[str, Any] | None = None) -> None:
    """artifact.json and manifest.json that fit what lies in `root`."""
    files = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name not in ("artifact.json", "manifest.json", "timestamp.json"):
            content = path.read_bytes()
            record = FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())
            files[path.relative_to(root).as_posix()] = record
    data = data or artifact_data()
    if (draft := data.get("draft")) is not None:
        own = {name: record for name, record in files.items() if name.startswith("draft/")}
        draft["metadata"]["artifact_id"] = artifact_id(Artifact.model_validate(draft), own)
    data["metadata"]["artifact_id"] = id_ = artifact_id(Artifact.model_validate(data), files)
    content = to_json(Artifact.model_validate(data))
    files["artifact.json"] = FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    (root / "artifact.json").write_bytes(content)
    (root / "manifest.json").write_bytes(to_json(Manifest(artifact_id=id_, files=files)))
    (root / "timestamp.json").write_bytes(to_json(Timestamp.of(id_, 1)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "artifact"
    for name in ("params", "programs", "model"):
        (root / name).mkdir(parents=True)
    (root / PARAMETERS).write_bytes(safetensors({"__metadata__": {"a": "b"}, "weight": tensor()}))
    (root / PROGRAM).write_bytes(b"machine code")
    (root / "model" / "config.json").write_text("{}")
    seal(root)
    return root


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


# Corruptions: what is done to a sound artifact.


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
    "manifest is no JSON": (write("manifest.json", b"{"), "manifest.json is no JSON"),
    "manifest is not UTF-8": (write("manifest.json", b'{"\xff": 1}'), "manifest.json is no JSON"),
    "manifest is a list": (write("manifest.json", b"[]"), "manifest.json is no JSON object"),
    "manifest too large": (oversize, "manifest.json has 68719476736 bytes"),
    "manifest lacks a key": (manifest(lambda data: data.pop("artifact_id")), "manifest.json: artifact_id"),
    "artifact is no JSON": (artifact_of(b"\0"), "artifact.json is no JSON"),
    "artifact nested too deep to parse": (artifact_of(b"[" * 10**6), "artifact.json is no JSON"),
    "artifact nested deep": (
        artifact(lambda data: data.update(hf_config=json.loads('{"a":' * 80 + "1" + "}" * 80))),
        "artifact.json is nested 81 levels deep",
    ),
    "artifact has an infinite number": (
        artifact_of(b'{"schema_version": 4, "hf_config": 1e999}'),
        "artifact.json is no JSON",
    ),
    "artifact has half a surrogate pair": (
        artifact_of(b'{"schema_version": 4, "a": "\\ud800"}'),
        "artifact.json is no JSON",
    ),
    "artifact has an enormous number": (artifact_of(b"9" * 5000), "artifact.json is no JSON"),
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
    "absolute path": (listed("/etc/passwd"), "'/etc/passwd', which is no plain path"),
    "path out of it": (listed("params/../../x"), "'params/../../x', which is no plain path"),
    "path with a dot": (listed("./x"), "'./x', which is no plain path"),
    "path with a backslash": (listed("a\\..\\x"), "no plain path"),
    "path with a NUL": (listed("a\0"), "no plain path"),
    "empty path": (listed(""), "no plain path"),
    "link to outside": (link(PROGRAM, "/etc/passwd"), "programs/first.so is a link out of the artifact"),
    "relative link to outside": (link(PROGRAM, "../../x"), "programs/first.so is a link out"),
    "artifact.json linked to outside": (link("artifact.json", "/etc/passwd"), "artifact.json is a link out"),
    "directory linked to outside": (link("more", "/etc"), "more is a link out of the artifact"),
    "dangling link": (link(PROGRAM, "nowhere.so"), "programs/first.so is no regular file"),
    "link to itself": (link(PROGRAM, "first.so"), "programs/first.so is no regular file"),
    "named pipe": (fifo, "model/config.json is no regular file"),
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
    "safetensors: a list": (header([]), "the header is no JSON object"),
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
        "import sys; from furiosa_build.artifact.reader import find_damage, open_artifact; "
        f"open_artifact({str(root)!r}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Every file, damaged in every way


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
