"""Training speed on this machine against Hugging Face's models of the same shape, in one run.

    python -m rondo.pretrain.bench [--modes eager compiled] [--rounds 5] [--profile]

Both sides run the same step (forward, mean cross-entropy, backward, fused AdamW) on the same
tokens in bfloat16 over float32 parameters, taking turns; the best of the rounds counts. Each has
two turns: with the allocator as the C library has it, and with the settings that our trainer makes
at its start (`reuse_memory`). The first ratio is of ours with them and the peer without, as users
of each train; the other two are of equal settings. Shares are of the run's best matrix product.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rondo.models import Decoder, ModelConfig
from rondo.parallel.hardware import measured_flops, return_memory, reuse_memory

VOCAB, DIM, LAYERS, FFN, BATCH, TIME = 8192, 256, 6, 768, 4, 512
Step = Callable[[], float]


@dataclass(frozen=True)
class Contest:
    """One of our models, and the peer it is measured against."""

    name: str
    pattern: list[str]
    mixers: dict[str, dict[str, Any]]
    peer: str
    peer_config: dict[str, Any]

    def ours(self) -> Decoder:
        """Our model, ready to train in bfloat16."""
        config = ModelConfig(
            vocab_size=VOCAB,
            dim=DIM,
            num_layers=LAYERS,
            pattern=self.pattern,
            mixers=self.mixers,
            ffn_dim=FFN,
        )
        model = Decoder(config, seed=0)
        model.activation_dtype = torch.bfloat16
        return model

    def theirs(self) -> nn.Module:
        """The peer, from transformers."""
        import transformers

        transformers.logging.set_verbosity_error()
        common = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": LAYERS}
        config = getattr(transformers, f"{self.peer}Config")(
            **common, tie_word_embeddings=False, **self.peer_config
        )
        return getattr(transformers, f"{self.peer}ForCausalLM")(config)


CONTESTS = [
    Contest(
        "attention",
        ["attention"],
        {"attention": {"num_heads": 4, "qk_norm": False}},
        "Llama",
        {"intermediate_size": FFN, "num_attention_heads": 4, "num_key_value_heads": 4},
    ),
    Contest(
        "mamba2",
        ["mamba2+none"],
        {"mamba2": {"head_dim": 64, "state_dim": 64}},
        "Mamba2",
        {"num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1, "chunk_size": 64},
    ),
    Contest(
        "gated_deltanet 3:1",
        ["gated_deltanet*3", "attention"],
        {
            "gated_deltanet": {"num_heads": 4, "head_dim": 64, "expand_v": 1},
            "attention": {"num_heads": 4, "num_kv_heads": 2},
        },
        "Qwen3Next",
        {
            "intermediate_size": FFN,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "num_experts": 0,
            "mlp_only_layers": list(range(LAYERS)),
            "decoder_sparse_step": 1,
        },
    ),
]


def our_step(model: Decoder, tokens: Tensor) -> Step:
    """A training step of our model; returns its loss. Rows are one document each, on both sides."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100

    def step() -> float:
        loss = model.loss(tokens, targets, reduction="mean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def their_step(model: nn.Module, tokens: Tensor) -> Step:
    """A training step of a transformers model; returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def best_times(
    steps: list[Step], rounds: int, before: list[Callable[[], object]] | None = None
) -> list[float]:
    """Best seconds of each step, run in turns after two rounds of warm-up.

    `before`: what to run ahead of each step, untimed.
    """
    best = [float("inf")] * len(steps)
    for turn in range(rounds + 2):
        for i, step in enumerate(steps):
            if before is not None:
                before[i]()
            began = time.perf_counter()
            step()
            if turn >= 2:
                best[i] = min(best[i], time.perf_counter() - began)
    return best


def settled(allocator: Callable[[], None], step: Step) -> Callable[[], object]:
    """Sets the allocator, and runs a step that fetches or gives back what memory it will."""

    def run() -> None:
        allocator()
        step()

    return run


def peak_now() -> float:
    """FLOP/s of bfloat16 products."""
    return measured_flops(torch.device("cpu"), torch.bfloat16)


def run(contest: Contest, mode: str, rounds: int, peak: float) -> dict[str, Any]:
    """Figures of one contest; `peak`: the most FLOP/s that products had before."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (BATCH, TIME), generator=generator)
    ours, theirs = contest.ours(), contest.theirs()
    flops = 3 * ours.cost(TIME).flops * tokens.numel()
    if mode == "compiled":
        for block in ours.blocks.values():
            block.compile()
        theirs.compile()
    our, their = our_step(ours, tokens), their_step(theirs, tokens)
    turns = [
        (reuse_memory, our),
        (return_memory, their),
        (reuse_memory, their),
        (return_memory, our),
    ]
    before = [settled(allocator, step) for allocator, step in turns]
    began = time.perf_counter()
    peak = max(peak, peak_now())
    times = best_times([step for _, step in turns], rounds, before)
    our_time, their_time, their_reusing, our_returning = times
    peak = max(peak, peak_now())
    return {
        "contest": contest.name,
        "peer": contest.peer,
        "mode": mode,
        "our_parameters": sum(p.numel() for p in ours.parameters()),
        "their_parameters": sum(p.numel() for p in theirs.parameters()),
        "our_tokens_per_second": tokens.numel() / our_time,
        "their_tokens_per_second": tokens.numel() / their_time,
        "ratio": their_time / our_time,
        "ratio_both_reusing_memory": their_reusing / our_time,
        "ratio_neither_reusing_memory": their_time / our_returning,
        "peak_flops": peak,
        "our_share_of_peak": flops / our_time / peak,
        "their_share_of_peak": flops / their_time / peak,
        "seconds": time.perf_counter() - began,
    }


def profile(contest: Contest, rows: int = 12) -> str:
    """Where a step of ours spends its time, by operator."""
    tokens = torch.randint(0, VOCAB, (BATCH, TIME))
    step = our_step(contest.ours(), tokens)
    step(), step()
    with torch.profiler.profile() as recorded:
        step()
    return recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows)


def main() -> None:
    """Runs the contests and prints a table, then one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="run only the contest of this name")
    parser.add_argument("--profile", action="store_true", help="show where our steps spend time")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(
        f"{torch.get_num_threads()} threads; ratios: as users of each train (both, neither reusing)"
    )
    results: list[dict[str, Any]] = []
    for mode in arguments.modes:
        for contest in CONTESTS:
            if arguments.only in (None, contest.name):
                peak = results[-1]["peak_flops"] if results else 0.0
                results.append(result := run(contest, mode, arguments.rounds, peak))
                print(
                    f"{mode:9} {contest.name:20} {result['our_tokens_per_second']:8,.0f} tokens/s"
                    f"  {contest.peer:10} {result['their_tokens_per_second']:8,.0f}"
                    f"  ratio {result['ratio']:.2f}"
                    f" ({result['ratio_both_reusing_memory']:.2f},"
                    f" {result['ratio_neither_reusing_memory']:.2f})"
                    f"  {100 * result['our_share_of_peak']:.0f}%"
                    f" vs {100 * result['their_share_of_peak']:.0f}%"
                    f" of {result['peak_flops'] / 1e9:,.0f} GFLOP/s",
                    flush=True,
                )
    if arguments.profile:
        for contest in CONTESTS:
            if arguments.only in (None, contest.name):
                print(f"\n{contest.name}\n{profile(contest)}")
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
