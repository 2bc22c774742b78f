"""Mixtures of experts: against loops over tokens, and what every routed layer must keep to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rondo.errors import UserError
from rondo.models import Decoder, ModelConfig
from rondo.models.config import problems
from rondo.models.ffn.dispatch import choose, over_capacity
from rondo.models.ffn.experts import Experts, mixture
from rondo.models.ffn.moe import BALANCE, MoE, Z
from rondo.models.ffn.swiglu import SwiGLU
from rondo.tests.numerics import assert_ratio, gradients

pytestmark = pytest.mark.quick


def config(rmoe: dict[str, Any] | None = None, **options: Any) -> ModelConfig:
    """A small model of attention and mixtures; `rmoe` are its router's options."""
    return ModelConfig(
        vocab_size=53,
        dim=16,
        num_layers=3,
        pattern=["attention+moe"],
        mixers={"attention": {"num_heads": 2}},
        ffns={"moe": {"num_experts": 6, "top_k": 2, "expert_dim": 8, **options}},
        routers={"rmoe": {"dim": 12, **(rmoe or {})}},
        init_std=0.3,
    )


def layered(**options: Any) -> Decoder:
    return Decoder(config(**options), seed=0).double()


def layer(**options: Any) -> tuple[MoE, dict[str, Any]]:
    """The mixture of the second layer in float64, and what layers share."""
    model = layered(**options)
    moe = model.blocks["1"].ffn
    return moe, {name: module() for name, module in model.shared.items()}


def start(model_config: ModelConfig, x: Tensor) -> dict[str, Tensor]:
    """What is carried into the first layer."""
    widths = MoE.carried(model_config)
    return {name: x.new_zeros(*x.shape[:2], width) for name, width in widths.items()}


def inputs(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tokens(batch: int = 2, time: int = 24) -> Tensor:
    return torch.randint(0, 53, (batch, time), generator=torch.Generator().manual_seed(3))


def expert(experts: Experts, e: int, x: Tensor) -> Tensor:
    gate, up = experts.gate_up_proj[e]
    hidden = F.silu(x @ gate.T) * (x @ up.T)
    return hidden @ experts.down_proj[e].T


def test_the_layer_is_a_loop_over_tokens() -> None:
    moe, shared = layer(shared_experts=2, routed_weight=0.7, shared_weight=0.4)
    x = inputs(2, 9, 16)
    y, _ = moe(x, start(config(), x), shared)
    logits, _ = moe.router(x, start(config(), x), shared)
    for b, t in ((b, t) for b in range(2) for t in range(9)):
        g = logits[b, t].softmax(-1)
        best = g.argsort(descending=True)[:2]
        routed = sum(g[e] / g[best].sum() * expert(moe.experts, int(e), x[b, t]) for e in best)
        gate, up, down = (getattr(moe, f"shared_{name}").weight for name in ("gate", "up", "down"))
        alike = (F.silu(x[b, t] @ gate.T) * (x[b, t] @ up.T)) @ down.T
        torch.testing.assert_close(y[b, t], 0.7 * routed + 0.4 * alike, rtol=1e-10, atol=1e-12)


def test_one_expert_is_a_dense_layer() -> None:
    moe, shared = layer(num_experts=1, top_k=1)
    dense = SwiGLU(ModelConfig(dim=16, ffn_dim=8)).double()
    with torch.no_grad():
        dense.gate_proj.weight.copy_(moe.experts.gate_up_proj[0, 0])
        dense.up_proj.weight.copy_(moe.experts.gate_up_proj[0, 1])
        dense.down_proj.weight.copy_(moe.experts.down_proj[0])
    x = inputs(2, 9, 16)
    torch.testing.assert_close(moe(x, {}, shared)[0], dense(x), rtol=1e-12, atol=1e-14)
    assert choose(torch.ones(2, 9, 1), 1, renormalize=True).weights.eq(1).all()


def test_a_layer_alone_starts_the_router_or_says_what_it_lacks() -> None:
    moe, shared = layer()
    x = inputs(2, 9, 16)
    expected, _ = moe(x, start(config(), x), shared)
    assert torch.equal(moe(x, shared=shared), expected)
    with pytest.raises(ValueError, match=r"shared=\{'router'.* got \['routr'\]"):
        moe(x, shared={"routr": shared["router"]})
    linear, _ = layer(router="linear")
    assert linear(x).shape == x.shape


@pytest.mark.parametrize("renormalize", [True, False])
def test_all_experts_are_a_dense_mixture(renormalize: bool) -> None:
    moe, shared = layer(num_experts=4, top_k=4, renormalize=renormalize)
    x = inputs(2, 9, 16)
    names = [name for name, _ in moe.named_parameters()]
    g = moe.router(x, {}, shared)[0].softmax(-1)

    def ours(x: Tensor, *params: Tensor) -> list[Tensor]:
        values = dict(zip(names, params, strict=True))
        return [torch.func.functional_call(moe, values, (x, {}, shared))[0]]

    def mixture(x: Tensor, *params: Tensor) -> list[Tensor]:
        values = dict(zip(names, params, strict=True))
        router = {n.removeprefix("router."): v for n, v in values.items() if "router" in n}
        g = torch.func.functional_call(moe.router, router, (x, {}, shared))[0].softmax(-1)
        gate, up = values["experts.gate_up_proj"].unbind(1)
        down = values["experts.down_proj"]
        hidden = F.silu(torch.einsum("btd,eid->btei", x, gate))
        hidden = hidden * torch.einsum("btd,eid->btei", x, up)
        return [torch.einsum("bte,btei,edi->btd", g, hidden, down)]

    (actual, grads), (expected, wanted) = (
        gradients(f, [x, *moe.parameters()]) for f in (ours, mixture)
    )
    torch.testing.assert_close(g.sum(-1), torch.ones(2, 9).double())
    for name, a, b in zip(["y", "x", *names], [*actual, *grads], [*expected, *wanted], strict=True):
        assert_ratio(name, a, b, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0]])
def test_grouped_products_are_separate_ones(dtype: torch.dtype, sizes: list[int]) -> None:
    """Experts with any number of rows, a choice a token; one share is zero."""
    shapes = (sum(sizes), 16), (sum(sizes), 1), (4, 2, 24, 16), (4, 16, 24)
    operands = [inputs(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    operands[1][:1] = 0
    mixed = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(7))
    experts = torch.arange(4).repeat_interleave(torch.tensor(sizes))[mixed]

    def ours(x: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> list[Tensor]:
        return [mixture(x, experts[:, None], shares, gate_up, down)]

    def separate(x: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> list[Tensor]:
        y = torch.zeros_like(x)
        for e, ((gate, up), out) in enumerate(zip(gate_up, down, strict=True)):
            rows = x[own := experts == e]
            y[own] = shares[own] * (F.silu(rows @ gate.T) * (rows @ up.T)) @ out.T
        return [y]

    rounded = [each.to(dtype) for each in operands]
    actual = gradients(ours, rounded)
    expected = gradients(separate, [each.double() for each in rounded])
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert a.dtype == dtype
        if a.numel():
            assert_ratio("grouped", a, b, limit)


@pytest.mark.parametrize("drops", [False, True])
def test_filled_rows_change_nothing(drops: bool) -> None:
    """In bfloat16 on a CPU the rows of an expert are filled up; in float64 they are not."""
    x, shares = inputs(37, 16), inputs(37, 2, seed=4)
    params = inputs(4, 2, 24, 16, seed=5), inputs(4, 16, 24, seed=6)
    experts = torch.randint(0, 4 + drops, (37, 2), generator=torch.Generator().manual_seed(1))
    rounded = [each.bfloat16() for each in (x, shares, *params)]

    def ours(x: Tensor, shares: Tensor, *params: Tensor) -> list[Tensor]:
        return [mixture(x, experts, shares, *params, drops=drops)]

    actual = gradients(ours, rounded)
    expected = gradients(ours, [each.double() for each in rounded])
    for a, b in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_ratio("mixture", a, b, 2e-2)


def test_one_expert_with_a_weight_of_one_is_refused() -> None:
    """The router would get no gradient from the tokens."""
    [found] = problems(config(top_k=1))
    assert found.startswith("model.ffns.moe.renormalize: must be false with top_k 1")
    assert not problems(config(top_k=1, renormalize=False))


def test_dropped_choices_add_nothing() -> None:
    moe, shared = layer(capacity_factor=0.5)
    x = inputs(2, 24, 16)
    y, _ = moe(x, {}, shared)
    logits, _ = moe.router(x, {}, shared)
    choice = choose(logits.softmax(-1), 2, renormalize=True)
    kept = ~over_capacity(choice, 6, 0.5)
    assert 0 < kept.sum() < kept.numel()
    outputs = torch.stack([expert(moe.experts, e, x) for e in range(6)], -2)
    picked = outputs.gather(-2, choice.experts[..., None].expand(-1, -1, -1, 16))
    expected = (picked * (choice.weights * kept)[..., None]).sum(-2)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    assert moe.load[-1] == (~kept).sum()
    assert moe.load[:-1].sum() == kept.numel()


def test_even_routing_costs_k() -> None:
    model_config = config(z_loss=1e-3)
    moe, _ = layer()
    x = inputs(2, 9, 16)
    logits = torch.zeros(2, 9, 6).double()
    g = logits.softmax(-1)
    even = torch.full((2, 6), 9 * 2 // 6)
    carry = moe._add_losses(start(model_config, x), logits, g, even)
    torch.testing.assert_close(3 * carry[BALANCE].mean(), torch.tensor(2.0).double())
    torch.testing.assert_close(3 * carry[Z].mean(), torch.tensor(6.0).double().log().square())
    one_sided = torch.tensor([[9, 9, 0, 0, 0, 0]] * 2)
    sure = torch.tensor([0.5, 0.5, 0, 0, 0, 0]).double().expand(2, 9, 6)
    carry = moe._add_losses(start(model_config, x), logits, sure, one_sided)
    torch.testing.assert_close(3 * carry[BALANCE].mean(), torch.tensor(6.0).double())


def test_auxiliary_losses_are_means_over_layers_of_their_formulas() -> None:
    model, ids = Decoder(config(z_loss=1e-3), seed=0).double(), tokens()
    seen: list[Tensor] = []
    for block in model.blocks.values():
        block.ffn.router.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    aux = model(ids).aux
    balance, z = [], []
    for logits in seen:
        g = logits.softmax(-1)
        f = F.one_hot(g.topk(2).indices, 6).double().sum(2).mean(1)  # of each sequence
        balance.append(6 * (f * g.mean(1)).sum(-1).mean())
        z.append(logits.logsumexp(-1).square().mean())
    torch.testing.assert_close(aux[BALANCE] / ids.numel(), torch.stack(balance).mean())
    torch.testing.assert_close(aux[Z] / ids.numel(), torch.stack(z).mean())
    assert model.loss_weights == {BALANCE: 0.01, Z: 1e-3}


def test_the_balance_loss_reaches_projection_cell_and_scores() -> None:
    model = Decoder(config(), seed=0).double()
    model(tokens()).aux[BALANCE].backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    for i in range(3):
        assert {f"blocks.{i}.ffn.router.{n}.weight" for n in ("proj", "scores")} <= names
    assert {n for n in dict(model.named_parameters()) if n.startswith("shared.")} <= names
    assert not any("experts" in name for name in names if name.startswith("blocks.2"))


def test_micro_batches_do_not_change_the_gradients() -> None:
    def grads(parts: list[Tensor]) -> dict[str, Tensor]:
        model = Decoder(config(z_loss=1e-2, balance_loss=0.5), seed=0).double()
        for ids in parts:
            out = model(ids[:, :-1])
            loss = model.hidden_loss(out.hidden, ids[:, 1:]) + model.auxiliary_loss(out.aux)
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    whole, split = grads([tokens(4)]), grads(list(tokens(4).split(1)))
    for name, value in whole.items():
        assert_ratio(name, split[name], value, 1e-10)


@pytest.mark.parametrize("router", ["linear", "rmoe"])
def test_tokens_are_independent(router: str) -> None:
    moe, shared = layer(router=router)
    x = inputs(3, 10, 16)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    y, _ = moe(x, {}, shared)
    mixed, _ = moe(x.flatten(0, 1)[order][None], {}, shared)
    assert_ratio("permuted", mixed[0], y.flatten(0, 1)[order], 1e-12)
    alone, _ = moe(x[1:2, 4:7], {}, shared)
    assert_ratio("alone", alone, y[1:2, 4:7], 1e-12)


def test_documents_and_batches_do_not_touch_each_other() -> None:
    model, ids = Decoder(config(), seed=0).double(), tokens(2, 40)
    segments = torch.zeros_like(ids)
    segments[:, 25:] = 1
    packed = model(ids, segment_ids=segments).hidden
    for part in (slice(0, 25), slice(25, None)):
        for row in (slice(0, 1), slice(1, 2)):
            assert_ratio("document", packed[row, part], model(ids[row, part]).hidden, 1e-9)


def test_decoding_equals_one_call() -> None:
    model, ids = Decoder(config(), seed=0).double(), tokens()
    chosen: list[Tensor] = []
    moe = model.blocks["2"].ffn
    moe.router.register_forward_hook(lambda m, a, out: chosen.append(out[0].topk(2).indices))
    expected = model(ids)
    state, hidden = None, []
    for t in range(ids.shape[1]):
        out = model(ids[:, t : t + 1], state=state)
        state = out.state
        hidden.append(out.hidden)
    assert_ratio("hidden", torch.cat(hidden, 1), expected.hidden, 1e-9)
    assert torch.equal(torch.cat(chosen[1:], 1), chosen[0])


def test_cost_is_counted() -> None:
    for router in ("linear", "rmoe", "xmoe", "mlp"):
        model = layered(shared_experts=1, router=router)
        moe = model.blocks["1"].ffn
        x, shared = inputs(1, 64, 16), {n: m() for n, m in model.shared.items()}
        with FlopCounterMode(display=False) as counter:
            moe(x, {}, shared)
        assert moe.cost(64).flops == counter.get_total_flops() / 64, router
        assert model.cost(64).parameters == sum(p.numel() for p in model.parameters())
        idle = 3 * 3 * 16 * 8 * 4  # layers, matrices, dim, width, experts a token does not see
        assert model.active_parameters() == model.cost(64).parameters - idle


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ffns": {"moee": {}}}, ["model.ffns.moee", "did you mean 'moe'"]),
        ({"ffns": {"moe": {"experts": 3}}}, ["model.ffns.moe.experts", "num_experts"]),
        ({"ffns": {"moe": {"top_k": 9, "num_experts": 4}}}, ["ffns.moe.top_k", "9", "4"]),
        ({"ffns": {"moe": {"router": "rmo"}}}, ["ffns.moe.router", "did you mean 'rmoe'"]),
        ({"ffns": {"moe": {"z_loss": -1.0}}}, ["model.ffns.moe.z_loss", "-1.0"]),
        ({"ffns": {"moe": {"num_experts": 0}}}, ["model.ffns.moe.num_experts", "0"]),
        ({"routers": {"rmoe": {"cell": "gruu"}}}, ["model.routers.rmoe.cell", "gru", "'gruu'"]),
        ({"routers": {"rmoe": {"detach_scores": True}}}, ["routers.rmoe.detach_scores", "alpha 0"]),
        ({"routers": {"rmoe": {"width": 3}}}, ["model.routers.rmoe.width", "dim"]),
        ({"routers": {"rmo": {}}}, ["model.routers.rmo", "did you mean 'rmoe'"]),
        # Used by nothing:
        ({"routers": {"mlp": {"width": 3}}}, ["model.routers.mlp.width", "dim"]),
        ({"ffn": "swiglu", "ffns": {"moe": {"top_k": "2"}}}, ["ffns.moe.top_k", "int", "'2'"]),
        ({"ffns": {"swiglu": {"dim": 3}}}, ["model.ffns.swiglu.dim: unknown option"]),
        ({"mixers": {"mamba2": {"heads": 3}}}, ["model.mixers.mamba2.heads", "head_dim"]),
        ({"mixers": {"wide": {"kind": "mamba"}}}, ["mixers.wide", "did you mean 'mamba2'"]),
        ({"mixers": {"wide": {"kind": "gla", "dims": 3}}}, ["model.mixers.wide.dims"]),
    ],
)
def test_impossible_options_are_named(changes: dict, words: list[str]) -> None:
    given = {"vocab_size": 8, "dim": 32, "num_layers": 2, "ffn": "moe", **changes}
    wrong = ModelConfig(**given)
    message = "\n".join(problems(wrong))
    for word in words:
        assert word in message
    with pytest.raises(UserError):
        Decoder(wrong)
