"""--load_path: starting a run from given weights."""

from pathlib import Path

import torch

from models import network_name
from utils.cli import per_class
from utils.files import checkpoint
from utils.files.torch_files import one_line
from utils.program import InputError

START = "start.pt"  # in RUN: a copy of the loaded state, so that the run no longer needs the file


def load_start(args, state):
    """Load the weights of --load_path into the new ``state`` and save it as RUN/start.pt.

    --load_buffer also loads the replay buffer. InputError if the network, the classes or the images
    do not fit.
    """
    opened = checkpoint.open_any(args.load_path)
    if opened.sha256 != args.load_sha256:
        raise InputError(f"--load_path {args.load_path} changes while it is read: try again")
    weights = opened.model.state_dict()
    check_network(args, opened.model.config, state.model.config)
    if not args.load_head:
        head = f"trunk.{[name for name, _ in state.model.trunk.named_children()][-1]}."
        own = state.model.state_dict()
        weights = {k: own[k] if k.startswith(head) else v for k, v in weights.items()}
    try:
        state.model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"--load_path {args.load_path} does not fit this network "
                         f"[{one_line(error)}]") from error
    if args.load_buffer:
        check_buffer(args, opened, state.buffer)
        state.buffer.images.copy_(checkpoint.own_share(opened.buffer))
        if opened.ages is not None:
            state.buffer.ages.copy_(checkpoint.own_share(opened.ages))
    checkpoint.save(Path(args.run_dir) / START, state, 0)
    return opened


def check_network(args, theirs, ours):
    """Refuse a file of another network, and tell which flags describe that network."""
    free = {"bn_momentum", "n_classes"}  # bn_momentum does not affect the weights
    other = {k: v for k, v in theirs.items() if k not in free and ours.get(k) != v}
    if other or theirs.keys() != ours.keys():
        raise InputError(f"--load_path {args.load_path} is a {described(theirs)}, this run's "
                         f"network is a {described(ours)}: type {typed(other)}")
    if args.load_head and theirs["n_classes"] != ours["n_classes"]:
        raise InputError(f"--load_path {args.load_path} knows {theirs['n_classes']} classes, "
                         f"{args.dataset} has {ours['n_classes']}: --no-load_head starts with a "
                         "new last layer")


def described(config):
    norm = f" with norm {config['norm']}" if "norm" in config else ""
    return network_name(config) + norm


def typed(words):
    """{"depth": 10, "stride_first": True} -> "--depth 10 --stride_first"."""
    return " ".join(f"--{'' if v else 'no-'}{k}" if isinstance(v, bool) else f"--{k} {v}"
                    for k, v in words.items())


def check_buffer(args, opened, buffer):
    """Refuse a replay buffer that this run's chains cannot continue from."""
    path, theirs = args.load_path, opened.buffer
    if theirs is None:
        raise InputError(f"--load_buffer: {path} holds no replay buffer")
    if len(theirs) != args.buffer_size:
        raise InputError(f"--load_buffer: {path} holds {len(theirs)} images: type --buffer_size "
                         f"{len(theirs)}")
    if theirs.shape[1:] != buffer.images.shape[1:]:
        sizes = ("x".join(map(str, x.shape[-2:])) for x in (theirs, buffer.images))
        raise InputError(f"--load_buffer: its images are {next(sizes)}, this run's {next(sizes)}")
    if not torch.isfinite(theirs).all():
        raise InputError(f"--load_buffer: the replay buffer of {path} is not finite")
    saved = opened.args or {}
    blocks = saved.get("class_cond_p_x_sample") or saved.get("p_x_y_weight")
    same_classes = opened.model.config["n_classes"] == buffer.n_classes
    if per_class(args) and not (blocks and same_classes):
        raise InputError(f"--load_buffer: this run draws chains per class, and the replay buffer "
                         f"of {path} does not lie in blocks of these classes")
