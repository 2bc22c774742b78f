"""Metrics of mixtures of experts, from the formulas and from a run."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rondo.models import Decoder, ModelConfig, load
from rondo.parallel.build import ParallelModel
from rondo.parallel.config import ParallelConfig
from rondo.parallel.load import load_summary, mixtures, move_biases, take_loads
from rondo.parallel.mesh import Ranks
from rondo.parallel.pipeline import MicroBatch
from rondo.pretrain import load_recipe, train
from rondo.pretrain.domain_loads import DomainLoads
from rondo.pretrain.metrics import heat_map
from rondo.pretrain.routing import (
    expert_similarity,
    mutual_information,
    router_gradients,
    routing,
)

ALONE = Ranks(0, 1, torch.device("cpu"), None)


def model(**moe: object) -> ParallelModel:
    config = ModelConfig(
        vocab_size=31,
        dim=16,
        num_layers=3,
        pattern=["attention+moe"],
        mixers={"attention": {"num_heads": 2}},
        ffns={"moe": {"num_experts": 4, "expert_dim": 8, **moe}},
        routers={"rmoe": {"dim": 8}},
        init_std=0.3,
    )
    return ParallelModel(config, ALONE, ParallelConfig(), precision="float64", seed=0, length=12)


def batch() -> MicroBatch:
    ids = torch.randint(0, 31, (2, 13), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(12).expand(2, 12)
    return MicroBatch(ids[:, :-1], ids[:, 1:], torch.zeros(2, 12, dtype=torch.long), positions)


def test_entropy_and_balance_are_their_formulas() -> None:
    ours, given = model(), batch()
    seen = []
    for mixture in mixtures(ours.parts).values():
        mixture.router.register_forward_hook(lambda m, a, out: seen.append(out[0].softmax(-1)))
    found = routing(ours, [given], information=True)
    for layer in range(3):
        g = seen[layer].flatten(0, 1)
        ordered = g.sort(-1, descending=True).values
        label = f"{layer:02d}"
        entropy = -(g * g.log()).sum(-1).mean()
        assert found[f"router_entropy/{label}"] == pytest.approx(float(entropy))
        inner = (ordered[:, 0] / ordered[:, 1]).median()
        assert found[f"router_inner/{label}"] == pytest.approx(float(inner))
        assert found[f"router_outer/{label}"] == pytest.approx(float(ordered[:, :2].sum(-1).mean()))
        if layer:
            expected = mutual_information(seen[layer - 1], seen[layer])
            assert found[f"router_information/{label}"] == pytest.approx(expected)
    assert "router_information/00" not in found


@pytest.mark.parametrize("sizes", [[2], [1, 1]])
def test_loads_by_domain_are_those_of_its_sequences(sizes: list[int]) -> None:
    ours, given = model(bias_rate=0.01), batch()
    layers = mixtures(ours.parts)
    layers[1].balance_bias[0] = 1.0  # has a say in the choice: expert 0 first, always
    parts = zip(*(tensor.split(sizes) for tensor in given), strict=True)
    batches = [MicroBatch(*tensors) for tensors in parts]
    sources = [[2], [0]] if len(sizes) == 2 else [[2, 0]]
    with DomainLoads(ours, sources, ["a", "b", "c"]) as loads:
        ours.evaluate(batches)
    found = loads.tables()
    assert list(found) == ["a", "c"]
    ours.evaluate(batches)  # no longer counted
    assert loads.tables() == found
    take_loads(ours.parts, ALONE)
    for name, row in (("c", 0), ("a", 1)):
        ours.forward_backward([MicroBatch(*(tensor[row : row + 1] for tensor in given))])
        counts = take_loads(ours.parts, ALONE)
        expected = [(each[:-1] / 24).tolist() for each in counts.values()]
        assert found[name] == expected
        assert found[name][1][0] == 0.5
    assert found["a"] != found["c"]


def test_similarity_of_experts_is_the_mean_cosine_of_pairs() -> None:
    ours = model()
    experts = mixtures(ours.parts)[2].experts
    flat = torch.cat([weight.detach().flatten(1) for weight in experts.parameters()], 1)
    pairs = [torch.cosine_similarity(flat[i], flat[j], 0) for i in range(4) for j in range(i)]
    found = expert_similarity(ours)
    assert found.keys() == {f"expert_similarity/{layer:02d}" for layer in range(3)}
    assert found["expert_similarity/02"] == pytest.approx(float(torch.stack(pairs).mean()))


def test_mutual_information() -> None:
    x = (torch.arange(10_000) % 100 + 0.5) / 100
    assert mutual_information(x, x) == pytest.approx(math.log(100))
    assert mutual_information(x, 1 - x) == pytest.approx(math.log(100))
    y = (torch.arange(10_000) // 100 + 0.5) / 100
    assert mutual_information(x, y) == pytest.approx(0, abs=1e-9)


def test_gradients_by_source_add_up() -> None:
    """The two gradients, taken one by one, make the gradient of the whole."""
    ours, given = model(balance_loss=2.0), batch()
    norms = router_gradients(ours, [given], 24)
    assert all(p.grad is None or not p.grad.any() for p in ours.parts[0].parameters())
    assert not any(m.load.any() for m in mixtures(ours.parts).values())
    plain: Decoder = ours.parts[0]
    assert plain.token_weight == 1.0 and plain.loss_weights == {"balance_loss": 2.0}
    out = plain(given.tokens, segment_ids=given.segment_ids)
    losses = {
        "tokens": plain.hidden_loss(out.hidden, given.targets),
        "auxiliary": plain.auxiliary_loss(out.aux),
    }
    params = [p for name, p in plain.named_parameters() if "router." in name]
    for source, loss in losses.items():
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        square = sum(float(g.square().sum()) for g in grads if g is not None)
        assert norms[f"router_grad_norm/{source}"] == pytest.approx(square**0.5 / 24)
        assert square > 0


@pytest.mark.parametrize("sizes", [[2], [1, 1]])
def test_auxiliary_losses_are_means_over_all_tokens(sizes: list[int]) -> None:
    """Also over those without a target, however the step is cut."""
    given, ours = batch(), model(balance_loss=2.0, z_loss=0.5)
    given = given._replace(targets=given.targets.clone())
    given.targets[0, 3:] = -100
    parts = zip(*(tensor.split(sizes) for tensor in given), strict=True)
    ours.forward_backward([MicroBatch(*tensors) for tensors in parts])
    plain: Decoder = ours.parts[0]
    out = plain(given.tokens, segment_ids=given.segment_ids)
    loss = plain.hidden_loss(out.hidden, given.targets) / 15
    loss = loss + (2.0 * out.aux["balance_loss"] + 0.5 * out.aux["z_loss"]) / 24
    params = dict(plain.named_parameters())
    for name, grad in zip(params, torch.autograd.grad(loss, [*params.values()]), strict=True):
        torch.testing.assert_close(params[name].grad / 15, grad, msg=name)


def test_without_auxiliary_losses_the_tokens_gradient_remains() -> None:
    found = router_gradients(model(balance_loss=0.0), [batch()], 24)
    assert found.keys() == {"router_grad_norm/tokens"}
    assert found["router_grad_norm/tokens"] > 0


def test_biases_move_towards_an_even_load() -> None:
    ours = model(bias_rate=0.01, balance_loss=0.0)
    mixture = mixtures(ours.parts)[1]
    mixture.load.copy_(torch.tensor([5, 1, 0, 2, 4]))
    loads = take_loads(ours.parts, ALONE)
    assert loads[1].tolist() == [5, 1, 0, 2, 4] and not mixture.load.any()
    move_biases(ours.parts, loads)
    assert mixture.balance_bias is not None
    torch.testing.assert_close(
        mixture.balance_bias, torch.tensor([-0.01, 0.01, 0.01, 0.0], dtype=torch.float64)
    )
    summary = load_summary({1: loads[1]})
    assert summary == {"moe/drop_ratio": 0.5, "moe/max_load": 2.5}


def test_biases_of_frozen_routers_stay() -> None:
    ours = model(bias_rate=0.01, freeze_router=True)
    mixtures(ours.parts)[1].load.copy_(torch.tensor([5, 1, 0, 2, 4]))
    move_biases(ours.parts, take_loads(ours.parts, ALONE))
    assert not any(mixture.balance_bias.any() for mixture in mixtures(ours.parts).values())


def test_balancing_by_bias_evens_the_load() -> None:
    ours, given = model(bias_rate=0.02, balance_loss=0.0), batch()
    layers = mixtures(ours.parts)
    for mixture in layers.values():
        mixture.balance_bias[0] = 1.0  # more than any probability: every token goes to expert 0
    share = []
    for _ in range(80):
        ours.forward_backward([given])
        loads = take_loads(ours.parts, ALONE)
        share.append([float(counts[0] / counts[:-1].sum()) for counts in loads.values()])
        move_biases(ours.parts, loads)
    assert share[0] == [0.5] * 3
    assert all(one < 0.4 for one in share[-1])


def test_heat_maps_are_png() -> None:
    image = heat_map("load", [[0.0, 0.5], [1.0, 0.25]], cell=2).value[0].image
    data = image.encoded_image_string
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and (image.width, image.height) == (4, 4)
    assert struct.unpack(">II", data[16:24]) == (4, 4)
    start = data.index(b"IDAT")
    length = struct.unpack(">I", data[start - 4 : start])[0]
    pixels = zlib.decompress(data[start + 4 : start + 4 + length])
    assert pixels == (b"\0\xff\xff\x7f\x7f" * 2 + b"\0\0\0\xbf\xbf" * 2)


def test_a_run_reports_its_routers(tmp_path: Path) -> None:
    options = [
        f"--output_dir={tmp_path}/runs",
        f"--data.folder={tmp_path}/data",
        "--steps=4",
        "--model.dim=32",
        "--model.num_layers=2",
        "--model.ffns.moe.expert_dim=16",
        "--model.ffns.moe.capacity_factor=1.0",
        "--model.ffns.moe.z_loss=0.001",
        "--model.ffns.moe.bias_rate=0.01",
        "--data.sequence_length=64",
        "--data.global_batch_size=4",
        "--data.micro_batch_size=2",
        "--schedule.warmup_steps=0",
        "--logging.norms_every=2",
        "--logging.router_information=true",
        "--evals.batches=0",
    ]
    assert train(load_recipe("rmoe-tiny", options)) == 0
    lines = (tmp_path / "runs/rmoe-tiny/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        assert 1.5 < row["moe/balance_loss"] < 4 and row["moe/z_loss"] > 0
        assert 0 <= row["moe/drop_ratio"] < 1 and row["moe/max_load"] >= 1
    assert not any(name.startswith("expert_load/") for row in rows for name in row)  # one source
    assert "expert_load" not in rows[0]
    for row in rows[1::2]:
        assert [len(shares) for shares in row["expert_load"]] == [16, 16]
        assert [sum(shares) for shares in row["expert_load"]] == pytest.approx([1, 1])
        for name in ("router_entropy/00", "router_outer/01"):
            assert row[name] > 0
        assert -1 < row["expert_similarity/01"] < 1
        assert row["router_information/01"] >= 0 and row["router_inner/00"] >= 1
        assert row["router_grad_norm/tokens"] > 0 and row["router_grad_norm/auxiliary"] > 0
    folder = tmp_path / "runs/rmoe-tiny/tensorboard"
    pictures = EventAccumulator(str(folder)).Reload().Images("expert_load")
    assert [picture.step for picture in pictures] == [row["step"] for row in rows[1::2]]
    saved = load(tmp_path / "runs/rmoe-tiny/checkpoints/step-000000004", dtype=torch.bfloat16)
    for mixture in mixtures([saved]).values():
        bias = mixture.balance_bias
        assert bias is not None and bias.dtype == torch.float32  # four steps of 0.01 each
        assert bias.any() and bias.abs().max() <= 0.0401
    saved.to("cpu")  # nothing of it is left without numbers


def test_a_run_on_several_sources_reports_loads_by_domain(tmp_path: Path) -> None:
    for name, text in (("one", "a rondo returns. "), ("two", "0123456789 ")):
        lines = (json.dumps({"text": text * 40}) for _ in range(8))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    options = [
        f"--output_dir={tmp_path}/runs",
        f"--data.folder={tmp_path}/data",
        f"--data.sources=[{{path: {tmp_path}/one.jsonl}}, {{path: {tmp_path}/two.jsonl}}]",
        "--steps=2",
        "--model.dim=32",
        "--model.num_layers=1",
        "--model.ffns.moe.expert_dim=16",
        "--data.sequence_length=64",
        "--data.global_batch_size=4",
        "--data.micro_batch_size=2",
        "--schedule.warmup_steps=0",
        "--logging.norms_every=2",
        "--evals.batches=0",
    ]
    assert train(load_recipe("rmoe-tiny", options)) == 0
    lines = (tmp_path / "runs/rmoe-tiny/metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert not any(name.startswith("expert_load") for name in first)
    (one,), (two,) = (second[f"expert_load/{name}.jsonl"] for name in ("one", "two"))
    assert len(one) == 16 and sum(one) == pytest.approx(1)
    assert one != two
    (both,) = second["expert_load"]
    assert len(both) == 16


def test_looking_at_routers_does_not_move_them(tmp_path: Path) -> None:
    """Balanced by bias alone, with and without the passes that measure: the same model."""
    options = [
        f"--output_dir={tmp_path}/runs",
        f"--data.folder={tmp_path}/data",
        "--steps=4",
        "--model.dim=32",
        "--model.num_layers=2",
        "--model.ffns.moe.expert_dim=16",
        "--model.ffns.moe.balance_loss=0",
        "--model.ffns.moe.bias_rate=0.01",
        "--data.sequence_length=64",
        "--data.global_batch_size=4",
        "--schedule.warmup_steps=0",
        "--data.micro_batch_size=2",
        "--evals.batches=0",
    ]
    biases = []
    for every in (0, 1):
        more = [f"--name=every{every}", f"--logging.norms_every={every}"]
        assert train(load_recipe("rmoe-tiny", [*options, *more])) == 0
        lines = (tmp_path / f"runs/every{every}/metrics.jsonl").read_text().splitlines()
        assert ("router_grad_norm/tokens" in json.loads(lines[0])) == bool(every)
        saved = load(tmp_path / f"runs/every{every}/checkpoints/step-000000004")
        biases.append([mixture.balance_bias for mixture in mixtures([saved]).values()])
    assert all(torch.equal(a, b) for a, b in zip(*biases, strict=True))
