"""The loss with all logits at once."""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.pointwise import soft_cap


def reference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid: Tensor,
    reduction: str,
    cap: float | None,
) -> Tensor:
    """See `linear_cross_entropy`; hidden is `(N, D)`, targets and valid `(N,)`, and targets that
    are not valid hold any index in range."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = soft_cap(hidden.to(dtype) @ weight.to(dtype).T, cap)
    losses = logits.logsumexp(dim=1) - logits.gather(1, targets[:, None]).squeeze(1)
    losses = losses * valid
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / valid.sum().clamp(min=1)
