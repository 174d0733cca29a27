"""`triton.jit` of functions that a run-time type checker may have wrapped."""

import inspect
from collections.abc import Callable
from typing import Any

import triton


def jit(kernel: Callable | None = None, **options: Any) -> Any:
    """`triton.jit`, as `@jit` or `@jit(do_not_specialize=[...])`.

    A run-time type checker that was installed as an import hook has wrapped the function by the
    time it gets here. Triton needs the function itself.
    """
    if kernel is None:
        return lambda function: jit(function, **options)
    return triton.jit(inspect.unwrap(kernel), **options)
