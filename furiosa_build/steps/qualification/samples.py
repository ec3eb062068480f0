"""Texts and conversations that tokenizers and chat templates are compared on, and a passage to measure models on."""

from __future__ import annotations

from typing import Any

TEXTS = (
    "It is a truth universally acknowledged, that",
    "The answer to the question is",
    "1 2 3 4 5 6",
    "",
    " ",
    "  two spaces before,  between  and after  ",
    "a line\nanother\r\n\n\nand\ta tab\t\t.",
    "0123456789 3.14159 1,000,000 1e-9 007 2024-02-29",
    "don't can't I'll we've it's -- 'quoted' \"quoted\" (brackets) [1] {x} <tag/>",
    "def f(x: int) -> str:\n    return f\"{x!r}\" if x >= 0 else '-'  # negative\n",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\path\\file.txt",
    "naïve façade, Straße, İstanbul, smørrebrød; ﬁ ½ ² ™ …",
    "e\u0301 combined, \u00e9 composed; zero\u200bwidth and no\u00a0break; \ufeffmark",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم",
    "नमस्ते दुनिया สวัสดีชาวโลก გამარჯობა 안녕하세요 세계",
    "你好，世界！今天是2024年。 こんにちは、世界。ｶﾀｶﾅ ＡＢＣ１２３",
    "🙂 👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 👍🏽 🇰🇷 ☃\ufe0f 𝒳 𓀀",
    "Antidisestablishmentarianism HTTPServerError snake_case_name kebab-case aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)
"""Spaces, digits, code, marks, other scripts and emoji. The first three are continued as well."""

AROUND = ("{}", " {} ", "a{}b", "a {} b", "{}{}", "\n{}\n")
"""How a special token stands in a text."""

_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather in a city, today\'s "real" one',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["°C", "°F"]}},
            "required": ["city"],
        },
    },
}


def _message(role: str, content: str, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


_SYSTEM = _message("system", "You are a careful assistant.\nAnswer briefly.")
_USER = _message("user", "  Hello, how are you? <b>Ü</b> 🙂\n")
_TURNS = [_message("user", "Hi."), _message("assistant", "Hello! What is it?"), _message("user", "What is 2 + 2?")]
_CALLS = [
    _message("user", "How warm is it in Seoul?"),
    _message(
        "assistant",
        "",
        tool_calls=[
            {
                "id": "call12345",
                "type": "function",
                "function": {"name": "get_weather", "arguments": {"city": "Seoul", "unit": "°C"}},
            }
        ],
    ),
    _message("tool", "21", name="get_weather", tool_call_id="call12345"),
]

CHATS: tuple[dict[str, Any], ...] = (
    {"messages": [_USER]},
    {"messages": [_USER], "add_generation_prompt": False},
    {"messages": [_SYSTEM, _USER]},
    {"messages": _TURNS},
    {"messages": [_SYSTEM, *_TURNS, _message("assistant", "4.")], "add_generation_prompt": False},
    {"messages": [_USER], "tools": [_WEATHER]},
    {"messages": [_SYSTEM, *_TURNS], "tools": [_WEATHER]},
    {"messages": _CALLS, "tools": [_WEATHER]},
)
"""With and without system, tools and generation prompt; one and several turns; a tool that was called."""

PASSAGE = """\
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.

However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so
well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or other
of their daughters.

"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at last?"

Mr. Bennet replied that he had not.

"But it is," returned she; "for Mrs. Long has just been here, and she told me all about it."

Mr. Bennet made no answer.

"Do not you want to know who has taken it?" cried his wife impatiently.

"You want to tell me, and I have no objection to hearing it."

This was invitation enough.

"Why, my dear, you must know, Mrs. Long says that Netherfield is taken by a young man of large fortune from the north of
England; that he came down on Monday in a chaise and four to see the place, and was so much delighted with it that he
agreed with Mr. Morris immediately; that he is to take possession before Michaelmas, and some of his servants are to be
in the house by the end of next week."

"What is his name?"

"Bingley."

"Is he married or single?"

"Oh! single, my dear, to be sure! A single man of large fortune; four or five thousand a year. What a fine thing for our
girls!"

"How so? how can it affect them?"

"My dear Mr. Bennet," replied his wife, "how can you be so tiresome! You must know that I am thinking of his marrying
one of them."

"Is that his design in settling here?"

"Design! nonsense, how can you talk so! But it is very likely that he may fall in love with one of them, and therefore
you must visit him as soon as he comes."
"""
"""The beginning of Jane Austen's `Pride and Prejudice` (1813)."""
