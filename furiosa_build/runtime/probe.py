"""Answers questions about an artifact by the runtime alone: `python -m furiosa_build.runtime.probe ARTIFACT IN OUT`.

The build runs this in a fresh process to find out what the artifact does. IN is a JSON file, `Questions`, or standard
input, `/dev/stdin`; whoever has them answered otherwise, such as by another library, reads the same file. OUT is a
safetensors file, see `probe`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import save_file

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.artifact.schema import GeneratorConfig
from furiosa_build.core.errors import BuildError, UserError
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.execution.replica import Replica
from furiosa_build.runtime.request import RequestOutput
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.sampling.selection import Floats
from furiosa_build.runtime.scheduling.batch import Batch
from furiosa_build.runtime.text.tokenizer import Tokenizer


class _Question(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Chat(_Question):
    """A conversation that is to become a prompt."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True


class Continuation(_Question):
    """A prompt that is to be continued by its likeliest tokens; `beams`: by a search of so many beams."""

    prompt: list[int]
    max_tokens: int
    beams: int | None = None


class Questions(_Question):
    """What is asked.

    Attributes:
        texts: Texts to be made tokens, with and without the special tokens that are put around every text.
        tokens: Tokens to be made text, with and without special tokens.
        chats: Conversations to be rendered.
        rounds: Prompts to be continued. Those of a round run side by side, one round after the other.
    """

    texts: list[str] = []
    tokens: list[list[int]] = []
    chats: list[Chat] = []
    rounds: list[list[Continuation]] = []


def probe(artifact: Path, questions: Path, answers: Path) -> None:
    """Writes a safetensors file. Of continuation k (they are counted through all rounds) it has

    - `tokens.k`: int64 [prompt + new]
    - `after.k`: int64 [positions], for which positions there are logits: those of the tokens that follow these
    - `logits.k`: float32 [positions, vocab]
    - `buckets.k`: int64 [positions], the bucket that computed them, as an index into the metadata's `buckets`

    or of a beam search `beams.k`: int64 [beams, prompt + new], the best first, and `scores.k`: float64 [beams].

    The metadata are JSON texts: `texts` and `tokens`, pairs of answers; `chats`, texts, or null where the conversation
    was refused (each null where there is no tokenizer); `buckets`, their names; and, where a draft model proposed
    tokens, `draft_acceptance`, the share of them that was accepted.
    """
    opened = open_artifact(artifact)
    asked = Questions.model_validate_json(questions.read_bytes())
    config = opened.artifact.generator_config
    engine = _Recording(opened, paged_attention_num_blocks=_num_blocks(config, asked.rounds))
    with closing(engine):
        outputs = [output for number, one in enumerate(asked.rounds) for output in _continue(engine, number, one)]
        accepted = engine.stats().acceptance_rate
    told: dict[str, Any] = {**text_answers(engine.tokenizer, asked), "buckets": engine.buckets}
    if accepted is not None:
        told["draft_acceptance"] = accepted
    arrays: dict[str, NDArray[Any]] = {}
    for k, output in enumerate(outputs):
        if engine.rows.get(output.request_id):
            after, buckets, logits = zip(*engine.rows[output.request_id], strict=True)
            arrays[f"tokens.{k}"] = np.array([*output.prompt_token_ids, *output.outputs[0].token_ids])
            arrays |= {f"after.{k}": np.array(after), f"buckets.{k}": np.array(buckets)}
            arrays[f"logits.{k}"] = np.stack(logits)
        else:
            beams = [np.array([*output.prompt_token_ids, *beam.token_ids]) for beam in output.outputs]
            arrays[f"beams.{k}"] = np.stack(beams)
            scores = [beam.cumulative_logprob for beam in output.outputs]
            arrays[f"scores.{k}"] = np.array(scores, dtype=np.float64)
    save_file(arrays, answers, {name: json.dumps(answer) for name, answer in told.items()})


class _Recording(LLMEngine):
    """An engine that keeps the logits it sees, with the bucket that computed them.

    Attributes:
        buckets: Names of buckets.
        rows: Request -> position, index of its bucket, logits [vocab].
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.buckets: list[str] = []
        self.rows: dict[str, list[tuple[int, int, Floats]]] = {}
        self._bucket = 0
        super().__init__(*args, **options, on_logits=self._keep)

    def _accept(self, replica: Replica, batch: Batch, *others: Any) -> Any:
        if batch.pipeline.name not in self.buckets:
            self.buckets.append(batch.pipeline.name)
        self._bucket = self.buckets.index(batch.pipeline.name)
        return super()._accept(replica, batch, *others)

    def _keep(self, request_id: str, row: Floats) -> None:
        request = self._requests[request_id]
        if request.beams is None:
            rows = self.rows.setdefault(request_id, [])
            rows.append((len(request.prompt_token_ids) + len(rows) - 1, self._bucket, row.copy()))


def _continue(engine: LLMEngine, number: int, asked: Sequence[Continuation]) -> list[RequestOutput]:
    """The continuations of a round, in order. As many run side by side as the engine takes."""
    names = [f"{number}.{i}" for i in range(len(asked))]
    waiting = list(zip(names, asked, strict=True))
    finished: dict[str, RequestOutput] = {}
    while waiting or engine.has_unfinished_requests():
        while waiting and not engine.is_full:
            name, each = waiting.pop(0)
            engine.add_request(name, each.prompt, _sampling(each))
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    return [finished[name] for name in names]


def _sampling(asked: Continuation) -> SamplingParams:
    if asked.beams is None:
        return SamplingParams(temperature=0.0, max_tokens=asked.max_tokens, ignore_eos=True)
    return SamplingParams(use_beam_search=True, n=asked.beams, max_tokens=asked.max_tokens, ignore_eos=True)


def text_answers(tokenizer: Tokenizer | None, asked: Questions) -> dict[str, Any]:
    """What a tokenizer says: see `probe`."""
    if tokenizer is None:
        return {"texts": None, "tokens": None, "chats": None}
    whether = (True, False)
    return {
        "texts": [[tokenizer.encode(text, add_special_tokens=special) for special in whether] for text in asked.texts],
        "tokens": [[tokenizer.decode(ids, skip_special_tokens=skip) for skip in whether] for ids in asked.tokens],
        "chats": [_rendered(tokenizer, chat) for chat in asked.chats],
    }


def _rendered(tokenizer: Tokenizer, chat: Chat) -> str | None:
    try:
        return tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, add_generation_prompt=chat.add_generation_prompt
        )
    except UserError:  # there is no template, or it refuses such conversations
        return None


def _num_blocks(config: GeneratorConfig, rounds: Sequence[Sequence[Continuation]]) -> int:
    """KV blocks for all prompts at once, so that one may begin with those of another.

    What an artifact suggests may be all the memory of a server.
    """
    size = config.paged_attention_block_size
    asked = [each for one in rounds for each in one]
    blocks = sum(-(-(len(each.prompt) + each.max_tokens) // size) for each in asked)
    # Beams may part at every token.
    blocks += sum(each.beams * each.max_tokens for each in asked if each.beams is not None)
    with_spare = math.ceil(max(blocks, 1) / (1 - config.default_scheduler_config.spare_blocks_ratio))
    return min(config.paged_attention_num_blocks, with_spare)


if __name__ == "__main__":
    try:
        probe(*map(Path, sys.argv[1:4]))
    except BuildError as error:
        sys.exit(str(error))
