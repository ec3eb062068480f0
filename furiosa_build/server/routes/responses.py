"""OpenAI's route for responses. Nothing is stored: no response can be asked for, or gone on from, later."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from furiosa_build.runtime.request import CompletionOutput, RequestOutput
from furiosa_build.runtime.text.tokenizer import Tokenizer
from furiosa_build.server.generation import Generation
from furiosa_build.server.http import event_stream
from furiosa_build.server.http.json_route import json_route
from furiosa_build.server.openai import tools
from furiosa_build.server.openai.descriptions import OF_GENERATION, ResponseObject, answers
from furiosa_build.server.openai.protocol import ChatRequest
from furiosa_build.server.openai.responses import Json, TextDeltas, chat_logprobs
from furiosa_build.server.openai.responses_output import OutputItems, ResponseBody, status_of
from furiosa_build.server.openai.responses_request import ResponsesRequest
from furiosa_build.server.routes.openai import chat_prompt
from furiosa_build.server.service import Service


class _Answer:
    """Follows one answer: what the engine has generated becomes items."""

    def __init__(self, chat: ChatRequest, use: tools.ToolUse, tokenizer: Tokenizer) -> None:
        self._number, self._parse, self._tokenizer = chat.top_logprobs or 0, use.parse, tokenizer
        self._deltas, self.items = TextDeltas(), OutputItems()

    def grow(self, output: CompletionOutput) -> list[Json]:
        """Takes the text so far. Gives the events of what is new."""
        _, tokens, logprobs = self._deltas.next(output)
        shown = []
        if logprobs is not None:
            shown = chat_logprobs(tokens, logprobs, self._number, self._tokenizer)["content"]
        return self.items.grow(self._parse(output.text, output.finish_reason is not None), shown)


def make_router(service: Service) -> APIRouter:
    """The route of a server."""
    router = APIRouter(prefix="/v1", route_class=json_route(service))

    @router.post("/responses", responses=answers(ResponseObject, streams=True) | OF_GENERATION)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        service.check_model(body.model)
        chat = body.as_chat()
        use = tools.tool_use(chat, service.tokenizer.special_tokens.values())
        tokens, params = await chat_prompt(service, request, chat, use)
        answer, writer = _Answer(chat, use, service.tokenizer), ResponseBody(body)
        generation = Generation(service, request, [tokens], params)
        if body.stream:
            return await event_stream.respond(request, _events(generation, answer, writer))
        [state] = await generation.collect(request)
        answer.grow(state.outputs[0])
        answer.items.close(status_of(state))
        return JSONResponse(writer.finished(answer.items.items, state))

    return router


async def _events(generation: Generation, answer: _Answer, writer: ResponseBody) -> AsyncGenerator[str, None]:
    """The events, numbered. They begin when there is a text, so that what fails before has a status of its own."""
    number = 0
    async with aclosing(_told(generation, answer, writer)) as told:
        async for each in told:
            yield f"event: {each['type']}\ndata: {json.dumps({**each, 'sequence_number': number})}\n\n"
            number += 1


async def _told(generation: Generation, answer: _Answer, writer: ResponseBody) -> AsyncGenerator[Json, None]:
    last: RequestOutput | None = None
    async with aclosing(generation.stream()) as states:
        async for _, state in states:
            if last is None:
                for kind in ("response.created", "response.in_progress"):
                    yield {"type": kind, "response": writer.under_way()}
            last = state
            for each in answer.grow(state.outputs[0]):
                yield each
    assert last is not None
    for each in answer.items.close(status_of(last)):
        yield each
    yield {"type": f"response.{status_of(last)}", "response": writer.finished(answer.items.items, last)}
