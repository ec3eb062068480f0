"""Requests for embeddings, for scores of pairs of texts, and for the order of documents."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import AliasChoices, Field, field_validator
from pydantic_core import PydanticCustomError

from furiosa_build.runtime.pooling import PoolingParams
from furiosa_build.server.http.body import Body, Integer, Unsupported
from furiosa_build.server.http.errors import bad_request
from furiosa_build.server.openai.protocol import TokenIds
from furiosa_build.server.openai.truncation import Truncation

MAX_INPUTS = 2048

_TEXTS_ONLY = "give texts"

Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]


class Pooling(Truncation):
    """The fields that all of these have in common."""

    without_effect: ClassVar = frozenset({"metadata", "mm_processor_kwargs", "request_id", "user"})
    unsupported: ClassVar = {
        "cache_salt": Unsupported("requests share the prefix cache; it can be turned off for the server"),
        "chat_template": Unsupported(_TEXTS_ONLY),
        "instruction": Unsupported("write it into the texts"),
        "messages": Unsupported(_TEXTS_ONLY),
        "priority": Unsupported("requests are served in the order in which they come", (0,)),
    }
    model: str | None = None
    add_special_tokens: bool = True


class EmbeddingRequest(Pooling):
    """Body of /v1/embeddings. Fields from `normalize` on are vLLM's additions."""

    unsupported: ClassVar = {
        "embed_dtype": Unsupported("embeddings are float32", ("float32",)),
        "endianness": Unsupported("embeddings are little-endian", ("native", "little")),
    }
    input: str | TokenIds | Texts | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: str = Field("float", pattern="^(float|base64)$")
    dimensions: Integer | None = Field(None, ge=1)
    normalize: bool = Field(True, validation_alias=AliasChoices("normalize", "use_activation"))

    @field_validator("input", mode="before")
    @classmethod
    def _not_empty(cls, given: Any) -> Any:
        if given == "" or (isinstance(given, list) and (not given or [] in given or "" in given)):
            raise PydanticCustomError("empty_input", "an input is empty")
        return given

    @property
    def engine_names(self) -> dict[str, str]:
        """Fields by the names that the engine's errors have for them."""
        return {"prompt": "input"}

    @property
    def inputs(self) -> Sequence[str | list[int]]:
        """Each input, a text or token ids."""
        given: Any = self.input
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given

    def params(self) -> PoolingParams:
        """How the engine makes an embedding."""
        return PoolingParams(normalize=self.normalize, dimensions=self.dimensions)

    def encoded(self, embedding: Sequence[float]) -> Sequence[float] | str:
        """An embedding as `encoding_format` says: as numbers, or as the bytes of little-endian float32 in base64."""
        if self.encoding_format == "float":
            return embedding
        return base64.b64encode(np.array(embedding, dtype="<f4").tobytes()).decode()


class ScoreRequest(Pooling):
    """Body of /score: texts that are compared, one with each or in pairs."""

    text_1: str | Texts = Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))
    text_2: str | Texts = Field(validation_alias=AliasChoices("text_2", "documents", "data_2"))

    @property
    def pairs(self) -> tuple[list[str], list[str]]:
        """The first and the second text of each pair."""
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        second = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if len(first) not in (1, len(second)):
            message = f"{len(first)} texts do not go with {len(second)}: give one, or as many"
            raise bad_request(message, "text_1")
        return first * len(second) if len(first) == 1 else first, second


class Document(Body):
    """A document to be ranked."""

    text: str


class RerankRequest(Pooling):
    """Body of /rerank: which documents answer a query best."""

    unsupported: ClassVar = {"max_tokens_per_doc": Unsupported("give truncate_prompt_tokens", (0,))}
    query: str
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=MAX_INPUTS)]
    top_n: Integer = Field(0, ge=0, description="The most documents of the answer; 0: all.")
    return_documents: bool = True

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [each if isinstance(each, str) else each.text for each in self.documents]
