"""The order of work of the released code, in our own code: the reference of benchmark.py.

This code is not optimised, but it is no slower than the released code. It works as follows.

- Chains run Algorithm 1 with a backward pass to the images and N passes through the stem. The
  backward pass computes no weight gradients, retains the graph, and keeps the gradient at the
  stem's output. Each chain ends with a backward pass through the stem whose result is unused.
- The graph of the real batch stays in memory during sampling.
- Each iteration draws one Gaussian sample per chain, one by one. It uses only those of chains that
  are re-initialised.
- Arithmetic is float32 without TensorFloat-32. Tensors are contiguous. Nothing is compiled or done
  in place.
"""

import argparse
import copy
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.distributions import MultivariateNormal

import train_jempp
from models import energy
from samplers import make_sampler
from utils.seeding import seed_step
from utils.training.build import Setup, new_state
from utils.training.schedule import learning_rate

# Our switches as set on this side. Both sides share --cudnn_benchmark, which the released code
# turns on.
SWITCHES = {"fast": False, "compile": "off", "amp": "off", "tf32": False, "channels_last": False}


class Literal:
    """The literal side of a run that starts from ``args``, ``data`` and the images of ``p0``.

    ``step`` and ``sample`` may use the sampler settings of other ``args``.
    """

    def __init__(self, args, data, p0):
        self.state = new_state(argparse.Namespace(**{**vars(args), **SWITCHES}), data, p0, {})
        for module in self.state.model.modules():
            if isinstance(module, torch.nn.LeakyReLU):
                module.inplace = False
        self.data, self.gaussians = data, OneByOneGaussians(p0)

    def draw(self, args):
        return literal_draw(self.state.buffer.images, self.gaussians, args)

    def sample(self, args):
        with full_float32():
            return literal_sample(self.state.model, self.state.buffer.images, self.draw(args), args)

    def step(self, args, drawn=None):
        """One iteration. Starts from ``drawn``, a pair (x_0, slots), if given."""
        state = self.state
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, self.data.steps_per_epoch, args)
        with full_float32():
            literal_step(state, self.data.batch(state.step), drawn or self.draw(args), args)
        state.step += 1


@contextmanager
def full_float32():
    """Turn TensorFloat-32 off inside the block, even if our side uses it."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class OneByOneGaussians:
    """N(mu_y, Sigma_y + 1e-4 I) of each class, with a dense covariance, sampled one at a time."""

    def __init__(self, p0):
        self.shape, self.normals = p0.shape, []
        for k in range(len(p0.classes)):
            x = p0.class_images(k)
            # the Cholesky factor of a covariance of few images needs float64
            covariance = torch.cov(x.double().T, correction=0)
            covariance.diagonal().add_(p0.ridge)
            factor = torch.linalg.cholesky(covariance).float()
            self.normals.append(MultivariateNormal(x.mean(0), scale_tril=factor))

    def sample(self, n):
        classes = torch.randint(len(self.normals), (n,)).tolist()
        x = torch.stack([self.normals[k].sample() for k in classes])
        return x.view(n, *self.shape).clamp_(-1, 1)


def literal_draw(images, gaussians, args):
    """x_0 [B, 3, H, W] and its slots in the replay buffer ``images``, all on its device."""
    slots = torch.randint(len(images), (args.batch_size,)).to(images.device)
    fresh = gaussians.sample(args.batch_size)
    anew = (torch.rand(args.batch_size) < args.reinit_freq).to(images.device)[:, None, None, None]
    return torch.where(anew, fresh, images[slots]), slots


def literal_sample(model, images, drawn, args):
    """Algorithm 1 from ``drawn`` = (x_0, slots). Stores the result in the buffer ``images``."""
    x, slots = drawn
    for _ in range(args.n_steps):
        x = x.detach().requires_grad_()
        features = model.stem(x)
        features.retain_grad()
        torch.autograd.grad(energy(model.trunk(features)).sum(), [x], retain_graph=True)
        p, moving = features.grad.detach(), x.detach()
        for _ in range(args.in_steps):
            moving.requires_grad_()
            hamiltonian = (p * model.stem(moving)).sum()
            (gradient,) = torch.autograd.grad(hamiltonian, moving, retain_graph=True)
            moving = (moving.detach() - args.pyld_lr * gradient.clamp(-args.eps, args.eps)
                      ).clamp(-1, 1)
        x = moving
    x = x.detach()
    (p * model.stem(x)).sum().backward()  # unused: gradients are zeroed before they count
    images[slots] = x
    return x


def literal_step(state, batch, drawn, args):
    """One training iteration with two real batches, for p(x) and p(y|x) with weights 1 and 1."""
    model, optimizer = state.model, state.optimizer
    x_pos, (x_lab, y_lab) = batch
    e_pos = model.energy(x_pos).mean()
    x_neg = literal_sample(model, state.buffer.images, drawn, args)
    e_neg = model.energy(x_neg).mean()
    loss = e_pos - e_neg + F.cross_entropy(model(x_lab), y_lab.to(x_lab.device))
    if loss.abs().item() > 1e8:  # the released test for divergence, which waits for the device
        raise RuntimeError("diverged")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def check(args, state, data, p0, dtype=torch.float32, steps=3):
    """Compare our iteration with the literal one, in ``dtype``, from the same state, x_0 and batch.

    Runs ``steps`` iterations, each from our current state. Returns [{step, lr, differences}, ...].
    If float32 rounding moves an activation across LeakyReLU's kink, its gradient takes the other
    slope, and the steps may differ by some percent. In float64 only real differences in the
    computation remain.
    """
    literal, draw, found = Literal(args, data, p0), make_sampler(args), []
    in_precision(dtype, data, state, literal.state)
    for _ in range(steps):
        copy_state(literal.state, state)
        before = vector(state.model.parameters())
        streams = seed_step(args.seed, state.step, 0, data.device)
        x_0, slots, _ = state.buffer.draw(args.batch_size, p0, args.reinit_freq,
                                          host=streams.host, generator=streams.device)
        literal.step(args, (x_0, slots.to(x_0.device)))
        train_jempp.train_step(args, Setup(state, data, p0), draw)
        found.append({"step": state.step, "lr": state.optimizer.param_groups[0]["lr"],
                      **differences(state, literal.state, before, slots)})
    return found


def in_precision(dtype, data, *states):
    """Convert weights, buffers and all later real images to ``dtype``."""
    for state in states:
        state.model.to(dtype)
        state.buffer.images = state.buffer.images.to(dtype)
    batch_of = data.batch

    def batch(step, part=0):
        x_pos, (x_lab, y_lab) = batch_of(step, part)
        return x_pos.to(dtype), (x_lab.to(dtype), y_lab)

    data.batch = batch


def copy_state(target, source):
    """Copy weights, statistics, momentum, buffer and step of ``source`` to ``target``."""
    target.model.load_state_dict(source.model.state_dict())
    target.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))
    target.buffer.images.copy_(source.buffer.images)
    target.step = source.step


def differences(a, b, before, slots):
    """Differences between states ``a`` and ``b`` after one step from the weights ``before``.

    Largest differences of weights, of running statistics, and of the buffer's slots that were drawn
    once (either of two chains in one slot may be the one that is stored). ``relative`` is the norm
    of the weights' difference divided by that of the step.
    """
    once = slots[slots.bincount()[slots] == 1].to(a.buffer.images.device)
    weights = [vector(s.model.parameters()) for s in (a, b)]
    statistics = [vector(s.model.buffers()) for s in (a, b)]
    chains = [vector([s.buffer.images[once]]) for s in (a, b)]
    found = {name: float((x - y).abs().max()) for name, (x, y) in
             (("weights", weights), ("statistics", statistics), ("buffer", chains))}
    step = (weights[0] - before).norm()
    return found | {"relative": float((weights[0] - weights[1]).norm() / step)}


def vector(tensors):
    """All numbers of ``tensors`` on the host, in float64, after a 0 (there may be none)."""
    return torch.cat([torch.zeros(1), *(t.detach().flatten().cpu() for t in tensors)]).double()
