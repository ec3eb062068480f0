"""Every argument of the engines: what it changes, or why it is refused."""

from __future__ import annotations

import argparse
import re
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from furiosa_build.core.errors import EngineFullError, UserError
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.engine_args import AsyncEngineArgs, EngineArgs
from furiosa_build.runtime.sampling.params import SamplingParams

from . import toy

REFERENCE = [
    "--model",
    "--tokenizer",
    "--tokenizer-mode",
    "--seed",
    "--devices",
    "--pipeline-parallel-size",
    "--data-parallel-size",
    "--cache-dir",
    "--paged-attention-num-blocks",
    "--npu-queue-limit",
    "--max-processing-samples",
    "--spare-blocks-ratio",
    "--is-offline",
]
ASYNC_REFERENCE = [
    "--num-speculative-tokens",
    "--backend",
    "--use-speculative-decoding-if-possible",
    "--speculative-model-paged-attention-num-blocks",
    "--packing-type",
]
OWN = ["--public-key", "--tensor-parallel-size", "--prefill-chunk-size", "--enable-prefix-caching"]
OWN += ["--num-threads", "--pin-threads"]


def engine(artifact: Path, **arguments: Any) -> LLMEngine:
    return LLMEngine.from_engine_args(AsyncEngineArgs(model=str(artifact), **arguments))


def generate(engine: LLMEngine, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    for n, prompt in enumerate(prompts):
        engine.add_request(str(n), prompt, SamplingParams(**{"max_tokens": 6, "ignore_eos": True, **params}))
    found: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        found.update((output.request_id, output.outputs[0].token_ids) for output in engine.step() if output.finished)
        engine.check_integrity()
    return [found[str(n)] for n in range(len(prompts))]


def parser(arguments: type[EngineArgs]) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    assert arguments.add_cli_args(made) is made
    return made


def test_the_options_are_those_of_the_references() -> None:
    def options(arguments: type[EngineArgs]) -> set[str]:
        return set(re.findall(r"(?m)^  (--[a-z-]+)", parser(arguments).format_help()))

    assert options(EngineArgs) == {*REFERENCE, *OWN}
    assert options(AsyncEngineArgs) == {*REFERENCE, *OWN, *ASYNC_REFERENCE}


def test_the_defaults() -> None:
    defaults = {each.name: each.default for each in fields(AsyncEngineArgs) if each.name != "model"}
    assert {name: value for name, value in defaults.items() if value is not None} == {
        "tokenizer_mode": "auto",
        "cache_dir": "$HOME/.cache/furiosa/llm",
        "use_speculative_decoding_if_possible": True,
        "packing_type": "IDENTITY",
        "enable_prefix_caching": True,
        "pin_threads": False,
    }
    read = parser(AsyncEngineArgs).parse_args(["--model", "there"])
    assert AsyncEngineArgs.from_cli_args(read) == AsyncEngineArgs(model="there")


def test_the_command_line_gives_what_python_gives() -> None:
    line = "--model there --seed 3 --devices npu:0:* --is-offline True --spare-blocks-ratio 0.5 --npu-queue-limit 4"
    expected = EngineArgs(
        model="there", seed=3, devices="npu:0:*", is_offline=True, spare_blocks_ratio=0.5, npu_queue_limit=4
    )
    assert EngineArgs.from_cli_args(parser(EngineArgs).parse_args(line.split())) == expected


@pytest.mark.parametrize("line", ["", "--model m --is-offline perhaps", "--model m --seed x"])
def test_a_command_line_that_is_not_valid(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser(EngineArgs).parse_args(line.split())
    assert re.search("required: --model|'perhaps' is not true or false|invalid int value: 'x'", capsys.readouterr().err)


def test_without_arguments_the_artifact_s_preferences_hold(toy_artifact: Path) -> None:
    assert engine(toy_artifact).artifact == LLMEngine(toy_artifact).artifact


def test_the_seed(toy_artifact: Path) -> None:
    def draw(seed: int) -> list[list[int]]:
        return generate(engine(toy_artifact, seed=seed), [[1]], max_tokens=12)

    assert draw(1) == draw(1) != draw(2)


def test_the_scheduler_s_fields_override_the_artifact_s(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    del toy_backend
    buckets = {**toy.DEFAULT_BUCKETS, "append": [(1, 4, 16)]}
    artifact = toy.write_artifact(tmp_path / "a", toy.artifact_data(buckets))
    changed = {
        "npu_queue_limit": 3,
        "max_processing_samples": 2,
        "spare_blocks_ratio": 0.5,
        "is_offline": True,
        "prefill_chunk_size": 4,
    }
    made = engine(artifact, **changed, paged_attention_num_blocks=7)
    [replica] = made._replicas
    config = made.artifact.generator_config
    assert config.default_scheduler_config.model_dump() == changed
    assert config.paged_attention_num_blocks == replica.scheduler.blocks.num_blocks == 7
    assert replica.queue_limit == 3
    assert (replica.scheduler._prefill._spare_blocks, replica.scheduler._queues.is_offline) == (3, True)
    made.add_request("a", [1] * 12, SamplingParams())
    batch = replica.scheduler.schedule()
    assert batch is not None
    assert batch.counts == [4], "a chunk of the prompt"
    made.add_request("b", [1], SamplingParams())
    with pytest.raises(EngineFullError, match="2 requests are under way"):
        made.add_request("c", [1], SamplingParams())


@pytest.mark.parametrize("is_offline", [True, False])
def test_is_offline_can_be_switched_both_ways(toy_backend: toy.ToyBackend, tmp_path: Path, is_offline: bool) -> None:
    del toy_backend
    artifact = toy.write_artifact(tmp_path / "a", toy.artifact_data(is_offline=not is_offline))
    assert engine(artifact, is_offline=is_offline)._replicas[0].scheduler._queues.is_offline is is_offline


def test_another_tokenizer(toy_artifact: Path, tmp_path: Path) -> None:
    other = toy.byte_tokenizer()
    other.add_tokens(["abc"])  # 258, which the model does not have
    other.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    made = engine(toy_artifact, tokenizer=str(tmp_path))
    with pytest.raises(UserError, match=r"lacks the token .abc. \(258\)"):
        made.add_request("a", "abc", SamplingParams())
    made.add_request("a", [{"role": "user", "content": "hi"}], SamplingParams(max_tokens=1))
    assert made.step()[0].prompt_token_ids == list(b"<hi>")
    with pytest.raises(UserError, match=r"nowhere has no tokenizer.json(.|\n)*valid: a directory with tokenizer.json"):
        engine(toy_artifact, tokenizer=str(tmp_path / "nowhere"))


def npu(directory: Path, **parallel: int) -> Path:
    """The toy's artifact, as if it were built for a device of 8 elements."""
    data = toy.artifact_data()
    data["target"]["num_elements"] = 8
    data["devices"] = "npu:0"
    data["parallel_config"] |= parallel
    return toy.write_artifact(directory, data)


@pytest.mark.parametrize(
    ("arguments", "replicas"),
    [
        ({}, 3),
        ({"devices": "npu:0:*"}, 8),
        ({"devices": "npu:0:2-4"}, 3),
        ({"devices": ["npu:0:1", "npu:1:5"]}, 2),
        ({"devices": "npu:0:*", "data_parallel_size": 2}, 2),
        ({"devices": "npu:0:*", "pipeline_parallel_size": 2}, 4),
        ({"pipeline_parallel_size": 2}, 4),
        ({"data_parallel_size": 5}, 5),
        ({"devices": "cpu"}, 3),
        ({"devices": "cpu", "data_parallel_size": 2, "pipeline_parallel_size": 2}, 2),
    ],
)
def test_replicas_come_from_the_devices(
    toy_backend: toy.ToyBackend, tmp_path: Path, arguments: dict[str, Any], replicas: int
) -> None:
    del toy_backend
    with closing(engine(npu(tmp_path / "a", data_parallel_size=3), **arguments)) as made:
        assert len(made._replicas) == made.artifact.parallel_config.data_parallel_size == replicas
        given = arguments.get("devices", "npu:0")
        assert made.artifact.devices == (given if isinstance(given, str) else "npu:0:1,npu:1:5")
        prompts = [[n, 3] for n in range(9)]
        assert generate(made, prompts, temperature=0) == [toy.expected(prompt, 6) for prompt in prompts]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer_mode": "slow"}, r"tokenizer_mode='slow': the runtime has fast tokenizers only\n.*\n.*valid: auto"),
        ({"cache_dir": "/tmp/x"}, r"cache_dir='/tmp/x': an engine generates no files"),
        ({"packing_type": "GREEDY"}, r"packing_type does not take 'GREEDY'(.|\n)*valid: IDENTITY"),
        ({"backend": "inductor"}, r"backend='inductor': the artifact's programs are of backend 'toy'"),
        ({"num_speculative_tokens": 3}, "num_speculative_tokens=3: the artifact has no draft model"),
        ({"speculative_model_paged_attention_num_blocks": 3}, "the artifact has no draft model"),
        ({"tensor_parallel_size": 2}, r"divided among 1 ranks(.|\n)*valid: 1(.|\n)*fixed when an artifact is built"),
        ({"prefill_chunk_size": 4}, "the artifact has no append buckets"),
        ({"paged_attention_num_blocks": 0}, "paged_attention_num_blocks does not take 0(.|\n)*greater than or equal"),
        ({"npu_queue_limit": 0}, "npu_queue_limit does not take 0"),
        ({"max_processing_samples": -1}, "max_processing_samples does not take -1"),
        ({"spare_blocks_ratio": 1.0}, r"spare_blocks_ratio does not take 1\.0(.|\n)*less than 1"),
        ({"is_offline": "perhaps"}, "is_offline does not take 'perhaps'"),
        ({"data_parallel_size": 0}, "data_parallel_size does not take 0"),
        ({"pipeline_parallel_size": 0}, r"pipeline_parallel_size=0: the model has 2 layers(.|\n)*valid: 1 to 2"),
        ({"pipeline_parallel_size": 3}, "pipeline_parallel_size=3: the model has 2 layers"),
        ({"devices": "tpu:0"}, "'tpu:0' is not well formed"),
        ({"devices": "cpu,npu:0"}, "mixes cpu and npu"),
        ({"devices": "cuda:0"}, "devices='cuda:0': the artifact's programs are for target 'toy'"),
        ({"devices": "npu:0:8"}, "'npu:0:8' is not there"),
        (
            {"devices": "npu:0:0-2", "data_parallel_size": 2, "pipeline_parallel_size": 2},
            r"are 3 elements; 1 ranks \(fixed at build\) x 2 stages x 2 replicas = 4 elements",
        ),
        ({"devices": "npu:0:0", "pipeline_parallel_size": 2}, "are 1 elements; .* 2 stages x 1 replicas = 2 elements"),
    ],
)
def test_what_is_refused_and_why(
    toy_backend: toy.ToyBackend, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    del toy_backend
    with pytest.raises(UserError, match=message):
        engine(npu(tmp_path / "a"), **arguments)


def test_an_artifact_for_cpus_has_no_npu(toy_artifact: Path) -> None:
    with pytest.raises(UserError, match=r"devices='npu:0:\*': the artifact's programs are for target 'toy'"):
        engine(toy_artifact, devices="npu:0:*")


@pytest.mark.parametrize(
    "arguments",
    [
        {"backend": "toy"},
        {"cache_dir": None},
        {"use_speculative_decoding_if_possible": False},
        {"use_speculative_decoding_if_possible": True},
        {"tensor_parallel_size": 1},
        {"packing_type": "IDENTITY"},
    ],
)
def test_what_says_what_is_so_already(toy_artifact: Path, arguments: dict[str, Any]) -> None:
    made = engine(toy_artifact, **arguments)
    assert made.artifact == LLMEngine(toy_artifact).artifact
    assert generate(made, [[1]], temperature=0) == [toy.expected([1], 6)]
