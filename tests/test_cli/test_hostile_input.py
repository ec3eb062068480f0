"""A model's directory that somebody made to do harm: refused with one message, before memory or time is taken."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from test_models.tiny import save_random_model
from user_directory import (
    CONFIG,
    UserDirectory,
    furiosa_build,
    make_new_directory,
    make_user_directory,
    steps_in_this_process,
)

from furiosa_build.core.errors import UserError
from furiosa_build.core.file_digests import HashMemory
from furiosa_build.recipe.schema import ModelSpec
from furiosa_build.weights.describe import describe
from furiosa_build.weights.directory import ModelDirectory
from furiosa_build.weights.formats import check_weight_file
from furiosa_build.weights.hf_layout import LARGEST_JSON, LARGEST_PARSED, check_file, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HUGE = 1 << 40
"""Bytes of a file with holes: whoever reads it whole does not come back."""


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """A directory in which the model has been surveyed. Not to be changed."""
    user = make_new_directory(tmp_path_factory.mktemp("hostile"))
    with steps_in_this_process():
        assert furiosa_build(user, "plan", "tiny").status == 0
    return user


@pytest.fixture
def user(tmp_path: Path, surveyed: UserDirectory) -> UserDirectory:
    """The same, to be spoiled."""
    shutil.copytree(surveyed.store, tmp_path / "store")
    return make_user_directory(tmp_path / "user", tmp_path / "store", surveyed.root / "tiny")


Spoil = Callable[[Path], None]


def safetensors(header: bytes | dict[str, object], data: int, length: int | None = None) -> Spoil:
    """A weight file with this header, and so many bytes of data; `length` is what it says of the header."""

    def spoil(directory: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        content = struct.pack("<Q", len(text) if length is None else length) + text
        (directory / WEIGHTS).write_bytes(content)
        os.truncate(directory / WEIGHTS, len(content) + data)

    return spoil


def twice(name: str) -> bytes:
    """A header with a name that stands there twice. Readers differ in which one they take."""
    first, second = (json.dumps({name: entry(*extent, [2])})[1:-1] for extent in ((0, 8), (8, 16)))
    return f"{{{second}, {first}, {json.dumps({'b': entry(8, 16, [2])})[1:]}".encode()


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def holes(name: str) -> Spoil:
    """A file that is far too large, and takes no place on the disk."""

    def spoil(directory: Path) -> None:
        (directory / name).touch()
        os.truncate(directory / name, HUGE)

    return spoil


def text(name: str, content: str) -> Spoil:
    def spoil(directory: Path) -> None:
        (directory / name).write_text(content)

    return spoil


def link(name: str, target: str) -> Spoil:
    """A link to something that is there."""

    def spoil(directory: Path) -> None:
        (directory.parent / "outside.json").write_text("{}")
        shutil.copy(directory / WEIGHTS, directory.parent / "outside.safetensors")
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(target)

    return spoil


def index(*names: object) -> Spoil:
    """An index of files, and something in their places."""

    def spoil(directory: Path) -> None:
        shutil.copy(directory / WEIGHTS, directory.parent / "outside.safetensors")
        (directory / INDEX).write_text(json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}))

    return spoil


def sharded(spoil: Spoil) -> Spoil:
    """The same where an index is read: of a directory that has no single file of weights."""

    def spoil_index(directory: Path) -> None:
        spoil(directory)
        (directory / WEIGHTS).rename(directory / "model-00001-of-00001.safetensors")

    return spoil_index


UNSOUND = f"{WEIGHTS} is not a sound safetensors file"


def lists(count: int) -> str:
    """JSON that takes many times its size in memory."""
    return '{"a":[' + "[]," * count + "[]]}"


DEEP = '{"a":' * 200_000
CASES: dict[str, tuple[Spoil, str]] = {
    "header of 2^63 bytes": (safetensors(b"{}", 8, 1 << 63), UNSOUND),
    "header larger than the file": (safetensors(b"{}", 8, 1000), UNSOUND),
    "header of 200 MB": (safetensors(b"{}", 300 << 20, 200 << 20), UNSOUND),
    "deep header": (safetensors(DEEP.encode(), 0), UNSOUND),
    "header that is a list": (safetensors(b"[]", 0), UNSOUND),
    "tensor that is no object": (safetensors({"a": 1}, 0), UNSOUND),
    "overlapping tensors": (safetensors({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12), UNSOUND),
    "a gap between tensors": (safetensors({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, 20), UNSOUND),
    "beyond the end": (safetensors({"a": entry(0, 1 << 40, [1 << 38])}, 8), UNSOUND),
    "backwards": (safetensors({"a": entry(8, 0, [2])}, 8), UNSOUND),
    "negative offsets": (safetensors({"a": entry(-8, 0, [2])}, 8), UNSOUND),
    "negative sizes": (safetensors({"a": entry(0, 8, [-1, -2])}, 8), UNSOUND),
    "a shape that overflows": (safetensors({"a": entry(0, 0, [1 << 40, 1 << 40])}, 0), UNSOUND),
    "a shape of many sizes": (safetensors({"a": entry(0, 8, [1 << 62] * 50_000)}, 8), UNSOUND),
    "a shape that is larger than its bytes": (safetensors({"a": entry(0, 8, [1 << 20])}, 8), UNSOUND),
    "a tensor that stands there twice": (safetensors(twice("a"), 16), UNSOUND),
    "unknown dtype": (safetensors({"a": entry(0, 8, [2], "X9")}, 8), UNSOUND),
    "weights missing": (safetensors({"a": entry(0, 8, [2])}, 8), "lack"),
    "index names a file above": (sharded(index("../outside.safetensors")), INDEX),
    "index names an absolute path": (sharded(index("/etc/passwd")), INDEX),
    "index names no string": (sharded(index(7)), INDEX),
    "index names a directory": (sharded(index(".")), INDEX),
    "index is huge": (sharded(holes(INDEX)), INDEX),
    "index of lists": (sharded(text(INDEX, lists(12_000_000))), f"{INDEX} has 36000010 bytes"),
    "index is deep": (sharded(text(INDEX, DEEP)), INDEX),
    "index is a list": (sharded(text(INDEX, "[]")), INDEX),
    "index without a map": (sharded(text(INDEX, "{}")), INDEX),
    "index that is not used is huge": (holes(INDEX), INDEX),
    "index that is not used is a link out": (link(INDEX, "../outside.json"), INDEX),
    "index is a link out": (sharded(link(INDEX, "../outside.json")), INDEX),
    "config is huge": (holes("config.json"), "config.json"),
    "config of lists": (text("config.json", lists(400_000)), "config.json has 1200010 bytes"),
    "config is deep": (text("config.json", DEEP), "config.json"),
    "config is a list": (text("config.json", "[]"), "config.json"),
    "config is a link out": (link("config.json", "../outside.json"), "config.json"),
    "tokenizer is huge": (holes("tokenizer.json"), "tokenizer.json"),
    "tokenizer is a link out": (link("tokenizer.json", "../outside.json"), "tokenizer.json"),
    "tokenizer is a link to a secret": (link("tokenizer_config.json", "/etc/passwd"), "tokenizer_config.json"),
    "chat template is a link out": (link("chat_template.jinja", "/etc/hostname"), "chat_template.jinja"),
}


@pytest.mark.parametrize(("spoil", "names"), CASES.values(), ids=CASES)
def test_is_refused_with_one_message(user: UserDirectory, spoil: Spoil, names: str) -> None:
    spoil(user.root / "tiny")
    ran = furiosa_build(user, "build", "tiny")
    assert ran.status == 2, ran
    assert ran.err.startswith("error: ")
    assert ran.err.count("error: ") == 1
    assert names in ran.err
    assert "Traceback" not in ran.out + ran.err
    assert len(ran.err) < 2000
    assert not user.artifacts.exists() or not list(user.artifacts.iterdir())


HEADERS = [name for name, (_, words) in CASES.items() if words == UNSOUND]


@pytest.mark.parametrize("name", HEADERS)
def test_the_header_is_judged_without_the_bytes_behind_it(tmp_path: Path, name: str) -> None:
    """Nor is a header read that is larger than the format allows."""
    CASES[name][0](tmp_path)
    path = tmp_path / WEIGHTS
    os.truncate(path, max(path.stat().st_size, 1 << 30))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=UNSOUND):
            check_weight_file(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20  # A header that is read takes some; the 200 MB are not read, nor what is behind a header.


def test_a_weight_file_of_the_hub_is_judged_before_it_is_hashed(tmp_path: Path) -> None:
    """Each of its terabytes would be read."""

    def hash_file(path: Path) -> str:
        raise AssertionError(path)

    (tmp_path / "config.json").write_text("{}")
    safetensors(b"{}", HUGE, 1 << 63)(tmp_path)
    source = ModelDirectory(tmp_path)
    model = ModelSpec(model_id_or_path=str(tmp_path))
    with pytest.raises(UserError, match=UNSOUND):
        describe(model, source, source, {}, hash_file)


def test_a_weight_file_of_a_directory_is_judged_before_it_is_hashed(
    user: UserDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_file = HashMemory.hash

    def small(self: HashMemory, path: Path) -> str:
        assert path.name != WEIGHTS
        return hash_file(self, path)

    monkeypatch.setattr(HashMemory, "hash", small)
    safetensors(b"{}", HUGE, 1 << 63)(user.root / "tiny")
    ran = furiosa_build(user, "build", "tiny")
    assert ran.status == 2
    assert UNSOUND in ran.err


@pytest.mark.parametrize(("name", "largest"), [("tokenizer.json", LARGEST_JSON), *LARGEST_PARSED.items()])
def test_a_file_of_the_largest_size_is_taken(tmp_path: Path, name: str, largest: int) -> None:
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, largest)
    check_file(tmp_path / name)
    os.truncate(tmp_path / name, largest + 1)
    with pytest.raises(UserError, match=f"{name} has {largest + 1} bytes"):
        check_file(tmp_path / name)


def test_a_config_of_nothing_but_lists_takes_little_memory(tmp_path: Path) -> None:
    """An empty list is three bytes of JSON, and 64 of memory."""
    path = tmp_path / "config.json"
    path.write_text(lists(LARGEST_PARSED["config.json"] // 3 - 10))
    tracemalloc.start()
    try:
        assert read_json(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_links_within_the_directory_and_to_weights_elsewhere_are_followed(user: UserDirectory) -> None:
    """Weights are often kept in another place. Of what they hold only tensors that the model has are read."""
    tiny = user.root / "tiny"
    (tiny / "config.json").rename(tiny / "real.json")
    (tiny / "config.json").symlink_to("real.json")
    (tiny / WEIGHTS).rename(user.root / "kept elsewhere")
    (tiny / WEIGHTS).symlink_to("../kept elsewhere")
    tiny.rename(user.root / "real")
    tiny.symlink_to("real")
    assert furiosa_build(user, "build", "tiny").status == 0


def test_the_links_of_the_hubs_cache_are_followed(
    user: UserDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789" * 4
    cached = tmp_path / "hub" / "models--org--tiny"
    snapshot = cached / "snapshots" / commit
    (cached / "blobs").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    save_random_model(CONFIG, snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(cached / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    ran = furiosa_build(user, "build", "tiny", "model.model_id_or_path=org/tiny")
    assert ran.status == 0, ran.err

    (snapshot / "tokenizer.json").symlink_to("/etc/passwd")
    ran = furiosa_build(user, "build", "tiny", "model.model_id_or_path=org/tiny", f"cache_dir={tmp_path / 'other'}")
    assert ran.status == 2
    assert "tokenizer.json is a link out of the model's directory" in ran.err
