"""torch, where the caller has imported it: the runtime itself needs none."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from torch import Tensor


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor of torch: nobody has one without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def num_threads() -> int | None:
    """The threads that operations of torch take when the calling thread starts them; None: torch is not imported."""
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def use_threads(number: int | None) -> None:
    """Sets that for the calling thread, which begins with what any thread was the last to set; None changes nothing."""
    if number is not None:
        sys.modules["torch"].set_num_threads(number)
