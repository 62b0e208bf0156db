"""Checkpoints of our own: dictionaries of tensors and plain values, written atomically.

A resumable file (``last.pt``) holds all that the next step depends on: weights, optimiser, replay
buffer in full precision, what p_0 was estimated from, step and random seed. Files are read with
``weights_only=True``: a stranger's checkpoint cannot run code.
"""

import errno
import hashlib
import json
import platform
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # not on Windows: no lock there
    fcntl = None

import torch
from torch.optim.swa_utils import AveragedModel

from models import JEM, official
from samplers import ReplayBuffer, to_pixels
from utils import distributed
from utils.cli import InputError, jsonable
from utils.records import replacing
from utils.torch_files import one_line, read, tensors

FORMAT = "jempp-1"
KEYS = {"model", "config", "buffer", "p0", "step", "epoch", "best", "args", "rng", "versions",
        "lr_factor", "guard", "log_lines", "sha256"}
# Flags that only say how far, how often or on what to run; a resumed run may change them.
FREE = {"max_steps", "max_minutes", "ckpt_steps", "print_every", "n_epochs", "keep_every",
        "on_divergence", "max_rollbacks", "num_threads", "run_dir", "data_root", "download",
        "device", "dry_run", "compile", "fast", "cudnn_benchmark", "batch_size", "accumulate",
        "dist_timeout"}


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
    stream: int = 0  # which random stream: one more after each rollback
    lr_factor: float = 1.0  # what rollbacks have made of the learning rate
    guard: dict = field(default_factory=dict)
    log_lines: int = 0  # of train.jsonl when this was saved
    saved_at: int = 0  # step of last.pt
    candidate_at: int = 0  # step of candidate.pt
    average: AveragedModel | None = None  # --ema: the running average of the weights

    def __post_init__(self):
        self.net = distributed.wrap(self.model)  # what training passes go through

    @property
    def rollbacks(self):
        return self.stream

    def whole_buffer(self):
        """The replay buffer of all ranks [|B|, 3, H, W] (a call that every rank makes), or None."""
        if self.buffer is None:
            return None
        return distributed.interleave(self.buffer.images)


def stream_key(seed, stream):
    """What random streams are seeded by: the seed, and after rollbacks their number as well."""
    return seed if stream == 0 else f"{seed}.{stream}"


def save(path, state, args, epoch, *, judged=None, keep_as=None):
    """Write ``state``, or the network ``judged`` in place of what resuming needs (best.pt).

    Every rank makes this call; the first one writes. ``keep_as``: the name that the file which
    stood there goes on under.
    """
    distributed.same_buffers(state.model)
    buffer = state.whole_buffer()
    if distributed.rank() == 0:
        write(path, state, buffer, args, epoch, judged, keep_as)
    distributed.barrier()


def write(path, state, buffer, args, epoch, judged, keep_as):
    content = {
        "format": FORMAT, "model": (judged or state.model).state_dict(),
        "config": dict(state.model.config), "buffer": buffer, "p0": state.p0,
        "step": state.step, "epoch": epoch, "best": state.best, "args": jsonable(vars(args)),
        # every random number is a function of these three
        "rng": {"seed": args.seed, "stream": state.stream, "step": state.step},
        "lr_factor": state.lr_factor, "guard": state.guard, "log_lines": state.log_lines,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()}}
    if judged is None:
        content["optimizer"] = state.optimizer.state_dict()
        if state.average is not None:
            content["average"] = state.average.state_dict()
    content["sha256"] = digest(content)
    with replacing(path, keep_as=keep_as) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(errno.EIO, f"cannot be written [{one_line(error)}]", str(path)) from error


def digest(content):
    """SHA-256 over names, types, shapes and values of all tensors."""
    sha = hashlib.sha256()
    for name, tensor in tensors({k: v for k, v in content.items() if k != "sha256"}):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def check(content, path):
    """``content`` if it is what ``save`` wrote; InputError, in one line, if not."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this code")
    if missing := KEYS - content.keys():
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}")
    types = {"model": dict, "config": dict, "args": dict, "p0": dict, "rng": dict, "guard": dict,
             "step": int, "log_lines": int, "lr_factor": float, "best": float}
    if wrong := [k for k, kind in types.items() if not isinstance(content[k], kind)]:
        raise InputError(f"{path}: {', '.join(wrong)} of the wrong type")
    try:
        same = digest(content) == content["sha256"]
    except (TypeError, RuntimeError, ValueError) as error:
        raise InputError(f"{path} holds tensors of a kind that is never saved "
                         f"[{one_line(error)}]") from error
    if not same:
        raise InputError(f"{path} is damaged: its tensors are not those that were saved")
    return content


@contextmanager
def locked(run_dir):
    """Hold RUN/.lock, so that no second process writes to the folder; InputError if one does.
    What a killed process left half written is cleared away."""
    with open(Path(run_dir) / ".lock", "a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(f"another process is using {run_dir}: wait for it, or choose "
                                 "another --run_dir") from error
        for folder in (Path(run_dir), Path(run_dir) / "samples"):
            for partial in folder.glob(".*.partial"):
                partial.unlink(missing_ok=True)
        yield


def step_of(path):
    """After which step a checkpoint of ours was saved."""
    return check(read(path), path)["step"]


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
            check_config(content["config"])
            model = JEM.wide_resnet(**content["config"])
            model.load_state_dict(content["model"])
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: its weights do not fit its network "
                             f"[{one_line(error)}]") from error
        buffer, args = content["buffer"], content["args"]
        step, epoch = content["step"], content["epoch"]
    if not all_finite([*model.state_dict().values()]):
        raise InputError(f"{path}: its weights are not all finite numbers")
    if isinstance(buffer, torch.Tensor) and buffer.dtype == torch.uint8:  # a published model's
        buffer = to_pixels(buffer)
    if buffer is not None and not (isinstance(buffer, torch.Tensor) and buffer.dim() == 4
                                   and buffer.shape[1] == 3 and buffer.is_floating_point()):
        raise InputError(f"{path}: its replay buffer is no image tensor [n, 3, H, W]")
    return Opened(str(path), sha256, model, buffer, args, step, epoch)


def check_config(config):
    """ValueError for a network beyond all use, before memory is taken for it."""
    if not (config["depth"] <= 1000 and config["width"] <= 100 and config["n_classes"] <= 100_000):
        raise ValueError(f"no network of this size is evaluated: {config}")


def all_finite(tensors):
    """Whether no tensor holds a NaN or an infinity."""
    finite = [torch.isfinite(t).all() for t in tensors if t.is_floating_point()]
    return bool(torch.stack(finite).all())


def is_finite(state):
    """Whether weights, running statistics and buffers of all ranks are free of NaN and infinity."""
    buffer = [] if state.buffer is None else [state.buffer.images]
    return all(distributed.gather(all_finite([*state.model.state_dict().values(), *buffer])))


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
        if state.average is not None:
            state.average.load_state_dict(content["average"])
        if state.buffer is not None:
            state.buffer.images.copy_(own_share(content["buffer"]))
        state.step, state.best = content["step"], content["best"]
        state.stream, state.lr_factor = content["rng"]["stream"], content["lr_factor"]
        state.guard, state.log_lines = dict(content["guard"]), content["log_lines"]
        state.saved_at = state.step
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} does not fit this run [{one_line(error)}]") from error


def own_share(rows):
    """The slots of the replay buffer that this rank owns."""
    return rows[distributed.rank()::distributed.world()]


def check_same_run(path, saved, args):
    """Refuse to continue a run under other arguments, showing the difference."""
    now, absent = jsonable(vars(args)), "(not there)"
    free = FREE - ({"n_epochs"} if args.schedule != "steps" else set())  # the rate depends on it
    names = sorted((saved.keys() | now.keys()) - free)
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
