"""langchain-openai: chats, tools, structured output, completions, and the Responses API."""

from __future__ import annotations

import sys
from typing import Any, Literal

from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

where: dict[str, Any] = {"model": "test", "base_url": f"{sys.argv[1]}/v1", "api_key": "unused", "max_retries": 0}


class Sea(BaseModel):
    """The sea."""

    kind: Literal["calm", "wild"]


@tool
def look(at: Literal["shore", "sea"]) -> str:
    """Look at the sea."""
    return f"nothing at the {at}"


brief = ChatOpenAI(max_tokens=6, temperature=0, **where)
said = brief.invoke("Hello")
assert "".join(chunk.content for chunk in brief.stream("Hello")) == said.content
brief.invoke([("user", "Hello"), said, ("user", "Go on")])
print("chat")

chat = ChatOpenAI(max_tokens=200, **where)
for method in ("json_schema", "function_calling"):
    assert isinstance(chat.with_structured_output(Sea, method=method, strict=True).invoke("Hello"), Sea)
called = chat.bind_tools([look], strict=True, tool_choice="any", parallel_tool_calls=False).invoke("Look")
[call] = called.tool_calls
result = ToolMessage(look.invoke(call["args"]), tool_call_id=call["id"])
chat.bind_tools([look]).invoke([("user", "Look"), called, result], max_tokens=4)
print("tools")

text = OpenAI(max_tokens=6, temperature=0, **where)
assert "".join(text.stream("It was a")) == text.invoke("It was a")
responses = ChatOpenAI(max_tokens=6, temperature=0, use_responses_api=True, **where)
assert responses.invoke("Hello").text == said.content
assert "".join(chunk.text for chunk in responses.stream("Hello")) == said.content
print("others")
