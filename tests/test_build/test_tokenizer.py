"""The tokenizer of an artifact, from a plan to what the runtime reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, models
from tokenizers_of_models import CHATML, NAMED, byte_level, write
from user_directory import (
    UserDirectory,
    furiosa_build,
    make_built_directory,
    make_user_directory,
    steps_in_this_process,
)

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.core.errors import UserError
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.text import tokenizer

SMALL = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 63, "d": 64, "e": 65}, unk_token="a"))
"""Two of its tokens are beyond the tiny model's vocabulary of 64."""
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """The tiny model, built without a tokenizer. Not to be changed."""
    return make_built_directory(tmp_path_factory.mktemp("built"))


@pytest.fixture
def user(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """A directory with the tiny model, whose store has what was built of it."""
    return make_user_directory(tmp_path / "user", built.store, built.root / "tiny")


def model_files(user: UserDirectory) -> set[str]:
    """What the latest artifact has beside parameters and programs."""
    directory = user.artifacts / "latest" / "model"
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_the_artifact_has_one_complete_tokenizer(user: UserDirectory) -> None:
    write(user.root / "tiny", SMALL, tokenizer_config=CONFIG, special_tokens_map={"bos_token": "b"}, added_tokens={})
    write(user.root / "tiny", chat_template="{{ bos_token }}", tool_use="tools", rag="rag")
    user.build()
    assert model_files(user) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "additional_chat_templates/rag.jinja",
    }
    ours = tokenizer.Tokenizer(user.artifacts / "latest" / "model")
    assert ours.apply_chat_template([]) == "b"
    assert ours.apply_chat_template([], tools=[]) == "tools"
    assert user.build("model.tokenizer=none") == ["package", "qualify"]
    assert model_files(user) == {"config.json", "generation_config.json"}


def test_tokens_that_the_model_lacks_are_told_and_refused(user: UserDirectory) -> None:
    write(user.root / "tiny", SMALL, tokenizer_config=CONFIG)
    told = "tokenizer: the model's vocabulary of 64 tokens lacks d (64), e (65): requests with these are refused"
    assert told in furiosa_build(user, "plan", "tiny").out.splitlines()
    ran = furiosa_build(user, "build", "tiny")
    assert ran.status == 0
    assert told in ran.out
    engine = LLMEngine(open_artifact(user.artifacts / "latest"))
    with pytest.raises(UserError, match=r"the model's vocabulary lacks the token 'd' \(64\), which its tokenizer has"):
        engine.add_request("1", "d", SamplingParams())


@pytest.mark.parametrize(
    ("overrides", "why"), [((), "tiny brings none"), (("model.tokenizer=none",), "as model.tokenizer says")]
)
def test_no_tokenizer_is_told(user: UserDirectory, overrides: tuple[str, ...], why: str) -> None:
    told = f"no tokenizer, {why}: the artifact takes and gives token ids"
    assert told in furiosa_build(user, "plan", "tiny", *overrides).out.splitlines()


def test_what_cannot_be_used_is_refused_by_plan(user: UserDirectory) -> None:
    (user.root / "tiny" / "vocab.json").write_text(json.dumps({"a": 0}))
    write(user.root / "tiny", tokenizer_config={"auto_map": {"AutoTokenizer": ["ours.Tokens", None]}})
    ran = furiosa_build(user, "plan", "tiny")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err == (
        "error: transformers cannot load the tokenizer of tiny: "
        "it is code of the model's own, which is never executed\n"
        "  where: the model's tokenizer files\n"
        "  hint: model.tokenizer=none builds an artifact that takes and gives token ids\n"
    )
    assert furiosa_build(user, "plan", "tiny", "model.tokenizer=none").status == 0


def test_what_cannot_be_fetched_can_be_planned_and_not_built(user: UserDirectory) -> None:
    """Of a model that the recipe describes. The tests have no network."""
    fields = json.loads((user.root / "tiny" / "config.json").read_text())
    described = {"model_id_or_path": "org/none", "architecture": fields}
    recipe = yaml.safe_load((user.root / "recipes" / "tiny.yaml").read_text())
    recipe["model"] = described
    (user.root / "recipes" / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    planned = furiosa_build(user, "plan", "tiny")
    assert (planned.status, planned.err) == (0, "")
    assert "tokenizer: not known before its files are fetched: model 'org/none'" in planned.out
    with closing(user.open()) as build, pytest.raises(UserError, match="could not be fetched"):
        build.begin(["package"])  # the hub may be there when it comes to that: not of this plan
    ran = furiosa_build(user, "build", "tiny")
    assert ran.status == 2
    assert ran.err.startswith("error: model 'org/none' (revision main) could not be fetched: ")
    assert not user.artifacts.exists()


def test_a_link_to_elsewhere_is_refused(user: UserDirectory, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    write(user.root / "tiny", byte_level(), tokenizer_config=NAMED, chat_template=CHATML)
    (user.root / "tiny" / "additional_chat_templates").mkdir()
    (user.root / "tiny" / "additional_chat_templates" / "rag.jinja").symlink_to(tmp_path / "secret")
    ran = furiosa_build(user, "plan", "tiny")
    assert ran.status == 2
    assert "rag.jinja is a link out of the model's directory" in ran.err
