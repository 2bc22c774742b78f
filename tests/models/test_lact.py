"""What is special about `lact`: its equations, how it starts, how far it sees."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.errors import UserError
from rondo.kernels import fast_weights
from rondo.models import Decoder, ModelConfig
from rondo.models.init import initial_values
from rondo.models.mixers.lact import InitialWeights, LaCT, LaCTOptions
from rondo.tests.mixer_suite import Case, build, context, inputs
from rondo.tests.numerics import assert_ratio

DIM, HEADS, FAST, CHUNK = 32, 4, 2, 6


def made(**changes: object) -> LaCT:
    options = {"num_heads": HEADS, "num_fast_heads": FAST, "chunk_size": CHUNK, "init_rank": 3}
    mixer, _ = build(Case("lact", {**options, **changes}, DIM))
    assert isinstance(mixer, LaCT)
    return mixer


def rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def turned(x: Tensor, theta: float) -> Tensor:
    """RoPE of `(B, T, H, D)` by complex numbers."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half).double() / half)
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    factor = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.complex(x[..., :half], x[..., half:]) * factor
    return torch.cat([pairs.real, pairs.imag], -1)


def by_equations(mixer: LaCT, x: Tensor) -> Tensor:
    """The layer of one document from its parameters alone."""
    p = dict(mixer.named_parameters())
    time = x.shape[1]
    q, k, v = (x @ p[f"{name}_proj.weight"].T for name in ("q", "k", "v"))
    heads = [y.unflatten(-1, (HEADS, -1)) for y in (q, k, v)]
    near_q, near_k = (turned(rms(y), 1e6).transpose(1, 2) for y in heads[:2])
    distance = torch.arange(time)[:, None] - torch.arange(time)
    mask = (distance >= 0) & (distance < mixer.window)
    near_v = heads[2].transpose(1, 2)
    near = F.scaled_dot_product_attention(near_q, near_k, near_v, attn_mask=mask).transpose(1, 2)

    fast_q, fast_k = (
        F.silu(y * p[f"{n}_scale"] + p[f"{n}_offset"]) for n, y in (("q", q), ("k", k))
    )
    fast_q, fast_k, fast_v = (y.unflatten(-1, (FAST, -1)) for y in (fast_q, fast_k, F.silu(v)))
    eye = torch.eye(DIM // FAST, dtype=x.dtype)
    gate, up = (p[f"fast.{n}_left"] @ p[f"fast.{n}_right"] + 0.5 * eye for n in ("gate", "up"))
    o, _ = fast_weights(
        fast_q / (fast_q.square().sum(-1, keepdim=True) + 1e-6).sqrt(),
        fast_k / (fast_k.square().sum(-1, keepdim=True) + 1e-6).sqrt(),
        fast_v,
        F.softplus(x @ p["rate_proj.weight"].T + p["rate_bias"]).unflatten(-1, (FAST, 3)),
        (gate, up, p["fast.down"]),
        momentum=(x @ p["momentum_proj.weight"].T).sigmoid(),
        chunk_size=CHUNK,
        backend="reference",
    )
    scale = F.silu(x @ p["scale_proj.weight"].T)
    learned = rms(o) * p["fast_norm.weight"] * scale[..., None]
    return (near.flatten(2) + learned.flatten(2)) @ p["o_proj.weight"].T


@pytest.mark.parametrize("window", [None, 4])
def test_equations(window: int | None) -> None:
    mixer = made(window=window)
    with torch.no_grad():
        for name in ("q_scale", "q_offset", "k_scale", "k_offset", "fast_norm.weight"):
            values = torch.linspace(-0.5, 1.5, len(mixer.get_parameter(name)))
            mixer.get_parameter(name).copy_(values)
    x = inputs(Case("lact", dim=DIM), 2, 20)
    y, _ = mixer(x, context(x, {}))
    assert_ratio("output", y, by_equations(mixer, x), 1e-8)


def test_fast_weights_see_what_the_window_does_not() -> None:
    """A token of an earlier chunk, far outside the window, changes the output; one of the same
    chunk outside the window does not."""
    mixer = made(window=2)
    x = inputs(Case("lact", dim=DIM), 1, 24)
    y, _ = mixer(x, context(x, {}))
    for position, seen in ((1, True), (18, False)):
        changed = x.clone()
        changed[:, position] += 1
        moved, _ = mixer(changed, context(x, {}))
        assert torch.equal(moved[:, 20:], y[:, 20:]) != seen


def test_how_a_model_starts() -> None:
    """Rates of 0.001, and matrices of the stated size."""
    module = InitialWeights(3, 256, LaCTOptions(expansion=2.0))
    with torch.no_grad():
        for name, value in initial_values(module, seed=1):
            module.get_parameter(name).copy_(value)
    gate, up, down = module()
    assert gate.shape == up.shape == (3, 512, 256)
    assert down.shape == (3, 256, 512)
    for matrix in (gate, up):
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        assert abs(diagonal.mean() - 0.5) < 0.01
        rest = matrix - 0.5 * torch.eye(512, 256)
        assert torch.linalg.matrix_rank(rest).tolist() == [32] * 3
        assert abs(rest.std() * 256**0.5 / 0.25 - 1) < 0.05
    assert abs(down.std() * 512**0.5 - 1) < 0.05
    torch.testing.assert_close(F.softplus(made().rate_bias), torch.full((6,), 1e-3).double())


def test_a_state_of_another_chunk_size_is_refused() -> None:
    x = inputs(Case("lact", dim=DIM), 1, 5)
    _, state = made(window=3)(x, context(x, {}))
    with pytest.raises(ValueError, match="another chunk_size than 4"):
        made(window=3, chunk_size=4)(x, context(x, {}, 5), state)


def test_what_is_impossible_is_said_at_once() -> None:
    options = {"num_heads": 3, "num_fast_heads": 5, "update": "moun"}
    config = ModelConfig(vocab_size=9, dim=32, pattern=["lact"], mixers={"lact": options})
    with pytest.raises(UserError) as error:
        Decoder(config)
    for text in (
        "num_heads: 3 heads do not divide model.dim 32",
        "num_fast_heads: 5 heads do not divide model.dim 32",
        "update: must be muon or gradient, got 'moun'",
    ):
        assert text in str(error.value)
