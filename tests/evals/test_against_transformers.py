"""The same weights in transformers' Llama and in a Decoder: the same log-likelihoods."""

from __future__ import annotations

import random

import pytest
import torch

from rondo.evals.scoring import continuations
from rondo.models import Decoder, ModelConfig

transformers = pytest.importorskip("transformers")
NAMES = {
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "mixer",
    "mlp": "ffn",
    "embed_tokens": "embedding",
    "lm_head": "head",
    "layers": "blocks",
}


def test_log_likelihoods_are_those_of_llama() -> None:
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            initializer_range=0.2,
        )
    ).eval()
    options = {"num_heads": 4, "num_kv_heads": 2, "qk_norm": False}
    config = ModelConfig(
        vocab_size=50,
        dim=32,
        num_layers=2,
        pattern=["attention"],
        ffn_dim=48,
        mixers={"attention": options},
    )
    decoder = Decoder(config, seed=0).eval()
    weights = {}
    for name, value in llama.state_dict().items():
        parts = [NAMES.get(part, part) for part in name.removeprefix("model.").split(".")]
        weights[".".join(parts)] = value
    decoder.load_state_dict(weights)
    draw = random.Random(0)
    pairs = []
    for size in (1, 6, 6, 13, 30):
        context = draw.choices(range(50), k=size)
        pairs += [(context, draw.choices(range(50), k=n)) for n in (1, 2, 5)]
    want = []
    with torch.no_grad():
        for context, continuation in pairs:
            logits = llama(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
            target = torch.tensor(continuation)[:, None]
            want.append(float(logits.log_softmax(-1).gather(1, target).sum()))
    assert max(want) - min(want) > 1  # weights large enough that scores differ
    for batch_size in (1, 7, 32):
        found = [score.log_likelihood for score in continuations(decoder, pairs, batch_size)]
        assert found == pytest.approx(want, abs=1e-4)
