"""RoPE scaling and QK-norm: what transformers computes, and what cannot be."""

from typing import Any

import jaxtyping
import pytest
import torch
from torch import nn
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from nsa.attention import Attention, SparseAttention, WindowAttention
from nsa.rotary import Rotary, find_scaling

M, D, H, G, BASE = 32, 64, 4, 2, 50_000.0
YARN = {"type": "yarn", "factor": 4.0, "original_seq_len": 2048}
SCALINGS = [
    None,
    {"type": "linear", "factor": 4.0},
    {"type": "ntk", "factor": 4.0},
    YARN,
    YARN | {"factor": 1, "attention_factor": None},
    YARN | {"original_seq_len": 256, "beta_fast": 20, "beta_slow": 2, "attention_factor": 1.5},
]


def theirs(scaling: dict | None) -> Qwen3Config:
    """A config of transformers with the same rotation."""
    rope = {"rope_theta": BASE, "rope_type": "default"}
    if scaling is not None:
        rope |= scaling | {"rope_type": scaling["type"]}
        rope["original_max_position_embeddings"] = rope.pop("original_seq_len", 128)
    return Qwen3Config(
        hidden_size=M, num_attention_heads=H, num_key_value_heads=G, head_dim=D,
        max_position_embeddings=128, rope_parameters=rope,
    )  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS[1:], ids=str)
def test_frequencies_are_those_of_transformers(scaling: dict) -> None:
    ours = find_scaling(scaling)
    assert ours is not None
    length = None
    if scaling["type"] == "ntk":  # theirs is dynamic: at factor × the length trained on
        scaling, length = {"type": "dynamic", "factor": 1.0}, round(128 * scaling["factor"])
    want, scale = ROPE_INIT_FUNCTIONS[scaling["type"]](theirs(scaling), "cpu", seq_len=length)
    torch.testing.assert_close(Rotary(D, BASE, ours).frequencies(), want)
    assert ours.key_scale == pytest.approx(scale**2)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("scaling", [SCALINGS[0], SCALINGS[1], YARN], ids=str)
def test_a_dense_layer_is_that_of_transformers(scaling: dict | None, qk_norm: bool) -> None:
    ours = Attention(
        M, D, H, G, norm=False, rope_base=BASE, rope_scaling=scaling, qk_norm=qk_norm
    ).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.4)
    config = theirs(scaling)
    config._attn_implementation = "eager"
    other: Any = Qwen3Attention(config, layer_idx=0).double()
    k, v = ours.to_kv.weight.chunk(2)
    weights = {"q_proj": ours.to_q.weight, "k_proj": k, "v_proj": v, "o_proj": ours.to_out.weight}
    if ours.q_norm is not None and ours.k_norms is not None:
        weights |= {"q_norm": ours.q_norm.weight, "k_norm": ours.k_norms["0"].weight}
    else:
        other.q_norm = other.k_norm = nn.Identity()
    other.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    x = torch.randn(2, 40, M, dtype=torch.float64)
    cos_sin = Qwen3RotaryEmbedding(config)(x, torch.arange(40)[None])
    mask = torch.full((40, 40), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    want, _ = other(x, cos_sin, mask)
    torch.testing.assert_close(ours(x), want, atol=2e-4, rtol=2e-4)  # their norm is float32


def build(kind: str, **options) -> Any:
    torch.manual_seed(0)
    layer = {
        "nsa": lambda: SparseAttention(M, 8, H, 5, 6, 4, 8, 4, kv_heads=G, **options),
        "window": lambda: WindowAttention(M, 8, H, 5, G, **options),
        "dense": lambda: Attention(M, 8, H, G, **options),
    }[kind]()
    return layer.double()


@pytest.mark.parametrize("option", [{"rope_scaling": s} for s in SCALINGS[1:4]], ids=str)
@pytest.mark.parametrize("kind", ["nsa", "window", "dense"])
def test_every_layer_kind_scales_and_decodes_alike(kind: str, option: dict) -> None:
    x = torch.randn(1, 24, M, dtype=torch.float64)
    layer = build(kind, **option)
    want = layer(x)
    assert not torch.allclose(want, build(kind)(x), atol=1e-6)
    out, cache = layer(x[:, :9], return_cache=True)
    rest = [layer(x[:, t : t + 1], cache=cache) for t in range(9, 24)]
    torch.testing.assert_close(torch.cat([out, *rest], 1), want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["nsa", "window", "dense"])
def test_normed_heads_forget_how_long_projections_are(kind: str) -> None:
    """Scores are bounded by the norms' weights, whatever queries and keys grow to."""
    x = torch.randn(1, 24, M, dtype=torch.float64)
    layer = build(kind, qk_norm=True)
    before = layer(x)
    with torch.no_grad():
        layer.to_q.weight.mul_(100)
        for place in layer.k_norms:
            layer.to_kv.weight.unflatten(0, (-1, G * 8))[int(place)].mul_(100)
    torch.testing.assert_close(layer(x), before, atol=1e-4, rtol=1e-4)  # but for eps


def test_autocast_keeps_the_dtype_of_normed_heads() -> None:
    layer = build("nsa", qk_norm=True).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heads = layer.split_heads(torch.randn(1, 9, M))
    assert {x.dtype for x in heads[:7]} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "longrope", "factor": 2}, "must be null, or have a type: one of linear, ntk"),
        ({"type": "linear"}, "linear needs factor; it takes factor"),
        ({"type": "yarn", "factor": 2}, "yarn needs original_seq_len"),
        ({"type": "ntk", "factor": 2, "beta_fast": 3}, "ntk takes no beta_fast; it takes factor"),
        ({"type": "linear", "factor": 0.5}, "factor=0.5 must be a number of at least 1"),
        ({"type": "linear", "factor": "4x"}, "factor='4x' must be a number"),
        (YARN | {"attention_factor": 0}, "attention_factor=0 must be a number above 0"),
        (YARN | {"beta_fast": 1}, "beta_fast=1 must be above beta_slow=1"),
        (YARN | {"original_seq_len": 6}, "original_seq_len=6 must be above 2π"),
    ],
)
def test_scalings_that_cannot_be_are_refused(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(M, D, H, rope_scaling=spec)


def test_a_type_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would complain first
    with pytest.raises(ValueError, match="rope_scaling=ntk must be null, or have a type"):
        Attention(M, D, H, rope_scaling="ntk")  # type: ignore[arg-type]


def test_a_base_that_turns_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rope_base=1\.0 must be above 1"):
        Attention(M, D, H, rope_base=1.0)
