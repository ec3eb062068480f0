"""What changes, and exactly which steps run: one row a case, built from one end to the other."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from test_models.tiny import save_random_model
from test_plan.source_tree import copied_package
from user_directory import (
    CONFIG,
    RANDOM,
    UserDirectory,
    make_built_directory,
    make_user_directory,
    steps_in_this_process,
)

from furiosa_build.backends.eager import EagerBackend
from furiosa_build.plan import keys
from furiosa_build.steps import shard

BUCKETS = ("prefill-1x32", "decode-2x64")
KINDS = ("first", "block", "last")
WEIGHTS = ["quantize", "partition:weights"]
ARTIFACT = ["package", "qualify"]


def programs(*kinds: str, buckets: tuple[str, ...] = BUCKETS) -> list[str]:
    """Their partition and compile steps."""
    return [f"{step}:{bucket}:{kind}" for bucket in buckets for kind in kinds for step in ("partition", "compile")]


TRACES = [name for name in programs(*KINDS) if name.startswith("partition")]
COMPILES = [name for name in programs(*KINDS) if name.startswith("compile")]


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """A directory in which the recipe has been built. Not to be changed."""
    return make_built_directory(tmp_path_factory.mktemp("rebuilds"))


@pytest.fixture
def user(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """A directory in which the recipe has been built, to be changed."""
    shutil.copytree(built.store, tmp_path / "store")
    directory = make_user_directory(tmp_path / "user", tmp_path / "store", built.root / "tiny")
    assert directory.build() == []
    return directory


class Next(NamedTuple):
    """The build that follows a change: where, and with which overrides."""

    user: UserDirectory
    overrides: tuple[str, ...] = ()


Change = Callable[[UserDirectory, pytest.MonkeyPatch], Next]

# Changes of the recipe


def override(*overrides: str) -> Change:
    """Other overrides than before."""
    return lambda user, _: Next(user, overrides)


def after(*first: str, then: tuple[str, ...] | Change) -> Change:
    """What was built last was built with the overrides `first`."""

    def change(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
        assert user.build(*first)
        return Next(user, then) if isinstance(then, tuple) else then(user, patch)

    return change


def rewrite(edit: Callable[[str], str]) -> Change:
    """Another text of the recipe."""

    def change(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
        del patch
        recipe = user.root / "recipes" / "tiny.yaml"
        before = recipe.read_text()
        recipe.write_text(edit(before))
        assert recipe.read_text() != before
        return Next(user)

    return change


def other_order(recipe: str) -> str:
    """The sections the other way round."""
    head, *sections = re.split(r"^(?=\w)", recipe, flags=re.MULTILINE)
    return head + "".join(reversed(sections))


def comments(recipe: str) -> str:
    """A comment on every line."""
    return "".join(f"# A comment.\n{line}  # Another.\n" for line in recipe.splitlines())


SPECULATIVE = ("speculative.recipe=draft", "buckets.append_buckets=null")
DRAFT_BUCKETS = ("prefill-1x32", "append-1x8x64", "decode-2x64")
"""Not those that verify."""


def draft(**more: str) -> Change:
    """A recipe of a draft model: a layer less of the same model. `more`: what its sections say besides."""

    def write(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
        del patch
        sections = {"model": "{num_hidden_layers: 1}", **more}
        text = "".join(f"{name}: {value}\n" for name, value in sections.items())
        (user.root / "recipes" / "draft.yaml").write_text(f"# A draft.\ndefaults: [tiny]\n{text}")
        return Next(user, SPECULATIVE)

    return write


def drafted(change: Change) -> Change:
    """What was built last has a draft model."""

    def apply(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
        assert user.build(*draft()(user, patch).overrides)
        then = change(user, patch)
        return Next(then.user, (*SPECULATIVE, *(o for o in then.overrides if o not in SPECULATIVE)))

    return apply


def draft_built_alone(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
    """The draft model has been built by its own recipe, in the same shapes."""
    then = draft()(user, patch)
    assert user.build("buckets.append_buckets=null", recipe="draft")
    return then


def of_draft(steps: list[str]) -> list[str]:
    return [f"draft:{name}" for name in steps]


# Changes of places and files


def move(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
    """The recipe, the model and the artifacts are elsewhere."""
    del patch
    elsewhere = user.root.parent / "moved to ö" / "another place"
    elsewhere.parent.mkdir()
    user.root.rename(elsewhere)
    return Next(UserDirectory(elsewhere, user.store))


def copy(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
    """Somebody else has a copy of the recipe and the model, and uses the same store."""
    del patch
    return Next(make_user_directory(user.root.parent / "other", user.store, user.root / "tiny"))


def move_store(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
    """The store is elsewhere."""
    del patch
    user.store.rename(user.store.parent / "other store")
    return Next(UserDirectory(user.root, user.store.parent / "other store"))


def other_surroundings(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
    """Another home, time zone, language and directory for temporary files."""
    home = user.root.parent / "home"
    home.mkdir()
    for variable, value in {"HOME": home, "TMPDIR": home, "TZ": "Pacific/Chatham", "LC_ALL": "C", "LANG": "C"}.items():
        patch.setenv(variable, str(value))
    return Next(user)


def touch(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
    """Every file of the user has another time."""
    del patch
    for path in user.root.rglob("*"):
        os.utime(path, ns=(1, 1), follow_symlinks=False)
    return Next(user)


def multiply(file: Path) -> bytes:
    """Other weights of the same shapes, as the bytes of a file."""
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    other = file.with_name("other")
    save_file({**tensors, name: tensors[name] * 1.5}, other, metadata={"format": "pt"})
    return other.rename(file.parent.parent / "other").read_bytes()


def new_weights(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
    """Other numbers of the same shapes."""
    del patch
    file = user.root / "tiny" / "model.safetensors"
    file.write_bytes(multiply(file))
    return Next(user)


def secret_weights(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
    """Other numbers; size, time and inode are as before."""
    del patch
    file = user.root / "tiny" / "model.safetensors"
    before = file.stat()
    with file.open("r+b") as opened:
        opened.write(multiply(file))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    return Next(user)


def verified(change: Change) -> Change:
    """The same change, and a build that reads all inputs again."""
    return lambda user, patch: Next(change(user, patch).user, ("verify_inputs=true",))


def more_layers(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
    """A model of three layers in place of two."""
    del patch
    shutil.rmtree(user.root / "tiny")
    save_random_model({**CONFIG, "num_hidden_layers": 3}, user.root / "tiny")
    return Next(user)


def model_file(name: str, content: str) -> Change:
    """Another file beside the weights."""

    def change(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
        del patch
        (user.root / "tiny" / name).write_text(content)
        return Next(user)

    return change


def field_of_config(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
    """A field of config.json that shapes no graph."""
    del patch
    file = user.root / "tiny" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_comment": "nobody reads this"}))
    return Next(user)


# Changes of the tools


def other_version(of: str) -> Change:
    """Another version of a package is installed."""

    def change(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
        patch.setattr(keys, "version", lambda package: "9.9" if package == of else version(package))
        return Next(user)

    return change


def other_compiler(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
    """The backend has another compiler, which makes the same programs."""
    patch.setattr(EagerBackend, "key_factors", lambda _: {"c++": "g++ 99"})
    return Next(user)


def other_isa(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
    """The backend compiles for an instruction set, and for another than before."""
    compiled_for = {"native": "any", "x86-64-v3": "x86-64-v2"}
    patch.setattr(EagerBackend, "isa", lambda _, requested: compiled_for[requested])
    patch.setattr("furiosa_build.backends.cpu.supports", lambda _: True)
    return Next(user, ("target.isa=x86-64-v3",))


# Edits of the project


def edit(*files: str) -> Change:
    """A name more in files of the project's source, which changes nothing that they do."""

    def change(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
        del patch
        for file in files:
            with (user.root.parent / "source" / "furiosa_build" / file).open("a") as opened:
                opened.write("edited = 1\n")
        return Next(user)

    return change


def edit_that_makes_others(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
    """An edit of `partition:weights` that names its files in another way."""
    patch.setattr(
        shard, "_file_names", lambda count, *_: [f"stage-0-rank-0-other-{i}.safetensors" for i in range(count)]
    )
    return edit("steps/shard.py")(user, patch)


ROWS: Mapping[str, tuple[Change, list[str]]] = {
    "nothing": (override(), []),
    "comment": (rewrite(comments), []),
    "key order": (rewrite(other_order), []),
    "recipe, model and artifacts moved": (move, []),
    "other directory": (copy, []),
    "store moved": (move_store, []),
    "other HOME, TZ, locale": (other_surroundings, []),
    "where and how to build": (override("num_compile_workers=2", "save_dir=elsewhere"), []),
    "name": (override("name=other"), ARTIFACT),
    "scheduler configuration": (override("scheduler.spare_blocks_ratio=0.5"), ARTIFACT),
    "size of the KV cache": (override("buckets.paged_attention_num_blocks=64"), ARTIFACT),
    "one bucket added": (
        override("buckets.decode_buckets=[[2,64],[3,64]]"),
        [*programs(*KINDS, buckets=("decode-3x64",)), *ARTIFACT],
    ),
    "append buckets, derived": (
        override("buckets.append_buckets=null"),
        [*programs(*KINDS, buckets=("append-1x8x64",)), *ARTIFACT],
    ),
    "prompts in pieces": (
        override("scheduler.prefill_chunk_size=8", "buckets.append_buckets=null"),
        [*programs(*KINDS, buckets=("append-1x8x64",)), *ARTIFACT],
    ),
    "beams": (
        override("buckets.kv_cache_sharing_across_beams_config={beam_width:2,max_new_tokens:8}"),
        [*programs(*KINDS, buckets=("decode-4x64",)), *ARTIFACT],
    ),
    # It has what is its own made, and shares the rest with the model and with builds of itself alone.
    "a draft model": (
        after("buckets.append_buckets=null", then=draft()),
        [*of_draft(WEIGHTS), *programs(*KINDS, buckets=("append-2x5x64",)), *ARTIFACT],
    ),
    "a draft model that was built alone": (
        draft_built_alone,
        [*programs(*KINDS, buckets=("append-2x5x64",)), *ARTIFACT],
    ),
    "quantization of the draft": (
        drafted(draft(quantization="{scheme: int8}")),
        of_draft([*WEIGHTS, *programs("block", "last", buckets=DRAFT_BUCKETS)]) + ARTIFACT,
    ),
    "number of proposals": (
        drafted(override("speculative.num_speculative_tokens=2")),
        [*programs(*KINDS, buckets=("append-2x3x64",)), *ARTIFACT],
    ),
    "quantization of the model that has a draft": (
        drafted(override("quantization=int8")),
        [*WEIGHTS, *programs("block", buckets=(*DRAFT_BUCKETS, "append-2x5x64")), *ARTIFACT],
    ),
    "one bucket removed": (
        after("buckets.decode_buckets=[[2,64],[3,64]]", then=("buckets.decode_buckets=[[3,64]]",)),
        ARTIFACT,
    ),
    "new weights, same shapes": (new_weights, ["fetch", *WEIGHTS, *ARTIFACT]),
    "new random weights": (
        after(*RANDOM, then=("model.seed_for_random_weight=1",)),
        ["fetch", *WEIGHTS, *ARTIFACT],
    ),
    "quantization scheme": (override("quantization=int8"), [*WEIGHTS, *programs("block"), *ARTIFACT]),
    "quantization scheme, to another": (
        after("quantization=int8", then=("quantization=fp8",)),
        [*WEIGHTS, *programs("block"), *ARTIFACT],
    ),
    "a quantization rule that matches nothing": (
        override("quantization.rules=[{match: nothing, scheme: none}]"),
        ["package"],
    ),
    "more layers of the same kind": (more_layers, ["fetch", *WEIGHTS, *ARTIFACT]),
    "more random layers of the same kind": (
        after(*RANDOM, "model.num_hidden_layers=1", then=RANDOM),
        ["fetch", *WEIGHTS, *ARTIFACT],
    ),
    "fewer layers of the same weights": (override("model.num_hidden_layers=1"), [*WEIGHTS, *ARTIFACT]),
    "tokenizer": (model_file("tokenizer_config.json", "{}"), ["fetch", *ARTIFACT]),
    "chat template": (model_file("chat_template.jinja", "{{ messages }}"), ["fetch", *ARTIFACT]),
    "a field of config.json that shapes no graph": (field_of_config, ["fetch", "quantize", *ARTIFACT]),
    "torch": (other_version("torch"), [*WEIGHTS, *TRACES, *ARTIFACT]),
    "transformers": (other_version("transformers"), [*TRACES, *ARTIFACT]),
    "numpy": (other_version("numpy"), [*WEIGHTS, *ARTIFACT]),
    "tokenizers": (other_version("tokenizers"), ["qualify"]),
    "pydantic": (other_version("pydantic"), []),
    "compiler": (other_compiler, [*COMPILES, "package"]),
    "target instruction set": (other_isa, [*COMPILES, *ARTIFACT]),
    "source of fetch": (edit("steps/fetch.py"), ["fetch"]),
    "source of quantize": (edit("steps/quantize.py"), ["quantize"]),
    "source of partition:weights": (edit("steps/shard.py"), ["partition:weights"]),
    "source of partition": (edit("steps/trace.py"), TRACES),
    "source of compile": (edit("steps/compile.py"), COMPILES),
    "source of package": (edit("steps/package.py"), ["package"]),
    "source of qualify": (edit("steps/qualify.py"), ["qualify"]),
    "source of the runtime": (edit("runtime/scheduling/scheduler.py"), ["qualify"]),
    "source of the backend": (edit("backends/eager.py"), [*COMPILES, "qualify"]),
    "source of another backend": (edit("backends/inductor/backend.py"), []),
    "source that no step runs": (edit("cli/main.py", "build/build.py", "ui/plan_text.py", "store/actions.py"), []),
    "source that makes other files": (edit_that_makes_others, ["partition:weights", *ARTIFACT]),
    "timestamps touched": (touch, []),
    "content changed with size and time kept": (secret_weights, []),
    "content changed with size and time kept, --verify-inputs": (
        verified(secret_weights),
        ["fetch", *WEIGHTS, *ARTIFACT],
    ),
    "nothing, --verify-inputs": (override("verify_inputs=true"), []),
}


EVERYDAY = {
    "nothing",
    "other HOME, TZ, locale",
    "scheduler configuration",
    "one bucket added",
    "a draft model that was built alone",
    "new weights, same shapes",
    "quantization scheme",
    "torch",
    "target instruction set",
    "source of partition",
    "source of the runtime",
    "content changed with size and time kept, --verify-inputs",
}
"""The rows that `make test` runs too: one for each way in which a build can depend on something."""


def test_rows_of_every_day_are_there() -> None:
    assert set(ROWS) >= EVERYDAY


@pytest.mark.parametrize(
    ("change", "expected"),
    [pytest.param(*row, id=name, marks=() if name in EVERYDAY else pytest.mark.grid) for name, row in ROWS.items()],
)
def test_what_a_change_runs(
    user: UserDirectory, tmp_path: Path, change: Change, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And `explain` tells so beforehand: what is surely to do, and what may be."""
    with copied_package(tmp_path / "source"):
        of, overrides = change(user, monkeypatch)
        with closing(of.open(*overrides)) as build:
            states = {one.step: one.state for one in build.explain()}
        ran = of.build(*overrides)
        assert sorted(ran) == sorted(expected)
        assert {step for step, state in states.items() if state == "to do"} <= set(ran)
        assert set(ran) <= {step for step, state in states.items() if state in ("to do", "waits")}
        assert of.build(*overrides) == []
