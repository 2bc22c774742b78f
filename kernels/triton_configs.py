"""Block sizes, warps and stages of the Triton kernels: a row a kernel, chosen without measuring.

A row maps "shape family", "shape", "family" or "*", the first that is there, to configurations: the
one to use, then alternatives that RONDO_AUTOTUNE=1 measures as well. Families are "sm80" (163 KiB
of shared memory a block), "sm90" (227 KiB) and "gfx942" (64 KiB, also taken for smaller chips);
shapes are classes that a kernel's launch names, such as "d128". What is here must fit all three.
"""

from __future__ import annotations

Config = dict[str, int]

CONFIGS: dict[str, dict[str, tuple[Config, ...]]] = {}

# norms_triton.py: a program holds whole rows; "dN" are rows of at most N numbers.
for _name in ("rms_norm", "gated_rms_norm"):
    CONFIGS[f"{_name}_forward"] = {
        "d256": ({"ROWS": 8, "num_warps": 4, "num_stages": 1},),
        "d1024": (
            {"ROWS": 2, "num_warps": 4, "num_stages": 1},
            {"ROWS": 1, "num_warps": 2, "num_stages": 1},
        ),
        "*": (
            {"ROWS": 1, "num_warps": 8, "num_stages": 1},
            {"ROWS": 1, "num_warps": 4, "num_stages": 1},
        ),
    }
    CONFIGS[f"{_name}_backward"] = CONFIGS[f"{_name}_forward"] | {
        "d1024": (  # two warps for float32 spill on sm_90
            {"ROWS": 2, "num_warps": 4, "num_stages": 1},
            {"ROWS": 1, "num_warps": 4, "num_stages": 1},
        ),
        "*": ({"ROWS": 1, "num_warps": 8, "num_stages": 1},),
    }

# scan/triton.py: tiles of positions by channels, scanned in registers.
for _name in ("linear_scan", "linear_scan_backward"):
    CONFIGS[_name] = {
        "*": (
            {"TIME": 16, "BLOCK": 64, "num_warps": 4, "num_stages": 1},
            {"TIME": 32, "BLOCK": 64, "num_warps": 8, "num_stages": 1},
            {"TIME": 32, "BLOCK": 32, "num_warps": 4, "num_stages": 1},
        )
    }
CONFIGS["linear_scan_backward"]["*"] = (
    {"TIME": 16, "BLOCK": 64, "num_warps": 4, "num_stages": 1},
    {"TIME": 32, "BLOCK": 32, "num_warps": 4, "num_stages": 1},
)
CONFIGS["linear_scan_borders"] = {"*": ({"BLOCK": 64, "num_warps": 4, "num_stages": 1},)}

# conv_triton.py: tiles of positions by channels.
CONFIGS["short_conv_forward"] = {
    "*": (
        {"TIME": 32, "BLOCK": 64, "num_warps": 4, "num_stages": 1},
        {"TIME": 16, "BLOCK": 128, "num_warps": 4, "num_stages": 1},
        {"TIME": 64, "BLOCK": 64, "num_warps": 4, "num_stages": 1},
    )
}
CONFIGS["short_conv_backward"] = {
    "*": (
        {"TIME": 16, "BLOCK": 32, "num_warps": 4, "num_stages": 1},
        {"TIME": 16, "BLOCK": 64, "num_warps": 8, "num_stages": 1},
    )
}

# cross_entropy/triton.py: a program reads a row. The second kernel works in place: one row only.
CONFIGS["target_logits"] = {"*": ({"BLOCK": 1024, "num_warps": 4, "num_stages": 1},)}
CONFIGS["cross_entropy_losses"] = {"*": ({"BLOCK": 4096, "num_warps": 8, "num_stages": 1},)}

# expert_rows/triton.py: a program moves ROWS rows, BLOCK numbers of each at a time.
for _name in ("expert_rows", "expert_sums"):
    CONFIGS[_name] = {
        "*": (
            {"ROWS": 4, "BLOCK": 512, "num_warps": 4, "num_stages": 1},
            {"ROWS": 8, "BLOCK": 256, "num_warps": 4, "num_stages": 1},
            {"ROWS": 1, "BLOCK": 1024, "num_warps": 4, "num_stages": 1},
        )
    }

# nonlinear_rnn/triton.py: ROWS of the batch; a head's weights are divided among the warps, on AMD
# only if they come first in the products (TURNED).
for _name in ("nonlinear_rnn_forward", "nonlinear_rnn_backward"):
    CONFIGS[_name] = {
        "*": ({"ROWS": 16, "TURNED": 0, "num_warps": 8, "num_stages": 1},),
        "* gfx942": ({"ROWS": 16, "TURNED": 1, "num_warps": 4, "num_stages": 1},),
    }

# newton_rnn/triton.py: channels of a chunk, two a thread, so that copies of bfloat16 run ahead.
for _name in ("newton_sweep", "newton_pull", "newton_borders"):
    CONFIGS[_name] = {
        "*": (
            {"BLOCK": 128, "num_warps": 2, "num_stages": 1},
            {"BLOCK": 64, "num_warps": 1, "num_stages": 1},
            {"BLOCK": 256, "num_warps": 4, "num_stages": 1},
        )
    }

# fast_weights/triton.py: rows of tokens, BLOCK numbers of each at a time; whole rows of matrices.
for _name in ("fast_read", "fast_read_backward", "fast_parts", "fast_parts_backward"):
    CONFIGS[_name] = {
        "*": (
            {"ROWS": 4, "BLOCK": 256, "num_warps": 4, "num_stages": 1},
            {"ROWS": 2, "BLOCK": 512, "num_warps": 4, "num_stages": 1},
            {"ROWS": 8, "BLOCK": 256, "num_warps": 8, "num_stages": 1},
        )
    }
for _name in ("fast_renew", "fast_renew_backward"):
    CONFIGS[_name] = dict(CONFIGS["rms_norm_forward"])

# neural_memory/triton.py: BK inputs and BV outputs of a layer, TOKENS of a chunk at a time. The
# other two kernels work in place: one row only.
CONFIGS["memory_advance"] = {
    "*": (
        {"BK": 32, "BV": 64, "TOKENS": 16, "num_warps": 4, "num_stages": 1},
        {"BK": 64, "BV": 64, "TOKENS": 16, "num_warps": 4, "num_stages": 1},
        {"BK": 32, "BV": 32, "TOKENS": 16, "num_warps": 2, "num_stages": 1},
    )
}
CONFIGS["memory_scale"] = {"*": ({"BLOCK": 2048, "num_warps": 4, "num_stages": 1},)}
CONFIGS["memory_advance_backward"] = dict(CONFIGS["memory_scale"])

# linear_attention/triton_calls.py: BK and BV are tiles of key and value channels. On sm_90 halves
# are multiplied by 2 warps: from 4 on the compiler takes wgmma for tiles of 64 rows, with which
# kernels of this kind are known to come out wrong (README.md).
for _name in ("walk", "mix", "gradients"):
    CONFIGS[f"linear_attention_{_name}"] = {
        "half": ({"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 2},),
        "float32": ({"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 2},),
    }
CONFIGS["linear_attention_gradients"]["float32"] = (
    {"BK": 16, "BV": 16, "num_warps": 4, "num_stages": 2},
)
CONFIGS["linear_attention_gradients"]["float32 sm80"] = (
    {"BK": 16, "BV": 32, "num_warps": 4, "num_stages": 2},
)
CONFIGS["linear_attention_gradients"]["half sm80"] = (
    {"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 2},
)
CONFIGS["linear_attention_gradients"]["half sm90"] = (
    {"BK": 16, "BV": 32, "num_warps": 2, "num_stages": 2},
)
CONFIGS["linear_attention_mix"]["half sm90"] = (
    {"BK": 64, "BV": 32, "num_warps": 2, "num_stages": 2},
)
CONFIGS["linear_attention_mix"]["half"] = (
    {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2},
    {"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 3},
)
CONFIGS["linear_attention_score_gradients"] = {
    "half sm90": (
        {"BV": 64, "num_warps": 2, "num_stages": 2},
        {"BV": 32, "num_warps": 2, "num_stages": 2},
    ),
    "half": ({"BV": 64, "num_warps": 4, "num_stages": 2},),
    "float32": ({"BV": 32, "num_warps": 4, "num_stages": 2},),
}
CONFIGS["linear_attention_step"] = {"*": ({"BK": 32, "BV": 32, "num_warps": 2, "num_stages": 1},)}
CONFIGS["linear_attention_key_scores"] = {"*": ({"num_warps": 4, "num_stages": 1},)}
CONFIGS["linear_attention_key_gradients"] = {
    "half": ({"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 2},),
    "float32": ({"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1},),
}
CONFIGS["linear_attention_key_gradients"]["half sm90"] = (
    {"BK": 32, "BV": 16, "num_warps": 4, "num_stages": 2},
)
CONFIGS["linear_attention_gate_sums"] = {
    "*": ({"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1},)
}

# delta_rule: "wide" are keys of more than 128 numbers; BK and BV are tiles of key and value
# channels. On sm_90 halves are multiplied by 2 warps, as above.
CONFIGS["delta_rule_inverse"] = {"*": ({"BK": 64, "num_warps": 4, "num_stages": 1},)}
CONFIGS["delta_rule_scores"] = {"*": ({"BK": 64, "num_warps": 2, "num_stages": 1},)}
_PAIR = {"num_warps": 2, "num_stages": 2}
CONFIGS["delta_rule_transform"] = {
    "half sm90": ({"BK": 64, "BV": 64, **_PAIR}, {"BK": 32, "BV": 32, **_PAIR}),
    "half wide sm90": ({"BK": 64, "BV": 64, **_PAIR}, {"BK": 32, "BV": 32, **_PAIR}),
    "*": ({"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2},),
}
CONFIGS["delta_rule_walk"] = {
    "half sm90": ({"BK": 64, "BV": 16, "num_warps": 2, "num_stages": 1},),
    "half wide sm90": ({"BK": 64, "BV": 16, "num_warps": 2, "num_stages": 1},),
    "half wide": ({"BK": 64, "BV": 16, "num_warps": 4, "num_stages": 1},),
    "float32": ({"BK": 64, "BV": 16, "num_warps": 4, "num_stages": 1},),
    "float32 wide": ({"BK": 32, "BV": 16, "num_warps": 4, "num_stages": 1},),
    "float32 wide sm80": ({"BK": 64, "BV": 8, "num_warps": 4, "num_stages": 1},),
    "float32 wide sm90": ({"BK": 32, "BV": 8, "num_warps": 4, "num_stages": 1},),
    "*": (
        {"BK": 64, "BV": 32, "num_warps": 4, "num_stages": 1},
        {"BK": 64, "BV": 16, "num_warps": 4, "num_stages": 1},
    ),
}
CONFIGS["delta_rule_mix"] = {
    "half sm90": ({"BK": 64, "BV": 64, **_PAIR}, {"BK": 64, "BV": 32, **_PAIR}),
    "half wide sm90": ({"BK": 64, "BV": 32, **_PAIR},),
    "float32": ({"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 2},),
    "float32 wide": ({"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 2},),
    "*": (
        {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2},
        {"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 2},
    ),
}
CONFIGS["delta_rule_pairs"] = {
    "half sm90": ({"BV": 32, "num_warps": 2, "num_stages": 1},),
    "half wide sm90": ({"BV": 32, "num_warps": 2, "num_stages": 1},),
    "*": ({"BV": 32, "num_warps": 4, "num_stages": 1},),
}
CONFIGS["delta_rule_readers"] = {
    "half sm90": ({"BK": 16, "BV": 32, **_PAIR}, {"BK": 16, "BV": 16, **_PAIR}),
    "half wide sm90": ({"BK": 16, "BV": 32, **_PAIR}, {"BK": 16, "BV": 16, **_PAIR}),
    "float32": ({"BK": 32, "BV": 16, "num_warps": 4, "num_stages": 1},),
    "float32 wide": ({"BK": 32, "BV": 16, "num_warps": 4, "num_stages": 1},),
    "*": (
        {"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 2},
        {"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1},
    ),
}
CONFIGS["delta_rule_step"] = {"*": ({"BV": 32, "num_warps": 4, "num_stages": 1},)}
CONFIGS["delta_rule_key_readers"] = {"*": ({"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1},)}
CONFIGS["delta_rule_key_gate"] = {"*": ({"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1},)}
