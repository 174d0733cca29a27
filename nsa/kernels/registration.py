"""How a launcher becomes an op of PyTorch: opaque to torch.compile, and cheap for the host.

These do what their namesakes in `torch.library` do, for arguments without defaults, at about half
of the host's time a call: `benchmarks.probes.host_overhead` counts it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable

LIBRARY = torch.library.Library("nsa", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)  # kernels see contiguous arrays


def custom_op(launch: Callable) -> OpOverload:
    """`launch` as the op nsa::<its name without _op>; its annotations are the schema.

    It mutates nothing.
    """
    name = launch.__name__.removesuffix("_op")
    LIBRARY.define(name + torch.library.infer_schema(launch, mutates_args=()), tags=TAGS)
    LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    return getattr(torch.ops.nsa, name).default


def register_fake(op: OpOverload) -> Callable[[Callable], Callable]:
    """Decorates what gives the op's outputs their shapes, without data."""
    return torch.library.register_fake(op, lib=LIBRARY)


def register_autograd(
    op: OpOverload, backward: Callable[..., Any], *, setup_context: Callable[..., None]
) -> None:
    """The op's gradient: backward(ctx, *grads); setup_context(ctx, inputs, output) saves for it.

    A gradient of that gradient is an error, not a zero.
    """

    def below_autograd(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = below_autograd(*inputs)
            setup_context(ctx, inputs, output)
            return output

    def with_autograd(*inputs: Any) -> Any:
        return Op.apply(*inputs) if torch.is_grad_enabled() else below_autograd(*inputs)

    Op.__name__ = op.name()
    Op.backward = staticmethod(once_differentiable(backward))  # type: ignore[assignment]
    LIBRARY.impl(op, with_autograd, "Autograd")
