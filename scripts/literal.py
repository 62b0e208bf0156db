"""The released code's order of work, in our words: what benchmark.py measures against.

Nothing here is meant to be fast. Chains run Algorithm 1 by a full backward pass over the network
(weight gradients included, graph retained) and N passes through the stem; each iteration draws a
Gaussian for every chain, one by one, of which it uses those to be re-initialised.
"""

import torch
import torch.nn.functional as F
from torch.distributions import MultivariateNormal

from models import energy


class OneByOneGaussians:
    """N(mu_y, Sigma_y + 1e-4 I) of each class with a dense covariance, sampled one at a time."""

    def __init__(self, p0):
        self.shape, self.normals = p0.shape, []
        for k in range(len(p0.members)):
            x = p0.class_images(k)
            covariance = torch.cov(x.T, correction=0)
            covariance.diagonal().add_(p0.ridge)
            self.normals.append(MultivariateNormal(x.mean(0), covariance))

    def sample(self, n):
        classes = torch.randint(len(self.normals), (n,)).tolist()
        x = torch.stack([self.normals[k].sample() for k in classes])
        return x.view(n, *self.shape).clamp_(-1, 1)


def literal_sample(model, buffer, gaussians, args):
    """Draw, run Algorithm 1, store; buffer [|B|, 3, H, W] on the training device."""
    device = buffer.device
    slots = torch.randint(len(buffer), (args.batch_size,))
    fresh = gaussians.sample(args.batch_size)
    anew = (torch.rand(args.batch_size) < args.reinit_freq).to(device)[:, None, None, None]
    x = torch.where(anew, fresh, buffer[slots.to(device)])
    for _ in range(args.n_steps):
        x = x.detach().requires_grad_()
        features = model.stem(x)
        features.retain_grad()
        energy(model.trunk(features)).sum().backward(retain_graph=True)
        p, moving = features.grad.detach(), x.detach()
        for _ in range(args.in_steps):
            moving.requires_grad_()
            hamiltonian = (p * model.stem(moving)).sum()
            (gradient,) = torch.autograd.grad(hamiltonian, moving, retain_graph=True)
            moving = (moving.detach() - args.pyld_lr * gradient.clamp(-args.eps, args.eps)
                      ).clamp(-1, 1)
        x = moving
    x = x.detach()
    buffer[slots.to(device)] = x
    return x


def literal_step(state, batch, gaussians, args):
    """One training iteration with two real batches (recipe: p(x) and p(y|x), weights 1 and 1)."""
    model, optimizer = state.model, state.optimizer
    x_pos, (x_lab, y_lab) = batch
    e_pos = model.energy(x_pos).mean()
    x_neg = literal_sample(model, state.buffer.images, gaussians, args)
    e_neg = model.energy(x_neg).mean()
    loss = e_pos - e_neg + F.cross_entropy(model(x_lab), y_lab)
    if loss.abs().item() > 1e8:  # the released test for divergence, a wait for the device each step
        raise RuntimeError("diverged")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
