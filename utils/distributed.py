"""Several processes with one network, as torchrun starts them, on PyTorch's own engine.

Ranks train on different parts of one global batch: DistributedDataParallel averages their gradients
and everything else (when to save, stop or go back, what is logged) is decided by all of them
together. Started without torchrun, every function here does the obvious for one process.
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
    """Join the processes that torchrun started; a peer that is silent for the timeout is an error.
    Tensors of the host go by gloo, those of GPUs by NCCL."""
    if launched() and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))


def rank():
    """The number of this process, 0 for the one that writes and speaks."""
    return int(os.environ["RANK"]) if launched() else 0


def world():
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def barrier():
    """Wait for all ranks, on the host."""
    gather(None)


@contextlib.contextmanager
def first_goes_ahead():
    """The first rank runs the block before the others do: it downloads, they find."""
    if rank():
        barrier()
    try:
        yield
    finally:
        if rank() == 0:
            barrier()


def gather(value):
    """[value of rank 0, value of rank 1, ...] on every rank; any small picklable thing."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def first(values):
    """The first that is not None, the lowest rank's; or None."""
    return next((v for v in gather(values) if v is not None), None)


def mean(values):
    """A CPU tensor averaged over the ranks."""
    if world() > 1:
        dist.all_reduce(values)
        values /= world()
    return values


def spread(work, items, what):
    """[work(item) for item in items], each done by one rank and known to all: CPU tensors or plain
    values. With the same threads, the results are those of one process to the last bit. ``what``
    the items are stands at the progress bar."""
    items = list(items)
    own = items[rank()::world()]
    own = [work(item) for item in tqdm(own, what, leave=False, disable=rank() > 0 or None)]
    results = [None] * len(items)
    for r, part in enumerate(gather(own)):
        results[r::world()] = part
    return results


def wrap(model):
    """What training passes go through: ``model``, or DistributedDataParallel around it. Batch
    statistics are each rank's own; of the running ones, rank 0's count."""
    if world() == 1:
        return model
    return DistributedDataParallel(model)


def accumulating(net):
    """A context whose backward passes only add to this rank's gradients; the next one outside
    averages the sums over the ranks."""
    return net.no_sync() if isinstance(net, DistributedDataParallel) else contextlib.nullcontext()


def same_buffers(model):
    """Give every rank the running statistics of rank 0."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def interleave(shard):
    """The whole [n, ...] of which rank r holds the rows r, r + world, ...; on every rank."""
    if world() == 1:
        return shard
    size = sum(gather(len(shard)))
    whole = torch.zeros(size, *shard.shape[1:], dtype=shard.dtype, device=shard.device)
    whole[rank()::world()] = shard
    dist.all_reduce(whole)  # the others' rows are zeros: a sum puts them together
    return whole
