"""Structured output: which tokens may come next, so that the text is what a schema, regex, choice or grammar allows.

llguidance does the work. It is imported for the first request that asks for it, unless `Guides.prepare` was called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.sampling.params import GUIDED, SamplingParams
from furiosa_build.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# One space after a comma or a colon, as `json.dumps` writes it, or none. Free white space lets a model write nothing
# else. Letters are not escaped: llguidance does not see that the key "\u0061" is "a". What has to be escaped can be.
_JSON = {
    "item_separator": ", ?",
    "key_separator": ": ?",
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
    "json_allowed_escapes": 'nrbtf\\"',
}

# Where a pattern has a class of all control characters, llguidance lets a quote and a backslash pass too, even if the
# class excludes them, as [^"] does. Without these two escapes it cannot. Such a class is negated, or has one of these.
_MAY_HAVE_CONTROL_CHARACTERS = re.compile(r"\[\^|\\[xuUpP]|\[:|--|&&|~~|[\x00-\x1f]")
_ESCAPES_BESIDE_SUCH_A_CLASS = "nrbtf"

_ESCAPE = re.compile(r"\\.", re.DOTALL)
_DIGITS = {r"\d": "[0-9]", r"\D": "[^0-9]"}
# Strings and comments of a grammar in Lark's notation, and in a group its regular expressions.
_LARK = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/((?:\\.|[^/\\\n])+)/')

# Bytes of text. llguidance follows references by recursion, and a chain of some thousands overflows the stack, which
# ends the process (seen: 4000 rules in 45 kB, 2000 references in 80 kB).
_LONGEST = {"guided_json": 32768, "guided_grammar": 16384}
_LONGEST_MESSAGE = 500


class Guides:
    """Makes the guides of an engine's requests.

    Args:
        tokenizer: The artifact's tokenizer, if it has one.
        end_token_ids: The model's end-of-sequence tokens.
        vocab_size: The number of logits. May be more or less than the tokenizer has tokens.
    """

    def __init__(self, tokenizer: Tokenizer | None, end_token_ids: Collection[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._end_token_ids = sorted(end_token_ids)
        self._vocab_size = vocab_size
        self._shared: LLTokenizer | None = None

    def prepare(self) -> None:
        """Does what the first request would wait for; nothing where none can be served.

        With a large vocabulary it takes up to a second, in which no other thread of the process runs: llguidance does
        not let go of the interpreter.
        """
        with suppress(UserError):
            self._llguidance_tokenizer("")

    def make(self, params: SamplingParams) -> Guide | None:
        """The guide for one request; None if its parameters ask for none.

        Raises:
            UserError: llguidance is not installed, or does not take the tokenizer, schema, regex or grammar; no text
                matches; the model has no end-of-sequence token, or the artifact no tokenizer.
        """
        name = next((name for name in GUIDED if getattr(params, name) is not None), None)
        if name is None:
            return None
        where = f"SamplingParams.{name}"
        tokenizer = self._llguidance_tokenizer(where)
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = _grammar(name, getattr(params, name), where)
        except ValueError as error:
            raise UserError(f"{name} cannot be served: {_short(str(error))}", where=where) from error
        limits = LLParserLimits(verbose_errors=False)  # the verbose ones show the whole grammar
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        guide = Guide(matcher, self._end_token_ids, self._vocab_size)
        if guide.error is not None:
            raise UserError(
                f"{name} cannot be served: {guide.error}", where=where, hint="docs/runtime.md lists what can be"
            )
        return guide

    def _llguidance_tokenizer(self, where: str) -> LLTokenizer:
        if self._shared is None:
            try:
                from llguidance import LLTokenizer
            except ImportError as error:
                raise UserError(
                    "structured output needs the package llguidance, which is not installed",
                    where=where,
                    hint="pip install 'furiosa-build[guided]'",
                ) from error
            if self._tokenizer is None:
                raise UserError("the artifact has no tokenizer, which structured output needs", where=where)
            if not self._end_token_ids:
                raise UserError("the model has no end-of-sequence token, which structured output needs", where=where)
            try:
                self._shared = LLTokenizer(self._tokenizer.to_json(), eos_token=self._end_token_ids)
            except ValueError as error:
                raise UserError(f"llguidance does not take the tokenizer: {error}", where=where) from error
        return self._shared


class Guide:
    """The grammar of one request, and how far its text has got.

    It moves by the tokens that are chosen, not by those that are run, so that a preempted request, whose tokens are run
    again, goes on as it would have.

    Attributes:
        allowed: bool [vocab]: the tokens that may come next; the end-of-sequence tokens exactly if the text may end.
            Of no meaning when the text is complete or there is an error.
        is_complete: The text matches, and nothing can follow it.
        error: Why the text can neither go on nor end; None if it can. A grammar may have a dead end, or become too
            costly to follow.
    """

    def __init__(self, matcher: LLMatcher, end_token_ids: list[int], vocab_size: int) -> None:
        self._matcher = matcher
        self._end_token_ids = end_token_ids
        self._vocab_size = vocab_size
        self.is_complete = False
        self.error: str | None = None
        self._update()

    def advance(self, token: int) -> None:
        """Takes the token that was chosen, one of the allowed."""
        self._matcher.consume_token(token)
        self._update()

    def _update(self) -> None:
        matcher = self._matcher
        if not matcher.is_stopped():
            # A byte holds the first of 8 tokens in its lowest bit. Beyond the tokenizer's tokens there are zeros.
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            self.allowed: NDArray[np.bool_] = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(bool)
        if matcher.is_error():
            self.error = _short(matcher.get_error())
        elif matcher.is_stopped():
            self.is_complete = True
        elif not self.allowed.any():
            self.error = "no token of the model can follow"
        elif matcher.is_accepting():
            self.is_complete = self._can_only_end()

    def _can_only_end(self) -> bool:
        return int(np.count_nonzero(self.allowed)) == int(np.count_nonzero(self.allowed[self._end_token_ids]))


def from_response_format(response_format: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of SamplingParams for OpenAI's `response_format`; none for text.

    The schema is always enforced, so `strict` changes nothing; nor do `name` and `description`.

    Raises:
        UserError: It has another form.
    """
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"guided_json": {"type": "object"}}
    if kind != "json_schema":
        raise UserError(
            f"the type of a response format is not {kind!r}",
            where="response_format.type",
            valid="text, json_object, json_schema",
        )
    described = response_format.get("json_schema")
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(schema, Mapping):
        raise UserError("the response format has no schema", where="response_format.json_schema.schema", valid="a dict")
    return {"guided_json": dict(schema)}


def _grammar(name: str, value: Any, where: str) -> str:
    """The grammar in llguidance's form."""
    from llguidance import LLMatcher

    longest = _LONGEST.get(name)
    if longest is not None and (size := len(value.encode("utf-8", "surrogatepass"))) > longest:
        raise UserError(f"{name} has {size} bytes", where=where, valid=f"at most {longest}")
    if name == "guided_choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, value)))
    if name == "guided_regex":
        return LLMatcher.grammar_from_regex(_with_ascii_digits(value))
    if name == "guided_grammar":
        return LLMatcher.grammar_from_lark(
            _LARK.sub(lambda found: f"/{_with_ascii_digits(found[1])}/" if found[1] else found[0], value)
        )
    schema = json.loads(value)
    _refuse_unenforceable(schema, where)
    escapes = {"json_allowed_escapes": _ESCAPES_BESIDE_SUCH_A_CLASS} if _has_suspect_pattern(schema) else {}
    return LLMatcher.grammar_from_json_schema(value, overrides=_JSON | escapes)  # type: ignore[arg-type]


def _with_ascii_digits(pattern: str) -> str:
    r"""A regular expression with classes of 0 to 9 for `\d` and `\D`.

    llguidance takes `\d` for every script's digits there, unlike in the patterns of a JSON schema.
    """
    return _ESCAPE.sub(lambda found: _DIGITS.get(found[0], found[0]), pattern)


def _has_suspect_pattern(schema: Any) -> bool:
    patterns: list[Any] = []
    for part in _parts(schema):
        if isinstance(part, dict):
            several = part.get("patternProperties")
            patterns += [part.get("pattern"), *(several if isinstance(several, dict) else ())]
    return any(isinstance(pattern, str) and _MAY_HAVE_CONTROL_CHARACTERS.search(pattern) for pattern in patterns)


def _refuse_unenforceable(schema: Any, where: str) -> None:
    """Raises UserError for what llguidance takes, but does not always enforce."""
    for part in _parts(schema):
        if isinstance(part, float | int) and not _is_exact(part):
            raise UserError(
                f"guided_json cannot be served: it has the number {part!r}",
                where=where,
                valid="numbers of at most 15 digits, without zeros before and after, from 1e-7 to 1e15",
            )
        if not isinstance(part, dict):
            continue
        least = part.get("minProperties", 0)
        # It may write a key that is not in `properties` twice, and counts both.
        names = part.get("required", [])
        required = {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
        if isinstance(least, int) and least > len(required):
            raise UserError(
                f"guided_json cannot be served: minProperties is {least}, of which {len(required)} are required",
                where=where,
                valid="minProperties of at most the number of required properties",
            )
        if isinstance(part.get("multipleOf"), float):  # whether 0.3 is a multiple of 0.1 depends on who asks
            raise UserError(
                "guided_json cannot be served: multipleOf is not an integer", where=where, valid="an integer"
            )
        if "x-guidance" in part:  # it could turn the checks off
            raise UserError("guided_json cannot be served: it has x-guidance", where=where, valid="a JSON schema")


def _is_exact(number: float) -> bool:
    """Whether llguidance reads a number as it is: it may be off by one in the last bit of others."""
    return number == 0 or (1e-7 <= abs(number) < 1e15 and float(f"{number:.15g}") == number)


def _parts(value: Any) -> Iterator[Any]:
    """All values within a JSON value, itself included."""
    todo = [value]
    while todo:
        part = todo.pop()
        yield part
        if isinstance(part, dict):
            todo += part.values()
        elif isinstance(part, list):
            todo += part


def _short(message: str) -> str:
    message = message.removesuffix("<non-verbose/>").strip()
    if message.startswith("NoExtension"):
        return "no text can follow what there is"
    if message.startswith("panic"):  # with a backtrace
        return "llguidance cannot handle it"
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + " ..."
