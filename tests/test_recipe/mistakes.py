"""Mistakes that can be made in a recipe, and what each message must say of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A mistake, and what each part of the message must say. `adds` follows the 6 lines of a valid recipe."""

    what: str
    where: str
    valid: str = ""
    hint: str = ""
    adds: str = ""
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    name: str = "mine"


def command_line(override: str, what: str, valid: str = "", hint: str = "") -> Case:
    return Case(what, f"command line: {override}", valid, hint, overrides=(override,))


def in_file(adds: str, what: str, line: str, valid: str = "", hint: str = "") -> Case:
    return Case(what, f"recipes/mine.yaml:{line}", valid, hint, adds=adds)


def whole_file(recipe: str, what: str, where: str, valid: str = "", hint: str = "") -> Case:
    return Case(what, where, valid, hint, recipe=recipe)


RECIPE_NAMES = {
    "unknown": Case(
        "there is no recipe 'quikstart'", "recipes", "llama3-8b-fp8, mine, ", "'quickstart'", name="quikstart"
    ),
    "nothing near": Case("there is no recipe 'zzz'", "recipes", "quickstart", "recipes/NAME.yaml", name="zzz"),
    "path": Case(
        "'recipes/mine.yaml' is not a recipe's name",
        "recipes",
        "without .yaml",
        "'mine'",
        name="recipes/mine.yaml",
    ),
    "parent": Case("'../mine' is not a recipe's name", "recipes", "the name of a file", "'mine'", name="../mine"),
    "suffix": Case("'mine.yaml' is not a recipe's name", "recipes", "without .yaml", "'mine'", name="mine.yaml"),
    "empty": Case("'' is not a recipe's name", "recipes", name=""),
}

KEYS_AND_CHOICES = {
    "unknown key": in_file(
        "modle: {a: 1}\n", "unknown key modle={'a': 1}", "7: modle", "name, devices, model", "'model'"
    ),
    "unknown key in a section": in_file(
        "model:\n  num_layers: 2\n",
        "model.num_layers=2",
        "8: model.num_layers",
        "num_hidden_layers",
        "'num_hidden_layers'",
    ),
    "unknown key on the command line": command_line(
        "model.num_layers=2", "unknown key model.num_layers=2", "num_hidden_layers", "'num_hidden_layers'"
    ),
    "unknown added key": command_line("+foo=1", "unknown key foo=1", "name, devices"),
    "key without its section": command_line(
        "num_hidden_layers=2", "num_hidden_layers=2", "model", "'model.num_hidden_layers'"
    ),
    "unknown key in a rule": in_file(
        "quantization:\n  rules:\n    - {match: a, scheme: none, layer: 1}\n",
        "unknown key quantization.rules[0].layer=1",
        "9: quantization.rules[0].layer",
        "match, scheme",
    ),
    "unknown choice": command_line(
        "quantization=int5",
        "there is no quantization 'int5'",
        "fp8, fp8-dynamic, int4, int8, none, w4a8, w8a8",
        "'int",
    ),
    "choice of nothing": command_line("model=null", "model is a config group"),
    "unknown choice in the defaults": whole_file(
        "defaults:\n  - base\n  - model: llama-8b\n",
        "there is no model 'llama-8b'",
        "mine.yaml:3: defaults",
        "qwen3-8b",
        "llama3-8b",
    ),
    "unknown override in the defaults": whole_file(
        "defaults:\n  - quickstart\n  - override target: x86\n",
        "no target 'x86'",
        "mine.yaml:3: defaults",
        "cpu, rngd, x86-64-v3",
    ),
    "unknown group": command_line(
        "quantisation=int8", "unknown key quantisation='int8'", "quantization", "'quantization'"
    ),
    "unknown group in the defaults": whole_file(
        "defaults:\n  - base\n  - modle: qwen3-8b\n",
        "no config group 'modle'",
        "mine.yaml:3: defaults",
        "backend, buckets",
        "'model'",
    ),
    "unknown config in the defaults": whole_file(
        "defaults:\n  - bse\n", "there is no config 'bse'", "mine.yaml:2: defaults", "base", "'base'"
    ),
    "config out of conf": whole_file(
        "defaults:\n  - ../base\n", "'../base' leads out", "mine.yaml:2: defaults", "- NAME"
    ),
    "defaults is no list": whole_file("defaults: base\n", "defaults is not a list", "mine.yaml:1", "`- GROUP: CHOICE`"),
    "no entry of a defaults list": whole_file(
        "defaults:\n  - [base]\n", "not an entry of a defaults list", "mine.yaml:2", "`- GROUP: CHOICE`"
    ),
    "group chosen twice": whole_file(
        "defaults:\n  - quickstart\n  - target: cpu\n",
        "target appears more than once",
        "mine.yaml",
        hint="- override GROUP: CHOICE",
    ),
    "no model": whole_file("defaults:\n  - base\n", "model is missing", "mine.yaml", hint="- model: CHOICE"),
    "group that was removed": command_line("~model", "model is missing", hint="- model: CHOICE"),
    "choice in the wrong place": in_file(
        "model: qwen3-8b\n", "'qwen3-8b' is not valid", "7: model", "mapping", "- model: qwen3-8b"
    ),
    "group that the recipe lacks": Case(
        "Could not override 'quantization'",
        "command line: quantization=int8",
        hint="+quantization=int8",
        recipe="defaults:\n  - base\n  - model: quickstart\n",
        overrides=("quantization=int8",),
    ),
    "recipe that includes itself": whole_file("defaults: [mine]\n", "mine.yaml includes itself", "mine.yaml: defaults"),
}

VALUES = {
    "text for a number": in_file(
        "model:\n  num_hidden_layers: two\n",
        "num_hidden_layers: 'two'",
        "8: model.num_hidden_layers",
        "a whole number",
    ),
    "quoted number": in_file(
        "model: {num_hidden_layers: '2'}\n",
        "'2' is not valid",
        "7: model.num_hidden_layers",
        "number",
        "without quotes",
    ),
    "fraction": command_line("model.num_hidden_layers=1.5", "1.5 is not valid", "a whole number"),
    "zero": command_line("num_compile_workers=0", "num_compile_workers: 0 is not valid", "at least 1"),
    "null": command_line("name=null", "name: null is not valid", "a string"),
    "name": command_line("name=a/b", "name: 'a/b' is not valid", "letters, digits"),
    "share": command_line("scheduler.spare_blocks_ratio=1.5", "1.5 is not valid", "less than 1"),
    "scheme": command_line("quantization.scheme=fp9", "'fp9' is not valid", "'none', 'fp8', 'int4' or 'int8'", "'fp8'"),
    "device": command_line("devices=npx:0", "the device 'npx:0' is not well formed", "npu:X:A-B"),
    "device of no target": Case(
        "target 'cpu' is not an NPU", "command line", "target=rngd", overrides=("target=cpu", "devices=npu:0")
    ),
    "GPU": command_line("devices=cuda:0", "does not compile for devices='cuda:0'", "cpu, or npu:X"),
    "device twice": command_line("devices='cpu,cpu:0'", "names cpu:0 twice", "every element once"),
    "devices of two kinds": command_line("devices='cpu,npu:0:0'", "mixes cpu and npu", "one kind"),
    "scheme of a rule": command_line(
        "quantization.rules=[{match: a, scheme: int5}]",
        "'int5' is not valid",
        "'none', 'fp8', 'int4' or 'int8'",
        "'int",
    ),
    "a choice that no scheme has": command_line(
        "quantization.group_size=32", "group_size=32 has no effect on none", "quantization=int4"
    ),
    "item of a list": command_line("quantization.rules.0.scheme=fp8", "quantization.rules.0.scheme=fp8"),
    "bucket order": command_line(
        "buckets.decode_buckets=[[4,512],[1,512]]",
        "[[4, 512], [1, 512]] are not sorted",
        "[[1, 512], [4, 512]]",
    ),
    "bucket twice": command_line("buckets.decode_buckets=[[1,512],[1,512]]", "not sorted and unique", "[[1, 512]]"),
    "bucket too long": command_line(
        "buckets.prefill_buckets=[[1,64],[1,1024]]",
        "the bucket [1, 1024] is longer than",
        "lengths of at most 512",
    ),
    "bucket of three": command_line(
        "buckets.prefill_buckets=[[1,2,3]]", "[1, 2, 3] is not [batch, length]", "2 whole numbers"
    ),
    "buckets of numbers": command_line("buckets.prefill_buckets=[1,128]", "the bucket 1 is not", "[1, 128]"),
    "no buckets": command_line("buckets.prefill_buckets=128", "128 is not a list of buckets", "[[1, 128]]"),
    "append bucket of two": command_line(
        "buckets.append_buckets=[[1,64]]", "[1, 64] is not [batch, new tokens, context]", "3 whole numbers"
    ),
    "append bucket order": command_line(
        "buckets.append_buckets=[[2,8,64],[1,8,64]]", "not sorted and unique", "[[1, 8, 64], [2, 8, 64]]"
    ),
    "append bucket too long": command_line(
        "buckets.append_buckets=[[1,8,1024]]", "[1, 8, 1024] is longer than", "lengths of at most 512"
    ),
    "append bucket without context": command_line(
        "buckets.append_buckets=[[1,64,64]]", "leaves no context before its 64 new tokens", "at most 63 new tokens"
    ),
    "chunk too large": command_line(
        "scheduler.prefill_chunk_size=1024", "1024 is more than any prefill bucket takes", "1 to 256, or null"
    ),
    "chunk without buckets": in_file(
        "buckets: {append_buckets: []}\nscheduler: {prefill_chunk_size: 8}\n",
        "no append bucket to run a second chunk",
        "8: scheduler.prefill_chunk_size",
        "null, or append buckets such as [[1, 64, 512]]",
    ),
    "beams that generate too much": command_line(
        "buckets.kv_cache_sharing_across_beams_config={beam_width:4,max_new_tokens:513}",
        "max_new_tokens=513 is more than the longest decode bucket holds",
        "1 to 512",
    ),
    "beams without their number": command_line(
        "buckets.kv_cache_sharing_across_beams_config={max_new_tokens:8}", "beam_width is missing"
    ),
    "no beams": command_line(
        "buckets.kv_cache_sharing_across_beams_config={beam_width:0,max_new_tokens:8}", "beam_width", "at least 1"
    ),
    "proposals of nobody": command_line(
        "speculative.num_speculative_tokens=2", "there is no draft model to propose them", "null, or speculative.recipe"
    ),
    "unknown draft": command_line("speculative.recipe=quikstart", "no recipe 'quikstart'", "qwen3", "'quickstart'"),
    "draft with a draft": command_line(
        "speculative.recipe=quickstart-speculative",
        "the draft 'quickstart-speculative' is speculative itself, with the draft 'quickstart-draft'",
        "without speculative.recipe",
    ),
    "draft by itself": in_file(
        "speculative: {recipe: mine}\n", "the draft 'mine' is speculative", "7: speculative.recipe"
    ),
    "draft of logits that are not there": in_file(
        "speculative: {recipe: quickstart}\nmodel: {calculate_logit_only_for_last_token: true}\n",
        "calculate_logit_only_for_last_token=True: proposed tokens are verified by the logits of each",
        "8: model.calc",
        "false where speculative.recipe is given",
    ),
    "draft of too many tokens": in_file(
        "speculative: {recipe: quickstart, num_speculative_tokens: 511}\n",
        "num_speculative_tokens=511 and the one before leave no context in 512 tokens",
        "7: speculative.num_speculative_tokens",
        "1 to 510",
    ),
    "no bucket to verify in": in_file(
        "speculative: {recipe: quickstart}\nbuckets: {append_buckets: [[1, 4, 64]]}\n",
        "num_speculative_tokens=4 are verified 5 new tokens at a time; not so: [[1, 4, 64]]",
        "8: buckets.append_buckets",
        "append buckets of at least 5 new tokens, or null",
    ),
    "too few KV blocks": command_line("buckets.paged_attention_num_blocks=31", "31 hold 496 tokens", "at least 32"),
}

ARCHITECTURE = {
    "too many layers": command_line(
        "model.num_hidden_layers=33", "33 is more than the model's own 32 layers", "1 to 32"
    ),
    "too long": command_line("buckets.max_seq_len_to_capture=200000", "max_position_embeddings=131072", "1 to 131072"),
    "no type": command_line("~model.architecture.model_type", "has no model_type", "a string"),
    "no classes": command_line(
        "model.architecture.architectures=[]", "architectures=[] is not valid", "a list of class names"
    ),
    "no size": command_line("model.architecture.hidden_size=big", "hidden_size='big' is not valid", "a whole number"),
}

FILES = {
    "syntax": in_file("model: [\n", "mine.yaml is not valid YAML", "8", hint="quote a value"),
    "tab": in_file("model:\n\ta: 1\n", "mine.yaml is not valid YAML", "8", hint="spaces"),
    "control character": whole_file("name: \x01\n", "mine.yaml is not valid YAML", "recipes/mine.yaml", hint="quote"),
    "key twice": in_file("model: {}\nmodel: {}\n", "model is written twice, first on line 7", "8", hint="remove one"),
    "odd key": in_file("? [a]\n: b\n", "a key is a list", "7", "a word"),
    "tag": in_file("name: !!python/name:os.system\n", "unknown YAML tag", "7: name", hint="texts, numbers"),
    "empty": whole_file("", "mine.yaml is empty", "recipes/mine.yaml", "`key: value`"),
    "list": whole_file("- a\n", "mine.yaml is a list", "recipes/mine.yaml", "`key: value`"),
    "text": whole_file("hello\n", "mine.yaml is a single value", "recipes/mine.yaml", "`key: value`"),
    "hydra": in_file("hydra: {run: {dir: x}}\n", "cannot configure Hydra", "7: hydra", hint="remove"),
}

OVERRIDES = {
    "bracket": command_line("buckets.prefill_buckets=[[1,128]", "is not an override", "key=value", "=[1, 2]'"),
    "no value": command_line(
        "model.revision", "'model.revision' is not an override", "key=value", "model.revision=VALUE"
    ),
    "empty": command_line("", "'' is not an override", "key=value", "KEY=VALUE"),
    "sweep": command_line("quantization=fp8,int8", "gives several values", hint="one value at a time"),
    "range": command_line("model.num_hidden_layers=range(1,4)", "gives several values", hint="one value at a time"),
    "hydra": command_line("hydra.run.dir=x", "would configure Hydra", "key=value"),
    "nothing to remove": command_line("~model.nope", "'model.nope' does not exist"),
}

INTERPOLATIONS = {
    "missing key": in_file("name: ${modle.x}\n", "'modle.x' not found", "7: name"),
    "circle": in_file("name: ${save_dir}\nsave_dir: ${name}\n", "Recursive interpolation", ""),
    "environment": in_file("name: ${oc.env:HOME}\n", "'${oc.env:HOME}' refers to a value outside", "7: name", "${key}"),
    "hidden resolver": in_file("name: ${${target.name}:HOME}\n", "refers to a value outside", "7: name", "${key}"),
    "time": command_line("name=${now:%Y}", "refers to a value outside", "${key}", "the same artifact"),
    "no value yet": in_file("name: ???\n", "Missing mandatory value: name", "7: name"),
}

TRAPS = {
    "no": in_file("name: no\n", "name: no is read as the boolean false", "7: name", "a string", 'name: "no"'),
    "on": in_file("save_dir: on\n", "save_dir: on is read as the boolean true", "7: save_dir", hint='save_dir: "on"'),
    "octal": in_file("model: {num_hidden_layers: 010}\n", "010 is read as the number 8", "7: model.", hint="write 10"),
    "time": in_file("num_compile_workers: 12:30\n", "12:30 is read as the number 750", "7: num", hint='"12:30"'),
    "revision as infinity": in_file(
        "model:\n  revision: 84e5123\n",
        "84e5123 is read as the number inf",
        "8: model.revision",
        hint='revision: "84e5123"',
    ),
    "revision as a number": in_file(
        "model:\n  revision: 1234567\n",
        "1234567 is read as the number 1234567",
        "8: model.revision",
        hint='"1234567"',
    ),
    "revision on the command line": command_line(
        "model.revision=84e5123",
        "84e5123 is read as the number inf",
        "a string",
        "'model.revision=\"84e5123\"'",
    ),
}

TABLES = {
    "name": RECIPE_NAMES,
    "key": KEYS_AND_CHOICES,
    "value": VALUES,
    "architecture": ARCHITECTURE,
    "file": FILES,
    "override": OVERRIDES,
    "interpolation": INTERPOLATIONS,
    "trap": TRAPS,
}
