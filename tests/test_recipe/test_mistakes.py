"""Every mistake is one message: what is wrong, where, what is valid, and the nearest valid spelling."""

from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.recipe.compose import load_recipe

from .conftest import VALID, Write
from .mistakes import TABLES, Case


@pytest.mark.parametrize(
    ("table", "case"),
    [
        pytest.param(table, case, id=f"{table}: {name}")
        for table, cases in TABLES.items()
        for name, case in cases.items()
    ],
)
def test_a_mistake_is_one_message(tmp_path: Path, write: Write, table: str, case: Case) -> None:
    write("recipes/mine.yaml", VALID + case.adds if case.recipe is None else case.recipe)
    overrides = ["model=llama3-8b"] if table == "architecture" else []
    with pytest.raises(UserError) as caught:
        load_recipe(case.name, [*overrides, *case.overrides], cwd=tmp_path)
    error = caught.value
    found = {"what": error.what, "where": error.where, "valid": error.valid, "hint": error.hint}
    expected = {"what": case.what, "where": case.where, "valid": case.valid, "hint": case.hint}
    assert {part: text for part, text in expected.items() if text not in found[part]} == {}, str(error)
    assert error.exit_status == 2
    assert error.__cause__ is None or error.__suppress_context__
    for jargon in ("Input should be", "pydantic", "https://", "++", "full_key", "object at 0x"):
        assert jargon not in str(error)


def test_what_cannot_be_read(tmp_path: Path, write: Write) -> None:
    write("recipes/folder.yaml/README", "a directory, and no recipe")
    with pytest.raises(UserError, match="there is no recipe 'folder'"):
        load_recipe("folder", cwd=tmp_path)
    with pytest.raises(UserError, match="cannot read a recipe's file: File name too long"):
        load_recipe("quickstart", ["model=" + "x" * 300], cwd=tmp_path)


def test_invalid_utf_8(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(UserError, match=r"mine\.yaml is not UTF-8 text: byte 0xe9 at offset 5"):
        load_recipe("mine", cwd=tmp_path)


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("model_id_or_path: 12\n", "model.model_id_or_path: 12 is read as the number 12", 1),
        ("a: 1\nmodel_id_or_path: x\n", "unknown key model.a=1", 1),
        ("model_id_or_path: [\n", "bad.yaml is not valid YAML", 2),
        ("model_id_or_path: x\nnum_hidden_layers: 8:10\n", "8:10 is read as the number 490", 2),
        ("defaults: [llama3-9b]\n", "there is no model 'llama3-9b'", 1),
        ("defaults: [model/llama3-8b]\n", "there is no config group 'model/model'", 1),
    ],
)
def test_a_mistake_in_a_conf_file_is_told_with_that_file(
    tmp_path: Path, write: Write, text: str, what: str, line: int
) -> None:
    path = write("conf/model/bad.yaml", text)
    with pytest.raises(UserError) as caught:
        load_recipe("quickstart", ["model=bad"], cwd=tmp_path)
    assert what in caught.value.what
    assert caught.value.where.startswith(f"{path}:{line}")


def test_a_missing_key_is_told_with_the_section_that_lacks_it(tmp_path: Path, write: Write) -> None:
    path = write("conf/model/bare.yaml", "# Nothing.\n")
    with pytest.raises(UserError, match=r"model\.model_id_or_path is missing") as caught:
        load_recipe("quickstart", ["model=bare"], cwd=tmp_path)
    assert caught.value.where == f"{path}:1: model.model_id_or_path"


def test_all_mistakes_are_told_at_once(tmp_path: Path, write: Write) -> None:
    path = write("recipes/mine.yaml", VALID + "num_compile_workers: 0\nmodel:\n  num_hidden_layers: x\n")
    with pytest.raises(UserError) as caught:
        load_recipe("mine", ["name=no/where", "bar=2"], cwd=tmp_path)
    assert caught.value.what.splitlines()[0] == "4 mistakes in recipe 'mine':"
    for part in (
        "name: 'no/where'",
        f"{path}:9: model.num_hidden_layers",
        "unknown key bar=2",
        f"{path}:7: num_compile_workers",
    ):
        assert part in caught.value.what


def test_the_command_line_is_named_for_a_value_that_it_took_from_a_file(tmp_path: Path, write: Write) -> None:
    write("recipes/mine.yaml", VALID + "num_compile_workers: 0\n")
    assert load_recipe("mine", ["num_compile_workers=1"], cwd=tmp_path).options.num_compile_workers == 1
    with pytest.raises(UserError) as caught:
        load_recipe("mine", ["num_compile_workers=1", "num_compile_workers=-1"], cwd=tmp_path)
    assert caught.value.where == "command line: num_compile_workers=-1"
