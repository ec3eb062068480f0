"""What has to hold of a plan, so that nothing it does reaches outside its buffers: the library trusts it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from furiosa_build.backends.native.check_attention import CACHES
from furiosa_build.backends.native.check_calls import CHECKS
from furiosa_build.backends.native.check_operands import Problem
from furiosa_build.backends.native.operators import OPERATORS
from furiosa_build.backends.native.plan import ALIGNMENT, Call, Plan, View
from furiosa_build.ir.dtypes import ITEMSIZE


def check_plan(plan: Plan) -> None:
    """Raises ValueError, with the call or tensor, for a plan that cannot run."""
    sizes = [*(spec.nbytes for spec in plan.inputs), *(spec.nbytes for spec in plan.outputs)]
    if None in sizes[len(plan.inputs) :]:
        raise ValueError("an output has a free dimension")
    sizes += [len(plan.constants_blob), plan.arena]
    for number, view in enumerate(plan.tensors):
        if problem := _problem_of_view(plan, view, sizes):
            raise ValueError(f"tensors[{number}]: {problem}")
    used = max((view.end for view in plan.tensors if view.buffer == plan.num_buffers), default=0)
    if plan.arena >= used + ALIGNMENT:
        raise ValueError(f"tensors[]: {plan.arena} bytes between the calls, of which {used} are used")
    for number, call in enumerate(plan.calls):
        if any(operand is not None and operand >= len(plan.tensors) for operand in call.tensors):
            raise ValueError(f"calls[{number}]: there is no such tensor")
        if call.op not in OPERATORS or call.op not in CHECKS:
            raise ValueError(f"calls[{number}]: there is no operator {call.op!r}")
        operands = list(plan.operands(call))
        try:
            _check_caches(plan, operands, call)
            for written in CHECKS[call.op](operands, call):
                _check_written(plan, written, call)
        except Problem as problem:
            raise ValueError(f"calls[{number}], {call.op}: {problem}") from problem


def _problem_of_view(plan: Plan, view: View, sizes: list[int | None]) -> str:
    if len(view.shape) != len(view.stride):
        return "it has not as many strides as sizes"
    if view.buffer >= len(sizes):
        return f"there is no buffer {view.buffer}"
    size = sizes[view.buffer]
    if size is None:
        return "" if _is_whole_cache(plan, view) else "it is not the whole of an input with a free dimension"
    if view.offset % ITEMSIZE[view.dtype]:
        return f"it begins at byte {view.offset}, within an element"
    return "" if view.end <= size else f"it ends at byte {view.end} of {size}"


def _is_whole_cache(plan: Plan, view: View) -> bool:
    """Whether a view is all of an input whose first dimension is free."""
    spec = plan.inputs[view.buffer]
    first, *others = spec.shape
    sizes = [size or 0 for size in others]
    dense = [math.prod(sizes[number:]) for number in range(len(spec.shape))]
    return (
        first is None
        and view.offset == 0
        and view.dtype == spec.dtype
        and view.shape == [0, *others]
        and view.stride == dense
    )


def _check_caches(plan: Plan, operands: Sequence[View | None], call: Call) -> None:
    """Where a call takes a KV cache it is given one: how far it reaches, the runtime knows."""
    for place in CACHES.get(call.op, ()):
        view = operands[place] if place < len(operands) else None
        if view is not None and not _is_cache(plan, view):
            raise Problem("a cache is not one")


def _is_cache(plan: Plan, view: View) -> bool:
    return view.buffer < len(plan.inputs) and None in plan.inputs[view.buffer].shape


def _check_written(plan: Plan, view: View, call: Call) -> None:
    """A call writes to outputs and the arena, the write of a cache to caches; and to no element twice."""
    is_cache = _is_cache(plan, view)
    if is_cache != (call.op == "write_kv_cache"):
        raise Problem("it writes what is no cache, or to a cache")
    if (view.buffer < len(plan.inputs) and not is_cache) or view.buffer == plan.num_buffers - 1:
        raise Problem("it writes to an input or a constant")
    reach = 1
    for stride, size in sorted(zip(view.stride, view.shape, strict=True)):
        if size > 1:
            if stride < reach:
                raise Problem("it writes an element twice")
            reach = stride * (size - 1) + reach
