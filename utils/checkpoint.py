"""Checkpoints of our own: dictionaries of tensors and plain values, written atomically.

A resumable file (``last.pt``) holds all that the next step depends on: weights, optimiser, replay
buffer in full precision, what p_0 was estimated from, step and random seed. Files are read with
``weights_only=True``: a stranger's checkpoint cannot run code.
"""

import hashlib
import json
import platform
from dataclasses import dataclass
from typing import NamedTuple

import torch

from models import JEM, official
from samplers import ReplayBuffer
from utils.cli import InputError, jsonable
from utils.records import replacing
from utils.torch_files import one_line, read

FORMAT = "jempp-1"
KEYS = {"model", "config", "buffer", "p0", "step", "epoch", "best", "args", "rng", "versions"}
# Flags that only say how far, how often or on what to run; a resumed run may change them.
FREE = {"max_steps", "max_minutes", "ckpt_steps", "print_every", "n_epochs", "keep_every",
        "num_threads", "run_dir", "data_root", "download", "device", "dry_run"}


@dataclass
class State:
    """What training changes: all of it goes into a checkpoint. ``step`` counts finished steps;
    ``best`` is the validation accuracy that best.pt was saved for."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    buffer: ReplayBuffer | None
    p0: dict
    step: int = 0
    best: float = -1.0


def save(path, state, args, epoch, *, resumable=True):
    """Write ``state``; without ``resumable`` the optimiser is left out (best.pt)."""
    content = {
        "format": FORMAT, "model": state.model.state_dict(), "config": dict(state.model.config),
        "buffer": None if state.buffer is None else state.buffer.images, "p0": state.p0,
        "step": state.step, "epoch": epoch, "best": state.best, "args": jsonable(vars(args)),
        "rng": {"seed": args.seed, "step": state.step},  # every stream is a function of the two
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()}}
    if resumable:
        content["optimizer"] = state.optimizer.state_dict()
    with replacing(path) as file:
        torch.save(content, file)


def check(content, path):
    """``content`` if it is what ``save`` wrote; InputError, in one line, if not."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this code")
    if missing := KEYS - content.keys():
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}")
    return content


class Opened(NamedTuple):
    """A checkpoint opened to be evaluated; what its file lacks is None."""

    path: str
    sha256: str
    model: JEM
    buffer: torch.Tensor | None
    args: dict | None
    step: int | None
    epoch: int | None


def open_any(path):
    """Ours or a released file of JEM, JEM++ or SADA-JEM, told apart by content, as ``Opened``."""
    content = read(path)
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if official.is_official(content):
        try:
            model, buffer = official.convert(content)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        args = step = epoch = None
    else:
        content = check(content, path)
        try:
            model = JEM.wide_resnet(**content["config"])
            model.load_state_dict(content["model"])
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: its weights do not fit its network "
                             f"[{one_line(error)}]") from error
        buffer, args = content["buffer"], content["args"]
        step, epoch = content["step"], content["epoch"]
    if not all_finite([*model.state_dict().values()]):
        raise InputError(f"{path}: its weights are not all finite numbers")
    return Opened(str(path), sha256, model, buffer, args, step, epoch)


def all_finite(tensors):
    """Whether no tensor holds a NaN or an infinity."""
    tensors = [t for t in tensors if t.is_floating_point()]
    return bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all())


def is_finite(state):
    """Whether weights, running statistics and buffer are free of NaN and infinity."""
    buffer = [] if state.buffer is None else [state.buffer.images]
    return all_finite([*state.model.state_dict().values(), *buffer])


def restore(state, path, args):
    """Put the content of a resumable file into ``state``, built from the same arguments."""
    content = check(read(path), path)
    check_same_run(path, content["args"], args)
    if content["p0"] != state.p0:
        raise InputError(f"{path} was trained on other images than --data_root holds now")
    if "optimizer" not in content:
        raise InputError(f"{path} cannot be resumed: it holds no optimiser state (use last.pt)")
    try:
        state.model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        if state.buffer is not None:
            state.buffer.images.copy_(content["buffer"])
        state.step, state.best = content["step"], content["best"]
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} does not fit this run [{one_line(error)}]") from error


def check_same_run(path, saved, args):
    """Refuse to continue a run under other arguments, showing the difference."""
    now, absent = jsonable(vars(args)), "(not there)"
    names = sorted((saved.keys() | now.keys()) - FREE)
    changed = [f"--{name} {saved.get(name, absent)} there, {now.get(name, absent)} here"
               for name in names if saved.get(name, absent) != now.get(name, absent)]
    if changed:
        raise InputError(f"{path} is of a run with other arguments: {'; '.join(changed)}. "
                         "Type the same ones, or choose another --run_dir")


def check_run_dir(run_dir, args):
    """Refuse a run folder that holds a run with other arguments, or is no folder."""
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"--run_dir {run_dir} is a file")
    path = run_dir / "args.json"
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        return
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise InputError(f"{path} is not what a run writes: mend it, or choose another --run_dir")
    check_same_run(path, saved, args)
