"""An mLSTM begun before the state in front of its row is known.

The scan of the stabiliser, log2 T passes over all gates, is made once. What the row writes is
summed up twice, for the summary relative to its own stabiliser and for the outputs relative to the
one that the state brings: outputs relative to the first could overflow, and to rescale them would
take one product more with the state that comes, as many FLOPs as the summary's.
"""

from __future__ import annotations

from torch import Tensor

from rondo.kernels.backend import full_precision
from rondo.kernels.mlstm import chunked
from rondo.kernels.mlstm.stabiliser import peaks
from rondo.kernels.mlstm.summary import summarize
from rondo.kernels.summary import Stretch


def begin_stretch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Tensor,
    forget: Tensor,
    scale: float,
    eps: float,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> Stretch:
    """Arguments as for `chunked.mlstm`."""
    found = peaks(write, forget, segment_ids)

    def finish(first: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(v.device):
            return chunked.mlstm(
                q, k, v, write, forget, scale, eps, first, segment_ids, chunk_size, found
            )

    return Stretch(summarize(k, v, write, forget, segment_ids, chunk_size, found), finish)
