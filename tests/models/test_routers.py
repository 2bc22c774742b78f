"""Routers: what holds for every registered one, and the recurrent one in its variants."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rondo.models import ROUTERS, Decoder, ModelConfig, SequenceContext
from rondo.models.ffn.cells import GATES, CellWeights, SharedCell, step
from rondo.models.ffn.moe import BALANCE
from rondo.models.ffn.router import project
from rondo.models.ffn.routers.rmoe import SCORES, STATE
from rondo.parallel.checkpointing import checkpoint_block
from rondo.pretrain.optim import build_optimizers
from rondo.pretrain.parse import load_recipe
from rondo.pretrain.recipe import OptimizerConfig
from rondo.tests.numerics import assert_ratio

pytestmark = pytest.mark.quick
DIM, EXPERTS, WIDTH, LAYERS = 16, 6, 8, 4


def decoder(router: str = "rmoe", moe: dict[str, Any] | None = None, **options: Any) -> Decoder:
    """Mixtures in all layers but the second, in float64."""
    config = ModelConfig(
        vocab_size=53,
        dim=DIM,
        num_layers=LAYERS,
        pattern=["attention+moe", "attention", "attention+moe*2"],
        mixers={"attention": {"num_heads": 2}},
        ffns={"moe": {"num_experts": EXPERTS, "router": router, "expert_dim": 8, **(moe or {})}},
        routers={router: options},
        init_std=0.3,
    )
    return Decoder(config, seed=0).double()


def small(**options: Any) -> dict[str, Any]:
    return {"dim": WIDTH, **options}


def inputs(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randint(0, 53, (2, 12), generator=torch.Generator().manual_seed(3))


def run(model: Decoder, xs: list[Tensor]) -> list[Tensor]:
    """Logits of each router in turn, for the given inputs instead of the model's own."""
    shared = {name: module() for name, module in model.shared.items()}
    carry = {n: xs[0].new_zeros(*xs[0].shape[:2], width) for n, width in model.carried.items()}
    logits = []
    for x, layer in zip(xs, ("0", "2", "3"), strict=True):
        scores, carry = model.blocks[layer].ffn.router(x, carry, shared)
        logits.append(scores)
    return logits


def backward(model: Decoder) -> dict[str, Tensor]:
    ids = tokens()
    out = model(ids[:, :-1])
    (model.hidden_loss(out.hidden, ids[:, 1:]) + model.auxiliary_loss(out.aux)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router(router: str) -> None:
    """All that is not frozen learns, in float32 whatever the activations are; a token's logits
    are its own; what is carried has the shapes it says."""
    model = decoder(router)
    grads = backward(model)
    for name, param in model.named_parameters():
        assert (name in grads and bool(grads[name].any())) == param.requires_grad, name
        if ".router." in name or name.startswith("shared."):
            assert name in model.float32_names(), name
    xs = [inputs(2, 5, DIM, seed=i) for i in range(3)]
    changed = [x.clone() for x in xs]
    changed[0][:, 2] += 1
    for before, after in zip(run(model, xs), run(model, changed), strict=True):
        assert before.shape == (2, 5, EXPERTS)
        same = torch.tensor([0, 1, 3, 4])
        assert torch.equal(before[:, same], after[:, same])
    model = decoder(router).float()
    model.activation_dtype = torch.bfloat16
    kinds = []
    for block in model.blocks.values():
        if block.carried:
            block.ffn.router.register_forward_hook(lambda m, args, out: kinds.append(out[0].dtype))
    out = model(tokens())
    assert out.hidden.dtype == torch.bfloat16
    assert set(kinds) == {torch.float32}
    assert all(value.dtype == torch.float32 for value in out.carry.values())
    assert {n: v.shape[-1] for n, v in out.carry.items()} == model.carried


def test_projections_of_bfloat16_are_float32() -> None:
    x = inputs(3, 50, DIM).bfloat16().requires_grad_()
    weight = inputs(WIDTH, DIM, seed=1).float().requires_grad_()
    wide, exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    y, expected = project(x, weight), wide @ exact.T
    assert y.dtype == torch.float32
    assert_ratio("product", y, expected, 1e-6)
    slope = inputs(3, 50, WIDTH, seed=2)
    y.backward(slope.float())
    expected.backward(slope)
    assert_ratio("gradient of x", x.grad, wide.grad, 1e-2)
    assert_ratio("gradient of the matrix", weight.grad, exact.grad, 1e-2)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("zero", [True, False])
def test_cells_are_torchs(kind: str, zero: bool) -> None:
    cell = SharedCell(kind, WIDTH, dim=DIM, std=0.1, projects=False)
    peer = {"gru": nn.GRUCell, "lstm": nn.LSTMCell, "rnn": nn.RNNCell}[kind](WIDTH, WIDTH)
    with torch.no_grad():
        for own, name in zip(
            cell.parameters(), ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), strict=True
        ):
            own.copy_(peer.get_parameter(name))
    x, h, c = (inputs(7, WIDTH, seed=i).float() for i in range(3))
    if zero:
        h, c = torch.zeros_like(h), torch.zeros_like(c)
    before = torch.cat((h, c), -1) if kind == "lstm" else h
    expected = torch.cat(peer(x, (h, c)), -1) if kind == "lstm" else peer(x, h)
    assert (step(kind, x, before, cell()) - expected).abs().max() < 1e-6
    cell.double()
    x, before = x.double().requires_grad_(), before.double().requires_grad_()
    params = tuple(cell.parameters())
    assert torch.autograd.gradcheck(
        lambda x, before, *params: step(kind, x, before, CellWeights(*params, None)),
        (x, before, *params),
    )


def test_gradients_of_a_cell_in_bfloat16() -> None:
    """What it gives stays float32; gradients lose what one rounding of their factors costs, and
    what passes a layer by, `z` times the gradient, none of it."""
    cell = SharedCell("gru", WIDTH, dim=DIM, std=0.1, projects=False)
    with torch.no_grad():
        for number, param in enumerate(cell.parameters()):
            param.copy_(inputs(*param.shape, seed=number))
    low = [inputs(300, WIDTH, seed=i).float() for i in (7, 8)] + [*cell.parameters()]
    low = [value.detach().requires_grad_() for value in low]
    exact = [value.detach().double().requires_grad_() for value in low]
    y = step("gru", *low[:2], CellWeights(*low[2:], None), gradients=torch.bfloat16)
    expected = step("gru", *exact[:2], CellWeights(*exact[2:], None))
    assert y.dtype == torch.float32
    assert_ratio("output", y, expected, 1e-6)
    slope = inputs(300, WIDTH, seed=9)
    y.backward(slope.float())
    expected.backward(slope)
    for number, (value, peer) in enumerate(zip(low, exact, strict=True)):
        assert value.grad.dtype == torch.float32
        assert_ratio(f"gradient {number}", value.grad, peer.grad, 6e-3)
    closed = [value.detach().clone().requires_grad_() for value in low]
    with torch.no_grad():
        closed[4][WIDTH : 2 * WIDTH] = 1e4  # z = 1
    y = step("gru", *closed[:2], CellWeights(*closed[2:], None), gradients=torch.bfloat16)
    y.backward(slope.float())
    assert torch.equal(closed[1].grad, slope.float())


def test_gradients_in_bfloat16_through_depth() -> None:
    """Through 24 routers of 128 channels, at their initial values, what rounded products cost
    gradients stays below half a hundredth, in the cell as in projections."""
    shape = {"dim": 128, "num_layers": 24, "mixers": {"attention": {"num_heads": 2}}}
    moe = {"num_experts": 8, "expert_dim": 8, "router": "rmoe"}
    config = ModelConfig(vocab_size=53, pattern=["attention+moe"], ffns={"moe": moe}, **shape)
    model = Decoder(config, seed=0)
    xs = [inputs(1, 64, 128, seed=layer).bfloat16() for layer in range(24)]
    slopes = [inputs(1, 64, 8, seed=100 + layer).float() for layer in range(24)]

    def gradients(dtype: torch.dtype) -> dict[str, Tensor]:
        shared = {name: module() for name, module in model.shared.items()}
        carry, total = {"router_state": torch.zeros(1, 64, 128)}, torch.zeros(())
        for block, x, slope in zip(model.blocks.values(), xs, slopes, strict=True):
            scores, carry = block.ffn.router(x.to(dtype), carry, shared)
            total = total + (scores * slope).sum()
        named = {k: p for k, p in model.named_parameters() if ".router." in k or "shared." in k}
        return dict(zip(named, torch.autograd.grad(total, [*named.values()]), strict=True))

    exact, rounded = gradients(torch.float32), gradients(torch.bfloat16)
    errors = {k: float((rounded[k] - exact[k]).norm() / exact[k].norm()) for k in exact}
    assert 1e-4 < max(errors.values()) < 5e-3, errors


def test_the_cell_is_the_papers() -> None:
    cell = SharedCell("gru", WIDTH, dim=DIM, std=0.1, projects=False).double()
    with torch.no_grad():
        for number, param in enumerate(cell.parameters()):
            param.copy_(inputs(*param.shape, seed=number))
    x, h = inputs(5, WIDTH), inputs(5, WIDTH, seed=9)
    (ws, wz, wc), (us, uz, uc) = cell.input_weight.chunk(3), cell.state_weight.chunk(3)
    (bws, bwz, bwc), (bus, buz, buc) = cell.input_bias.chunk(3), cell.state_bias.chunk(3)
    s = torch.sigmoid(x @ ws.T + bws + h @ us.T + bus)
    z = torch.sigmoid(x @ wz.T + bwz + h @ uz.T + buz)
    c = torch.tanh(x @ wc.T + bwc + s * (h @ uc.T + buc))
    torch.testing.assert_close(step("gru", x, h, cell()), (1 - z) * c + z * h)


def test_a_closed_cell_is_a_two_layer_router() -> None:
    model = decoder(**small())
    cell = model.shared["router"]
    with torch.no_grad():
        cell.state_weight.zero_()
        cell.input_weight[WIDTH : 2 * WIDTH].zero_()
        cell.input_bias[WIDTH : 2 * WIDTH] = -1e4  # z = 0
        cell.input_bias[2 * WIDTH :] = inputs(WIDTH)
    xs = [inputs(2, 5, DIM, seed=i) for i in range(3)]
    for logits, x, layer in zip(run(model, xs), xs, ("0", "2", "3"), strict=True):
        router = model.blocks[layer].ffn.router
        inner = router.proj(x) @ cell.input_weight[2 * WIDTH :].T + cell.input_bias[2 * WIDTH :]
        torch.testing.assert_close(logits, torch.tanh(inner) @ router.scores.weight.T)


@pytest.mark.parametrize("passing", ["gradient", "detach", "none"])
@pytest.mark.parametrize("cell", GATES)
def test_what_the_layer_above_knows(passing: str, cell: str) -> None:
    """Inputs are constants: only the state leads from layer to layer."""
    model = decoder(**small(passing=passing, cell=cell))
    xs = [inputs(2, 5, DIM, seed=i) for i in range(3)]
    changed = [xs[0] + 0.5, *xs[1:]]
    before, after = run(model, xs), run(model, changed)
    assert not torch.equal(before[0], after[0])
    for a, b in zip(before[1:], after[1:], strict=True):
        assert torch.equal(a, b) == (passing == "none")
    run(model, xs)[2].square().sum().backward()
    first = model.blocks["0"].ffn.router.proj.weight.grad
    reached = first is not None and bool(first.any())
    assert reached == (passing == "gradient")


@pytest.mark.parametrize("detached", [False, True])
def test_scores_of_the_router_below(detached: bool) -> None:
    plain = decoder(**small(passing="none"))
    model = decoder(**small(passing="none", alpha=0.5, detach_scores=detached))
    assert model.carried.keys() == {SCORES, BALANCE}
    xs = [inputs(2, 5, DIM, seed=i) for i in range(3)]
    own = run(plain, xs)
    logits = run(model, xs)
    for i in range(3):
        expected = own[i] + (0.5 * own[i - 1] if i else 0)
        torch.testing.assert_close(logits[i], expected)
    logits[1].square().sum().backward()
    first = model.blocks["0"].ffn.router.proj.weight.grad
    assert (first is not None and bool(first.any())) != detached


def test_one_projection_for_all_layers() -> None:
    model = decoder(**small(shared_projection=True))
    names = [n for n, _ in model.named_parameters() if "proj" in n and "router" in n]
    assert names == ["shared.router.projection"]
    expected = decoder(**small())
    with torch.no_grad():
        expected.load_state_dict(
            {
                **expected.state_dict(),
                **{k: v for k, v in model.state_dict().items() if k in expected.state_dict()},
            }
        )
        for layer in ("0", "2", "3"):
            expected.blocks[layer].ffn.router.proj.weight.copy_(model.shared["router"].projection)
    xs = [inputs(2, 5, DIM, seed=i) for i in range(3)]
    for a, b in zip(run(model, xs), run(expected, xs), strict=True):
        torch.testing.assert_close(a, b)


def test_dense_layers_pass_the_state_on() -> None:
    model = decoder(**small())
    state = inputs(2, 5, WIDTH)
    x = inputs(2, 5, DIM)
    positions = torch.arange(5).expand(2, 5)
    _, carry, _ = model.blocks["1"](x, {STATE: state}, SequenceContext(positions))
    assert carry[STATE] is state


def test_extra_parameters_are_the_formula() -> None:
    """L (p d + N p) + 6 p² + 6 p instead of L N d; the published 24-layer shape adds 3.59 M."""

    def count(router: str, dim: int, layers: int, experts: int) -> int:
        config = ModelConfig(
            vocab_size=8,
            dim=dim,
            num_layers=layers,
            pattern=["attention+moe"],
            mixers={"attention": {"num_heads": 8}},
            ffns={"moe": {"num_experts": experts, "router": router, "expert_dim": 8}},
        )
        with torch.device("meta"):
            return sum(p.numel() for p in Decoder(config).parameters())

    for dim, layers, experts, rounded in ((1280, 24, 16, 3.59e6), (352, 8, 16, 0.431e6)):
        extra = count("rmoe", dim, layers, experts) - count("linear", dim, layers, experts)
        p = 128
        formula = layers * (p * dim + experts * p) + 6 * p * p + 6 * p - layers * experts * dim
        assert extra == formula
        assert extra == pytest.approx(rounded, rel=2e-3)


def test_the_small_recipe_has_the_published_size() -> None:
    """Arithmetic from the shape: 36.89M outside the embedding, of which 475,904 are routers'
    (arXiv 2408.06793, table 1: 36.51M and 0.47M)."""
    model_config = load_recipe("rmoe-enwik8-small").model
    with torch.device("meta"):
        model = Decoder(dataclasses.replace(model_config, vocab_size=256))
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    routers = sum(size for name, size in sizes.items() if "router" in name)
    inside = sum(sizes.values()) - sizes["embedding.weight"] - sizes["head.weight"]
    d, p, n, layers, width = 352, 128, 16, 8, 240
    assert routers == layers * (p * d + n * p) + 6 * p * p + 6 * p == 475_904
    block = 4 * d * d + 2 * d + n * 3 * width * d  # attention, two norms, experts
    assert inside == layers * block + d + routers == 36_887_136
    assert inside == pytest.approx(36.51e6, rel=0.011)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("router", ROUTERS)
def test_recomputed_activations_give_the_same_gradients(mode: str, router: str) -> None:
    expected, model = backward(decoder(router)), decoder(router)
    for block in model.blocks.values():
        checkpoint_block(block, mode)
    found = backward(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_ratio(name, found[name], value, 1e-12)


def test_frozen_routers_stay() -> None:
    model = decoder(moe={"freeze_router": True}, **small())
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if "router" in n}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    backward(model)
    for optimizer in build_optimizers([model], OptimizerConfig(name="muon", lr=0.1)):
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == before.keys() - frozen
