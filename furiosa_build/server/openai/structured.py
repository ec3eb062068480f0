"""What a request says that the text is to look like: OpenAI's `response_format`, and vLLM's ways of saying it."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from furiosa_build.runtime.sampling.guided import from_response_format
from furiosa_build.server.http.body import Body, Unsupported
from furiosa_build.server.http.errors import bad_request

Json = dict[str, Any]

_OWN_SPACE = "there is a space, or none, after a comma and a colon"


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: one of its fields is given."""

    without_effect: ClassVar = frozenset({"disable_any_whitespace", "disable_fallback"})
    unsupported: ClassVar = {
        "disable_additional_properties": Unsupported("say so in the schema", (False,)),
        "structural_tag": Unsupported("give tools"),
        "whitespace_pattern": Unsupported(_OWN_SPACE),
    }
    schema_: Json | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, max_length=1024)
    grammar: str | None = None
    json_object: bool = False


class Structure(NamedTuple):
    """What constrains the text: a `guided_...` parameter of the engine, and the field that the client wrote."""

    guided: Json
    field: str


class Structured(Body):
    """The fields of a request that constrain the text. All but the first are vLLM's."""

    without_effect: ClassVar = frozenset({"guided_decoding_backend"})
    unsupported: ClassVar = {"guided_whitespace_pattern": Unsupported(_OWN_SPACE)}
    response_format: Json | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, max_length=1024)
    guided_grammar: str | None = None

    @property
    def engine_names(self) -> dict[str, str]:
        """The field that was given, by the name that the engine has for it."""
        return {f"guided_{kind}": field for kind, field, _ in self._given()}

    def structure(self) -> Structure | None:
        """What constrains the text; None: nothing. Raises ApiError where several fields do, and UserError."""
        given = self._given()
        if len(given) > 1:
            (_, one, _), (_, other, _), *_ = given
            raise bad_request(f"{one} and {other} do not go together", other)
        for kind, field, value in given:
            return Structure({f"guided_{kind}": value}, field)
        return None

    def _given(self) -> list[tuple[str, str, Any]]:
        """The fields that constrain the text: the kind, its name, and the engine's value."""
        of_vllm = self.structured_outputs or StructuredOutputs()
        fields = (
            (
                "json",
                "response_format",
                from_response_format(self.response_format or {"type": "text"}).get("guided_json"),
            ),
            ("json", "guided_json", self.guided_json),
            ("regex", "guided_regex", self.guided_regex),
            ("choice", "guided_choice", self.guided_choice),
            ("grammar", "guided_grammar", self.guided_grammar),
            ("json", "structured_outputs.json", of_vllm.schema_),
            ("regex", "structured_outputs.regex", of_vllm.regex),
            ("choice", "structured_outputs.choice", of_vllm.choice),
            ("grammar", "structured_outputs.grammar", of_vllm.grammar),
            ("json", "structured_outputs.json_object", {"type": "object"} if of_vllm.json_object else None),
        )
        return [each for each in fields if each[-1] is not None]
