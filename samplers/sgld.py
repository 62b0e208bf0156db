"""SGLD and proximal SGLD: a short chain that descends the energy (Eqs. 3, 9 and 10).

``step_size`` is the step actually taken. The paper writes that step as alpha / 2 and the released
code as the plain factor 0.2; the number here is the released one.
"""

import functools
import math

import torch

PIXELS = (-1.0, 1.0)


def input_gradient(energy_fn, x):
    """The gradient of the *sum* of energies with respect to x [B, ...]. Parameters get none."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy_fn(x).sum(), x)
    return gradient


def move(x, step, pixels):
    """x - step, clamped to the pixel range (low, high) unless ``pixels`` is None."""
    x = x - step
    return x if pixels is None else x.clamp_(*pixels)


def add_noise(x, std, generator):
    """x + std * N(0, 1), drawn from ``generator`` on x's device."""
    if std == 0:
        return x
    noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return x + std * noise


def sgld(energy_fn, x, **settings):
    """``descend`` along the gradient of ``energy_fn`` (images [B, ...] to energies [B])."""
    return descend(functools.partial(input_gradient, energy_fn), x, **settings)


def descend(gradient_fn, x, *, n_steps, step_size, clip=math.inf, noise_std=0.0, repeats=1,
            step_decay=1.0, pixels=PIXELS, generator=None):
    """Run ``n_steps`` of proximal SGLD (Eq. 10) from x [B, C, H, W] and return the end points.

    x <- x - step_size * clamp(grad E(x), -clip, clip) + noise_std * N(0, 1). ``gradient_fn`` maps
    images to grad E(x), the gradient of the sum of their energies. ``clip`` is the paper's epsilon.
    clip = inf is plain SGLD (Eq. 3). After each move x is clamped to ``pixels``. Step i is
    multiplied by ``step_decay`` ** i.

    ``repeats`` = N takes each clamped step N times for one gradient. This is PYLD with an affine
    first layer (see ``pyld.pyld_collapsed``). Two clamps give exactly the result of the loop's N,
    even if noise left x outside the range. The first brings x inside. From there, N - 1 equal steps
    clamped each time end where one long step clamped once does.
    """
    for i in range(n_steps):
        step = step_size * step_decay**i * gradient_fn(x).clamp(-clip, clip)
        x = move(x, step, pixels)
        if repeats > 1:
            x = move(x, (repeats - 1) * step, pixels)
        x = add_noise(x, noise_std, generator)
    return x.detach()
