"""The loss with all logits at once."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, reduction: str
) -> Tensor:
    """See `linear_cross_entropy`; hidden is `(N, D)`, targets and valid `(N,)`, and targets that
    are not valid hold any index in range."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    losses = logits.logsumexp(dim=1) - logits.gather(1, targets[:, None]).squeeze(1)
    losses = losses * valid
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / valid.sum().clamp(min=1)
