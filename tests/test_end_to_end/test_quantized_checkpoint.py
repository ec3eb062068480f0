"""Checkpoints that compressed-tensors has quantized, taken as they are: against transformers, which loads the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import grid
from quantized import FORMS, save_quantized
from safetensors.torch import load_file, save_file
from test_models.tiny import LLAMA, TIED, load, save_random_model
from torch import Tensor

from furiosa_build.build.build import Build
from furiosa_build.core.errors import StepError
from furiosa_build.quant.linear import QuantizedLinear
from furiosa_build.runtime import LLMEngine, SamplingParams

from .test_against_transformers import logits_of

BuildArtifact = Callable[..., Path]
StartBuild = Callable[..., Build]
OutputsOf = Callable[[Build, str], Path]
Quantized = Callable[[str], Path]

MODEL = {**LLAMA, "num_hidden_layers": 2}
BUCKETS: dict[str, Any] = {
    "prefill_buckets": [[1, 32], [1, 48]],
    "decode_buckets": [[2, 64]],
    "max_seq_len_to_capture": 64,
}
"""Each makes linear layers formulate their product in another way."""
PROMPTS = [list(range(3, 12)), list(range(150, 110, -1))]
NEW_TOKENS = 20
WEIGHTS_ONLY = [form for form in FORMS if "dynamic" not in form]
DYNAMIC = [form for form in FORMS if "dynamic" in form]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(MODEL, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def build_artifact(build_artifact: BuildArtifact) -> BuildArtifact:
    """Few programs are enough here."""
    return partial(build_artifact, **BUCKETS)


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """The model in a form. Not to be changed."""
    root = tmp_path_factory.mktemp("quantized")
    return cache(lambda form: save_quantized(model, root / form, form))


def edit_config(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    change(config)
    (checkpoint / "config.json").write_text(json.dumps(config))


def edit_weights(checkpoint: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def only_group(config: dict[str, Any]) -> dict[str, Any]:
    [group] = config["quantization_config"]["config_groups"].values()
    return group  # type: ignore[no-any-return]


def generated(artifact: Path) -> list[tuple[list[int], Tensor]]:
    """Of every prompt: all tokens, and the logits [new tokens, vocab] that the new ones were chosen from."""
    rows: dict[str, list[Tensor]] = {}
    engine = LLMEngine(artifact, on_logits=lambda request, row: rows.setdefault(request, []).append(torch.tensor(row)))
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), prompt, SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True))
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    return [(tokens[request], torch.stack(rows[request])) for request in sorted(tokens)]


def compared(artifact: Path, checkpoint: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every prompt: logits of what the artifact generates, and those of transformers for the same tokens."""
    reference = load(checkpoint)
    for tokens, logits in generated(artifact):
        yield logits, logits_of(reference, tokens[:-1])[-NEW_TOKENS:]


@pytest.mark.parametrize("form", grid([*WEIGHTS_ONLY, "int4-32"], ["fp8", "int4-32"]))
def test_weights_of_every_form_give_the_logits_and_the_tokens_of_transformers(
    form: str, model: Path, quantized: Quantized, build_artifact: BuildArtifact
) -> None:
    for logits, expected in compared(build_artifact(model, checkpoint=quantized(form)), quantized(form)):
        # float32, with sums in another order and scaled afterwards: some hundred units of 2**-24.
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert logits.argmax(-1).equal(expected.argmax(-1))


@pytest.mark.parametrize("form", grid(DYNAMIC, ["int8-dynamic"]))
def test_activations_are_rounded_as_transformers_rounds_them(
    form: str, model: Path, quantized: Quantized, build_artifact: BuildArtifact, tmp_path: Path
) -> None:
    """Nearer to transformers than transformers is to itself without that rounding, by a factor of 4 at the least.

    Not nearer, because chance has a part: a number of a token that lies between two steps falls to either side. For
    int8 the largest one always does when it is negative: it is -127.5 steps, by compressed-tensors' definition.
    `test_quant/test_linear.py` shows that from the same input the same comes out.
    """
    unrounded = shutil.copytree(quantized(form), tmp_path / "unrounded")
    edit_config(unrounded, lambda config: only_group(config).update(input_activations=None))
    distance, effect, regret = [], [], []
    artifact = build_artifact(model, checkpoint=quantized(form))
    for (logits, expected), (_, other) in zip(
        compared(artifact, quantized(form)), compared(artifact, unrounded), strict=True
    ):
        distance.append((logits - expected).square().mean())
        effect.append((other - expected).square().mean())
        regret.append(expected.amax(-1) - expected.gather(-1, logits.argmax(-1, keepdim=True))[:, 0])
    rms, without = (float(torch.stack(found).mean().sqrt()) for found in (distance, effect))
    assert rms < without / 4
    assert float(torch.cat(regret).max()) < without


@pytest.mark.grid
@pytest.mark.parametrize("form", ["fp8-dynamic", "int8-plain-tensor-dynamic", "int8-tensor"])
def test_such_an_artifact_qualifies(form: str, model: Path, quantized: Quantized, start_build: StartBuild) -> None:
    build = start_build(model, checkpoint=quantized(form), **BUCKETS)
    for step in build.plan.steps:
        build.run(step)
    metadata = json.loads((build.version_directory / "artifact.json").read_text())["model_metadata"]
    assert metadata["quantization"] == form


@pytest.mark.grid
def test_an_artifact_that_rounds_otherwise_does_not_qualify(
    model: Path, quantized: Quantized, start_build: StartBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    buckets = {"prefill_buckets": [[1, 30]], "decode_buckets": [[1, 40]], "max_seq_len_to_capture": 40}  # kept by key
    build = start_build(model, checkpoint=quantized("int8-dynamic"), **buckets)
    forward = QuantizedLinear.forward

    def with_4_bits(self: QuantizedLinear, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 7
        return forward(self, (x / scale).round() * scale)

    monkeypatch.setattr(QuantizedLinear, "forward", with_4_bits)
    for step in build.plan.steps:
        if step != "qualify":
            build.run(step)
    monkeypatch.undo()
    with pytest.raises(StepError, match="not the model's"):
        build.run("qualify")


TP2, PP2 = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}


@pytest.mark.grid
@pytest.mark.parametrize(
    ("form", "parallel"),
    [("fp8-tensor-dynamic", TP2), ("int8-plain", TP2), ("int8-plain-tensor-dynamic", PP2)],
)
def test_ranks_and_stages_give_what_one_rank_gives(
    form: str, parallel: Mapping[str, int], model: Path, quantized: Quantized, build_artifact: BuildArtifact
) -> None:
    """A token's scale is that of the whole token, of which a rank has a share: so it is found together."""
    whole = build_artifact(model, checkpoint=quantized(form))
    divided = build_artifact(model, checkpoint=quantized(form), parallel=parallel)
    for (tokens, logits), (others, expected) in zip(generated(divided), generated(whole), strict=True):
        if "dynamic" not in form or parallel == PP2:
            assert tokens == others
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        else:  # Sums in another order, so that numbers fall to other steps; see above.
            assert float((logits[0] - expected[0]).abs().max()) < 0.05 * float(expected[0].abs().max())


@pytest.mark.grid
def test_what_quantize_has_written_is_taken_and_gives_the_same_parameters_and_programs(
    model: Path, start_build: StartBuild, build_artifact: BuildArtifact, outputs_of: OutputsOf
) -> None:
    keep_head = ({"match": "lm_head.weight", "scheme": "none"},)
    for scheme in ("fp8", "int8"):
        own = build_artifact(model, scheme=scheme, rules=keep_head)
        written = outputs_of(start_build(model, scheme=scheme, rules=keep_head), "quantize")
        taken = build_artifact(model, checkpoint=written)
        names = {path.relative_to(own) for path in own.rglob("*") if path.parent.name in ("params", "programs")}
        assert len(names) > 2
        for name in names:
            assert (own / name).read_bytes() == (taken / name).read_bytes(), name
        shutil.rmtree(written)


@pytest.mark.grid
def test_scales_may_have_another_dtype_and_shape(
    model: Path, quantized: Quantized, build_artifact: BuildArtifact, tmp_path: Path
) -> None:
    """transformers makes them the model's dtype as well; here they are numbers that both dtypes have."""

    def rounded(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.endswith("_scale"):
                tensors[name] = tensors[name].bfloat16().float()

    def changed(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.endswith("_scale"):
                tensors[name] = tensors[name].bfloat16().reshape(())

    usual = shutil.copytree(quantized("fp8-tensor"), tmp_path / "usual")
    other = shutil.copytree(usual, tmp_path / "other")
    edit_weights(usual, rounded)
    edit_weights(other, changed)
    artifacts = [build_artifact(model, checkpoint=directory) for directory in (usual, other)]
    first, second = (sorted((artifact / "params").iterdir()) for artifact in artifacts)
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


@pytest.mark.grid
def test_the_first_layers_of_a_checkpoint(
    model: Path, quantized: Quantized, build_artifact: BuildArtifact, tmp_path: Path
) -> None:
    """The checkpoint has more layers than are asked for."""
    form = "int8-plain"
    cut = shutil.copytree(quantized(form), tmp_path / "cut")
    edit_config(cut, lambda config: config.update(num_hidden_layers=1))
    for logits, expected in compared(build_artifact(model, checkpoint=quantized(form), num_hidden_layers=1), cut):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.grid
def test_a_model_whose_head_is_its_embedding(tmp_path: Path, build_artifact: BuildArtifact) -> None:
    tied = save_random_model({**TIED, "num_hidden_layers": 2}, tmp_path / "tied")
    checkpoint = save_quantized(tied, tmp_path / "quantized", "fp8")
    for logits, expected in compared(build_artifact(tied, checkpoint=checkpoint), checkpoint):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_only_some_layers_are_quantized(
    model: Path, quantized: Quantized, build_artifact: BuildArtifact, tmp_path: Path
) -> None:
    """By patterns, as llm-compressor writes them: layer 1 and all projections of attention are left alone."""
    some = shutil.copytree(quantized("fp8"), tmp_path / "some")
    originals = load_file(model / "model.safetensors")

    def ignore(config: dict[str, Any]) -> None:
        only_group(config)["targets"] = [r"re:.*layers\.\d+\.mlp\.", "model.layers.1.self_attn.o_proj"]
        config["quantization_config"]["ignore"] = ["lm_head", r"re:model\.layers\.1\."]

    def restore(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if "layers.1" in name or "self_attn" in name:
                del tensors[name]
                if name in originals:
                    tensors[name] = originals[name]

    edit_config(some, ignore)
    edit_weights(some, restore)
    artifact = build_artifact(model, checkpoint=some)
    for logits, expected in compared(artifact, some):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    programs = json.loads((artifact / "artifact.json").read_text())["programs"].values()
    assert {program["kind"] for program in programs} == {"first", "block0", "block1", "last"}
