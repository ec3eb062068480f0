"""Routes for embeddings, OpenAI's; for scores and reranking, vLLM's, Jina's and Cohere's."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from furiosa_build.runtime.pooling import PoolingParams, cosine
from furiosa_build.server.generation import Generation
from furiosa_build.server.http.errors import bad_request
from furiosa_build.server.http.json_route import json_route
from furiosa_build.server.http.middleware import log_fields
from furiosa_build.server.openai import prompts
from furiosa_build.server.openai.descriptions import OF_GENERATION, Embeddings, Ranking, Scores, answers
from furiosa_build.server.openai.pooling import EmbeddingRequest, Pooling, RerankRequest, ScoreRequest
from furiosa_build.server.openai.responses import Json
from furiosa_build.server.service import Service


def make_router(service: Service) -> APIRouter:
    """The routes of a server."""
    router = APIRouter(route_class=json_route(service))

    @router.post("/v1/embeddings", responses=answers(Embeddings) | OF_GENERATION)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        found, tokens = await _embed(service, request, body, body.inputs, body.params())
        data = [
            {"object": "embedding", "index": index, "embedding": body.encoded(embedding)}
            for index, embedding in enumerate(found)
        ]
        answer = _head(service, body, "embd") | {"object": "list", "data": data, "usage": _usage(tokens)}
        return await asyncio.to_thread(JSONResponse, answer)  # numbers by the thousand

    @router.post("/score", responses=answers(Scores) | OF_GENERATION)
    @router.post("/v1/score", include_in_schema=False)
    async def score(body: ScoreRequest, request: Request) -> Response:
        first, second = body.pairs
        scores, tokens = await _scores(service, request, body, first, second)
        data = [{"object": "score", "index": index, "score": found} for index, found in enumerate(scores)]
        answer = _head(service, body, "score") | {"object": "list", "data": data, "usage": _usage(tokens)}
        return JSONResponse(answer)

    @router.post("/rerank", responses=answers(Ranking) | OF_GENERATION)
    @router.post("/v1/rerank", include_in_schema=False)
    @router.post("/v2/rerank", include_in_schema=False)
    async def rerank(body: RerankRequest, request: Request) -> Response:
        texts = body.texts
        scores, tokens = await _scores(service, request, body, [body.query] * len(texts), texts)
        ranked = sorted(range(len(texts)), key=lambda index: scores[index], reverse=True)
        results: list[Json] = [{"index": index, "relevance_score": scores[index]} for index in ranked]
        if body.return_documents:
            results = [each | {"document": {"text": texts[each["index"]]}} for each in results]
        shown = results[: body.top_n or len(results)]
        return JSONResponse(_head(service, body, "rerank") | {"results": shown, "usage": _usage(tokens)})

    return router


async def _scores(
    service: Service, request: Request, body: Pooling, first: Sequence[str], second: Sequence[str]
) -> tuple[list[float], int]:
    """The cosine of the embeddings of each pair of texts, and the number of tokens in all texts."""
    texts = list(dict.fromkeys([*first, *second]))
    embeddings, tokens = await _embed(service, request, body, texts, PoolingParams())
    of = dict(zip(texts, embeddings, strict=True))
    return [cosine(of[one], of[other]) for one, other in zip(first, second, strict=True)], tokens


async def _embed(
    service: Service, request: Request, body: Pooling, inputs: Sequence[str | list[int]], params: PoolingParams
) -> tuple[list[list[float]], int]:
    """The embedding of each input, and the number of tokens in all of them."""
    service.check_model(body.model)
    tokens = [
        await prompts.encode(service.tokenizer, each, body.add_special_tokens) if isinstance(each, str) else each
        for each in inputs
    ]
    if service.options.log_prompts:
        log_fields(request.scope)["prompts"] = list(inputs)
    tokens = [body.truncated(each, service.longest_prompt(0)) for each in tokens]
    if not all(tokens):
        raise bad_request("an input has no token", "input", "empty_input")
    generation = Generation(service, request, tokens, [params])
    states = await generation.collect(request)
    return [state.embedding or [] for state in states], generation.prompt_tokens


def _head(service: Service, body: Pooling, prefix: str) -> Json:
    model = body.model or service.model_name
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def _usage(tokens: int) -> Json:
    return {"prompt_tokens": tokens, "total_tokens": tokens}
