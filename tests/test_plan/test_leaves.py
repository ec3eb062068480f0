"""For every leaf of the BuildSpec: which steps read it, and that no other does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pydantic import BaseModel, ValidationError

from furiosa_build.core.canonical_json import digest
from furiosa_build.ir.outline import Outline
from furiosa_build.plan.model import ModelPlan, plan_model
from furiosa_build.plan.planner import Plan, PlannedStep, make_plan
from furiosa_build.quant.compressed_tensors import QuantizedCheckpoint
from furiosa_build.recipe.compose import load_recipe
from furiosa_build.recipe.draft import draft_spec
from furiosa_build.recipe.schema import BuildOptions, BuildSpec, RewritingSpec, SpeculativeSpec
from furiosa_build.steps.registry import STEPS

from .outlines import DOWN, QUERY, outline

Path = tuple[str, ...]
HEAD = "lm_head.weight"
ARCHITECTURE = {
    "model_type": "test",
    "architectures": ["TestForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 8,
    "num_hidden_layers": 9,
    "num_attention_heads": 2,
    "max_position_embeddings": 4096,
}
WEIGHTS = ("fetch", "quantize", "partition:weights", "qualify")


class Leaf(NamedTuple):
    """Values that a leaf may have, and whether a step that is there before and after reads it."""

    values: SearchStrategy[Any]
    is_read_by: Callable[[PlannedStep, BuildSpec, BuildSpec], bool]


def by(*names: str) -> Callable[[PlannedStep, BuildSpec, BuildSpec], bool]:
    """The steps of these names, or whose name begins and ends as NAME* or *NAME says."""
    return lambda step, *_: any(fnmatchcase(step.name, name) for name in names)


def scheme(of: BuildSpec, parameter: str) -> str:
    """The scheme of a linear parameter: that of the first rule that matches, with what is chosen for its family."""
    own = of.quantization
    if parameter == HEAD and own.lm_head is not None:
        return f"{own.lm_head}False"  # whose input is not rounded
    family = next((rule.scheme for rule in own.rules if fnmatchcase(parameter, rule.match)), own.scheme)
    dynamic = "" if family == "none" else f"{own.dynamic}"
    return f"{family}{dynamic}{own.group_size or 128}{own.symmetric}" if family == "int4" else f"{family}{dynamic}"


def by_what_is_quantized(step: PlannedStep, before: BuildSpec, after: BuildSpec) -> bool:
    """The artifact tells the recipe. All else depends on what becomes of the parameters, not on how that is said."""
    block = {f"model.layers.0.{name}" for name in (QUERY, DOWN)}
    changed = {name for name in {HEAD, *block} if scheme(before, name) != scheme(after, name)}
    if step.name == "package":
        return True
    if step.name in ("quantize", "qualify"):
        return bool(changed)
    if step.name == "partition:weights":  # whether it finds them in the checkpoint of `quantize`
        was, will_be = ({scheme(of, name) for name in {HEAD, *block}} == {"none"} for of in (before, after))
        return was != will_be
    if step.action == "trace":
        return bool(
            changed & (block if step.name.endswith(":block") else {HEAD} if step.name.endswith(":last") else set())
        )
    return False


def by_what_parameters_there_are(step: PlannedStep, before: BuildSpec, after: BuildSpec) -> bool:
    """`fetch` lists them only when they are drawn."""
    del after
    drawn = before.model.seed_for_random_weight is not None
    return step.name == "package" or (step.name in WEIGHTS and (drawn or step.name != "fetch"))


def by_kv_blocks(step: PlannedStep, before: BuildSpec, after: BuildSpec) -> bool:
    """The artifact has their number."""
    return step.name == "package" and plan(before).kv_blocks.count != plan(after).kv_blocks.count


def by_what_has_places(step: PlannedStep, before: BuildSpec, after: BuildSpec) -> bool:
    """Where nothing is divided, all parameters are in one place."""
    divided = before.parallel.is_divided and after.parallel.is_divided
    return step.name == "package" or (step.name == "partition:weights" and divided)


def by_proposals(step: PlannedStep, before: BuildSpec, after: BuildSpec) -> bool:
    """The artifact says how many there are, however the recipe says it."""
    return step.name == "package" and before.num_speculative_tokens != after.num_speculative_tokens


def by_what_has_several_rows(step: PlannedStep, before: BuildSpec, after: BuildSpec) -> bool:
    """An append bucket of one token has nothing to leave out."""
    several = by("partition:prefill-*:last", "partition:append-*:last", "package")(step, before, after)
    return several and not fnmatchcase(step.name, "partition:append-*x1x*:last")


sizes = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([8, 16, 64])), min_size=1, max_size=3, unique=True)
buckets = sizes.map(lambda found: sorted([list(size) for size in found]))
appended = st.sets(st.sampled_from([(1, 4, 8), (1, 8, 64), (2, 8, 64)]), min_size=1).map(
    lambda found: sorted([list(size) for size in found])
)
schemes = st.sampled_from(["none", "int8", "fp8"])
matches = st.sampled_from(["lm_head*", "*mlp*", "*q_proj*", "nothing"])
rules = st.lists(st.fixed_dictionaries({"match": matches, "scheme": schemes}), max_size=2)

LEAVES: Mapping[Path, Leaf] = {
    ("devices",): Leaf(st.sampled_from(["cpu", "npu:0:*", "npu:0:*,npu:1:*"]), by("package")),
    ("name",): Leaf(st.from_regex(r"[a-z]{1,8}", fullmatch=True), by("package")),
    ("model", "model_id_or_path"): Leaf(st.sampled_from(["org/model", "org/other"]), by("package")),
    # The commit is an input of fetch, found when it runs; a revision by another name changes nothing.
    ("model", "revision"): Leaf(st.sampled_from([None, "main", "v2"]), by()),
    ("model", "tokenizer"): Leaf(st.sampled_from(["source", "none"]), by("package", "qualify")),
    ("model", "num_hidden_layers"): Leaf(st.integers(1, 9), by_what_parameters_there_are),
    ("model", "seed_for_random_weight"): Leaf(st.none() | st.integers(0, 9), by("fetch", "package")),
    # What the file holds is an input of fetch.
    ("model", "param_file_path"): Leaf(st.sampled_from([None, "a.safetensors", "b.safetensors"]), by()),
    ("model", "calculate_logit_only_for_last_token"): Leaf(st.booleans(), by("partition:*:last", "package")),
    ("model", "output_last_hidden_state"): Leaf(st.booleans(), by("partition:*:last", "package")),
    ("model", "architecture"): Leaf(
        st.sampled_from([{**ARCHITECTURE, "rope_theta": theta} for theta in (1e4, 5e5)]),
        by("fetch", "quantize", "qualify", "package"),  # What shapes a graph is in the outline's signatures.
    ),
    ("target", "name"): Leaf(st.sampled_from(["cpu", "other"]), by("package")),
    ("target", "isa"): Leaf(st.sampled_from(["x86-64-v3", "x86-64-v4"]), by("compile:*", "package")),
    # Enough for what `parallel` says, below.
    ("target", "num_elements"): Leaf(st.integers(36, 64), by("package")),
    # Read for the number of KV blocks, where that is not given.
    ("target", "memory_gb"): Leaf(st.none() | st.sampled_from([2e-5, 1e-4, 1e-3, 1.0]), by_kv_blocks),
    ("parallel", "tensor_parallel_size"): Leaf(st.sampled_from([1, 2, 4]), by("partition:*", "package")),
    ("parallel", "pipeline_parallel_size"): Leaf(st.sampled_from([1, 3]), by("partition:weights", "package")),
    ("parallel", "num_blocks_per_pp_stage"): Leaf(
        st.none() | st.sampled_from([(3, 3, 3), (2, 3, 4)]), by_what_has_places
    ),
    ("parallel", "data_parallel_size"): Leaf(
        st.none() | st.integers(1, 3),
        lambda step, was, is_: step.name == "package" and was.data_parallel_size != is_.data_parallel_size,
    ),
    ("backend", "compiler_config_overrides"): Leaf(
        st.sampled_from([{}, {"max_autotune": True}, {"max_fusion_size": 8}]), by("compile:*", "package")
    ),
    ("backend", "name"): Leaf(st.sampled_from(["eager", "inductor"]), by("compile:*", "package")),
    ("buckets", "prefill_buckets"): Leaf(buckets, by("package")),
    ("buckets", "decode_buckets"): Leaf(buckets, by("package")),
    ("buckets", "append_buckets"): Leaf(st.none() | appended, by("package")),
    ("buckets", "kv_cache_sharing_across_beams_config"): Leaf(
        st.none() | st.fixed_dictionaries({"beam_width": st.integers(1, 3), "max_new_tokens": st.integers(1, 8)}),
        by("package"),
    ),
    ("buckets", "max_seq_len_to_capture"): Leaf(st.integers(64, 4096), by("package")),
    ("buckets", "paged_attention_num_blocks"): Leaf(st.none() | st.integers(64, 4096), by("package")),
    ("buckets", "paged_attention_block_size"): Leaf(st.integers(1, 16), by("package")),
    ("buckets", "kv_cache_dtype"): Leaf(st.sampled_from(["auto", "int8", "fp8"]), by("partition:*:block", "package")),
    ("quantization", "scheme"): Leaf(schemes, by_what_is_quantized),
    ("quantization", "rules"): Leaf(rules, by_what_is_quantized),
    ("quantization", "dynamic"): Leaf(st.booleans(), by_what_is_quantized),
    ("quantization", "group_size"): Leaf(st.sampled_from([None, 32, 64, 128]), by_what_is_quantized),
    ("quantization", "symmetric"): Leaf(st.booleans(), by_what_is_quantized),
    ("quantization", "lm_head"): Leaf(st.sampled_from([None, "int8"]), by_what_is_quantized),
    # Programs that are there before and after: others have other names.
    ("rewriting", "use_blockwise_compile"): Leaf(st.booleans(), by("package")),
    ("rewriting", "num_blocks_per_supertask"): Leaf(st.sampled_from([1, 3, 9]), by("partition:*:block", "package")),
    # All backends take the same graphs: what they are lowered to is the backend's.
    ("rewriting", "do_decompositions_for_model_rewrite"): Leaf(st.booleans(), by("compile:*", "package")),
    ("rewriting", "embed_all_constants_into_graph"): Leaf(st.booleans(), by("compile:*", "package")),
    ("rewriting", "add_prefill_last_block_slice"): Leaf(st.booleans(), by_what_has_several_rows),
    ("scheduler", "npu_queue_limit"): Leaf(st.integers(1, 9), by("package")),
    ("scheduler", "max_processing_samples"): Leaf(st.integers(1, 9999), by("package")),
    ("scheduler", "spare_blocks_ratio"): Leaf(st.floats(0, 0.9), by("package")),
    ("scheduler", "is_offline"): Leaf(st.booleans(), by("package")),
    ("scheduler", "prefill_chunk_size"): Leaf(st.none() | st.integers(1, 7), by("package")),
    # Besides, programs that were not there before: test_draft.py.
    ("speculative", "recipe"): Leaf(st.none() | st.sampled_from(["small", "smaller"]), by("package")),
    ("speculative", "num_speculative_tokens"): Leaf(st.none() | st.integers(1, 6), by_proposals),
    # What the file holds is an input of fetch.
    ("qualify", "texts"): Leaf(st.sampled_from([None, "a.txt", "b.txt"]), by()),
    ("qualify", "logit_tolerance"): Leaf(st.none() | st.sampled_from([0.01, 0.1]), by("qualify")),
    ("qualify", "max_kl_divergence"): Leaf(st.floats(0, 2), by("qualify")),
    ("qualify", "min_top1_agreement"): Leaf(st.floats(0, 1), by("qualify")),
    ("qualify", "max_perplexity_ratio"): Leaf(st.floats(1, 9), by("qualify")),
}

CHECKPOINT: Path = ("quantization", "quantize_artifact_path")
WITHOUT_CHECKPOINT: Mapping[Path, Any] = {
    ("quantization", "scheme"): "none",
    ("quantization", "rules"): [],
    ("quantization", "lm_head"): None,
    ("model", "seed_for_random_weight"): None,
    ("model", "param_file_path"): None,
}
"""What a checkpoint goes with: it has weights and schemes of its own."""


VERIFYING: Mapping[Path, Any] = {
    ("model", "calculate_logit_only_for_last_token"): False,
    ("buckets", "append_buckets"): None,
}
INT4: Mapping[Path, Any] = {
    ("quantization", "scheme"): "int4",
    ("quantization", "rules"): [],
    ("backend", "name"): "eager",
    ("target", "isa"): "native",
}
NEEDED: Mapping[Path, Mapping[Path, Any]] = {
    ("buckets", "kv_cache_dtype"): {("backend", "name"): "native", ("backend", "compiler_config_overrides"): {}},
    ("quantization", "dynamic"): INT4,
    ("quantization", "group_size"): INT4,
    ("quantization", "symmetric"): INT4,
    ("model", "seed_for_random_weight"): {("model", "param_file_path"): None, CHECKPOINT: None},
    ("rewriting", "num_blocks_per_supertask"): {
        ("model", "num_hidden_layers"): 9,
        ("parallel", "pipeline_parallel_size"): 1,
        ("parallel", "num_blocks_per_pp_stage"): None,
    },
    ("rewriting", "embed_all_constants_into_graph"): {("parallel", "tensor_parallel_size"): 1},
    ("rewriting", "add_prefill_last_block_slice"): {("model", "calculate_logit_only_for_last_token"): True},
    ("model", "param_file_path"): {("model", "seed_for_random_weight"): None},
    ("speculative", "recipe"): VERIFYING,
    ("speculative", "num_speculative_tokens"): {**VERIFYING, ("speculative", "recipe"): "small"},
}
"""What another value of a leaf asks of others."""


def leaves(model: type[BaseModel], at: Path = ()) -> Iterator[Path]:
    """Every field that is no section itself."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, (*at, name))
        else:
            yield (*at, name)


def spec(values: Mapping[Path, Any]) -> BuildSpec:
    """The BuildSpec with these leaves, if they do not contradict each other."""
    assume(None in (values["model", "seed_for_random_weight"], values["model", "param_file_path"]))
    data: dict[str, Any] = {}
    for path, value in values.items():
        section = data
        for key in path[:-1]:
            section = section.setdefault(key, {})
        section[path[-1]] = value
    return BuildSpec.model_validate(data)


def plan(of: BuildSpec) -> Plan:
    """As a build would make it: the models' configs, their outlines and the instruction set follow from the spec."""
    models = {"": model(of)}
    if (name := of.speculative.recipe) is not None:
        own = {"name": name, "model": {"model_id_or_path": "org/small"}, "backend": {"name": "eager"}}
        small = BuildSpec.model_validate({**own, "target": {"name": "any"}})
        models["draft"] = model(draft_spec(small, of, "here"))
    return make_plan(models, STEPS)


def model(of: BuildSpec) -> ModelPlan:
    layers = of.model.num_hidden_layers or 9
    config = {**(of.model.architecture or ARCHITECTURE), "num_hidden_layers": layers}
    checkpoint = None if of.quantization.quantize_artifact_path is None else QuantizedCheckpoint({"Linear": "fp8"}, ())
    return plan_model(of, config, wide(outline(layers)), of.target.isa, checkpoint)


def wide(of: Outline) -> Outline:
    """The outline with linear layers whose columns are a group of any size, and rows a whole int32 of zero points."""
    layers = {name: p.model_copy(update={"shape": [8, 128]}) for name, p in of.parameters.items() if p.linear}
    return of.model_copy(update={"parameters": {**of.parameters, **layers}})


def own_factors(step: PlannedStep) -> str:
    """What a step reads, and of which steps it takes what: its key, but for what those have made."""
    return digest([step.action, dict(step.reads), dict(step.needs)])


def test_every_leaf_has_its_row() -> None:
    """A new field of the BuildSpec is to be entered here, with the steps that read it."""
    assert set(leaves(BuildSpec)) == {*LEAVES, CHECKPOINT}


CHOICES: Mapping[Path, Any] = {
    ("buckets", "kv_cache_dtype"): "auto",
    ("quantization", "dynamic"): False,
    ("quantization", "group_size"): None,
    ("quantization", "symmetric"): True,
}


def usual(path: Path, leaf: Leaf) -> SearchStrategy[Any]:
    """How the model is rewritten decides what a change of other leaves means for programs: it is as by default here.

    Nor does a draft model forbid what it does not go with; and there is no choice that a scheme may not have.
    """
    if path in CHOICES:
        return st.just(CHOICES[path])
    of = {"rewriting": RewritingSpec(), "speculative": SpeculativeSpec()}
    return st.just(getattr(of[path[0]], path[1])) if path[0] in of else leaf.values


LAYERS, STAGES = ("model", "num_hidden_layers"), ("parallel", "pipeline_parallel_size")
OF_STAGES = ("parallel", "num_blocks_per_pp_stage")


def is_divisible(values: Mapping[Path, Any]) -> bool:
    """Whether there are layers for all stages; what is not is refused before it is planned."""
    layers, given = values[LAYERS], values[OF_STAGES]
    return layers >= values[STAGES] and (given is None or (len(given), sum(given)) == (values[STAGES], layers))


def divisible(values: Mapping[Path, Any]) -> Mapping[Path, Any]:
    """The values, changed where a model could not be divided so."""
    if values[OF_STAGES] is not None:
        return {**values, STAGES: 3, LAYERS: 9}
    return values if is_divisible(values) else {**values, LAYERS: 9}


everything = st.fixed_dictionaries({path: usual(path, leaf) for path, leaf in LEAVES.items()}).map(divisible)


def check(values: Mapping[Path, Any], others: Mapping[Path, Any]) -> None:
    """Changing leaves to `others` changes the own factors of exactly the steps that read one of them."""
    assume(is_divisible(values) and is_divisible({**values, **others}))
    before, after = spec(values), spec({**values, **others})
    old, new = plan(before).steps, plan(after).steps
    differing = {name for name in old.keys() & new.keys() if own_factors(old[name]) != own_factors(new[name])}
    really = [path for path in others if values[path] != others[path]]
    expected = {
        name
        for name, step in old.items()
        if name in new and any(LEAVES[path].is_read_by(step, before, after) for path in really)
    }
    assert differing == expected


@pytest.mark.parametrize("path", LEAVES, ids=".".join)
@settings(max_examples=25)
@given(data=st.data())
def test_changing_a_leaf_changes_the_keys_of_exactly_the_steps_that_read_it(path: Path, data: st.DataObject) -> None:
    values = data.draw(everything)
    values = {**values, **NEEDED.get(path, {})}
    other = data.draw(LEAVES[path].values.filter(lambda other: other != values[path]))
    check(values, {path: other})


@given(everything, everything, st.sets(st.sampled_from(sorted(LEAVES)), min_size=2, max_size=4))
def test_changing_several_changes_all_that_reads_one_of_them(
    values: Mapping[Path, Any], others: Mapping[Path, Any], changed: set[Path]
) -> None:
    check(values, {path: others[path] for path in changed})


@given(everything, st.sampled_from(["/data/a", "b"]))
def test_a_checkpoint_by_another_name_is_the_same_checkpoint(values: Mapping[Path, Any], path: str) -> None:
    """The artifact tells the name, without its place; `fetch` finds by digest what is in it."""
    values = {**values, **WITHOUT_CHECKPOINT, CHECKPOINT: "/home/a"}
    old, new = (plan(spec({**values, CHECKPOINT: of})).steps for of in ("/home/a", path))
    differing = {name for name in old if own_factors(old[name]) != own_factors(new[name])}
    assert differing == (set() if path == "/data/a" else {"package"})


@given(everything)
def test_a_checkpoint_instead_of_weights_concerns_all_that_reads_weights_or_their_form(
    values: Mapping[Path, Any],
) -> None:
    without = {**values, **WITHOUT_CHECKPOINT}
    old, new = plan(spec(without)).steps, plan(spec({**without, CHECKPOINT: "a"})).steps
    differing = {name for name in old if own_factors(old[name]) != own_factors(new[name])}
    traces = {name for name, step in old.items() if step.action == "trace" and not name.endswith(":first")}
    assert differing == {"quantize", "partition:weights", "package", "qualify", *traces}


@given(everything, st.sampled_from(sorted(WITHOUT_CHECKPOINT)))
def test_a_checkpoint_contradicts_a_scheme_and_a_seed(values: Mapping[Path, Any], other: Path) -> None:
    assume(values[other] != WITHOUT_CHECKPOINT[other])
    with pytest.raises(ValidationError, match="quantize_artifact_path"):
        spec({**values, **WITHOUT_CHECKPOINT, CHECKPOINT: "a", other: values[other]})


@given(everything)
def test_there_are_programs_for_each_bucket_and_no_others(values: Mapping[Path, Any]) -> None:
    """So a bucket that is added, or taken away, concerns no other."""
    of = spec(values)
    names = {f"prefill-{batch}x{length}" for batch, length in values["buckets", "prefill_buckets"]}
    beams = values["buckets", "kv_cache_sharing_across_beams_config"]
    width = beams["beam_width"] if beams else 1
    names |= {f"decode-{batch * width}x{length}" for batch, length in values["buckets", "decode_buckets"]}
    names |= {f"append-{batch}x{new}x{length}" for batch, new, length in of.append_buckets}
    found = {name.split(":")[1] for name, step in plan(of).steps.items() if step.action in ("trace", "compile")}
    assert found == names


OPTIONS: Mapping[str, str] = {
    "save_dir": "elsewhere",
    "cache_dir": "elsewhere",
    "num_compile_workers": "7",
    "num_pipeline_builder_workers": "7",
    "verify_inputs": "true",
}


@pytest.mark.parametrize(("option", "value"), OPTIONS.items(), ids=list(OPTIONS))
def test_options_are_no_part_of_what_is_planned(option: str, value: str) -> None:
    """A plan is made from the BuildSpec, so what does not reach that reaches no key."""
    usual, changed = load_recipe("quickstart"), load_recipe("quickstart", [f"{option}={value}"])
    assert getattr(changed.options, option) != getattr(usual.options, option)
    assert changed.spec == usual.spec


def test_every_option_has_its_row() -> None:
    assert set(BuildOptions.model_fields) == set(OPTIONS)
    assert not set(BuildOptions.model_fields) & {path[-1] for path in (*LEAVES, CHECKPOINT)}
