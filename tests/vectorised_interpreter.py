"""Triton's interpreter, many times as fast: the same arithmetic, without repeated work.

Where a reduction or a scan combines by a function of one's own, the interpreter calls it once an
element, which took three quarters of the time of a layer. Such functions are elementwise, so that a
call can take a slice. It patches `triton.language` anew for every helper that a kernel calls, works
out shapes and dtypes anew for every value, finds out anew for every operator what its operands must
be made, and looks for overflow in all arithmetic of integers, although it reports none unless it
debugs.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

patch = interpreter._patch_lang  # as Triton has it
np_dtype_of_scalar = cache(interpreter._get_np_dtype)


def slices(operation, tensors, i: int) -> tuple:
    """The i-th slice of each tensor along the operation's axis, as tensors."""
    return tuple(
        operation.to_tensor(np.take(x.handle.data, i, axis=operation.axis), x.dtype)
        for x in tensors
    )


def combined(operation, left: tuple, right: tuple) -> tuple:
    """What the operation's function makes of two slices, in their dtypes."""
    out = operation.combine_fn.fn(*left, *right)
    out = out if isinstance(out, tuple) else (out,)
    return tuple(operation.to_tensor(data_of(x), of.dtype) for x, of in zip(out, left, strict=True))


def data_of(x) -> np.ndarray:
    """A tensor's numbers in its own shape: the interpreter keeps a scalar as an array of one."""
    return x.handle.data.reshape([int(size) for size in x.shape])


def reduce(self, tensors: tuple) -> list:
    """For `ReduceOps.generic_reduce`."""
    everything, keep_dims = self.axis is None, self.keep_dims
    rank = len(tensors[0].shape)
    if everything:
        tensors = tuple(self.to_tensor(x.handle.data.flatten(), x.dtype) for x in tensors)
        self.axis = 0
    total = slices(self, tensors, 0)
    for i in range(1, int(tensors[0].shape[self.axis])):
        total = combined(self, total, slices(self, tensors, i))
    out = []
    for x in total:
        data = data_of(x)
        if keep_dims:
            data = data.reshape([1] * rank) if everything else np.expand_dims(data, self.axis)
        out.append(self.to_tensor(data, x.dtype))
    return out


def scan(self, tensors: tuple) -> list:
    """For `ScanOps.generic_scan`."""
    so_far = [slices(self, tensors, 0)]
    for i in range(1, int(tensors[0].shape[self.axis])):
        so_far.append(combined(self, so_far[-1], slices(self, tensors, i)))
    return [
        self.to_tensor(np.stack([data_of(x) for x in column], axis=self.axis), column[0].dtype)
        for column in zip(*so_far, strict=True)
    ]


@cache
def languages(function) -> list:
    """The names that a function has for `triton.language`."""
    return [x for x in function.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]


def patch_once(function):
    """For `_patch_lang`, which a kernel that runs has called for its helpers as well."""
    seen = languages(function)
    if any(tl.core.is_builtin(module.load) for module in seen) or not seen:
        scope = patch(function)
        for name in OPERATORS:
            scope.set_attr(tl.tensor, name, remembering_types(getattr(tl.tensor, name), WAYS[name]))
        return scope
    return interpreter._LangPatchScope()


TWO_WAYS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor")
OPERATORS = [
    *(f"__{side}{name}__" for name in TWO_WAYS for side in ("", "r")),
    *(f"__{name}__" for name in ("lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne")),
]
SPREAD = {"create_splat", "create_broadcast", "create_expand_dims"}  # numpy does so unasked
WAYS: dict[str, dict] = {name: {} for name in OPERATORS}


class Watched:
    """A builder that notes what it is asked to make."""

    def __init__(self, builder) -> None:
        self.builder = builder
        self.calls: list[tuple[str, tuple, object]] = []

    def __getattr__(self, name: str):
        method = getattr(self.builder, name)

        def noted(*given):
            self.calls.append((name, given, made := method(*given)))
            return made

        return noted if name.startswith("create_") else method


class Place(int):
    """Of a value in a list: the two operands, then what each step made."""


class Way(NamedTuple):
    """How an operator makes its result: calls of the builder, and what the result is then."""

    steps: list[tuple[Callable, list]]
    attributes: dict


def watched(slow: Callable, left: tl.tensor, right) -> tuple[tl.tensor, Way | None]:
    """An operator's result, and the way to it from any operands of these types."""
    semantic = interpreter.interpreter_semantic
    builder = semantic.builder
    semantic.builder = watch = Watched(builder)
    try:
        result = slow(left, right)
    finally:
        semantic.builder = builder
    operands = [x.handle for x in (left, right) if isinstance(x, tl.tensor)]
    places = {id(handle): Place(i) for i, handle in enumerate(operands)}
    steps = []
    for name, given, made in watch.calls:
        values = [places.get(id(x), x) for x in given]
        if name in SPREAD:
            (narrow,) = [x for x in values if isinstance(x, Place | interpreter.TensorHandle)]
            places[id(made)] = narrow
        else:
            places[id(made)] = Place(2 + len(steps))
            steps.append((getattr(builder, name), values))
    ends = bool(steps) and watch.calls[-1][2] is result.handle
    return result, Way(steps, dict(vars(result))) if ends else None


def remembering_types(slow: Callable, ways: dict) -> Callable:
    """An operator that finds out once for any two types, or type and number, what it must do."""

    def operator(left: tl.tensor, right):
        number = type(right) is not tl.tensor
        plainly = getattr(right, "value", right)  # of a constexpr
        key = left.type.name, (type(right), type(plainly), plainly) if number else right.type.name
        if key not in ways and (number or left.handle is not right.handle):
            result, ways[key] = watched(slow, left, right)
            return result
        if ways.get(key) is None:
            return slow(left, right)
        values = [left.handle, None if number else right.handle]
        for method, taken in ways[key].steps:
            values.append(method(*[values[x] if type(x) is Place else x for x in taken]))
        result = object.__new__(tl.tensor)
        vars(result).update(ways[key].attributes, handle=values[-1])
        return result

    return operator


def np_dtype(of: tl.dtype) -> np.dtype:
    """For `_get_np_dtype`, which makes a table of all of them to look one up."""
    of = of.scalar
    return np.dtype(np.uint64) if of.is_ptr() else np_dtype_of_scalar(of)


def plain(shape) -> tuple[int, ...]:
    return tuple([getattr(size, "value", size) for size in shape])


def remembering_shapes(new_block_type: Callable, new_tensor: Callable) -> tuple[Callable, Callable]:
    """The `__init__` of `block_type` and `tensor` that take shapes from equal ones made before."""
    types: dict[tuple, dict] = {}
    tensors: dict[tuple, dict] = {}

    def block_type(self, element_ty: tl.dtype, shape) -> None:
        key = element_ty.name, plain(shape)
        if key not in types:
            new_block_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key], element_ty=element_ty)

    def tensor(self, handle, type: tl.dtype) -> None:
        key = plain(type.shape) if type.is_block() else ()
        if key not in tensors:
            new_tensor(self, None, type)
            tensors[key] = dict(vars(self))
        vars(self).update(tensors[key], handle=handle, type=type, dtype=type.scalar)

    return block_type, tensor


def install() -> None:
    interpreter._get_np_dtype = np_dtype
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    quick = remembering_shapes(tl.block_type.__init__, tl.tensor.__init__)
    tl.block_type.__init__, tl.tensor.__init__ = quick
    interpreter.ReduceOps.generic_reduce = reduce
    interpreter.ScanOps.generic_scan = scan
    if hasattr(interpreter, "_LangPatchScope"):  # Triton 3.6 patches for good
        interpreter._patch_lang = patch_once
