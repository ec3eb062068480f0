"""Recipes are found, composed and validated."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.recipe import compose
from furiosa_build.recipe.compose import list_recipes, load_recipe
from furiosa_build.recipe.schema import BuildSpec

from .conftest import VALID, Write

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = (
    "llama3-405b-fp8",
    "llama3-70b-fp8",
    "llama3-8b-bf16",
    "llama3-8b-fp8",
    "mistral-nemo-12b-fp8",
    "quickstart",
    "quickstart-draft",
    "quickstart-speculative",
    "qwen3-8b-int8",
)


def test_the_shipped_recipes_are_listed_with_a_description(tmp_path: Path) -> None:
    recipes = list_recipes(tmp_path)
    assert tuple(recipe.name for recipe in recipes) == SHIPPED
    assert all(recipe.description.endswith(".") for recipe in recipes)
    assert all(recipe.path.parent == REPOSITORY / "recipes" for recipe in recipes)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_short_and_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.spec.name == name
    assert recipe.spec.quantization.scheme == {"fp8": "fp8", "int8": "int8"}.get(name.rpartition("-")[2], "none")
    lines = (REPOSITORY / "recipes" / f"{name}.yaml").read_text().splitlines()
    assert len(lines) <= 15
    assert BuildSpec.model_validate_json(recipe.spec.model_dump_json()) == recipe.spec


@pytest.mark.parametrize("name", SHIPPED)
def test_any_shipped_recipe_can_be_cut_down_to_two_random_layers(name: str) -> None:
    spec = load_recipe(name, ["model.num_hidden_layers=2", "model.seed_for_random_weight=0"]).spec
    assert (spec.model.num_hidden_layers, spec.model.seed_for_random_weight) == (2, 0)


@pytest.mark.parametrize(
    "conf",
    sorted(path.relative_to(REPOSITORY / "conf") for path in (REPOSITORY / "conf").glob("*/*.yaml")),
    ids=str,
)
def test_every_conf_file_is_valid_and_says_what_it_is(conf: Path) -> None:
    load_recipe("quickstart", [f"{conf.parent}={conf.stem}"])
    assert (REPOSITORY / "conf" / conf).read_text().startswith("# ")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
        ("mistral-nemo-12b", 12_247_782_400),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_the_architecture_is_the_published_model(name: str, parameters: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = load_recipe("quickstart", [f"model={name}"]).spec.model.architecture
    assert architecture is not None
    config = AutoConfig.for_model(**architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    assert [type(model).__name__] == architecture["architectures"]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert config.dtype == torch.bfloat16
    assert config.rope_parameters["rope_theta"] == architecture["rope_theta"]
    scaling = architecture.get("rope_scaling") or {"rope_type": "default"}
    assert scaling.items() <= config.rope_parameters.items()


def test_overrides_of_every_form(tmp_path: Path) -> None:
    overrides = [
        "quantization=int8",
        "model.num_hidden_layers=2",
        "buckets.prefill_buckets=[[1,64],[2,64]]",
        "+scheduler.npu_queue_limit=2",
        "~scheduler.spare_blocks_ratio",
        "num_compile_workers=3",
        "save_dir=${name}/out",
        "name=other",
    ]
    spec, options = (recipe := load_recipe("quickstart", overrides, cwd=tmp_path)).spec, recipe.options
    assert spec.quantization.scheme == "int8"
    assert spec.quantization.scheme_of("lm_head.weight") == "none"
    assert spec.model.num_hidden_layers == 2
    assert spec.buckets.prefill_buckets == ((1, 64), (2, 64))
    assert spec.scheduler.spare_blocks_ratio == 0.2
    assert (spec.name, options.save_dir, options.num_compile_workers) == ("other", "other/out", 3)
    assert recipe.roots == (tmp_path, REPOSITORY)


def test_the_users_directory_comes_first(tmp_path: Path, write: Write) -> None:
    write("recipes/quickstart.yaml", VALID + "num_compile_workers: 7\n")
    write("conf/model/quickstart.yaml", "# Mine.\nmodel_id_or_path: mine\n")
    recipe = load_recipe("quickstart", cwd=tmp_path)
    assert (recipe.options.num_compile_workers, recipe.spec.model.model_id_or_path) == (7, "mine")
    assert next(each for each in list_recipes(tmp_path) if each.name == "quickstart").path.parent.parent == tmp_path
    assert load_recipe("quickstart").spec.model.model_id_or_path == "examples/quickstart/model"


def test_a_conf_directory_alone_is_enough(tmp_path: Path, write: Write) -> None:
    write("conf/model/short.yaml", "# Three layers.\ndefaults: [llama3-8b]\nnum_hidden_layers: 3\n")
    model = load_recipe("llama3-8b-fp8", ["model=short"], cwd=tmp_path).spec.model
    assert (model.num_hidden_layers, model.model_id_or_path) == (3, "meta-llama/Llama-3.1-8B-Instruct")


def test_a_recipe_can_extend_a_shipped_one(tmp_path: Path, write: Write) -> None:
    write("recipes/mine.yaml", "# Mine.\ndefaults:\n  - llama3-8b-fp8\n  - override buckets: large\n")
    spec = load_recipe("mine", cwd=tmp_path).spec
    assert (spec.name, spec.quantization.scheme, spec.buckets.max_seq_len_to_capture) == ("mine", "fp8", 4096)


def test_an_odd_directory_name_is_no_trouble(tmp_path: Path, write: Write) -> None:
    write("it's, [an] odd=name/recipes/mine.yaml", VALID)
    assert load_recipe("mine", cwd=tmp_path / "it's, [an] odd=name").spec.name == "mine"


def test_in_an_installed_package_the_shipped_files_lie_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "shipped").symlink_to(REPOSITORY)
    monkeypatch.setattr(compose, "_PACKAGE", tmp_path / "package")
    recipe = load_recipe("quickstart", cwd=tmp_path)
    assert recipe.roots == (tmp_path, tmp_path / "package" / "shipped")


@pytest.mark.filterwarnings("ignore:The version_base parameter")
def test_a_mistake_leaves_nothing_behind_and_an_outer_hydra_stays(tmp_path: Path, write: Write) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    write("app/app.yaml", "answer: 42\n")
    with initialize_config_dir(str(tmp_path / "app"), version_base="1.3"):
        with pytest.raises(UserError):
            load_recipe("quickstart", ["no_such_key=1"])
        first, second = load_recipe("quickstart"), load_recipe("quickstart")
        assert hydra_compose("app").answer == 42
    assert first == second


def test_the_examples_in_the_manual_are_valid(tmp_path: Path, write: Write) -> None:
    blocks = re.findall(
        r"```yaml\n# (\S+\.yaml)\n(.*?)```", (REPOSITORY / "docs" / "recipes.md").read_text(), re.DOTALL
    )
    for path, text in blocks:
        write(path, text)
    shipped, mine = load_recipe("llama3-8b-fp8", cwd=tmp_path), load_recipe("support-bot", cwd=tmp_path)
    assert shipped.spec == load_recipe("llama3-8b-fp8").spec
    assert (mine.spec.model.model_id_or_path, mine.spec.target.isa) == ("/data/support-bot", "x86-64-v4")


def test_nothing_heavy_is_imported() -> None:
    program = """
        import sys
        from furiosa_build.recipe.compose import load_recipe
        assert "hydra" not in sys.modules
        load_recipe("llama3-8b-fp8", ["quantization=int8"])
        print(*sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "numpy"}))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
