"""Robust accuracy under white-box attacks in an L-inf or L2 ball (Fig. 9).

Budgets ``eps`` have the units of the paper's axes: L-inf in 1/255 of [0, 1] images, L2 as a norm of
[0, 1] images. Internally images are in [-1, 1], and the budget in that range is called ``radius``.
``pgd_accuracy`` is the usual attack. The others distinguish robustness from vanishing gradients.
"""

import math
import os
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from models import frozen
from samplers import to_pixels
from utils import distributed
from utils.evaluation.inference import predict
from utils.machine import eager
from utils.program import InputError, Unavailable, needed
from utils.seeding import generator

AUTOATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")  # its standard version, in its order
CLEAR = 1e-3  # a margin, in logits, larger than rounding errors


class Robustness(NamedTuple):
    """Robustness of N images at the budgets ``eps`` [E] as typed.

    ``robust`` bool [E, N]: classified correctly at this and every smaller budget, including 0.
    ``accuracy`` float64 [E]: its mean over images. ``correct`` bool [N]: correct at budget 0.
    """

    eps: list
    accuracy: torch.Tensor
    robust: torch.Tensor
    correct: torch.Tensor


def ball_radius(eps, norm):
    """The radius in [-1, 1] images of a budget as typed. The range is twice [0, 1]: 8 -> 16/255."""
    return 2 * eps / 255 if norm == "linf" else 2 * eps


def lengths(delta, norm):
    """L-inf or L2 norm of each perturbation [B, C, H, W], shaped [B, 1, 1, 1]."""
    return torch.linalg.vector_norm(delta, math.inf if norm == "linf" else 2, (1, 2, 3), True)


def steepest(slope, norm):
    """The direction of unit length in ``norm`` along which a linear function rises fastest."""
    return slope.sign() if norm == "linf" else slope / (lengths(slope, norm) + 1e-30)


def project(delta, radius, norm):
    """The perturbation of length <= radius that is nearest to ``delta`` [B, C, H, W]."""
    if norm == "linf":
        return delta.clamp(-radius, radius)
    return delta * (radius / lengths(delta, norm).clamp_min(radius))


def adversarial_batch(model, x, y, radius, norm, *, steps, generator):
    """Images for PGD adversarial training (Madry et al., 2018, the top lines of Fig. 9).

    Projected ascent of the cross-entropy in ``steps`` steps of 2.5 / steps radii, from a random
    start in the ball around x [B, C, H, W] in [-1, 1]. The caller sets the network's mode.
    """
    delta = radius * (2 * torch.rand(x.shape, device=x.device, generator=generator) - 1)
    delta = project(delta, radius, norm)
    for _ in range(steps):
        x_adv = (x + delta).clamp(-1, 1).requires_grad_()
        with frozen(model):
            loss = F.cross_entropy(model(x_adv), y, reduction="sum")
            (slope,) = torch.autograd.grad(loss, x_adv)
        delta = x_adv.detach() + 2.5 / steps * radius * steepest(slope, norm) - x
        delta = project(delta, radius, norm)
    return (x + delta).clamp(-1, 1)


def random_starts(x, norm, seed, indices, restart=0):
    """Perturbations shaped like ``x`` [B, C, H, W], uniform in [-1, 1] or on the unit sphere.

    That of image i depends on (seed, i, restart) alone, not on the batch, the device or which
    images are attacked.
    """
    draw = torch.rand if norm == "linf" else torch.randn
    z = torch.stack([draw(x.shape[1:], generator=generator("cpu", "attack", seed, i, restart))
                     for i in indices.tolist()])
    return (2 * z - 1 if norm == "linf" else z / lengths(z, norm)).to(x.device)


def foolbox_pgd(model, x, y, radius, norm, *, steps, rel_stepsize, start=None):
    """foolbox's PGD: the last of ``steps`` iterates [B, C, H, W], from x + radius * ``start``."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # or foolbox requires a git binary
    eagerpy, foolbox = needed("eagerpy"), needed("foolbox")
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    attack = kind(rel_stepsize=rel_stepsize, steps=steps, random_start=start is not None)
    # foolbox's own start would use torch's global random stream for a whole batch
    attack.get_random_start = lambda x_0, epsilon: x_0 + epsilon * eagerpy.astensor(start)
    return attack(foolbox.PyTorchModel(model, (-1, 1), x.device), x, y, epsilons=radius)[1]


def margin(logits, y, target=None):
    """max_{j != y} z_j - z_y [B], or z_target - z_y. The first is positive for a broken image."""
    rival = (logits.scatter(1, y[:, None], -math.inf).amax(1) if target is None
             else logits.gather(1, target[:, None]).squeeze(1))
    return rival - logits.gather(1, y[:, None]).squeeze(1)


def margin_pgd(model, x, y, radius, norm, *, steps, starts):
    """Projected ascent of the logit margin from each of ``starts`` in turn: images [B, C, H, W].

    A margin has a gradient where the cross-entropy of a confident network has none. The first start
    follows the largest other logit. Later start r follows the clean image's r-th largest other
    logit, because the nearest boundary may belong to another class. The step size falls from
    2 radius to 0 as a cosine. The best iterate is kept. Images whose margin exceeds CLEAR stop.
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
            z = model(x_t.requires_grad_())
            slope = torch.autograd.grad(margin(z, y_0, target).sum(), x_t)[0]
            x_t, reached = x_t.detach(), margin(z.detach(), y_0)
            better = reached > best[todo]
            best[todo[better]], x_adv[todo[better]] = reached[better], x_t[better]
            size = radius * (1 + math.cos(math.pi * step / steps))
            delta = project(x_t + size * steepest(slope, norm) - x_0, radius, norm)
            x_t = (x_0 + delta).clamp(-1, 1)
            going = best[todo] <= CLEAR
            if not going.all():  # broken images are done, the others continue
                todo, x_0, y_0, x_t = todo[going], x_0[going], y_0[going], x_t[going]
                target = None if target is None else target[going]
            if not len(todo):
                break
    return x_adv


def finite(values):
    """InputError for NaN or infinity. Attacks fail there, so the network would look robust."""
    if not torch.isfinite(values).all():
        raise InputError("the network's logits or gradients are not finite: broken weights")


def watch(module, inputs, logits):
    """A forward hook that checks logits, and in the backward pass the images' gradients."""
    finite(logits)
    if inputs[0].requires_grad:
        inputs[0].register_hook(finite)


@contextmanager
def under_attack(model):
    """Set eval mode, freeze parameters and check for finite values. Restore the modes after."""
    hook = model.register_forward_hook(watch)
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with frozen(model), eager(), torch.enable_grad():
            yield
    finally:
        hook.remove()
        for module, training in modes:
            module.training = training


def robust_accuracy(model, x, y, eps, norm, attack, *, batch_size=100):
    """``Robustness`` of images ``x`` uint8 [N, 3, H, W] with labels ``y`` [N] at budgets ``eps``.

    The attack is ``attack(x, y, radius, indices) -> x_adv``. InputError for invalid input.
    """
    if norm not in ("linf", "l2") or not len(eps) or not all(0 <= e < math.inf for e in eps):
        raise InputError(f"an attack's norm is linf or l2, its budgets are >= 0: {norm!r}, {eps}")
    if not len(x) or len(x) != len(y) or x.dtype != torch.uint8 or batch_size < 1:
        raise InputError("an attack needs uint8 images, each with a label, and a batch size > 0")
    device, robust = next(model.parameters()).device, torch.zeros(len(eps), len(x)).bool()
    x, y = x.to(device), y.to(device).long()
    def survivors(i):
        x_0 = to_pixels(x[i])
        x_adv = attack(x_0, y[i], radius, i)
        if (x_adv.abs() > 1).any() or (lengths(x_adv - x_0, norm) > radius + 1e-4).any():
            raise RuntimeError(f"an attack left the image box or its {norm} ball")
        return (model(x_adv).argmax(1) == y[i]).cpu()

    with under_attack(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        correct = predict(model, x, batch_size).argmax(1) == y
        alive = correct.clone()
        for row in sorted(range(len(eps)), key=eps.__getitem__):
            radius, todo = ball_radius(eps[row], norm), alive.nonzero().squeeze(1)
            if radius and len(todo):
                parts = distributed.spread(survivors, todo.split(batch_size),
                                           f"{norm} {eps[row]:g}")
                alive[todo] = torch.cat(parts).to(device)
            robust[row] = alive.cpu()
    return Robustness(list(eps), robust.double().mean(1), robust, correct.cpu())


def pgd_accuracy(model, x, y, eps, norm, *, steps=40, rel_stepsize=None, random_start=True, seed=0,
                 **options):
    """``robust_accuracy`` under ``foolbox_pgd``. A step is ``rel_stepsize`` radii.

    The default is 2.5 / steps. With foolbox's defaults (1/30, L2 1/40), 40 steps from a random
    start cannot cross the ball.
    """
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
    """``robust_accuracy`` under AutoAttack (Croce & Hein, 2020), with all or some of its attacks.

    The default is its standard version. AutoAttack is seeded once per batch, so numbers may depend
    on ``batch_size``. Unavailable if it is not installed.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise Unavailable("AutoAttack is not installed: pip install pyautoattack==0.2.0") from None

    def attack(x_0, labels, radius, indices):
        n_others = model(x_0[:1]).shape[1] - 1
        known = [name for name in AUTOATTACKS if n_others > 2 or name != "apgd-t"]
        if not attacks or set(attacks) - set(known):
            raise InputError(f"AutoAttack for {n_others + 1} classes is some of {', '.join(known)}")
        run = AutoAttack(lambda images: model(2 * images - 1), norm=norm.capitalize(),
                         eps=radius / 2, seed=seed, device=x_0.device)
        run.attacks_to_run = list(attacks)
        run.apgd_targeted.n_target_classes = run.fab.n_target_classes = min(9, n_others)
        x_adv, _ = run.run_standard_evaluation((x_0 + 1) / 2, labels, batch_size=len(x_0))
        return 2 * x_adv - 1
    return robust_accuracy(model, x, y, eps, norm, attack, **options)
