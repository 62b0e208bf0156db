"""Random streams that are functions of (seed, step): a resumed run draws the same numbers."""

import hashlib
from typing import NamedTuple

import torch


class Streams(NamedTuple):
    """What one training step draws from: choices on the host, noise on the device."""

    host: torch.Generator
    device: torch.Generator


def number(*key):
    """A seed of 63 bits made from the words and numbers of ``key`` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(device, *key):
    """A torch.Generator on ``device`` seeded by the words and numbers of ``key`` alone."""
    return torch.Generator(device).manual_seed(number(*key))


def seed_layers(*key):
    """Seed PyTorch's own generators, from which layers like dropout draw."""
    torch.manual_seed(number(*key, "layers"))


def seed_step(seed, step, part, device):
    """The streams of one part (of a process, or accumulated) of a training step (0-based)."""
    return Streams(generator("cpu", seed, step, part, "host"),
                   generator(device, seed, step, part, "device"))
