"""What training costs in operations: counted from the network and the passes of a step.

A multiply-add counts as two. A backward pass to the input counts as one forward pass, one to the
weights as well as two. Element-wise work is left out.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import JEM, NETWORKS, network_words


def forward_flop(config, size, n_images):
    """Operations of a forward pass over a batch, counted without a device."""
    with torch.device("meta"):
        model, x = JEM.build(**config).eval(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() * n_images


def network_of(args):
    """The config, without classes, of the network that training arguments describe, as a dict.

    Those of a record have the network's display name, which is that of NETWORKS for all but
    Wide-ResNets.
    """
    name = args["network"] if args.get("network") in NETWORKS else "wrn"
    return {"network": name} | {k: args[k] for k in network_words(name) if k in args}


def forward_images(args, p_x=True):
    """The cost of one step in forward passes over single images.

    ``args`` are training arguments as a dict, where what a record lacks is off. ``p_x``: whether
    log p(x) has begun (--p_x_from).
    """
    n, labelled = batches(args)
    chains, weights = 0, 0
    if p_x and args.get("p_x_weight", 1):
        chains += 2 * args["n_steps"] * n
        weights += 6 * n
    if args.get("p_x_y_weight", 0):
        chains += 2 * args["n_steps"] * labelled
        weights += 3 * labelled
    if args.get("p_y_given_x_weight", 1) or args.get("p_x_y_weight", 0):
        attack = args.get("adv_steps", 0) if args.get("adversarial", "none") != "none" else 0
        weights += (3 + 2 * attack) * labelled
    return chains + weights * (2 if args.get("sam") else 1)


def batches(args):
    """(images of p(x), labelled images) in a step, over all parts and processes."""
    n = args.get("global_batch_size") or args["batch_size"]
    return n, args.get("labelled_batch") or n


def pflop_of(trained):
    """The cost of a run in 10^15 operations, from the training arguments in a record of it."""
    return run_pflop(trained, network_of(trained), trained["n_train"] or 45000, trained["step"])


def run_pflop(args, config, n_train, steps):
    """The cost of the first ``steps`` steps of a run on ``n_train`` images, in 10^15 operations."""
    before = min(steps, args.get("p_x_from", 0) * (n_train // batches(args)[1]))
    images = before * forward_images(args, False) + (steps - before) * forward_images(args)
    return forward_flop(config, args.get("image_size", 32), images) / 1e15
