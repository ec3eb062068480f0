"""`furiosa-build`: every command, in this process where that shows the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from user_directory import (
    UserDirectory,
    furiosa_build,
    make_built_directory,
    make_user_directory,
    steps_in_this_process,
)

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.runtime import LLM, SamplingParams

PLANS = {
    "llama3-405b-fp8": "LlamaForCausalLM, 406 B parameters, bfloat16, fp8, 882 weights",
    "llama3-70b-fp8": "LlamaForCausalLM, 70.6 B parameters, bfloat16, fp8, 560 weights",
    "llama3-8b-bf16": "LlamaForCausalLM, 8.03 B parameters, bfloat16, no quantization",
    "llama3-8b-fp8": "LlamaForCausalLM, 8.03 B parameters, bfloat16, fp8, 224 weights",
    "mistral-nemo-12b-fp8": "MistralForCausalLM, 12.2 B parameters, bfloat16, fp8, 280 weights",
    "quickstart": "LlamaForCausalLM, 2.75 M parameters, bfloat16, no quantization",
    "quickstart-draft": "LlamaForCausalLM, 1.64 M parameters, bfloat16, no quantization",
    "quickstart-speculative": "LlamaForCausalLM, 2.75 M parameters, bfloat16, no quantization",
    "qwen3-8b-int8": "Qwen3ForCausalLM, 8.19 B parameters, bfloat16, int8, 252 weights",
}
"""The shipped recipes, and what each plans to build."""


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """A directory in which the recipe has been built."""
    return make_built_directory(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def fresh(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """A directory in which nothing has been built."""
    return make_user_directory(tmp_path / "user", tmp_path / "store", built.root / "tiny")


# In processes of its own


def test_the_console_script_is_installed(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "furiosa-build"), "recipes"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in ran.stdout.splitlines()] == list(PLANS)


HEAVY = ("torch", "transformers")
WORKING = (
    *("concurrent.futures.process", "jinja2", "rich.progress", "statistics", "fastapi", "uvicorn", "huggingface_hub"),
    *(f"furiosa_build.{name}" for name in ("build.estimates", "plan.budget.costs", "ui.display", "ui.step_summary")),
)
"""What a build needs that has something to do."""


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "tiny"],
        ["explain", "tiny"],
        ["build", "tiny"],
        ["recipes"],
        ["inspect", "artifacts/tiny/latest"],
        ["--help"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_has_nothing_to_do_imports_nothing_heavy(built: UserDirectory, arguments: list[str]) -> None:
    unneeded = HEAVY if arguments[0] in ("plan", "explain") else (*HEAVY, *WORKING)
    script = (
        "import sys\n"
        "from furiosa_build.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    print(sorted({set(unneeded)} & set(sys.modules)), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", script, *arguments]
    environment = {**os.environ, "FURIOSA_BUILD_CACHE": str(built.store)}
    ran = subprocess.run(command, cwd=built.root, env=environment, capture_output=True, text=True, check=True)
    assert ran.stderr == "[]\n"
    assert ran.stdout


# build and plan


def test_build_twice(fresh: UserDirectory) -> None:
    first = furiosa_build(fresh, "build", "tiny")
    assert (first.status, first.err) == (0, "")
    assert "ran 17 of 17 steps" in first.out
    artifact = fresh.latest()
    second = furiosa_build(fresh, "build", "tiny")
    assert second.status == 0
    assert re.fullmatch(
        rf"artifact   artifacts/tiny/{artifact.metadata.artifact_id[:12]} \(\d+ kB\)\n"
        r"qualified  52 tokens, top-1 agreement 100%, largest logit difference \S+ \(allowed \S+\)\n"
        r"ran 0 of 17 steps in \d\.\d s, 17 up to date\n",
        second.out,
    )


PLAN = """\
recipe tiny: LlamaForCausalLM, 19.6 k parameters, float32, no quantization
target cpu (any), backend eager, devices cpu
no tokenizer, tiny brings none: the artifact takes and gives token ids
steps
  {state}  fetch                         find the weights of tiny and list them by digest
  {state}  quantize                      no quantization: check the weights
  {state}  partition:weights             lay out 21 parameters for stage 0, rank 0
  {state}  partition:prefill-1x32:first  trace first of prefill-1x32
  {state}  compile:prefill-1x32:first    compile first of prefill-1x32 with eager for any
  {state}  partition:prefill-1x32:block  trace block of prefill-1x32 (2 layers)
  {state}  compile:prefill-1x32:block    compile block of prefill-1x32 (2 layers) with eager for any
  {state}  partition:prefill-1x32:last   trace last of prefill-1x32
  {state}  compile:prefill-1x32:last     compile last of prefill-1x32 with eager for any
  {state}  partition:decode-2x64:first   trace first of decode-2x64
  {state}  compile:decode-2x64:first     compile first of decode-2x64 with eager for any
  {state}  partition:decode-2x64:block   trace block of decode-2x64 (2 layers)
  {state}  compile:decode-2x64:block     compile block of decode-2x64 (2 layers) with eager for any
  {state}  partition:decode-2x64:last    trace last of decode-2x64
  {state}  compile:decode-2x64:last      compile last of decode-2x64 with eager for any
  {state}  package                       publish artifact tiny
  {state}  qualify                       {qualify}
buckets
  prefill-1x32                  compiles first, block (2 layers), last
  decode-2x64                   compiles first, block (2 layers), last
needs
"""
"""What is needed depends on the machine: test_preflight.py."""


def test_plan_before_and_after(fresh: UserDirectory, built: UserDirectory) -> None:
    qualify = "load the artifact in a fresh process, generate, compare with transformers"
    before = furiosa_build(fresh, "plan", "tiny")
    assert (before.status, before.err) == (0, "")
    assert before.out.startswith(PLAN.format(state="to do", qualify=qualify))
    assert before.out.endswith("\n0 steps done, 17 to do\n")
    assert not fresh.artifacts.exists()
    after = furiosa_build(built, "plan", "tiny")
    assert (after.status, after.err) == (0, "")
    assert after.out.startswith(PLAN.format(state="done ", qualify=qualify))
    assert after.out.endswith("\n17 steps done, 0 to do\n")


def test_plan_of_a_change_shows_what_it_calls_for(built: UserDirectory) -> None:
    planned = furiosa_build(built, "plan", "tiny", "name=other")
    assert planned.status == 0
    to_do = re.findall(r"^  to do  (\S+)", planned.out, re.MULTILINE)
    assert to_do == ["package", "qualify"]


@pytest.mark.parametrize(
    ("recipe", "summary"),
    [
        pytest.param(*plan, id=plan[0], marks=() if plan[0] == "quickstart" else pytest.mark.grid)
        for plan in PLANS.items()
    ],
)
def test_every_shipped_recipe_plans_without_weights(fresh: UserDirectory, recipe: str, summary: str) -> None:
    """In full, the one with 405 billion parameters as well; then with 2 layers of random weights."""
    programs = re.compile(r"^  to do  (?:partition|compile):(?:prefill|decode)\S+", re.MULTILINE)
    full = furiosa_build(fresh, "plan", recipe)
    assert (full.status, full.err) == (0, "")
    assert full.out.startswith(f"recipe {recipe}: {summary}\n")
    assert "RANDOM" not in full.out
    assert ("tokenizer: not known before its files are fetched: " in full.out) != recipe.startswith("quickstart")
    cut = furiosa_build(fresh, "plan", recipe, "model.num_hidden_layers=2", "model.seed_for_random_weight=0")
    assert (cut.status, cut.err) == (0, "")
    assert "\nTHE WEIGHTS ARE RANDOM, drawn from seed 0\n" in cut.out
    assert "block (2 layers)" in cut.out
    assert programs.findall(cut.out) == programs.findall(full.out) != [], "depth costs no program"


# Shipped recipes, built

SMALL = [
    "backend=eager",
    "model.seed_for_random_weight=0",
    "model.num_hidden_layers=2",
    "model.architecture.hidden_size=128",
    "model.architecture.intermediate_size=256",
    "model.architecture.num_attention_heads=4",
    "model.architecture.num_key_value_heads=2",
    "model.architecture.vocab_size=512",
    "model.architecture.bos_token_id=1",
    "model.architecture.eos_token_id=2",
    "buckets.prefill_buckets=[[1,16],[2,32]]",
    "buckets.decode_buckets=[[1,32],[2,64]]",
    "buckets.max_seq_len_to_capture=64",
]
"""What makes a shipped recipe small: 2 layers of random weights, a 32nd of the width, few and small buckets."""


@pytest.mark.parametrize(
    ("recipe", "others", "quantization"),
    [
        ("llama3-8b-fp8", [], "fp8"),
        pytest.param("qwen3-8b-int8", ["model.architecture.head_dim=32"], "int8", marks=pytest.mark.grid),
    ],
)
def test_a_shipped_recipe_is_built_and_generates(
    fresh: UserDirectory, recipe: str, others: list[str], quantization: str
) -> None:
    built = furiosa_build(fresh, "build", recipe, *SMALL, *others)
    assert (built.status, built.err) == (0, "")
    assert "THE WEIGHTS ARE RANDOM, drawn from seed 0" in built.out
    latest = fresh.root / "artifacts" / recipe / "latest"
    opened = open_artifact(latest, verify="full")
    assert opened.artifact.model_metadata.quantization == quantization
    assert opened.artifact.model_metadata.num_hidden_layers == 2
    assert json.loads(opened.directory.with_suffix(".qualify.json").read_bytes())["top1_agreement"] > 0.9

    prompts = [[5, 6, 7], list(range(100, 120)), [9]]
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    together = LLM(latest).generate(prompts, greedy)
    assert [len(output.outputs[0].token_ids) for output in together] == [12, 12, 12]
    alone = [LLM(latest).generate(prompt, greedy)[0] for prompt in prompts]
    assert [o.outputs[0].token_ids for o in alone] == [o.outputs[0].token_ids for o in together]


# inspect and generate


@pytest.fixture(scope="module")
def speaking(built: UserDirectory) -> Path:
    """An artifact of the quickstart model, which has a tokenizer and says something."""
    user = UserDirectory(built.root, built.store)
    buckets = (
        "buckets.prefill_buckets=[[1,32]]",
        "buckets.decode_buckets=[[1,64]]",
        "buckets.max_seq_len_to_capture=64",
    )
    with steps_in_this_process():
        user.build("backend=eager", *buckets, recipe="quickstart")
    return user.root / "artifacts" / "quickstart" / "latest"


def test_inspect(built: UserDirectory) -> None:
    shown = furiosa_build(built, "inspect", "artifacts/tiny/latest")
    assert shown.status == 0
    entries = dict(line.split(maxsplit=1) for line in shown.out.splitlines() if " " in line)
    assert entries["artifact"] == f"tiny {built.latest().metadata.artifact_id[:12]}, schema 4"
    assert entries["model"] == "tiny (LlamaForCausalLM, 2 layers, 19.6 k parameters, float32)"
    assert entries["quantization"] == "none"
    assert entries["devices"].startswith("cpu: tensor_parallel_size=1")
    assert entries["buckets"] == "prefill 1x32; decode 2x64; sequences up to 64 tokens"
    assert entries["KV"] == "cache      8 blocks of 16 tokens, 36.9 kB"
    assert entries["decode-2x64.block"].split(maxsplit=3)[3] == "2 x in decode-2x64"


PROMPT = "It is a truth universally acknowledged, that"


def test_generate_prints_the_text(speaking: Path, built: UserDirectory) -> None:
    arguments = ["generate", str(speaking), "--prompt", PROMPT, "--seed", "3", "--max-tokens", "12"]
    once = furiosa_build(built, *arguments)
    assert (once.status, once.err) == (0, "")
    assert once == furiosa_build(built, *arguments), "one seed, one text"
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=3, max_tokens=12)
    assert once.out == LLM(speaking).generate(PROMPT, params)[0].outputs[0].text + "\n"


def test_generate_takes_its_options(speaking: Path, built: UserDirectory) -> None:
    greedy = ["generate", str(speaking), "--prompt", PROMPT, "--temperature", "0"]
    text = furiosa_build(built, *greedy, "--max-tokens", "12").out.rstrip("\n")
    assert furiosa_build(built, *greedy[:-1], "0.7", "--top-k", "1", "--max-tokens", "12").out == text + "\n"
    assert text.startswith(furiosa_build(built, *greedy, "--max-tokens", "4").out.rstrip("\n"))
    word = text.split()[2]
    assert furiosa_build(built, *greedy, "--max-tokens", "12", "--stop", word, "--stop", "no such text").out == (
        text.partition(word)[0] + "\n"
    )


def test_measure_prints_a_row_a_bucket(built: UserDirectory) -> None:
    load = ["--clients", "2", "--requests", "3", "--input-tokens", "20", "--output-tokens", "10"]
    ran = furiosa_build(built, "measure", "artifacts/tiny/latest", "--seconds", "0", *load)
    assert (ran.status, ran.err) == (0, "")
    for name in ("prefill-1x32", "decode-2x64"):
        assert re.search(rf"^{name} +\d+\.\d\d +\d+\.\d   ±", ran.out, re.MULTILINE), ran.out
    assert "3 requests of 20 + 10 tokens, 2 at a time" in ran.out


def test_measure_as_json(built: UserDirectory) -> None:
    ran = furiosa_build(built, "measure", "artifacts/tiny/latest", "--seconds", "0", "--json")
    found = json.loads(ran.out)
    assert found["artifact_id"] == built.latest().metadata.artifact_id
    assert all(bucket["timing"]["median"] > 0 for bucket in found["buckets"])
    assert found["load"] is None


def test_measure_refuses_a_load_that_does_not_fit(built: UserDirectory) -> None:
    ran = furiosa_build(built, "measure", "artifacts/tiny/latest", "--clients", "1", "--input-tokens", "5000")
    assert (ran.status, ran.out) == (2, "")
    assert "the prompt has 5000 tokens" in ran.err


# Recipes and help


def test_recipes_lists_the_users_and_the_shipped(built: UserDirectory) -> None:
    shown = furiosa_build(built, "recipes")
    lines = dict(line.split(maxsplit=1) for line in shown.out.splitlines())
    assert sorted(lines) == sorted(["tiny", *PLANS])
    assert lines["tiny"] == "A tiny model of a user."
    assert all(lines.values())


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_every_command(built: UserDirectory, arguments: list[str]) -> None:
    """Without arguments it is an error, and on stderr."""
    shown = furiosa_build(built, *arguments)
    assert shown.status == (0 if arguments else 2)
    text = shown.out if arguments else shown.err
    assert re.findall(r"(?m)^  (\w+) ", text.split("Commands:")[1]) == [
        *("build", "shard", "plan", "explain", "recipes", "inspect", "verify", "sign", "generate", "measure"),
        *("serve", "cache"),
    ]


@pytest.mark.parametrize("arguments", [["build"], ["bild", "tiny"], ["generate", "x"], ["build", "tiny", "--fast"]])
def test_a_wrong_command_line_ends_with_2(built: UserDirectory, arguments: list[str]) -> None:
    ran = furiosa_build(built, *arguments)
    assert ran.status == 2
    assert ran.err.startswith("Usage: ")


# The longest sequence

UNSAID = """\
# A recipe that says nothing of lengths.
defaults:
  - base
  - quantization: none
  - override backend: eager
model:
  model_id_or_path: tiny
"""


def test_the_longest_sequence_is_the_models_where_the_recipe_does_not_say(fresh: UserDirectory) -> None:
    (fresh.root / "recipes" / "unsaid.yaml").write_text(UNSAID)
    planned = furiosa_build(fresh, "plan", "unsaid")
    assert (planned.status, planned.err) == (0, "")
    assert "sequences up to 256 tokens, as the model's max_position_embeddings" in planned.out
    assert "compile:decode-1x256:block" in planned.out
    same = furiosa_build(fresh, "plan", "unsaid", "buckets.max_seq_len_to_capture=256")
    told, alike = (ran.out.partition("\nneeds\n")[0].splitlines() for ran in (planned, same))
    assert alike == [line for line in told if "sequences up to" not in line]
    refused = furiosa_build(fresh, "plan", "unsaid", "buckets.max_seq_len_to_capture=2048")
    assert refused.status == 2
    assert "max_seq_len_to_capture=2048 is more than the model's max_position_embeddings=256" in refused.err


def test_a_draft_has_the_lengths_of_the_model(fresh: UserDirectory) -> None:
    (fresh.root / "recipes" / "unsaid.yaml").write_text(UNSAID)
    (fresh.root / "recipes" / "drafted.yaml").write_text(UNSAID + "speculative: {recipe: unsaid}\n")
    planned = furiosa_build(fresh, "plan", "drafted")
    assert (planned.status, planned.err) == (0, "")
    assert "draft:compile:decode-1x256:block" in planned.out
    assert "x2048" not in planned.out
