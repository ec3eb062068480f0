"""Errors with what they concern: the step that fails, the model whose recipe is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from furiosa_build.core.cancellation import Cancelled
from furiosa_build.core.errors import StepError, UserError


@contextmanager
def errors_of(model_id: str, recipe: str) -> Iterator[None]:
    """What is wrong within is wrong with the model of that id, which the recipe of that name builds, and says so."""
    try:
        yield
    except UserError as error:
        if not model_id:
            raise
        where = f"{model_id} {recipe!r}: {error.where}"
        raise UserError(error.what, where=where, valid=error.valid, hint=error.hint) from error


@contextmanager
def failing(step: str) -> Iterator[None]:
    """A disk that is full or cannot be written makes a step fail, and so does an interruption."""
    try:
        yield
    except Cancelled as error:
        raise StepError(step, "the build was interrupted") from error
    except OSError as error:
        raise StepError(step, f"{type(error).__name__}: {error}") from error
