"""Speed of mixtures of experts on this machine, against dense layers and the linear router.

    python -m rondo.pretrain.bench_moe [--rounds 5] [--only layer|router]

`layer`: one mixture (16 experts, top-2), forward and backward in bfloat16 over float32 parameters,
against a dense SwiGLU of the same active FLOPs, on several numbers of tokens: the more, the less it
weighs that a mixture has eight times the parameters to cast. `router`: a training step with `rmoe`
against one with `linear`, in a smaller model with the ratios of the preset rmoe-0.9b; time in
turns, peak memory each in a process of its own. The best of the rounds counts.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rondo.models import Decoder, ModelConfig
from rondo.models.ffn import MoE, SwiGLU
from rondo.models.init import initial_values
from rondo.models.mixer import ChannelMixer
from rondo.parallel.hardware import reuse_memory
from rondo.pretrain.bench import best_times, our_step

DIM, EXPERT, TOP_K = 1024, 1408, 2
TOKENS = (8192, 16384, 32768)
Contest = Callable[[int], list[dict[str, Any]]]


def layer_step(
    ffn: ChannelMixer, shared: dict[str, Any], tokens: int, rounds: int
) -> Callable[[], float]:
    """Forward and backward of a channel mixer on `tokens` tokens, new ones each time: the same
    would give experts the same loads, and the CPU library products it has prepared."""
    generator, size = torch.Generator().manual_seed(0), (8, tokens // 8, DIM)
    batches = [torch.randn(size, generator=generator).bfloat16() for _ in range(rounds + 2)]
    slope, turns = torch.ones_like(batches[0]), itertools.cycle(batches)

    def step() -> float:
        x = next(turns).requires_grad_()
        arguments = (x, {}, shared) if isinstance(ffn, MoE) else (x,)
        y = ffn(*arguments)
        (y[0] if isinstance(y, tuple) else y).backward(slope)
        x.grad = None
        ffn.zero_grad()
        return 0.0

    return step


def layer_contest(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Tokens a second of mixtures and of the dense layer."""
    steps, names = (
        [
            layer_step(
                _filled(SwiGLU(ModelConfig(dim=DIM, ffn_dim=TOP_K * EXPERT))), {}, tokens, rounds
            )
        ],
        [],
    )
    for router in ("linear", "rmoe"):
        options = {"top_k": TOP_K, "expert_dim": EXPERT, "router": router}
        config = ModelConfig(vocab_size=8, dim=DIM, num_layers=1, ffns={"moe": options})
        shared = {n: _filled(m)() for n, m in MoE.shared_modules(config).items()}
        steps.append(layer_step(_filled(MoE(config)), shared, tokens, rounds))
        names.append(router)
    dense, *ours = best_times(steps, rounds)
    return [
        {
            "contest": f"layer, {name} router, {tokens} tokens",
            "tokens_per_second": tokens / seconds,
            "dense_tokens_per_second": tokens / dense,
            "ratio": dense / seconds,
        }
        for name, seconds in zip(names, ours, strict=True)
    ]


def _filled(module: Any) -> Any:
    with torch.no_grad():
        params = dict(module.named_parameters())
        for name, value in initial_values(module, seed=0):
            params[name].copy_(value)
    return module


def small_model(router: str) -> Decoder:
    """rmoe-0.9b with half its width, heads, expert and router width, a quarter of its layers, and
    a vocabulary that keeps the output matrix's share. Sequences of 2,048 tokens keep that of
    attention (4,096 at twice the width)."""
    config = ModelConfig(
        vocab_size=12064,
        dim=640,
        num_layers=6,
        pattern=["attention+moe"],
        mixers={"attention": {"num_heads": 10, "qk_norm": False}},
        ffns={"moe": {"num_experts": 16, "top_k": 4, "expert_dim": 176, "router": router}},
        routers={"rmoe": {"dim": 64}},
    )
    model = Decoder(config, seed=0)
    model.activation_dtype = torch.bfloat16
    return model


def model_step(router: str) -> Callable[[], float]:
    """A training step on a sequence of 2,048 tokens."""
    tokens = torch.randint(0, 12064, (1, 2048), generator=torch.Generator().manual_seed(0))
    return our_step(small_model(router), tokens)


def router_contest(rounds: int) -> list[dict[str, Any]]:
    """What `rmoe` costs beyond `linear`, as shares of time and of peak memory."""
    linear, rmoe = best_times([model_step("linear"), model_step("rmoe")], rounds)
    peaks = {router: _peak(router) for router in ("linear", "rmoe")}
    return [
        {
            "contest": "router",
            "linear_seconds": linear,
            "rmoe_seconds": rmoe,
            "extra_time": rmoe / linear - 1,
            "linear_bytes": peaks["linear"],
            "rmoe_bytes": peaks["rmoe"],
            "extra_memory": peaks["rmoe"] / peaks["linear"] - 1,
        }
    ]


def _peak(router: str) -> int:
    # Large buffers go back to the system when freed, so that the peak is what was in use at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-m", "rondo.pretrain.bench_moe", "--peak", router]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout)


def print_peak(router: str) -> None:
    """Prints the peak memory in bytes of two steps in this process."""
    step = model_step(router)
    step(), step()
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024)


def main() -> None:
    """Runs the contests and prints one JSON object for each result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["layer", "router"])
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print_peak(arguments.peak)
        return
    reuse_memory()
    contests: list[Contest] = []
    if arguments.only != "router":
        contests += [functools.partial(layer_contest, tokens) for tokens in TOKENS]
    if arguments.only != "layer":
        contests.append(router_contest)
    for contest in contests:
        for result in contest(arguments.rounds):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
