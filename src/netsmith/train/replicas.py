"""The replicas of a training: processes that torchrun started, each with its part of every batch.

One process alone is a replica too, the first of one. Nothing here looks at what is trained.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from netsmith.errors import UserError


@dataclass(frozen=True)
class Replica:
    """One of the processes that train a network together."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all replicas; every one of them has to ask."""
        if self.count == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def tell(self, compute: Callable[[], Any]) -> Any:
        """What ``compute()`` gives the first replica, for all of them; its UserError too."""
        if self.count == 1:
            return compute()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = compute()
            except UserError as error:
                told[1] = str(error)
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise UserError(told[1])
        return told[0]


ALONE = Replica()


@contextmanager
def joined(device: str | torch.device = "cpu") -> Iterator[Replica]:
    """This process among those that torchrun started: gloo between CPUs, NCCL between GPUs. Else `ALONE`."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif sys.platform == "linux" and int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == count:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all on this machine, whose own name need not lead anywhere
    # What replicas tell each other when they meet stays in torchrun's store when all are started again (PyTorch 2.15),
    # and those of the next attempt would look for the dead at their old ports: each attempt has names of its own.
    store, rank, count = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    store = dist.PrefixStore(  # type: ignore[attr-defined]
        f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
    )
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=count)
    try:
        yield Replica(rank, count)
    except RuntimeError as error:  # NCCL's is one too
        if not isinstance(error, dist.DistBackendError) and "gloo" not in str(error):
            raise
        raise UserError(
            "the connection to another replica is lost: it or its machine is gone; under torchrun --max-restarts N all "
            "are started again, and go on from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()
