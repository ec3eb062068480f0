from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from furiosa_build.backends.base import Backend, Option, check_options
from furiosa_build.backends.eager import EagerBackend
from furiosa_build.backends.graph import Graph
from furiosa_build.backends.inductor import InductorBackend
from furiosa_build.backends.inductor.compiler import path_free_compiler
from furiosa_build.build.executors.local import WorkerPool
from furiosa_build.core.errors import UserError
from furiosa_build.ir.segment import Segment
from furiosa_build.models.partition import CutGraph
from furiosa_build.models.tracing import BucketShape, Tracer
from furiosa_build.recipe.schema import Scheme
from furiosa_build.steps.base import Inputs
from furiosa_build.steps.compile import GRAPHS, Compile, CompileRequest

from .small_graph import Small, inputs, small_graph

LAYER = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 128,
    "dtype": "bfloat16",
}

LATENT = {
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "num_hidden_layers": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 128,
    "dtype": "float32",
}
"""Heads of keys have 24 numbers, those of values 16."""
ALIBI = {
    **{"model_type": "bloom", "hidden_size": 64, "n_head": 4, "n_layer": 1, "vocab_size": 128, "dtype": "float32"},
}


@pytest.fixture(scope="module")
def compile_graph() -> Iterator[Callable[..., Path]]:
    """Compiles (graph, directory, scratch) as a build does, in a worker process; returns the program."""
    isa, places = InductorBackend().isa("native"), dict[str, Inputs]()
    pool = WorkerPool(1, lambda request: places[request.inputs[GRAPHS]])

    def compile_graph(graph: Graph, directory: Path, scratch: Path, **options: Option) -> Path:
        output = directory / "output"
        output.mkdir(parents=True)
        graphs = CutGraph(parts=[graph.data], collectives=[[]])
        (directory / "graphs.json").write_text(graphs.model_dump_json())
        places[str(directory)] = Inputs({GRAPHS: directory / "graphs.json"}, scratch)
        request = CompileRequest(inputs={GRAPHS: str(directory)}, backend="inductor", isa=isa, options=options)
        pool.run("compile:test", Compile(), request, output, directory / "log")
        return output / "program-0.so"

    yield compile_graph
    pool.close()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, compile_graph: Callable[[Graph, Path, Path], Path]) -> Path:
    """A graph compiled in an empty scratch directory: done once for all tests here, since it takes many seconds."""
    root = tmp_path_factory.mktemp("inductor") / "one"
    return compile_graph(small_graph(), root, root / "scratch")


@pytest.mark.grid
@pytest.mark.parametrize("slots", [11, 40])
def test_a_program_gives_the_numbers_of_the_function_and_writes_the_cache(program: Path, slots: int) -> None:
    given, expected_inputs = inputs(slots), inputs(slots)
    (expected,) = Small()(*expected_inputs)
    (found,) = InductorBackend().load(program).run(given)
    # float32 sums of 16 numbers near 1, in another order and with fused multiply-add: a few units of 2**-24.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert given[1].equal(expected_inputs[1])


@pytest.mark.grid
def test_two_compiles_in_different_directories_give_the_same_bytes(
    program: Path, compile_graph: Callable[[Graph, Path, Path], Path], tmp_path: Path
) -> None:
    # Of another length, so that a path that is only overwritten in place would show as well.
    root = tmp_path / "another-directory-with-a-longer-name"
    assert compile_graph(small_graph(), root, root / "scratch").read_bytes() == program.read_bytes()


@pytest.mark.grid
def test_no_path_of_the_build_is_in_the_program(program: Path) -> None:
    content = program.read_bytes()
    assert content[:4] == b"\x7fELF"
    for path in (program.parents[2], Path.home(), Path(torch.__file__).parent, Path(__file__).parents[2]):
        assert os.fsencode(path) not in content, path
    assert b"scratch" not in content


@pytest.mark.grid
def test_the_program_is_all_that_is_left_and_may_be_read_by_everyone(program: Path) -> None:
    assert [path.name for path in program.parent.iterdir()] == ["program-0.so"]
    assert stat.S_IMODE(program.stat().st_mode) == 0o644
    assert list((program.parents[1] / "scratch").glob("program-*")) == []


def test_a_program_that_is_no_library_is_refused_at_load(tmp_path: Path) -> None:
    program = tmp_path / "program.so"
    program.write_bytes(b"\x7fELF and no more")
    with pytest.raises(RuntimeError, match=r"program\.so"):
        InductorBackend().load(program)


def test_a_missing_compiler_is_one_message_with_both_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    for attempt in (
        InductorBackend().check_toolchain,
        lambda: InductorBackend().compile(small_graph(), tmp_path / "program.so", "x86-64-v3", tmp_path / "scratch"),
    ):
        with pytest.raises(UserError) as error:
            attempt()
        assert "no-such-compiler" in error.value.what
        assert "install g++" in str(error.value.hint)
        assert "backend=eager" in str(error.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_the_compiler_is_part_of_what_determines_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "fake-compiler"
    fake.write_text("#!/bin/sh\necho fake compiler 99.1\necho more\n")
    fake.chmod(0o755)
    assert "fake" not in InductorBackend().key_factors()["c++"]
    monkeypatch.setenv("CXX", str(fake))
    assert InductorBackend().key_factors()["c++"] == "fake compiler 99.1"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert InductorBackend().key_factors()["c++"] == "none"


def test_the_compiler_is_a_command_as_a_shell_splits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = tmp_path / "a launcher"
    launcher.write_text('#!/bin/sh\necho launched >> "$LAUNCHED"\nexec "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("LAUNCHED", str(tmp_path / "launched"))
    plain = InductorBackend().key_factors()["c++"]

    monkeypatch.setenv("CXX", f"'{launcher}' g++")
    InductorBackend().check_toolchain()
    assert InductorBackend().key_factors()["c++"] == plain, "a launcher changes no program"
    (tmp_path / "launched").unlink()
    ran = subprocess.run([path_free_compiler(tmp_path), "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(plain)
    assert (tmp_path / "launched").read_text() == "launched\n"

    monkeypatch.setenv("CXX", "g++ -O1 -DX='a b'")
    assert InductorBackend().key_factors()["c++"] == f"{plain} -O1 -DX=a b", "a flag may change it"


@pytest.mark.parametrize("command", ["{launcher} no-such-compiler", "no-such-launcher g++", "no-such-compiler -O1"])
def test_a_compiler_or_launcher_that_is_missing_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    command = command.format(launcher=launcher)
    monkeypatch.setenv("CXX", command)
    with pytest.raises(UserError) as error:
        InductorBackend().check_toolchain()
    assert error.value.what == f"backend inductor needs a C++ compiler, and {command!r} was not found"


def test_a_command_with_an_open_quote_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(UserError, match="No closing quotation"):
        InductorBackend().check_toolchain()


@pytest.mark.parametrize("host", ["x86-64-v2", "other"])
def test_an_instruction_set_without_programs_is_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("furiosa_build.backends.cpu.host_isa", lambda: host)
    backend = InductorBackend()
    with pytest.raises(UserError, match=host) as error:
        backend.isa("native")
    assert error.value.where == "target.isa"
    assert error.value.valid == "x86-64-v3, x86-64-v4"
    assert backend.isa("x86-64-v4") == "x86-64-v4", "to compile for another machine is no mistake"


def test_native_is_the_host_s_own_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("furiosa_build.backends.cpu.host_isa", lambda: "x86-64-v3")
    assert InductorBackend().isa("native") == "x86-64-v3"


@pytest.mark.grid
@pytest.mark.parametrize(
    ("scheme", "batch", "query"),
    [
        pytest.param("int8", 1, 1, id="int8 converted inside the product", marks=pytest.mark.grid),
        pytest.param("int8", 8, 1, id="int8 kernel of torch", marks=pytest.mark.grid),
        pytest.param("fp8", 2, 1, id="fp8 converted inside the product", marks=pytest.mark.grid),
        pytest.param("fp8", 1, 32, id="fp8 copy", marks=pytest.mark.grid),
    ],
)
def test_a_compiled_quantized_layer_is_the_eager_one(
    program: Path,
    compile_graph: Callable[[Graph, Path, Path], Path],
    tmp_path: Path,
    scheme: Scheme,
    batch: int,
    query: int,
) -> None:
    graph = quantized_layer(scheme, BucketShape(batch, query, 32))
    scratch = program.parents[1] / "scratch"  # knows the compiler already
    compiled = InductorBackend().load(compile_graph(graph, tmp_path, scratch))
    EagerBackend().compile(graph, tmp_path / "program.json", "any", scratch)
    eager = EagerBackend().load(tmp_path / "program.json")
    expected, found = (program.run(layer_inputs(graph, batch, query))[0].float() for program in (eager, compiled))
    assert expected.isfinite().all()
    assert expected.abs().mean() > 0.1
    # bfloat16 keeps 8 bits; Inductor rounds to it less often than eager does, over the some ten operations of a layer.
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) * 2e-2)


@pytest.mark.grid
@pytest.mark.parametrize("config", [LATENT, ALIBI], ids=["values smaller than keys", "attention of its own"])
@pytest.mark.parametrize(
    "shape",
    [BucketShape(1, 32, 32), BucketShape(1, 4, 32), BucketShape(2, 1, 32)],
    ids=["prefill", "append", "decode"],
)
def test_a_compiled_layer_with_other_attention_is_the_eager_one(
    program: Path,
    compile_graph: Callable[[Graph, Path, Path], Path],
    tmp_path: Path,
    config: dict[str, Any],
    shape: BucketShape,
) -> None:
    graph = Tracer(config, {}).trace(shape, Segment(layers=(0,))).whole
    scratch = program.parents[1] / "scratch"  # knows the compiler already
    compiled = InductorBackend().load(compile_graph(graph, tmp_path, scratch))
    EagerBackend().compile(graph, tmp_path / "program.json", "any", scratch)
    eager = EagerBackend().load(tmp_path / "program.json")
    one, other = (layer_inputs(graph, shape.batch, shape.query) for _ in range(2))
    expected, found = eager.run(one)[0], compiled.run(other)[0]
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for spec, mine, theirs in zip(graph.inputs, one, other, strict=True):
        if spec.role == "kv_cache":
            torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)


def quantized_layer(scheme: Scheme, shape: BucketShape) -> Graph:
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    return (
        Tracer(LAYER, {f"model.layers.0.{name}.weight": scheme for name in names})
        .trace(shape, Segment(layers=(0,)))
        .whole
    )


def layer_inputs(graph: Graph, batch: int, query: int) -> list[torch.Tensor]:
    """Random weights of a size that keeps activations near one; sequences of 32 tokens, one behind the other."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.arange(batch * 32).reshape(batch, 32)
    fixed = {
        "slot_mapping": slots[:, -query:].contiguous(),
        "context_slots": slots,
        "context_lens": torch.full((batch,), 32) - torch.arange(batch),
        "position_ids": torch.arange(32 - query, 32).repeat(batch, 1),
    }
    tensors = []
    for spec in graph.inputs:
        shape = [batch * 32 if size is None else size for size in spec.shape]
        noise = torch.randn(shape, generator=generator)
        if spec.name in fixed:
            tensors.append(fixed[spec.name])
        elif spec.dtype == "uint8":
            tensors.append((noise * 40 + 128).clamp(1, 255).to(torch.uint8))
        elif spec.name.endswith("weight_scale"):
            tensors.append(
                (noise.abs() * 0.1 + 1).to(torch.bfloat16) / (320 if "weight_packed" in str(graph.inputs) else 8)
            )
        else:
            tensors.append(noise.to(getattr(torch, spec.dtype)))
    return tensors


# Options


@pytest.mark.grid
def test_an_option_reaches_the_compiler(program: Path, compile_graph: Callable[..., Path], tmp_path: Path) -> None:
    """Sums may be in another order then."""
    scratch = program.parents[1] / "scratch"
    fast = compile_graph(small_graph(), tmp_path / "fast", scratch, **{"cpp.enable_unsafe_math_opt_flag": True})
    assert fast.read_bytes() != program.read_bytes()


def test_every_option_is_one_of_torch_and_of_its_type() -> None:
    from torch._inductor import config

    for name, kind in InductorBackend.options.items():
        value = getattr(config, name) if "." not in name else getattr(config.cpp, name.removeprefix("cpp."))
        assert isinstance(value, kind | None), name


@pytest.mark.parametrize(
    ("backend", "overrides", "message"),
    [
        (InductorBackend(), {"max_autotun": True}, "did you mean 'max_autotune'"),
        (InductorBackend(), {"max_fusion_size": True}, "max_fusion_size=True is not of type int"),
        (InductorBackend(), {"cpp.cxx": "evil"}, "has no option 'cpp.cxx'"),
        (EagerBackend(), {"max_autotune": True}, "valid: none"),
    ],
)
def test_options_that_a_backend_has_not(backend: Backend, overrides: dict[str, Option], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_options(backend, overrides)
