"""Random streams that are functions of (seed, step): a resumed run draws the same numbers."""

import hashlib
from typing import NamedTuple

import torch


class Streams(NamedTuple):
    """What one training step draws from: choices on the host, noise on the device."""

    host: torch.Generator
    device: torch.Generator


def generator(device, *key):
    """A torch.Generator on ``device`` seeded by the words and numbers of ``key`` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def seed_step(seed, step, part, device):
    """The streams of one part (of a process, or accumulated) of a training step (0-based)."""
    return Streams(generator("cpu", seed, step, part, "host"),
                   generator(device, seed, step, part, "device"))
