"""What checks of calls require of operands: that they are given, of the shapes and dtypes that a kernel takes."""

from __future__ import annotations

from collections.abc import Sequence

from furiosa_build.backends.native.packing import ROWS
from furiosa_build.backends.native.plan import Call, View

Operands = Sequence[View | None]
FLOATS = {"float32", "bfloat16", "float16", "float64"}
_TOGETHER = {"float32": 1, "bfloat16": 2, "float16": 2, "uint8": 4}
"""Numbers of a row that lie together in a packed weight."""


class Problem(Exception):  # noqa: N818 (it becomes a ValueError with the call's number)
    """What is wrong with a call."""


def require(holds: bool, otherwise: str) -> None:
    """Raises Problem."""
    if not holds:
        raise Problem(otherwise)


def require_given(operands: Operands, optional: str) -> None:
    """`optional` has a `?` for each operand that may be left out, `.` for one that may not."""
    require(len(operands) == len(optional), f"it has {len(operands)} operands, not {len(optional)}")
    missing = [n for n, (view, mark) in enumerate(zip(operands, optional, strict=True)) if view is None and mark == "."]
    require(not missing, f"operand {missing[0] if missing else 0} is missing")


def require_numbers(call: Call, ints: int, floats: int = 0) -> None:
    """The call has so many integers and floating-point numbers."""
    require((len(call.ints), len(call.floats)) == (ints, floats), "it has other ints or floats")


def require_floating(*views: View | None) -> None:
    """All are floating-point, as far as they are given; so it is with the others here."""
    require(all(view is None or view.dtype in FLOATS for view in views), "an operand is not floating-point")


def require_computed(*views: View | None) -> None:
    """All are of a dtype that kernels compute in."""
    dtypes = ("float32", "bfloat16", "float16")
    require(all(view is None or view.dtype in dtypes for view in views), "an operand is not of a dtype to compute in")


def require_integer(*views: View | None) -> None:
    """All are int64."""
    require(all(view is None or view.dtype == "int64" for view in views), "an index is not int64")


def require_same_shape(*views: View | None) -> None:
    """All have one shape."""
    shapes = [view.shape for view in views if view is not None]
    require(all(shape == shapes[0] for shape in shapes), "shapes differ")


def require_shape(view: View | None, *shape: int) -> None:
    """It has this shape."""
    require(view is None or view.shape == list(shape), f"an operand is not of shape {list(shape)}")


def require_dense_last(*views: View | None) -> None:
    """The last dimension of all is contiguous."""
    for view in views:
        if view is not None:
            require(bool(view.shape), "an operand has no dimension")
            require(view.stride[-1] == 1 or view.shape[-1] <= 1, "the last dimension is not contiguous")


def require_packed(weight: View, rows: int, columns: int) -> None:
    """A weight [rows, columns], packed."""
    together = _TOGETHER.get(weight.dtype)
    require(together is not None, "a weight is of a dtype that is not packed")
    assert together is not None
    head = [-(-rows // ROWS), -(-columns // together), ROWS]
    require_shape(weight, *head, *([together] if together > 1 else []))
    step, dense = 1, []
    for size in reversed(weight.shape):
        dense.append(step)
        step *= size
    require(weight.stride == dense[::-1], "a weight is not contiguous")


def present(operands: Operands) -> list[View]:
    """The operands that are given."""
    return [view for view in operands if view is not None]


def operand(operands: Operands, number: int) -> list[View]:
    """One of those that are given."""
    return [present(operands)[number]]
