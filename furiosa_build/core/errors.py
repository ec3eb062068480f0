"""The errors a person is meant to read. Each carries the exit status the command line ends with."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class BuildError(Exception):
    """Base class of every error that is shown as one message, without a traceback."""

    exit_status = 1


class UserError(BuildError):
    """Bad input: a recipe, a device, weights, an artifact or a request.

    Args:
        what: What is wrong, one sentence, with the value that was found.
        where: File, key or option it was found in.
        valid: What would be valid.
        hint: What to do about it.
    """

    exit_status = 2

    def __init__(self, what: str, *, where: str = "", valid: str = "", hint: str = "") -> None:
        self.what, self.where, self.valid, self.hint = what, where, valid, hint
        lines = [what]
        lines += [f"  {label}: {text}" for label, text in (("where", where), ("valid", valid), ("hint", hint)) if text]
        super().__init__("\n".join(lines))


class EngineFullError(UserError):
    """The engine has as many requests under way as it takes. Not the request's fault: it may be tried again later."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"{limit} requests are under way, no more are taken", where="max_processing_samples", valid=f"<= {limit}"
        )


class StepError(BuildError):
    """A step of the build failed. What was finished before stays in the store; the step's log is named."""

    exit_status = 3

    def __init__(self, step: str, cause: str, log: str = "") -> None:
        self.step, self.cause, self.log = step, cause, log
        super().__init__(f"step {step} failed: {cause}" + (f"\n  log: {log}" if log else ""))


class PreflightError(BuildError):
    """The build was refused before it began: this machine lacks what it needs. The message gives the figures."""

    exit_status = 4


class VerificationError(BuildError):
    """Verification of an artifact, a store or a repeated build failed. Every finding is one line."""

    exit_status = 5


class BuildInterrupted(KeyboardInterrupt):
    """A build was ended by a signal. Its workers are gone, and the steps that were done are in the store."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"interrupted by {self.signal.name}")


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint such as ``did you mean 'fp8'?`` for the choice nearest to `word`, or the empty string."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"did you mean {matches[0]!r}?" if matches else ""
