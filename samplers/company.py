"""Chains in company: they share their batches with images of the replay buffer, as in training."""

import torch


def in_company(make_draw, n_steps, every, crowd, classes, size):
    """Make ``draw(model, x_0, y=None, generator=None) -> x`` of ``n_steps`` outer steps.

    ``size`` images of ``crowd`` [N, C, H, W], on the host, move along in the batch, which matters
    to batch statistics alone. After ``every`` steps they are dropped and others drawn. ``classes``
    [N] are theirs, for chains that descend E(x, y). ``make_draw(k, taken)`` makes the sampler of k
    steps after ``taken`` others.
    """
    def draw(model, x, y=None, generator=None):
        n = len(x)
        for taken in range(0, n_steps, every):
            step = make_draw(min(every, n_steps - taken), taken)
            others = torch.randint(len(crowd), (size,), device=x.device, generator=generator).cpu()
            both = torch.cat([x, crowd[others].to(x)])
            labels = None if y is None else torch.cat([y, classes[others].to(y)])
            x = step(model, both, y=labels, generator=generator)[:n]
        return x

    return draw
