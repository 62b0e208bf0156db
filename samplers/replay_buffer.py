"""The replay buffer B of persistent chains (paper §3.4 and Algorithm 2, lines 3 and 6)."""

import torch


def evenly_spaced(size, n):
    """The numbers [n] of evenly spaced slots of ``size``, of all of them if there are fewer than n.

    For n a multiple of the number of classes, slot i of n lies in the class block that it would
    have in a buffer of n slots.
    """
    n = min(n, size)
    return (torch.arange(n) * size + n - 1) // n


class ReplayBuffer:
    """|B| images [|B|, C, H, W] on the training device, filled from p_0 at the start.

    ``ages`` int64 [|B|], on the host, are the sampler steps that each chain is away from p_0.
    If chains are drawn per class, class y owns the y-th of ``n_classes`` equal blocks of slots.
    ``place`` = (first, every, size): slot i is slot first + i * every of a whole buffer of ``size``
    slots, to which the blocks belong.
    Choices (which slot, which chain starts anew) are drawn on the host, so that an iteration never
    waits for the device.
    """

    def __init__(self, images, n_classes, ages=None, place=None):
        self.images, self.n_classes, self.place = images, n_classes, place or (0, 1, len(images))
        self.ages = torch.zeros(len(images), dtype=torch.int64) if ages is None else ages

    @classmethod
    def fill(cls, size, init, n_classes, *, per_class, host, generator):
        """A new buffer of ``size`` images from ``init``. ``per_class`` fills it block by block."""
        y = torch.arange(size) * n_classes // size if per_class else None
        return cls(init.sample(size, y, host=host, generator=generator), n_classes)

    def __len__(self):
        return len(self.images)

    def share(self, part, parts):
        """Every ``parts``-th slot from ``part`` on, as a buffer over the same memory."""
        first, every, size = self.place
        return ReplayBuffer(self.images[part::parts], self.n_classes, self.ages[part::parts],
                            (first + part * every, every * parts, size))

    def slots(self, n, y=None, *, host):
        """``n`` slot numbers with replacement, from anywhere or from the blocks of ``y`` [n]."""
        if y is None:
            return torch.randint(len(self), (n,), generator=host)
        start, every, size = self.place
        first, last = (-((start + k * size // -self.n_classes) // every)  # the block of class y is
                       for k in (y, y + 1))                               # [first, last)
        found = first + (torch.rand(n, generator=host) * (last - first)).long()
        return found.clamp(max=len(self) - 1)  # a block may have no slot in a small share

    def draw(self, n, init, reinit_freq, y=None, *, host, generator):
        """x_0 [n, C, H, W], its slots [n] and the ages of its chains [n].

        Each chain starts anew from ``init`` with probability ``reinit_freq`` (rho). Only those
        chains draw from ``init``. ``y`` [n], slots and ages are on the host.
        """
        slots = self.slots(n, y, host=host)
        anew = (torch.rand(n, generator=host) < reinit_freq).nonzero().squeeze(1)
        x_0, ages = self.images[self.on_device(slots)], self.ages[slots]
        if len(anew):
            fresh = init.sample(len(anew), None if y is None else y[anew], host=host,
                                generator=generator)
            x_0[self.on_device(anew)] = fresh
            ages[anew] = 0
        return x_0, slots, ages

    def store(self, slots, x, ages):
        """Put the chains' end points and ages [n] back in their slots (Algorithm 2, line 6).

        If several chains came from one slot, the last is kept. With several writers per slot, the
        result would depend on the order of threads.
        """
        chain = {slot: i for i, slot in enumerate(slots.tolist())}
        slots, rows = torch.tensor(list(chain)), torch.tensor(list(chain.values()))
        self.images[self.on_device(slots)] = x[self.on_device(rows)]
        self.ages[slots] = ages[rows]

    def on_device(self, indices):
        return indices.to(self.images.device, non_blocking=True)
