"""Errors for models that are not supported, with what they do that is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from furiosa_build.core.errors import UserError


def refusal(reason: str) -> UserError:
    """The error for a model that is not supported."""
    return UserError(f"not supported: {reason}", where="model.architecture")


@contextmanager
def failures_of(model: nn.Module) -> Iterator[None]:
    """What fails in transformers' code is a reason too."""
    try:
        yield
    except UserError:
        raise
    except (DataDependentOutputException, GuardOnDataDependentSymNode) as error:
        raise refusal(
            f"what transformers' code of {type(model).__name__} does depends on the values of tensors, such "
            "as the longest sequence of a batch"
        ) from error
    except Exception as error:
        what = str(error).strip().splitlines()
        raise refusal(
            f"transformers' code of {type(model).__name__} does not run as a chain of decoder layers on fake "
            f"tensors ({type(error).__name__}: {what[0] if what else ''})"
        ) from error
