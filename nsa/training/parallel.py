"""How a Transformer fits on its devices: what is recomputed, what is compiled, what is sharded.

In this order: a compiler has to see the recomputation, and PyTorch shards last. Nothing here
changes a parameter's name, and calling it twice does no harm.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from nsa.backends import BACKENDS
from nsa.transformer import Transformer
from nsa.transformer_block import Block

aten = torch.ops.aten


def own(*names: str) -> list[torch._ops.OpOverload]:
    """Our own ops of these names; none where Triton is not installed."""
    return [getattr(torch.ops.nsa, name).default for name in names if "triton" in BACKENDS]


# Selections are kept: made anew from numbers that differ in a last bit, they may differ.
CHOICES = [aten.sort.stable, *own("select_blocks")]
PRODUCTS = [
    *(aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default),
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    *own("attend_tiles", "attend_blocks", "gated_attention", "selected_importance", "membership"),
]
KEPT = {"none": None, "full": CHOICES, "selective": CHOICES + PRODUCTS}
PROGRAMS = 8  # compiled for one kind of layer, at most
REPLAYED = "reduce-overhead"  # compiled blocks, in steps that are replayed as CUDA graphs
COMPILE = ("auto", False, True, REPLAYED)
RESHARD = ("auto", False, True)
SMALL = 0.1  # of a device's memory: gathered weights that may stay from forward to backward pass


def check_activation_checkpointing(mode: str) -> None:
    """Raises ValueError for a mode that is not in `KEPT`."""
    if mode not in KEPT:
        raise ValueError(f"activation_checkpointing={mode!r} must be one of {', '.join(KEPT)}")


def checkpoint_activations(model: Transformer, mode: str) -> None:
    """Let the backward pass of each block recompute what its forward pass does not keep.

    `none` keeps everything. `full` keeps a block's input and which blocks its queries selected.
    `selective` keeps the results of matrix products and of attention too, and recomputes what is
    cheap: norms, rotations, activations, gates, dropout.
    """
    check_activation_checkpointing(mode)
    contexts = partial(create_selective_checkpoint_contexts, KEPT[mode])
    for block in model.blocks:
        # Without dropout there is no random state to ask for, which a CUDA graph cannot.
        keeping = partial(
            checkpoint,
            use_reentrant=False,
            context_fn=contexts,
            preserve_rng_state=block.dropout.p > 0,
        )
        block.checkpoint = None if mode == "none" else keeping


def check_compile(compile: bool | str) -> None:
    """Raises ValueError for a value that is not in `COMPILE`."""
    if compile not in COMPILE:
        values = ", ".join(str(value).lower() for value in COMPILE)
        raise ValueError(f"compile={compile} must be one of {values}")


def resolve_compile(compile: bool | str, device: torch.device) -> bool | str:
    """What `auto` means: steps replayed as CUDA graphs on a GPU, nothing compiled elsewhere."""
    if compile != "auto":
        return compile
    return REPLAYED if device.type == "cuda" else False


def compile_blocks(model: Transformer, compile: bool | str) -> None:
    """Compile each block in place, unless `compile` is False: blocks of a kind share one program.

    In torch.compile's default mode: what is replayed is a whole step, not a block.
    """
    check_compile(compile)
    if not compile:
        return
    new = [block for block in model.blocks if block._compiled_call_impl is None]
    allow_programs(new)
    for block in new:
        block.compile()


def allow_programs(blocks: Sequence[Block]) -> None:
    """Let Dynamo keep the programs of these blocks beside all that it has.

    The blocks of all models share one forward pass, of which Dynamo keeps 8 programs and runs the
    rest uncompiled: too few for several kinds of layers in training, in validation and with a last
    batch that is smaller.
    """
    kinds = {type(block.attention) for block in blocks}
    torch._dynamo.config.recompile_limit += PROGRAMS * len(kinds)


def check_reshard(reshard: bool | str) -> None:
    """Raises ValueError for a value that is not in `RESHARD`."""
    if reshard not in RESHARD:
        values = ", ".join(str(value).lower() for value in RESHARD)
        raise ValueError(f"reshard_after_forward={reshard} must be one of {values}")


def resolve_reshard(reshard: bool | str, gathered_bytes: int, memory: int) -> bool:
    """Whether blocks free their gathered weights after the forward pass.

    `auto` does so where the weights of all blocks together would take more than a tenth of a
    device's memory; below that they stay, and the backward pass need not gather them again.
    """
    return gathered_bytes > SMALL * memory if reshard == "auto" else bool(reshard)


def shard(
    model: Transformer,
    mesh: DeviceMesh,
    gathered: torch.dtype | None = None,
    reshard: bool | str = "auto",
) -> None:
    """FSDP2: a rank holds one shard of each parameter, of its gradient and of its optimizer state.

    The linear layers of a block are gathered together before the block runs, in the dtype
    `gathered`, which is what autocast would turn them into: so the numbers are those of unsharded
    training. They are freed after its forward pass if `reshard` says so, else after its backward
    pass (`resolve_reshard`). What a block multiplies in float32 (norms, positions, φ) belongs to
    the root, with embedding, last norm and head, and is gathered once a step, as it is. Gradients
    are averaged in float32.
    """
    if isinstance(model, FSDPModule):
        return
    linears = [m for block in model.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    of_blocks = {parameter for linear in linears for parameter in linear.parameters()}
    size = (gathered or torch.float32).itemsize * sum(map(torch.numel, of_blocks))
    # A CPU's memory is not the model's alone: there nothing is kept that can be gathered again.
    memory = torch.cuda.get_device_properties().total_memory if mesh.device_type == "cuda" else 0
    reshards = resolve_reshard(reshard, size, memory)
    # The root first: it does not look into modules that are sharded already.
    fully_shard(model, mesh=mesh, ignored_params=of_blocks)
    policy = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        of_root = set(block.parameters()) - of_blocks
        fully_shard(
            block, mesh=mesh, mp_policy=policy, ignored_params=of_root,
            reshard_after_forward=reshards,
        )  # fmt: skip


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
