"""Where the ranks of a draft model compute: in the threads, or in the processes, of the model's ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from furiosa_build.artifact.reader import OpenArtifact, open_artifact
from furiosa_build.artifact.stages import restage
from furiosa_build.core.errors import UserError
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.execution.communicator import DistributedCommunicator
from furiosa_build.runtime.execution.rank_threads import RankThread

from . import toy
from .stepping import greedy

PROMPT = [1, 2, 3]
NEW = 12

Make = Callable[..., OpenArtifact]


@pytest.fixture
def make(toy_backend: toy.ToyBackend, tmp_path: Path) -> Make:
    """The toy model with itself as its draft, each divided into stages."""
    del toy_backend
    buckets = {**toy.DEFAULT_BUCKETS, "append": [(1, 4, 48), (4, 4, 48)]}
    toy.write_artifact(
        tmp_path / "artifact", toy.with_draft(toy.artifact_data(buckets), toy.artifact_data(buckets), number=3)
    )

    def make(stages: int, draft_stages: int, replicas: int = 1) -> OpenArtifact:
        opened = open_artifact(tmp_path / "artifact")
        artifact = restage(opened.artifact, stages)
        assert artifact.draft is not None
        parallel = artifact.parallel_config.model_copy(update={"data_parallel_size": replicas})
        changed = {"draft": restage(artifact.draft, draft_stages), "parallel_config": parallel}
        return OpenArtifact(opened.directory, artifact.model_copy(update=changed), opened.manifest)

    return make


def assert_proposes_and_is_right(engine: LLMEngine) -> None:
    for name in "ab":
        engine.add_request(name, PROMPT, greedy(NEW))
    found = {}
    while engine.has_unfinished_requests():
        found.update((output.request_id, output.outputs[0].token_ids) for output in engine.step())
        engine.check_integrity()
    assert found == dict.fromkeys("ab", toy.expected(PROMPT, NEW))
    assert engine.stats().accepted_tokens > 0


@pytest.mark.parametrize(
    ("stages", "draft_stages", "replicas", "number"),
    [(1, 1, 1, 0), (2, 1, 1, 2), (2, 2, 1, 2), (1, 2, 1, 2), (1, 1, 2, 2), (2, 2, 2, 4)],
)
def test_a_draft_computes_in_the_threads_of_the_model(
    make: Make, monkeypatch: pytest.MonkeyPatch, stages: int, draft_stages: int, replicas: int, number: int
) -> None:
    """OpenMP has a team for every thread that has computed: there are as many as there are elements."""
    computing: set[threading.Thread] = set()
    run = toy.ToyProgram.run

    def watched(program: toy.ToyProgram, inputs: Sequence[Tensor]) -> list[Tensor]:
        computing.add(threading.current_thread())
        return run(program, inputs)

    monkeypatch.setattr(toy.ToyProgram, "run", watched)
    before = set(threading.enumerate())
    with closing(LLMEngine(make(stages, draft_stages, replicas))) as engine:
        started = set(threading.enumerate()) - before
        assert len(started) == number
        assert_proposes_and_is_right(engine)
        assert computing == (started or {threading.current_thread()})
    assert set(threading.enumerate()) == before


def test_the_cores_are_divided_among_the_threads(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    with closing(LLMEngine(make(2, 2, 2))) as engine:
        threads = [thread for thread in threading.enumerate() if isinstance(thread, RankThread)]
        assert [thread._share.number for thread in threads] == [2] * 4
        engine.check_integrity()


@pytest.fixture
def one_process() -> Iterator[DistributedCommunicator]:
    """The end of the only process of a group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield DistributedCommunicator(stages=1, ranks=1)
    finally:
        torch.distributed.destroy_process_group()


def test_with_processes_a_draft_divided_otherwise_is_refused(make: Make, one_process: DistributedCommunicator) -> None:
    with pytest.raises(UserError) as refused:
        LLMEngine(make(1, 2), communicator=one_process)
    assert str(refused.value) == (
        "with a process for each rank, the draft model's 1 ranks x 2 stages cannot run beside the model's 1 ranks x 1 "
        "stages\n"
        "  where: communicator\n"
        "  valid: a draft model of as many ranks and stages\n"
        "  hint: run ranks as threads, or set use_speculative_decoding_if_possible=False"
    )


def test_a_process_runs_the_draft_as_well(make: Make, one_process: DistributedCommunicator) -> None:
    with closing(LLMEngine(make(1, 1), communicator=one_process)) as engine:
        assert_proposes_and_is_right(engine)


PROCESS = """
import json, sys
import torch.distributed as dist
from test_runtime import toy
from test_runtime.stepping import greedy
from furiosa_build.artifact.reader import OpenArtifact, open_artifact
from furiosa_build.artifact.stages import restage
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.execution import rank
from furiosa_build.runtime.execution.communicator import DistributedCommunicator

rank.get_backend = lambda _: toy.ToyBackend()
dist.init_process_group("gloo")
opened = open_artifact(sys.argv[1])
artifact = restage(opened.artifact, 2)
artifact = artifact.model_copy(update={"draft": restage(artifact.draft, 2)})
opened = OpenArtifact(opened.directory, artifact, opened.manifest)
engine = LLMEngine(opened, seed=0, communicator=DistributedCommunicator(stages=2, ranks=1))
engine.add_request("a", json.loads(sys.argv[2]), greedy(int(sys.argv[3])))
while engine.has_unfinished_requests():
    [output] = engine.step()
print(json.dumps([output.outputs[0].token_ids, engine.stats().accepted_tokens]))
dist.destroy_process_group()
"""


def test_stages_of_model_and_draft_in_two_processes(make: Make) -> None:
    artifact = make(2, 2).directory
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    python_path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(artifact), json.dumps(PROMPT), str(NEW)],
            env={**os.environ, **shared, "PYTHONPATH": python_path, "RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        tokens, accepted = json.loads(out.splitlines()[-1])
        assert tokens == toy.expected(PROMPT, NEW)
        assert accepted > 0
