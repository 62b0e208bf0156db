"""Samplers. They all descend the energy, and none gives a parameter a gradient.

``make_sampler`` turns the flags into the draw function that training and evaluation share.
The caller sets the network's train or eval mode.
"""

import functools

from samplers.company import in_company
from samplers.informative_init import ClassGaussians, UniformInit, to_pixels
from samplers.pyld import pyld, pyld_collapsed
from samplers.replay_buffer import ReplayBuffer
from samplers.sgld import PIXELS, descend, sgld

__all__ = ["ClassGaussians", "ReplayBuffer", "UniformInit", "in_company", "make_init",
           "make_sampler", "pyld", "pyld_collapsed", "sampler_name", "sgld", "to_pixels"]


def make_sampler(args):
    """Make ``draw(model, x_0, y=None, generator=None) -> x``: PYLD-M-N, or SGLD-M if in_steps is 0.

    ``args`` holds the flags n_steps, in_steps, pyld_lr, sgld_lr, sgld_std, eps, step_decay,
    pixel_clamp and literal_pyld.
    """
    shared = {"clip": args.eps, "noise_std": args.sgld_std, "step_decay": args.step_decay,
              "pixels": PIXELS if args.pixel_clamp else None}
    if args.in_steps:
        chain = pyld if args.literal_pyld else pyld_collapsed
        return functools.partial(chain, n_outer=args.n_steps, n_inner=args.in_steps,
                                 step_size=args.pyld_lr, **shared)

    def draw(model, x_0, y=None, generator=None):
        return descend(lambda x: model.energy_gradient(x, y), x_0, n_steps=args.n_steps,
                       step_size=args.sgld_lr, generator=generator, **shared)

    return draw


def sampler_name(args):
    """The sampler's name in the paper's terms, "PYLD-10-5" or "SGLD-20"."""
    if args.in_steps:
        return f"PYLD-{args.n_steps}-{args.in_steps}"
    return f"SGLD-{args.n_steps}"


def make_init(name, x, y, n_classes, compiled=False):
    """p_0 by name: ``informative``, estimated from images, or ``uniform`` noise of their shape.

    Images ``x`` are uint8 [n, C, H, W] with labels ``y`` [n]. ValueError if a class has no image.
    """
    if name == "uniform":
        return UniformInit(x.shape[1:], x.device)
    return ClassGaussians.fit(x, y, n_classes, compiled=compiled)
