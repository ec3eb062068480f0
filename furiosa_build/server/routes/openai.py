"""OpenAI's routes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from furiosa_build.runtime.request import CompletionOutput, Logprob
from furiosa_build.server.generation import Generation
from furiosa_build.server.http import event_stream
from furiosa_build.server.http.errors import ApiError, bad_request
from furiosa_build.server.http.json_route import json_route
from furiosa_build.server.http.middleware import log_fields
from furiosa_build.server.openai import prompts, tools
from furiosa_build.server.openai.descriptions import OF_GENERATION, ChatCompletion, Completion, Models, answers
from furiosa_build.server.openai.protocol import ChatRequest, CompletionRequest, Sampling
from furiosa_build.server.openai.responses import Json, ResponseWriter, TextDeltas, chat_logprobs, usage
from furiosa_build.server.openai.tools import MessageDeltas, ParsedText
from furiosa_build.server.service import Service

Logprobs = list[dict[int, Logprob]] | None
MakeChoice = Callable[[int, TextDeltas, CompletionOutput], Json]


def make_router(service: Service) -> APIRouter:
    """The routes of a server."""
    router = APIRouter(prefix="/v1", route_class=json_route(service))

    @router.get("/models", responses=answers(Models))
    async def models() -> Json:
        artifact = service.engine.artifact
        model = {
            "id": service.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "furiosa-build",
            "root": artifact.model_metadata.pretrained_id,
            "max_model_len": artifact.generator_config.max_seq_len_to_capture,
        }
        return {"object": "list", "data": [model]}

    @router.post("/completions", responses=answers(Completion, streams=True) | OF_GENERATION)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        if body.echo and body.logprobs is not None:
            raise bad_request("echo and logprobs do not go together", "echo")
        params = body.params(body.max_tokens, body.logprobs)
        tokens = [
            await prompts.encode(service.tokenizer, prompt) if isinstance(prompt, str) else prompt
            for prompt in body.prompts
        ]
        _log_prompt(service, request, body.prompts)
        echoes = [""] * len(tokens)
        if body.echo:
            echoes = [await prompts.as_text(service.tokenizer, prompt) for prompt in body.prompts]

        def choice(index: int, text_deltas: TextDeltas, output: CompletionOutput) -> Json:
            begins = text_deltas.is_first
            text, ids, logprobs = text_deltas.next(output)
            shown = None if logprobs is None else text_deltas.completion_logprobs(ids, logprobs, body.logprobs or 0)
            echo = echoes[index // body.n] if begins else ""
            return {"index": index, "text": echo + text, "logprobs": shown, "finish_reason": output.finish_reason}

        writer = ResponseWriter("text_completion", "cmpl", body.model)
        generation = Generation(service, request, tokens, params)
        return await _respond(request, body, generation, writer, choice, choice)

    @router.post("/chat/completions", responses=answers(ChatCompletion, streams=True) | OF_GENERATION)
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        use = tools.tool_use(body)
        params = body.chat_params(use.schema)
        text, tokens = await prompts.render(service.tokenizer, body.messages, use.offered)
        _log_prompt(service, request, [text])

        def part(index: int, text_deltas: TextDeltas, output: CompletionOutput, parsed: ParsedText) -> Json:
            _, ids, logprobs = text_deltas.next(output)
            shown = None if logprobs is None else chat_logprobs(ids, logprobs, body.top_logprobs or 0)
            called = parsed.calls and output.finish_reason == "stop"
            reason = "tool_calls" if called else output.finish_reason
            return {"index": index, "logprobs": shown, "finish_reason": reason}

        def whole(index: int, text_deltas: TextDeltas, output: CompletionOutput) -> Json:
            parsed = use.parse(output.text, True)
            return part(index, text_deltas, output, parsed) | {"message": tools.message(parsed)}

        message_deltas: dict[int, MessageDeltas] = defaultdict(MessageDeltas)

        def delta(index: int, text_deltas: TextDeltas, output: CompletionOutput) -> Json:
            parsed = use.parse(output.text, output.finish_reason is not None)
            return part(index, text_deltas, output, parsed) | {"delta": message_deltas[index].next(parsed)}

        writer = ResponseWriter("chat.completion", "chatcmpl", body.model)
        try:
            return await _respond(request, body, Generation(service, request, [tokens], params), writer, whole, delta)
        except ApiError as error:
            if use.schema is None or error.param != "response_format":
                raise
            raise bad_request(error.message, "tools") from error

    return router


def _log_prompt(service: Service, request: Request, texts: Sequence[Any]) -> None:
    if service.options.log_prompts:
        log_fields(request.scope)["prompts"] = list(texts)


async def _respond(
    request: Request,
    body: Sampling,
    generation: Generation,
    writer: ResponseWriter,
    whole: MakeChoice,
    part: MakeChoice,
) -> Response:
    """The response, whole or as a stream."""
    if body.stream:
        return await event_stream.respond(request, _events(generation, writer, part, body.includes_usage))
    outputs = [state.outputs[0] for state in await generation.collect(request)]
    choices = [whole(index, TextDeltas(), output) for index, output in enumerate(outputs)]
    return JSONResponse(writer.body(choices, usage(generation.prompt_tokens, generation.generated_tokens)))


async def _events(
    generation: Generation, writer: ResponseWriter, part: MakeChoice, includes_usage: bool
) -> AsyncGenerator[str, None]:
    # With usage asked for, every chunk has the field, and only the last a value.
    field: dict[str, Json | None] = {"usage": None} if includes_usage else {}
    deltas: dict[int, TextDeltas] = {}
    async with aclosing(generation.stream()) as states:
        async for index, state in states:
            choice = part(index, deltas.setdefault(index, TextDeltas()), state.outputs[0])
            yield event_stream.event(writer.chunk([choice], **field))
    if includes_usage:
        numbers = usage(generation.prompt_tokens, generation.generated_tokens)
        yield event_stream.event(writer.chunk([], usage=numbers))
    yield event_stream.DONE
