"""shark's route for texts: `/generate`.

The answer to a single text is the text that continues it, as its guide says. That to a list is JSON with a
response for every prompt, in order. A stream has events `data(RID): TEXT`, where RID names the prompt.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import Field

from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.server.generation import Generation
from furiosa_build.server.http import event_stream
from furiosa_build.server.http.body import Body, Integer, Unsupported
from furiosa_build.server.http.errors import bad_request
from furiosa_build.server.http.json_route import json_route
from furiosa_build.server.http.middleware import log_fields
from furiosa_build.server.openai import prompts
from furiosa_build.server.openai.descriptions import GENERATED, OF_GENERATION
from furiosa_build.server.openai.protocol import TokenIds
from furiosa_build.server.openai.responses import TextDeltas
from furiosa_build.server.openai.sampling import MAX_N
from furiosa_build.server.service import Service

Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern="^[!-~]{1,128}$")]


class SharkSampling(Body):
    """Sampling parameters of shark's server. Greedy, unless temperature, top_k or top_p is given."""

    unsupported: ClassVar = {
        "num_beams": Unsupported("/v1/completions has use_beam_search", (1,)),
        "use_beam_search": Unsupported("/v1/completions has it", (False,)),
    }
    max_completion_tokens: Integer = Field(50, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: Integer | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)

    def params(self) -> SamplingParams:
        """The engine's sampling parameters."""
        given = self.model_dump(exclude={"max_completion_tokens"}, exclude_none=True)
        return SamplingParams(max_tokens=self.max_completion_tokens, **(given or {"temperature": 0}))


class GenerateRequest(Body):
    """Body of /generate: `text` or `input_ids`, one or a list of them."""

    text: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_N)] | None = None
    input_ids: TokenIds | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_N)] | None = None
    sampling_params: SharkSampling = SharkSampling()
    rid: Name | list[Name] | None = None
    stream: bool = False

    @property
    def is_single(self) -> bool:
        """Whether there is one prompt, and no list of them."""
        given = self.input_ids if self.text is None else self.text
        return isinstance(given, str) or (given is not None and isinstance(given[0], int))

    def prompts(self) -> list[Any]:
        """Texts, or lists of token ids."""
        if (self.text is None) == (self.input_ids is None):
            raise bad_request("either text or input_ids is given", "text")
        given: Any = self.input_ids if self.text is None else self.text
        return [given] if self.is_single else given

    def names(self, number: int) -> list[str]:
        """The name of each prompt in the stream."""
        if self.rid is None:
            return [uuid.uuid4().hex for _ in range(number)]
        given = [self.rid] if isinstance(self.rid, str) else self.rid
        if len(given) != number:
            raise bad_request(f"{len(given)} names for {number} prompts", "rid")
        return given


def make_router(service: Service) -> APIRouter:
    """The route of a server."""
    router = APIRouter(route_class=json_route(service))

    @router.post("/generate", responses=GENERATED | OF_GENERATION)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        given = body.prompts()
        names = body.names(len(given))
        tokens = [await prompts.encode(service.tokenizer, each) if isinstance(each, str) else each for each in given]
        if service.options.log_prompts:
            log_fields(request.scope)["prompts"] = given
        generation = Generation(service, request, tokens, [body.sampling_params.params()])
        if body.stream:
            return await event_stream.respond(request, _events(generation, names))
        texts = [state.outputs[0].text for state in await generation.collect(request)]
        if body.is_single:
            return PlainTextResponse(texts[0])
        responses = [
            {"prompt": await prompts.as_text(service.tokenizer, prompt), "responses": [{"text": text}]}
            for prompt, text in zip(given, texts, strict=True)
        ]
        return JSONResponse({"responses": responses})

    return router


async def _events(generation: Generation, names: Sequence[str]) -> AsyncGenerator[str, None]:
    deltas: dict[int, TextDeltas] = {}
    async with aclosing(generation.stream()) as states:
        async for index, state in states:
            text, _, _ = deltas.setdefault(index, TextDeltas()).next(state.outputs[0])
            yield f"data({names[index]}): {text}\n\n"
    yield event_stream.DONE
