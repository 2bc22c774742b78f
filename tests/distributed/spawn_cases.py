"""What ranks run in the tests of the helper that starts them."""

import torch
import torch.distributed as dist


def sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total) + offset


def second_raises() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the cause")
    dist.barrier()
