"""An artifact with a draft model: built by every face, published, verified, and the draft what it is by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage
from user_directory import (
    CONFIG,
    UserDirectory,
    furiosa_build,
    make_model,
    make_user_directory,
    run,
    steps_in_this_process,
)

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.artifact.schema import Artifact, Manifest
from furiosa_build.build import graph
from furiosa_build.build.artifact_builder import ArtifactBuilder
from furiosa_build.build.reporter import EventReporter
from furiosa_build.build.reproduce import differing_files
from furiosa_build.core.errors import UserError
from furiosa_build.ui.artifact_text import artifact_text

pytestmark = pytest.mark.grid  # one build takes ten seconds, and what it goes through has tests of its own

SMALL = {**CONFIG, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24}
RECIPES = {
    "fast": """\
defaults: [tiny]
speculative: {recipe: small, num_speculative_tokens: 3}
buckets: {append_buckets: null}
""",
    "small": f"""\
defaults: [tiny]
model: {{model_id_or_path: test/small, architecture: {json.dumps(SMALL)}, seed_for_random_weight: 3}}
quantization: {{scheme: int8}}
buckets: {{append_buckets: null}}
""",
}


@pytest.fixture(autouse=True, scope="module")
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """A directory in which the recipe `fast` has been built, with the draft `small`. Not to be changed."""
    root = tmp_path_factory.mktemp("draft")
    user = make_user_directory(root / "user", root / "store", make_model(root / "model" / "tiny"))
    for name, text in RECIPES.items():
        (user.root / "recipes" / f"{name}.yaml").write_text(f"# {name}.\n{text}")
    ran = furiosa_build(user, "build", "fast")
    assert ran.status == 0, ran.err
    return user


@pytest.fixture
def latest(user: UserDirectory) -> Path:
    return (user.root / "artifacts" / "fast" / "latest").resolve()


def content(directory: Path) -> tuple[Artifact, Manifest]:
    opened = open_artifact(directory, verify="full")
    return opened.artifact, opened.manifest


def test_it_qualifies_with_what_the_draft_is_good_for(latest: Path) -> None:
    figures = json.loads(latest.with_suffix(".qualify.json").read_bytes())
    assert figures["top1_agreement"] == 1.0
    shown = artifact_text(open_artifact(latest).artifact, latest)
    assert f"; {figures['draft_acceptance']:.0%} of the draft's tokens accepted" in shown


def test_the_draft_in_it_is_the_artifact_that_it_is_by_itself(user: UserDirectory, latest: Path) -> None:
    """But for the directory of its files, and for what it has of the model: the same programs and parameters."""
    assert run(user.open(recipe="small")) == ["package", "qualify"], "the rest is shared"
    artifact, manifest = content(latest)
    alone, files = content(user.root / "artifacts" / "small" / "latest")
    draft = artifact.draft
    assert draft is not None
    own = {name.removeprefix("draft/"): r for name, r in manifest.files.items() if name.startswith("draft/")}
    assert own == {name: r for name, r in files.files.items() if name.startswith(("params/", "programs/"))}
    moved = json.loads(draft.model_dump_json().replace('"draft/', '"'))
    expected = json.loads(alone.model_dump_json())
    assert moved["metadata"].pop("artifact_id") != expected["metadata"].pop("artifact_id")
    assert moved == expected


def test_what_the_artifact_says_of_it(latest: Path) -> None:
    artifact, _ = content(latest)
    draft = artifact.draft
    assert draft is not None
    config, of_draft = artifact.generator_config, draft.generator_config
    assert (config.num_speculative_tokens, of_draft.num_speculative_tokens) == (3, None)
    assert config.append_buckets == [(1, 8, 64), (2, 4, 64)]
    assert of_draft.append_buckets == [(1, 8, 64)]
    assert of_draft.paged_attention_num_blocks == config.paged_attention_num_blocks
    assert (artifact.model_metadata.quantization, draft.model_metadata.quantization) == ("none", "int8")
    assert draft.model_metadata.num_hidden_layers == 1
    assert {path.name for path in (latest / "draft").iterdir()} == {"params", "programs"}


def test_where_it_comes_from_is_told(latest: Path) -> None:
    statement = json.loads((latest / "provenance.json").read_bytes())
    Statement.copy_from_pb(ParseDict(statement, StatementMessage())).validate()
    definition = statement["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["draft"]["recipe"]["name"] == "small"
    assert definition["externalParameters"]["recipe"]["speculative"]["num_speculative_tokens"] == 3
    assert definition["internalParameters"]["draft"]["hf_config"]["hidden_size"] == 16
    names = [found["name"] for found in definition["resolvedDependencies"]]
    assert {"model.safetensors", "draft/random weights"} <= set(names)
    assert len(names) == len(set(names))


def test_the_same_bytes_from_python_without_the_store(
    user: UserDirectory, latest: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(user.root)
    builder = ArtifactBuilder(
        "tiny",
        "cpu",
        "fast",
        tensor_parallel_size=1,
        backend="eager",
        prefill_buckets=[(1, 32)],
        decode_buckets=[(2, 64)],
        max_seq_len_to_capture=64,
        paged_attention_block_size=16,
        speculative_recipe="small",
        num_speculative_tokens=3,
    )
    builder.build(tmp_path / "artifacts", cache_dir=tmp_path / "store")
    assert differing_files(latest, tmp_path / "artifacts" / "fast" / "latest") == []


def test_a_task_of_doit_makes_the_draft_alone(user: UserDirectory, tmp_path: Path) -> None:
    build = user.open(f"cache_dir='{tmp_path}'", recipe="fast")
    assert graph.run(build, "draft") == 0
    steps = [name for name in build.plan.steps if name.startswith("draft:")]
    assert sorted(build.outcomes) == sorted(steps)
    tasks = graph.doit_tasks(build, EventReporter(build))
    assert [task["basename"] for task in tasks if task.get("name", "") is None] == ["partition", "compile", "draft"]


def test_every_listing_shows_both(user: UserDirectory, latest: Path) -> None:
    shown = furiosa_build(user, "plan", "fast").out
    assert "\ndraft small: LlamaForCausalLM, " in shown
    assert "int8, 8 weights; proposes 3 tokens at a time\n  THE WEIGHTS ARE RANDOM, drawn from seed 3\n" in shown
    for line in ("done   draft:compile:decode-2x64:last  ", "  draft:decode-2x64  ", "  append-2x4x64  "):
        assert line in shown
    assert "steps done, 0 to do" in shown
    data = json.loads(furiosa_build(user, "plan", "fast", "--json").out)
    assert "draft:fetch" in [step["step"] for step in data["steps"]]
    explained = furiosa_build(user, "explain", "fast", "speculative.num_speculative_tokens=2").out
    assert "up to date  draft:fetch" in explained
    inspected = furiosa_build(user, "inspect", str(latest)).out
    assert "draft         small " in inspected
    assert ": proposes 3 tokens at a time\n" in inspected
    assert "\nprograms of the draft\n" in inspected
    report = json.loads(latest.with_suffix(".build-report.json").read_bytes())
    assert report["sizes"]["draft"] > 0
    assert "draft:partition:weights" in [step["step"] for step in report["steps"]]


def test_a_damaged_file_of_the_draft_is_named_and_made_whole(user: UserDirectory, tmp_path: Path) -> None:
    there = user.open(f"save_dir='{tmp_path}'", recipe="fast")
    with closing(there):
        there.run("package")
    directory = there.version_directory
    [file] = (directory / "draft" / "params").iterdir()
    shutil.copy(file, tmp_path / "copy")
    file.unlink()
    file.write_bytes((tmp_path / "copy").read_bytes()[:-1] + b"\x77")
    (tmp_path / "copy").unlink()
    ran = furiosa_build(user, "verify", str(directory))
    assert ran.status == 5
    assert f"the sha256 of draft/params/{file.name} is not that of manifest.json" in ran.err
    again = user.open(f"save_dir='{tmp_path}'", recipe="fast")
    with closing(again):
        [said] = [one for one in again.explain() if one.step == "package"]
        assert said.reason.endswith(f": draft/params/{file.name}")
        again.run("package")
    assert furiosa_build(user, "verify", str(directory)).status == 0


def test_a_mistake_in_the_draft_is_told_as_such(user: UserDirectory) -> None:
    recipes = user.root / "recipes"
    other = {**SMALL, "vocab_size": 65}
    (recipes / "other.yaml").write_text(
        f"# Another vocabulary.\ndefaults: [small]\nmodel: {{architecture: {json.dumps(other)}}}\n"
    )
    with pytest.raises(UserError, match="the draft 'other' has a vocabulary of 65 tokens, the model of 64"):
        user.open("speculative.recipe=other", recipe="fast")
    (recipes / "gone.yaml").write_text("# No such model.\ndefaults: [tiny]\nmodel: {model_id_or_path: ./gone}\n")
    with pytest.raises(UserError) as caught:
        user.open("speculative.recipe=gone", recipe="fast")
    assert caught.value.where == "draft 'gone': model.model_id_or_path"
