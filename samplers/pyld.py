"""PYLD-M-N, proximal YOPO SGLD: Algorithm 1 as written, and a short cut for a conv stem."""

import torch
from torch import nn

from models.jem import energy
from samplers.sgld import PIXELS, add_noise, descend, move

AFFINE = (nn.Conv2d, nn.Linear, nn.Identity, nn.Flatten)


def is_affine(stem):
    """Whether a stem is known to be affine: one of the layers above, or a chain of them."""
    if isinstance(stem, nn.Sequential):
        return all(is_affine(part) for part in stem)
    return isinstance(stem, AFFINE)


def slack_variable(model, x, y=None):
    """p = dE / df_0 (Eq. 13): the gradient of the energy with respect to the stem's output."""
    with torch.enable_grad():
        features = model.stem(x.detach()).detach().requires_grad_()
        logits = model.trunk(features.clone())  # its first layer may work in place
        (p,) = torch.autograd.grad(energy(logits, y).sum(), features)
    return p


def pyld(model, x, *, n_outer, n_inner, step_size, clip, noise_std=0.0, step_decay=1.0, y=None,
         pixels=PIXELS, generator=None):
    """Algorithm 1, line by line: M = ``n_outer``, N = ``n_inner``, epsilon = ``clip``.

    x [B, 3, H, W] is in ``pixels``. ``y`` [B] makes the chain conditional: it descends E(x, y).
    ``step_size`` is the step of one inner iteration, 0.2 in the released code (see sgld.py). In
    outer step i it is multiplied by ``step_decay`` ** i.
    """
    for i in range(n_outer):
        p = slack_variable(model, x, y)                                   # line 4
        for _ in range(n_inner):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad((p * model.stem(x)).sum(), x)
            gamma = gradient.clamp(-clip, clip)                           # line 7
            x = move(x.detach(), step_size * step_decay**i * gamma, pixels)  # line 8
        x = add_noise(x, noise_std, generator)                            # line 10
    return x.detach()


def pyld_collapsed(model, x, *, n_outer, n_inner, step_size, clip, noise_std=0.0, step_decay=1.0,
                   y=None, pixels=PIXELS, generator=None):
    """Compute the same as ``pyld`` at the cost of its outer loop. The stem must be affine.

    p . grad f_0(x) does not depend on x for an affine f_0, so the N inner steps repeat one clamped
    step of proximal SGLD. A convolution is affine. ValueError for a stem that is not known to be
    affine. That needs ``pyld``.
    """
    if not is_affine(model.stem):
        raise ValueError("the stem is not affine, which PYLD's short cut needs: add --literal_pyld "
                         "(Algorithm 1 as written, for any stem)")
    return descend(lambda x: model.energy_gradient(x, y), x, n_steps=n_outer, repeats=n_inner,
                   step_size=step_size, clip=clip, noise_std=noise_std, step_decay=step_decay,
                   pixels=pixels, generator=generator)
