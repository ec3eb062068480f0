"""Requests of OpenAI's Responses API, as the chats that they are."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field
from pydantic import Tag as Named

from furiosa_build.server.http.body import Body, Integer, Unsupported
from furiosa_build.server.http.errors import bad_request
from furiosa_build.server.openai.messages import CalledFunction, Content, Message, TemplateOptions, ToolCall
from furiosa_build.server.openai.protocol import MAX_TOOLS, ChatRequest, Function, Tool
from furiosa_build.server.openai.sampling import MAX_LOGPROBS, Sampling

Json = dict[str, Any]

_NOTHING_IS_STORED = "nothing is stored; give all that was said as input"
LOGPROBS = "message.output_text.logprobs"
"""What `include` has for log probabilities."""


class InputMessage(Body):
    """A message, or one of an earlier answer."""

    without_effect: ClassVar = frozenset({"id", "phase", "status"})
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class InputCall(CalledFunction):
    """A call of an earlier answer."""

    without_effect: ClassVar = frozenset({"async", "caller", "id", "namespace", "status"})
    type: Literal["function_call"]
    call_id: str


class InputResult(Body):
    """What a called function gave."""

    without_effect: ClassVar = frozenset({"id", "status"})
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class InputReasoning(Body):
    """Reasoning of an earlier answer. It is left out, as templates leave it out of earlier turns."""

    without_effect: ClassVar = frozenset({"id", "status", "summary", "content", "encrypted_content"})
    type: Literal["reasoning"]


def _kind(item: Any) -> Any:
    return item.get("type") or "message" if isinstance(item, dict) else getattr(item, "type", "message")


Item = Annotated[
    Annotated[InputMessage, Named("message")]
    | Annotated[InputCall, Named("function_call")]
    | Annotated[InputResult, Named("function_call_output")]
    | Annotated[InputReasoning, Named("reasoning")],
    Discriminator(_kind, "unsupported", "there are messages, function_call, function_call_output and reasoning only"),
]


class ResponseTool(Function):
    """A function that is offered to the model. OpenAI's own tools are not here."""

    without_effect: ClassVar = frozenset({"defer_loading"})
    type: Literal["function"]


class TextFormat(Body):
    """The form of the text; `json_schema` has a schema and its name."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Json | None = Field(None, alias="schema")


class TextOptions(Body):
    """What is asked of the text."""

    unsupported: ClassVar = {"verbosity": Unsupported("the model knows of none", ("medium",))}
    format: TextFormat = TextFormat()


class Reasoning(Body):
    """What is asked of the model's reasoning: the effort, a variable of the chat template."""

    without_effect: ClassVar = frozenset({"context", "generate_summary", "summary"})
    effort: str | None = None


class ResponsesRequest(Sampling, TemplateOptions):
    """Body of /v1/responses. What it shares with chats has the same meaning."""

    without_effect: ClassVar = frozenset({"background", "max_tool_calls"})
    unsupported: ClassVar = {
        "background": Unsupported("the answer is given at once", (False,)),
        "context_management": Unsupported(_NOTHING_IS_STORED, ([],)),
        "conversation": Unsupported(_NOTHING_IS_STORED),
        "previous_response_id": Unsupported(_NOTHING_IS_STORED),
        "prompt": Unsupported("give instructions and input"),
        "truncation": Unsupported("give truncate_prompt_tokens", ("disabled",)),
    }
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    n: Integer = Field(1, ge=1, le=1)
    max_output_tokens: Integer | None = Field(None, ge=1)
    text: TextOptions = TextOptions()
    reasoning: Reasoning = Reasoning()
    include: list[str] = Field([], description=f"Of use: {LOGPROBS}.")
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[ResponseTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = Field(None, description="Nothing is stored, whatever it says.")
    metadata: Json = Field({}, description="Given back as it is.")

    @property
    def engine_names(self) -> dict[str, str]:
        """Fields by the names that chats and the engine's errors have for them."""
        names = {"guided_json": "tools", "max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}
        of_format = {"response_format": "text.format", "messages": "input", "prompt": "input"}
        constrained = {"guided_json": "text.format"} if self.text.format.type != "text" else {}
        return names | of_format | constrained | super().engine_names

    def as_chat(self) -> ChatRequest:
        """The chat that it is. Raises ApiError for what is asked to be included, and cannot be."""
        for number, name in enumerate(self.include):
            if name not in (LOGPROBS, "reasoning.encrypted_content"):
                raise bad_request(f"include does not take {name!r}, only {LOGPROBS!r}", f"include.{number}")
        shared = {name: getattr(self, name) for name in self.model_fields_set & ChatRequest.model_fields.keys()}
        own: Json = {
            "messages": self._messages(),
            "tools": [Tool(type="function", function=_as_function(tool)) for tool in self.tools] or None,
            "tool_choice": _tool_choice(self.tool_choice),
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": LOGPROBS in self.include,
            "top_logprobs": self.top_logprobs if LOGPROBS in self.include else None,
        }
        if self.text.format.type != "text":
            own["response_format"] = _response_format(self.text.format)
        if self.reasoning.effort is not None:
            own["reasoning_effort"] = self.reasoning.effort
        return ChatRequest.model_validate(shared | own)

    def _messages(self) -> list[Message]:
        items = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        for item in items:
            match item:
                case InputMessage():
                    messages.append(Message(role=item.role, content=item.content))
                case InputCall():
                    function = CalledFunction(name=item.name, arguments=item.arguments)
                    call = ToolCall(id=item.call_id, function=function)
                    if messages and messages[-1].role == "assistant":
                        messages[-1].tool_calls = [*(messages[-1].tool_calls or []), call]
                    else:
                        messages.append(Message(role="assistant", tool_calls=[call]))
                case InputResult():
                    messages.append(Message(role="tool", tool_call_id=item.call_id, content=item.output))
        if not messages:
            raise bad_request("input has nothing to answer: no message, and no function_call or its output", "input")
        return messages


def _as_function(tool: ResponseTool) -> Function:
    return Function.model_validate(tool.model_dump(exclude={"type"}))


def _tool_choice(choice: str | Json | None) -> str | Json | None:
    """OpenAI names a function without the object around it that chats have."""
    match choice:
        case {"type": "function", "name": str(name), **others} if not others:
            return {"type": "function", "function": {"name": name}}
    return choice


def _response_format(given: TextFormat) -> Json:
    if given.type == "json_object":
        return {"type": "json_object"}
    schema = given.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
    return {"type": "json_schema", "json_schema": schema}
