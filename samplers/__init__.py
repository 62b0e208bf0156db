"""Samplers. They all descend the energy, and none gives a parameter a gradient.

``make_sampler`` turns the flags into the draw function that training and evaluation share.
The caller sets the network's train or eval mode.
"""

import functools

import torch

from samplers.informative_init import ClassGaussians, UniformInit, to_pixels
from samplers.pyld import pyld, pyld_collapsed
from samplers.replay_buffer import ReplayBuffer, evenly_spaced
from samplers.sgld import PIXELS, descend, sgld

__all__ = ["ClassGaussians", "ReplayBuffer", "UniformInit", "evenly_spaced", "in_company",
           "make_init", "make_sampler", "pyld", "pyld_collapsed", "sampler_name", "sgld",
           "to_pixels"]


def make_sampler(args, n_steps=None, before=0):
    """Make ``draw(model, x_0, y=None, generator=None) -> x``: PYLD-M-N, or SGLD-M if in_steps is 0.

    ``args`` holds the flags n_steps, in_steps, pyld_lr, sgld_lr, sgld_std, eps, step_decay,
    pixel_clamp and literal_pyld. ``n_steps`` is another M. ``before`` are outer steps that the
    chains have taken already. step_decay begins again after every ``args.n_steps`` steps, as it
    does in training, where a chain is visited again and again.
    """
    n_steps = args.n_steps if n_steps is None else n_steps
    taken, whole = before % args.n_steps, args.n_steps
    if args.step_decay == 1 or taken + n_steps <= whole:
        return visit(args, n_steps, args.step_decay**taken)
    middle, last = divmod(taken + n_steps - whole, whole)
    parts = ((1, visit(args, whole - taken, args.step_decay**taken)),
             (middle, visit(args, whole, 1)), (1, visit(args, last, 1)))

    def draw(model, x_0, y=None, generator=None):
        for times, part in parts:
            for _ in range(times):
                x_0 = part(model, x_0, y=y, generator=generator)
        return x_0

    return draw


def visit(args, n_steps, decay):
    """``make_sampler`` for steps over which step_decay goes on, from the factor ``decay`` on."""
    shared = {"clip": args.eps, "noise_std": args.sgld_std, "step_decay": args.step_decay,
              "pixels": PIXELS if args.pixel_clamp else None}
    if args.in_steps:
        chain = pyld if args.literal_pyld else pyld_collapsed
        return functools.partial(chain, n_outer=n_steps, n_inner=args.in_steps,
                                 step_size=decay * args.pyld_lr, **shared)

    def draw(model, x_0, y=None, generator=None):
        return descend(lambda x: model.energy_gradient(x, y), x_0, n_steps=n_steps,
                       step_size=decay * args.sgld_lr, generator=generator, **shared)

    return draw


def in_company(args, n_steps, crowd, classes, size, before=0):
    """``make_sampler`` for chains that share their batches with images of the buffer.

    ``size`` images of ``crowd`` [N, C, H, W] move along in the batch, which matters to batch
    statistics alone. After ``args.n_steps`` outer steps, as many as in training, they are dropped
    and others drawn. ``classes`` [N] are theirs, for chains that descend E(x, y).
    """
    def draw(model, x, y=None, generator=None):
        n = len(x)
        for taken in range(0, n_steps, args.n_steps):
            part = make_sampler(args, min(args.n_steps, n_steps - taken), before + taken)
            others = torch.randint(len(crowd), (size,), device=x.device, generator=generator)
            labels = None if y is None else torch.cat([y, classes[others]])
            x = part(model, torch.cat([x, crowd[others]]), y=labels, generator=generator)[:n]
        return x

    return draw


def sampler_name(args, n_steps=None):
    """The sampler's name in the paper's terms, "PYLD-10-5" or "SGLD-20". ``n_steps``: another M."""
    n_steps = args.n_steps if n_steps is None else n_steps
    return f"PYLD-{n_steps}-{args.in_steps}" if args.in_steps else f"SGLD-{n_steps}"


def make_init(name, x, y, n_classes, compiled=False):
    """p_0 by name: ``informative``, estimated from images, or ``uniform`` noise of their shape.

    Images ``x`` are uint8 [n, C, H, W] with labels ``y`` [n]. ValueError if a class has no image.
    """
    if name == "uniform":
        return UniformInit(x.shape[1:], x.device)
    return ClassGaussians.fit(x, y, n_classes, compiled=compiled)
