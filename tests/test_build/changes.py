"""Changes of a recipe, its files, its tools and this project: each is made, and says which build follows."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from test_models.tiny import save_random_model
from tokenizers import Tokenizer, models
from user_directory import (
    CONFIG,
    UserDirectory,
    make_user_directory,
)

from furiosa_build.backends.eager import EagerBackend
from furiosa_build.plan import keys
from furiosa_build.steps import shard


class Next(NamedTuple):
    """The build that follows a change: where, and with which overrides."""

    user: UserDirectory
    overrides: tuple[str, ...] = ()


Change = Callable[[UserDirectory, pytest.MonkeyPatch], Next]

# Changes of the recipe


def override(*overrides: str) -> Change:
    """Other overrides than before."""
    return lambda user, _: Next(user, overrides)


TOKENIZER = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str()


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
    """Other numbers; size, time of modification and inode are as before."""
    del patch
    file = user.root / "tiny" / "model.safetensors"
    before = file.stat()
    with file.open("r+b") as opened:
        opened.write(multiply(file))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # the kernel's clock ticks some hundred times a second
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    return Next(user)


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


def of_tokenizer(then: Change) -> Change:
    """Of a model that was built with a tokenizer."""

    def change(user: UserDirectory, patch: pytest.MonkeyPatch) -> Next:
        model_file("tokenizer.json", TOKENIZER)(user, patch)
        assert user.build() == ["fetch", "package", "qualify"]
        return then(user, patch)

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
