"""OpenAI's routes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from furiosa_build.runtime.request import CompletionOutput, Logprob, RequestOutput
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.server.generation import Generation
from furiosa_build.server.http import event_stream
from furiosa_build.server.http.errors import bad_request
from furiosa_build.server.http.json_route import json_route
from furiosa_build.server.http.middleware import log_fields
from furiosa_build.server.openai import prompts, tools
from furiosa_build.server.openai.descriptions import (
    NO_MODEL,
    OF_GENERATION,
    ChatCompletion,
    Completion,
    Model,
    Models,
    answers,
)
from furiosa_build.server.openai.protocol import ChatRequest, CompletionRequest
from furiosa_build.server.openai.responses import (
    Json,
    ResponseWriter,
    TextDeltas,
    TokenOffsets,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
    usage,
)
from furiosa_build.server.openai.sampling import Sampling
from furiosa_build.server.openai.structured import Structure
from furiosa_build.server.openai.tools import MessageDeltas, ParsedText, ToolUse
from furiosa_build.server.service import Service

MakeChoice = Callable[[int, TextDeltas, CompletionOutput, RequestOutput], Json]
"""Index, what has been given of the text, the text, and a state that tells of its prompt -> the choice."""


def make_router(service: Service) -> APIRouter:
    """The routes of a server."""
    router = APIRouter(prefix="/v1", route_class=json_route(service))

    @router.get("/models", responses=answers(Models))
    async def models() -> Json:
        return {"object": "list", "data": [_model(service)]}

    @router.get("/models/{name:path}", responses=answers(Model) | NO_MODEL)
    async def model(name: str) -> Json:
        if not name:  # of a client that ends its addresses with a slash
            return await models()
        service.check_model(name)
        return _model(service)

    @router.post("/completions", responses=answers(Completion, streams=True) | OF_GENERATION)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        params = body.params(service.sampling_defaults.params, body.max_tokens, body.logprobs)
        tokens = [
            await prompts.encode(service.tokenizer, prompt, body.add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for prompt in body.prompts
        ]
        _log_prompt(service, request, body.prompts)
        shown: Sequence[str | list[int]] = body.prompts
        if body.truncate_prompt_tokens is not None:
            shown = tokens = [body.truncated(prompt, service.longest_prompt(body.max_tokens)) for prompt in tokens]
        if not all(tokens):
            raise bad_request("a prompt has no token", "prompt", "empty_prompt")
        echoes = [""] * len(tokens)
        if body.echo:
            skip = body.skip_special_tokens
            echoes = [await prompts.as_text(service.tokenizer, prompt, skip) for prompt in shown]

        offsets: dict[int, TokenOffsets] = {}

        def choice(index: int, text_deltas: TextDeltas, output: CompletionOutput, state: RequestOutput) -> Json:
            begins, prompt, tokenizer = text_deltas.is_first, index // body.n, service.engine.tokenizer
            text, ids, given = text_deltas.next(output)
            shown = None
            if given is not None and body.logprobs is not None:
                logprobs: list[dict[int, Logprob] | None] = [*given]
                if index not in offsets:
                    before = [] if body.echo else tokens[prompt]
                    offsets[index] = TokenOffsets(tokenizer, before, body.skip_special_tokens)
                if begins and body.echo:
                    ids, logprobs = tokens[prompt] + ids, [*(state.prompt_logprobs or ()), *given]
                shown = completion_logprobs(ids, logprobs, body.logprobs, tokenizer, offsets[index])
            echo = echoes[prompt] if begins else ""
            made = {"index": index, "text": echo + text, "logprobs": shown, "finish_reason": output.finish_reason}
            return made | _prompt_logprobs(body, state)

        writer = ResponseWriter("text_completion", "cmpl", body)
        generation = Generation(service, request, tokens, params)
        return await _respond(request, body, generation, writer, choice, choice)

    @router.post("/chat/completions", responses=answers(ChatCompletion, streams=True) | OF_GENERATION)
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        use = tools.tool_use(body, service.tokenizer.special_tokens.values())
        tokens, params = await chat_prompt(service, request, body, use)

        def part(index: int, text_deltas: TextDeltas, output: CompletionOutput, parsed: ParsedText) -> Json:
            _, ids, logprobs = text_deltas.next(output)
            shown = (
                None if logprobs is None else chat_logprobs(ids, logprobs, body.top_logprobs or 0, service.tokenizer)
            )
            called = parsed.calls and output.finish_reason == "stop"
            reason = "tool_calls" if called else output.finish_reason
            return {"index": index, "logprobs": shown, "finish_reason": reason}

        def whole(index: int, text_deltas: TextDeltas, output: CompletionOutput, _: RequestOutput) -> Json:
            parsed = use.parse(output.text, True)
            return part(index, text_deltas, output, parsed) | {"message": tools.message(parsed)}

        message_deltas: dict[int, MessageDeltas] = defaultdict(MessageDeltas)

        def delta(index: int, text_deltas: TextDeltas, output: CompletionOutput, _: RequestOutput) -> Json:
            parsed = use.parse(output.text, output.finish_reason is not None)
            return part(index, text_deltas, output, parsed) | {"delta": message_deltas[index].next(parsed)}

        writer = ResponseWriter("chat.completion", "chatcmpl", body)
        generation = Generation(service, request, [tokens], params)
        return await _respond(request, body, generation, writer, whole, delta)

    return router


async def chat_prompt(
    service: Service, request: Request, body: ChatRequest, use: ToolUse
) -> tuple[list[int], list[SamplingParams]]:
    """The prompt of a chat, and the sampling parameters of each answer. Raises ApiError and UserError."""
    schema = None if use.schema is None else Structure({"guided_json": use.schema}, "tools")
    params = use.shown(body.chat_params(service.sampling_defaults, schema))
    special = body.add_special_tokens
    text, tokens = await prompts.render(service.tokenizer, body.messages, body, use.offered, special)
    _log_prompt(service, request, [text])
    tokens = body.truncated(tokens, service.longest_prompt(body.limit))
    if not tokens:
        raise bad_request("the prompt has no token", "messages", "empty_prompt")
    return tokens, params


def _model(service: Service) -> Json:
    return {
        "id": service.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "furiosa-build",
        "root": service.engine.artifact.model_metadata.pretrained_id,
        "max_model_len": service.max_context,
    }


def _prompt_logprobs(body: Sampling, state: RequestOutput) -> Json:
    """vLLM's field `prompt_logprobs`, where it is asked for."""
    if body.prompt_logprobs is None or state.prompt_logprobs is None:
        return {}
    return {"prompt_logprobs": prompt_logprobs(state.prompt_logprobs, body.prompt_logprobs)}


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
        return await event_stream.respond(request, _events(generation, writer, part, body))
    states = await generation.collect(request)
    outputs = body.best([output for state in states for output in state.outputs])
    of_prompt = len(states) * body.n // len(outputs)  # states of each prompt
    choices = [
        whole(index, TextDeltas(), output, states[index // body.n * of_prompt]) for index, output in enumerate(outputs)
    ]
    answer = writer.body(choices, usage(generation.prompt_tokens, generation.generated_tokens))
    return JSONResponse(answer | (_prompt_logprobs(body, states[0]) if isinstance(body, ChatRequest) else {}))


async def _events(
    generation: Generation, writer: ResponseWriter, part: MakeChoice, body: Sampling
) -> AsyncGenerator[str, None]:
    # With usage asked for, every chunk has the field; by default only the last a value.
    field: dict[str, Json | None] = {"usage": None} if body.includes_usage else {}
    deltas: dict[int, TextDeltas] = {}
    async with aclosing(generation.stream()) as states:
        async for index, state in states:
            output = state.outputs[0]
            choice = part(index, deltas.setdefault(index, TextDeltas()), output, state)
            if body.every_chunk_has_usage:
                field["usage"] = usage(len(state.prompt_token_ids), len(output.token_ids))
            yield event_stream.event(writer.chunk([choice], **field))
    if body.includes_usage:
        numbers = usage(generation.prompt_tokens, generation.generated_tokens)
        yield event_stream.event(writer.chunk([], usage=numbers))
    yield event_stream.DONE
