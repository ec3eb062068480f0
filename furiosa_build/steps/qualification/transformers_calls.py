"""Calls of transformers: quiet ones, and what they raise as this step's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from furiosa_build.core.errors import StepError


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Raises StepError for whatever transformers says when it loads something of the source."""
    try:
        yield
    except StepError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise StepError("qualify", f"transformers cannot load the {what} of the source: {reason}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Without progress bars and advice of transformers."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
