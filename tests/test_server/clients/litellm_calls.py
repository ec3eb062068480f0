"""litellm: chats, streams and completions, as its providers `openai` and `hosted_vllm`."""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks for a newer one elsewhere

import litellm

where: dict[str, Any] = {"api_base": f"{sys.argv[1]}/v1", "api_key": "unused", "max_retries": 0}
messages: list[Any] = [{"role": "user", "content": "Hello"}]
for provider in ("openai", "hosted_vllm"):
    done = litellm.completion(model=f"{provider}/test", messages=messages, max_tokens=6, temperature=0, **where)
    said = done.choices[0].message
    goes_on = [*messages, said, {"role": "user", "content": "Go on"}]
    litellm.completion(model=f"{provider}/test", messages=goes_on, max_tokens=2, **where)
    stream = litellm.completion(
        model=f"{provider}/test", messages=messages, max_tokens=6, temperature=0, stream=True, **where
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == said.content
    print(provider)
text = litellm.text_completion(model="text-completion-openai/test", prompt="It was a", max_tokens=4, **where)
assert text.choices[0].text
response = litellm.responses(model="openai/test", input="Hello", max_output_tokens=4, **where)
assert response.output
