"""How the tokens of a request are chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from furiosa_build.core.errors import UserError

# A temperature below this is greedy: dividing by it would only lose precision.
GREEDY_BELOW = 1e-5

# Fields that say what the text is to look like. At most one is given.
GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. The names and defaults are vLLM's.

    Attributes:
        n: Completions per prompt, each with random numbers of its own; of a beam search the n best beams.
        best_of: Beams of a beam search; if given, the artifact's beam width. Without beam search only 1.
        use_beam_search: Follows the likeliest sequences instead of drawing tokens. Needs an artifact that was built for
            it. Most other parameters must be as they are by default; the temperature may be 0 too.
        length_penalty: Beams are ranked by the sum of log probabilities / number of tokens ** length_penalty.
        early_stopping: When as many beams have ended as there are: True: the search is over. False: it is when the best
            that goes on is worse at its present length. `never`: when it cannot become better at any length.
        temperature: Divides the logits; 0 takes the likeliest token (greedy).
        top_k: Keeps the k likeliest tokens; 0 or -1 keeps all.
        top_p: Keeps the likeliest tokens whose probabilities first reach this sum, in (0, 1].
        min_p: Keeps tokens at least this share as likely as the likeliest, in [0, 1].
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt or output; >
            0.
        presence_penalty: Subtracted once from the logit of every token in the output, in [-2, 2].
        frequency_penalty: Subtracted once per occurrence in the output, in [-2, 2].
        logit_bias: Token id -> what is added to its logit, before penalties and temperature; in [-100, 100].
        allowed_token_ids: The only tokens that may be chosen; None: all.
        bad_words: Texts that the output does not contain, as far as it is tokenized as they are: each alone and after
            a space. Needs the artifact's tokenizer.
        seed: Seed of this request's random numbers, of 64 bits with or without a sign. Without one, or with -1, it
            derives from the engine's seed and the request id.
        stop: Strings that end the text; the text excludes them. Needs the artifact's tokenizer.
        stop_token_ids: Tokens that end the text; `token_ids` includes, the text excludes them.
        include_stop_str_in_output: The text includes what ended it: the stop string, or the end token's text if special
            tokens are not skipped.
        ignore_eos: Goes on after the model's end-of-sequence tokens.
        max_tokens: Most tokens to generate, >= 0; None: up to the artifact's largest context. With 0 the prompt is
            computed, for its log probabilities, and nothing is sampled.
        min_tokens: Until so many tokens no stop condition applies, and end tokens are not sampled.
        truncate_prompt_tokens: Keeps so many of the prompt's last tokens, >= 1; -1: as many as the artifact takes.
        logprobs: Report each token's log probability and those of so many likeliest tokens, >= 0; -1: of all tokens.
        prompt_logprobs: The same for the prompt's tokens. Needs an artifact that returns the logits of all
            tokens.
        skip_special_tokens: Leaves special tokens out of the text.
        spaces_between_special_tokens: False only where special tokens are skipped, and then without effect.
        detokenize: False: the text stays empty.
        structured_outputs: vLLM's name for the four below: a dict, or an object, with one of `json`, `regex`, `choice`,
            `grammar` or `json_object`.
        guided_json: The text is JSON that validates against this schema, a dict or text (kept as text).
        guided_regex: The whole text matches this regular expression.
        guided_choice: The text is one of these.
        guided_grammar: The text matches this grammar, in llguidance's form of Lark's notation.

    At most one of structured_outputs and guided_... is given. The text then ends where the grammar does, so no other
    condition may end it but max_tokens (docs/runtime.md). They need the extra `guided`.

    None for `logit_bias` or a list is an empty one.

    Log probabilities are the model's own: log_softmax of its logits, before penalties, temperature and filters.

    Raises:
        UserError: A value out of range; the message names the field.
    """

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    truncate_prompt_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: Mapping[str, Any] | object = None
    guided_json: Mapping[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Sequence[str] | None = None
    guided_grammar: str | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _tuple_of(str, "stop", stop))
        object.__setattr__(self, "bad_words", _tuple_of(str, "bad_words", self.bad_words))
        object.__setattr__(self, "stop_token_ids", _tuple_of(int, "stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            allowed = _tuple_of(int, "allowed_token_ids", self.allowed_token_ids)
            object.__setattr__(self, "allowed_token_ids", allowed)
            self._check("allowed_token_ids", bool(allowed), "one id or more, or None")
        self._check("n", _is_int(self.n, 1), ">= 1")
        self._check("best_of", self.best_of is None or _is_int(self.best_of, self.n), f">= n ({self.n}), or None")
        for name in (
            "use_beam_search",
            "ignore_eos",
            "include_stop_str_in_output",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "detokenize",
        ):
            self._check(name, isinstance(getattr(self, name), bool), "True or False")
        self._check(
            "early_stopping",
            isinstance(self.early_stopping, bool) or self.early_stopping == "never",
            "True, False or 'never'",
        )
        for name in (
            "length_penalty",
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            self._check(name, _is_number(getattr(self, name)), "a finite number")
        for name in ("top_k", "min_tokens"):
            self._check(name, _is_int(getattr(self, name)), "an integer")
        self._check("temperature", self.temperature >= 0, ">= 0")
        self._check("top_k", self.top_k >= -1, "0 or -1 (all), or >= 1")
        self._check("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        self._check("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        self._check("repetition_penalty", self.repetition_penalty > 0, "> 0")
        self._check("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]")
        self._check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        self._check(
            "seed", self.seed is None or _is_int(self.seed, -(2**63), 2**64 - 1), "an integer of 64 bits, or None"
        )
        for name in ("stop", "bad_words"):
            self._check(name, all(getattr(self, name)), "strings that are not empty")
        self._check("stop", self.detokenize or not self.stop, "() without detokenize")
        self._check(
            "spaces_between_special_tokens",
            self.spaces_between_special_tokens or self.skip_special_tokens,
            "True, unless special tokens are skipped",
        )
        self._check(
            "truncate_prompt_tokens",
            self.truncate_prompt_tokens in (None, -1) or _is_int(self.truncate_prompt_tokens, 1),
            ">= 1, -1 (as many as fit), or None",
        )
        self._check("max_tokens", self.max_tokens is None or _is_int(self.max_tokens, 0), ">= 0, or None")
        self._check("max_tokens", self.max_tokens != 0 or not self.use_beam_search, ">= 1 with use_beam_search")
        self._check("min_tokens", self.min_tokens >= 0, ">= 0")
        if self.max_tokens is not None:
            self._check("min_tokens", self.min_tokens <= self.max_tokens, f"<= max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            self._check(name, value is None or _is_int(value, -1), ">= 0, -1 (all), or None")

        fixed = _NOT_WITH_BEAM_SEARCH if self.use_beam_search else _WITH_BEAM_SEARCH_ONLY
        when = "with" if self.use_beam_search else "without"
        for name, values in fixed.items():
            valid = f"{' or '.join(map(repr, values))} {when} use_beam_search"
            self._check(name, getattr(self, name) in values, valid)
        self._check_guided()

    def _check_guided(self) -> None:
        if self.structured_outputs is not None:
            self._take_structured_outputs()
        given = [name for name in GUIDED if getattr(self, name) is not None]
        if not given:
            return
        if self.guided_json is not None:
            object.__setattr__(self, "guided_json", _schema_text(self.guided_json))
        if self.guided_choice is not None:
            self._check("guided_choice", not isinstance(self.guided_choice, str), "a list of str")
            object.__setattr__(self, "guided_choice", _tuple_of(str, "guided_choice", self.guided_choice))
            self._check("guided_choice", bool(self.guided_choice) and all(self.guided_choice), "texts, none empty")
        for name in ("guided_regex", "guided_grammar"):
            self._check(name, getattr(self, name) is None or isinstance(getattr(self, name), str), "a text")
        self._check(given[-1], len(given) == 1, f"None, as {given[0]} is given")
        for name, value in _WITH_GUIDED.items():
            self._check(
                name, getattr(self, name) == value, f"{value!r} with {given[0]}, which says where the text ends"
            )

    def _take_structured_outputs(self) -> None:
        """Sets the guided_... that `structured_outputs` says, in its place."""
        if given := [name for name in GUIDED if getattr(self, name) is not None]:
            self._check("structured_outputs", False, f"None, as {given[0]} is given")
        name, value = _guided_of(self.structured_outputs)
        object.__setattr__(self, name, value)
        object.__setattr__(self, "structured_outputs", None)

    def _check(self, name: str, fits: bool, valid: str) -> None:
        if not fits:
            value = getattr(self, name)
            raise UserError(f"{name} does not take {value!r}", where=f"SamplingParams.{name}", valid=valid)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


_STRUCTURED_OUTPUTS = {
    "json": "guided_json",
    "regex": "guided_regex",
    "choice": "guided_choice",
    "grammar": "guided_grammar",
    "json_object": "guided_json",
}
_STRUCTURED_OUTPUTS_WITHOUT_EFFECT = ("disable_fallback", "disable_any_whitespace")  # there is but one way here

_WITH_BEAM_SEARCH_ONLY: Mapping[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
}
_NOT_WITH_BEAM_SEARCH: Mapping[str, tuple[object, ...]] = {
    "temperature": (1.0, 0.0),
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "logit_bias": ({},),
    "allowed_token_ids": (None,),
    "bad_words": ((),),
    "seed": (None,),
    "stop": ((),),
    "include_stop_str_in_output": (False,),
    "min_tokens": (0,),
    "logprobs": (None,),
}


_WITH_GUIDED: Mapping[str, object] = {
    "use_beam_search": False,
    "stop": (),
    "stop_token_ids": (),
    "allowed_token_ids": None,
    "bad_words": (),
    "ignore_eos": False,
    "min_tokens": 0,
}


def _is_int(value: object, least: int | None = None, most: int | None = None) -> bool:
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return (least is None or value >= least) and (most is None or value <= most)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _tuple_of(kind: type, name: str, values: object) -> tuple[object, ...]:
    if values is None:
        return ()
    if isinstance(values, Sequence) and not isinstance(values, str) and all(type(value) is kind for value in values):
        return tuple(values)
    what, where = f"{name} does not take {values!r}", f"SamplingParams.{name}"
    raise UserError(what, where=where, valid=f"a list of {kind.__name__}")


def _biases(values: object) -> dict[int, float]:
    """A copy, which no caller can change."""
    values = {} if values is None else values
    fits = isinstance(values, Mapping) and all(
        _is_int(token, 0) and _is_number(bias) and -100 <= bias <= 100 for token, bias in values.items()
    )
    if not fits:
        what, where = f"logit_bias does not take {values!r}", "SamplingParams.logit_bias"
        raise UserError(what, where=where, valid="token ids -> numbers in [-100, 100]")
    return dict(cast(Mapping[int, float], values))


def _guided_of(structured: object) -> tuple[str, Any]:
    """The guided_... that vLLM's `structured_outputs` says, and its value."""
    entries = structured if isinstance(structured, Mapping) else getattr(structured, "__dict__", {})
    given = {name: v for name, v in entries.items() if v not in (None, False) and not str(name).startswith("_")}
    found = [name for name in given if name in _STRUCTURED_OUTPUTS]
    others = sorted(map(str, given.keys() - {*_STRUCTURED_OUTPUTS, *_STRUCTURED_OUTPUTS_WITHOUT_EFFECT}))
    where, valid = "SamplingParams.structured_outputs", f"one of {', '.join(_STRUCTURED_OUTPUTS)}"
    if others:
        raise UserError(f"structured_outputs does not take `{others[0]}`", where=where, valid=valid)
    if len(found) != 1:
        what = f"structured_outputs does not take {' and '.join(found) or repr(structured)}"
        raise UserError(what, where=where, valid=valid)
    [name] = found
    return _STRUCTURED_OUTPUTS[name], {"type": "object"} if name == "json_object" else given[name]


def _schema_text(schema: object) -> str:
    """A JSON schema as text, of which no caller can change anything."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(value, allow_nan=False) if isinstance(value, Mapping) else None
    except (ValueError, TypeError, RecursionError) as error:
        what = f"guided_json is invalid JSON: {error}"
        raise UserError(what, where="SamplingParams.guided_json", valid="a JSON schema") from error
    if text is None:
        raise UserError(f"guided_json is not a JSON object: {value!r}", where="SamplingParams.guided_json")
    return text
