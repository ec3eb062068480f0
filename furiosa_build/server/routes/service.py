"""Routes about the server and its tokenizer."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

import furiosa_build
from furiosa_build.server.http.errors import bad_request
from furiosa_build.server.http.json_route import json_route
from furiosa_build.server.metrics import CONTENT_TYPE
from furiosa_build.server.openai import prompts
from furiosa_build.server.openai.descriptions import (
    HEALTH,
    METRICS,
    OF_BODIES,
    Text,
    TokenizerInfo,
    Tokens,
    Version,
    answers,
)
from furiosa_build.server.openai.protocol import DetokenizeRequest, TokenizeRequest
from furiosa_build.server.openai.responses import Json
from furiosa_build.server.service import Service


def make_router(service: Service) -> APIRouter:
    """The routes of a server."""
    router = APIRouter(route_class=json_route(service))

    @router.get("/health", responses=HEALTH, response_class=Response)
    async def health() -> Response:
        """Empty. 200 when requests are taken; 503 while the model is loaded, while the server drains, if it failed."""
        return Response(status_code=200 if service.is_healthy else 503)

    @router.get("/version", responses=answers(Version))
    async def version() -> Json:
        return {"version": furiosa_build.__version__}

    @router.get("/metrics", responses=METRICS, response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @router.get("/tokenizer_info", responses=answers(TokenizerInfo))
    async def tokenizer_info() -> Json:
        return {"tokenizer_class": "PreTrainedTokenizerFast", **service.tokenizer.description}

    @router.post("/tokenize", responses=answers(Tokens) | OF_BODIES)
    async def tokenize(body: TokenizeRequest) -> Json:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("either prompt or messages is given", "prompt")
        if body.messages is not None:
            offered = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
            special = bool(body.add_special_tokens)
            _, tokens = await prompts.render(service.tokenizer, body.messages, body, offered or None, special)
        else:
            tokens = await prompts.encode(service.tokenizer, body.prompt or "", body.add_special_tokens is not False)
        found = {"tokens": tokens, "count": len(tokens), "max_model_len": service.max_context}
        return found | ({"token_strs": list(map(service.tokenizer.token, tokens))} if body.return_token_strs else {})

    @router.post("/detokenize", responses=answers(Text) | OF_BODIES)
    async def detokenize(body: DetokenizeRequest) -> Json:
        service.check_model(body.model)
        vocabulary = service.engine.artifact.model_metadata.vocab_size
        for token in body.tokens:
            if token >= vocabulary:
                raise bad_request(f"{token} is not a token id: there are 0 to {vocabulary - 1}", "tokens")
        return {"prompt": await prompts.decode(service.tokenizer, body.tokens, body.skip_special_tokens)}

    return router
