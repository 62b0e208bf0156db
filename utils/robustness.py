"""Robust accuracy under white-box attacks in an L-inf or L2 ball (Fig. 9).

Budgets ``eps`` are typed as on the paper's axes: L-inf in 1/255 of [0, 1] images, L2 as a norm of
[0, 1] images. Inside, images are [-1, 1] and the budget there is called ``radius``.
``pgd_accuracy`` is the usual attack, PGD on the cross-entropy; ``margin_pgd_accuracy`` and, where
it is installed, ``autoattack_accuracy`` tell robustness from gradients that merely vanish.
"""

import importlib
import math
import os
from contextlib import contextmanager
from typing import NamedTuple

import torch
from tqdm import tqdm

from samplers import to_pixels
from utils.cli import InputError
from utils.seeding import generator

AUTOATTACK = "pyautoattack==0.2.0"
AUTOATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")  # its standard version, in its order


class Robustness(NamedTuple):
    """Rows stand for the budgets ``eps`` [E] in the order typed. ``robust`` bool [E, N]: the image
    is classified right, and still is after the attack at this and every smaller budget;
    ``accuracy`` float64 [E] is its mean; ``correct`` bool [N] is that of the clean images."""

    eps: list
    accuracy: torch.Tensor
    robust: torch.Tensor
    correct: torch.Tensor


def ball_radius(eps, norm):
    """Budget as typed to radius among [-1, 1] images, twice as wide as [0, 1]: 8 -> 16/255."""
    return 2 * eps / 255 if norm == "linf" else 2 * eps


def lengths(delta, norm):
    """L-inf or L2 norm of each perturbation [B, C, H, W], shaped [B, 1, 1, 1]."""
    order = math.inf if norm == "linf" else 2
    return torch.linalg.vector_norm(delta, order, dim=(1, 2, 3), keepdim=True)


def random_starts(x, norm, seed, indices, restart=0):
    """Perturbations like ``x`` [B, C, H, W], uniform in the unit ball: image i's depends on
    (seed, i, restart) alone, hence not on batch size, device or which images are still attacked."""
    starts = []
    for index in indices.tolist():
        source = generator("cpu", "attack", seed, index, restart)
        if norm == "linf":
            starts.append(torch.rand(x.shape[1:], generator=source) * 2 - 1)
        else:
            direction = torch.randn(x.shape[1:], generator=source)
            length = torch.rand((), generator=source) ** (1 / direction.numel())
            starts.append(direction * (length / direction.norm()))
    return torch.stack(starts).to(x.device)


def finite(values):
    """``values`` as they are; InputError if one is NaN or infinite: nothing is measured then."""
    if not torch.isfinite(values).all():
        raise InputError("the network's logits or gradients are not finite: its weights are broken")
    return values


def foolbox_pgd(model, x, y, radius, norm, *, steps, rel_stepsize, start=None):
    """foolbox's PGD: the last of ``steps`` iterates [B, C, H, W], from x + radius * ``start``."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox would insist on a git binary
    import eagerpy
    import foolbox

    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    attack = kind(rel_stepsize=rel_stepsize, steps=steps, random_start=start is not None)
    # its own start would come from torch's global stream, a whole batch at a time
    attack.get_random_start = lambda x_0, epsilon: x_0 + epsilon * eagerpy.astensor(start)
    wrapped = foolbox.PyTorchModel(model, bounds=(-1, 1), device=x.device)
    return attack(wrapped, x, y, epsilons=radius)[1]


def margin(logits, y, target=None):
    """max_{j != y} z_j - z_y [B], positive where the image is broken; or z_target - z_y."""
    rival = (logits.scatter(1, y[:, None], -math.inf).amax(1) if target is None
             else logits.gather(1, target[:, None]).squeeze(1))
    return rival - logits.gather(1, y[:, None]).squeeze(1)


def margin_pgd(model, x, y, radius, norm, *, steps, starts):
    """Projected ascent of the logit margin from each of ``starts`` in turn: images [B, C, H, W].

    A margin has a gradient where the cross-entropy of a confident network has none. The first
    pass follows the largest other logit, pass r the r-th largest of the clean image, since the
    nearest boundary is often not the largest logit's. The step falls from 2 radius to 0 as a
    cosine; each image keeps its iterate of largest margin and is left alone once broken.
    """
    z = model(x)
    best, x_adv = margin(z, y), x.clone()
    runners_up = z.scatter(1, y[:, None], -math.inf).argsort(1, descending=True)[:, :-1]
    for turn, start in enumerate(starts):
        todo = (best <= 0).nonzero().squeeze(1)
        if not len(todo):
            break
        x_0, y_0 = x[todo], y[todo]
        target = runners_up[todo, (turn - 1) % runners_up.shape[1]] if turn else None
        x_t = (x_0 + radius * start[todo]).clamp(-1, 1)
        for step in range(steps + 1):
            x_t.requires_grad_()
            z = model(x_t)
            slope = finite(torch.autograd.grad(margin(z, y_0, target).sum(), x_t)[0])
            x_t, reached = x_t.detach(), margin(z.detach(), y_0)
            better = reached > best[todo]
            best[todo[better]], x_adv[todo[better]] = reached[better], x_t[better]
            step_size = radius * (1 + math.cos(math.pi * step / steps))
            slope = slope.sign() if norm == "linf" else slope / lengths(slope, norm).clamp_min(1e-30)
            delta = x_t + step_size * slope - x_0
            delta = (delta.clamp(-radius, radius) if norm == "linf"
                     else delta * (radius / lengths(delta, norm).clamp_min(radius)))
            x_t = (x_0 + delta).clamp(-1, 1)
    return x_adv


@contextmanager
def frozen(model):
    """Inside: eval mode and constant parameters. After: each module and parameter as it was."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def robust_accuracy(model, x, y, eps, norm, attack, *, batch_size=100, progress=False):
    """``Robustness`` of images ``x`` uint8 [N, 3, H, W], labels ``y`` [N], at budgets ``eps`` under
    ``attack(x, y, radius, indices) -> x_adv``; InputError for input that makes no sense."""
    if norm not in ("linf", "l2"):
        raise InputError(f"norm is linf or l2, got {norm!r}")
    if not len(eps) or not all(math.isfinite(e) and e >= 0 for e in eps):
        raise InputError(f"attack budgets are finite numbers >= 0, got {list(eps)}")
    if not len(x) or len(x) != len(y) or x.dtype != torch.uint8 or batch_size < 1:
        raise InputError(f"an attack needs uint8 images, a label each, in batches of 1 or more: got "
                         f"{len(x)} ({x.dtype}), {len(y)} labels, batches of {batch_size}")
    y, device, robust = y.cpu().long(), next(model.parameters()).device, {}

    def is_right(images, i):
        return (finite(model(images)).argmax(1) == y[i].to(device)).cpu()

    with frozen(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        parts = torch.arange(len(x)).split(batch_size)
        alive = torch.cat([is_right(to_pixels(x[i.to(x.device)].to(device)), i) for i in parts])
        correct = alive.clone()
        for budget in sorted(set(eps)):
            radius = ball_radius(budget, norm)
            parts = alive.nonzero().squeeze(1).split(batch_size) if radius else ()
            for i in tqdm(parts, f"{norm} {budget:g}", leave=False, disable=not progress):
                if not len(i):  # nothing is left to attack
                    break
                x_0 = to_pixels(x[i.to(x.device)].to(device))
                x_adv = attack(x_0, y[i].to(device), radius, i)
                if (x_adv.abs() > 1).any() or (lengths(x_adv - x_0, norm) > radius + 1e-4).any():
                    raise RuntimeError(f"an attack left the image box or its {norm} ball")
                alive[i] = is_right(x_adv, i)
            robust[budget] = alive.clone()
    robust = torch.stack([robust[budget] for budget in eps])
    return Robustness(list(eps), robust.double().mean(1), robust, correct)


def pgd_accuracy(model, x, y, eps, norm, *, steps=40, rel_stepsize=None, random_start=True, seed=0,
                 **options):
    """``robust_accuracy`` under ``foolbox_pgd``; a step is ``rel_stepsize`` radii, by default
    2.5 / steps: foolbox's own 1/30 would not cross the ball in 40 steps from a random start."""
    if steps < 1:
        raise InputError(f"PGD takes one step or more, not {steps}")

    def attack(x_0, labels, radius, indices):
        start = random_starts(x_0, norm, seed, indices) if random_start else None
        return foolbox_pgd(model, x_0, labels, radius, norm, steps=steps, start=start,
                           rel_stepsize=2.5 / steps if rel_stepsize is None else rel_stepsize)

    return robust_accuracy(model, x, y, eps, norm, attack, **options)


def margin_pgd_accuracy(model, x, y, eps, norm, *, steps=40, restarts=10, seed=0, **options):
    """``robust_accuracy`` under ``margin_pgd`` from ``restarts`` random starts."""
    if steps < 1 or restarts < 1:
        raise InputError(f"PGD takes one step and start or more, not {steps} and {restarts}")

    def attack(x_0, labels, radius, indices):
        starts = (random_starts(x_0, norm, seed, indices, turn) for turn in range(restarts))
        return margin_pgd(model, x_0, labels, radius, norm, steps=steps, starts=starts)

    return robust_accuracy(model, x, y, eps, norm, attack, **options)


def autoattack_accuracy(model, x, y, eps, norm, *, attacks=AUTOATTACKS, seed=0, **options):
    """``robust_accuracy`` under AutoAttack (Croce & Hein, 2020), its standard version or some of
    its ``attacks``. It is seeded once a batch, so that numbers may depend on ``batch_size``."""
    try:
        library = importlib.import_module("pyautoattack")
    except ImportError:
        raise InputError(f"AutoAttack is not installed: pip install {AUTOATTACK}") from None
    if not attacks or set(attacks) - set(AUTOATTACKS):
        raise InputError(f"attacks are some of {', '.join(AUTOATTACKS)}, got {list(attacks)}")

    def attack(x_0, labels, radius, indices):
        n_others = model(x_0[:1]).shape[1] - 1
        if n_others < 3 and "apgd-t" in attacks:
            raise InputError("AutoAttack's apgd-t needs 4 classes or more: name the other attacks")
        run = library.AutoAttack(lambda images: model(2 * images - 1), device=x_0.device, seed=seed,
                                 norm={"linf": "Linf", "l2": "L2"}[norm], eps=radius / 2)
        run.attacks_to_run = list(attacks)
        run.apgd_targeted.n_target_classes = run.fab.n_target_classes = min(9, n_others)
        x_adv, _ = run.run_standard_evaluation((x_0 + 1) / 2, labels, batch_size=len(x_0))
        return 2 * x_adv - 1

    return robust_accuracy(model, x, y, eps, norm, attack, **options)
