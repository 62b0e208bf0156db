"""Training one network in several processes, started by torchrun.

Each rank trains on its part of the global batch. DistributedDataParallel averages the gradients.
The ranks decide together when to save, stop or roll back, and what to log. Without torchrun, the
functions here treat the process as the only rank.
"""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from utils.program import launched


def start(device, timeout_minutes):
    """Join the processes that torchrun started. A peer that is silent for the timeout is an error.

    gloo transfers CPU tensors, NCCL those of GPUs.
    """
    if launched() and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))


def rank():
    """The number of this process. Rank 0 writes files and prints."""
    return int(os.environ["RANK"]) if launched() else 0


def world():
    """The number of processes."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def barrier():
    """Wait for all ranks, on the host."""
    gather(None)


@contextlib.contextmanager
def first_goes_ahead():
    """Let rank 0 run the block before the others, so that it downloads what they then find."""
    if rank():
        barrier()
    try:
        yield
    finally:
        if rank() == 0:
            barrier()


def gather(value):
    """[value of rank 0, value of rank 1, ...] on every rank. Values are small and picklable."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def first(values):
    """The value of the lowest rank whose value is not None. None if all are None."""
    return next((v for v in gather(values) if v is not None), None)


def mean(values):
    """Average a CPU tensor over the ranks, in place."""
    if world() > 1:
        dist.all_reduce(values)
        values /= world()
    return values


def spread(work, items, what):
    """[work(item) for item in items], shared out over the ranks. Every rank gets all results.

    Results are CPU tensors or plain values. With the same number of threads they equal those of
    one process to the last bit. ``what`` labels the progress bar.
    """
    items = list(items)
    own = items[rank()::world()]
    own = [work(item) for item in tqdm(own, what, leave=False, disable=rank() > 0 or None)]
    results = [None] * len(items)
    for r, part in enumerate(gather(own)):
        results[r::world()] = part
    return results


def wrap(model):
    """The module that training calls: ``model``, or DistributedDataParallel around it.

    Each rank has its own batch statistics. Rank 0's running statistics are the ones used.
    """
    if world() == 1:
        return model
    return DistributedDataParallel(model)


def accumulating(net):
    """A context in which backward passes only add to this rank's gradients.

    The next backward pass outside it averages the sums over the ranks.
    """
    return net.no_sync() if isinstance(net, DistributedDataParallel) else contextlib.nullcontext()


def same_buffers(model):
    """Copy the running statistics of rank 0 to all ranks."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def interleave(shard):
    """Assemble the whole [n, ...] on every rank. Rank r holds the rows r, r + world, ..."""
    if world() == 1:
        return shard
    size = sum(gather(len(shard)))
    whole = torch.zeros(size, *shard.shape[1:], dtype=shard.dtype, device=shard.device)
    whole[rank()::world()] = shard
    dist.all_reduce(whole)  # each row is zero on all ranks but one, so the sum assembles them
    return whole
