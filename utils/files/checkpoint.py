"""Checkpoints of our own: dictionaries of tensors and plain values, written atomically.

A resumable file (``last.pt``) holds all that the next step depends on: weights, optimiser, replay
buffer in full precision, what p_0 was estimated from, step and random seed. Files are read with
``weights_only=True``: a stranger's checkpoint cannot run code.
"""

import errno
import hashlib
import math
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
from utils.files.records import replacing
from utils.files.regular import regular
from utils.files.torch_files import (
    MOST_BYTES,
    Damaged,
    leaves,
    one_line,
    read,
    read_hashed,
    refusing,
)
from utils.program import InputError, say

FORMAT, OLD_FORMAT = "jempp-2", "jempp-1"
KEYS = {"model", "config", "buffer", "p0", "step", "epoch", "best", "args", "rng", "versions",
        "lr_factor", "guard", "log_lines", "sha256"}
MOST_STEPS = 10**9  # of a run; the paper's has 10^5
LOCKED = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}  # what flock says of another's lock
READABLE = ("checkpoints of train_jempp.py, the released files of JEM, JEM++ and SADA-JEM, and "
            "weights under their names or ours, .pt or .safetensors, with or without the prefixes "
            f"module. and _orig_mod., bare or as {', '.join(official.WRAPPERS)}")


@dataclass
class State:
    """What training changes: all of it goes into a checkpoint."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    buffer: ReplayBuffer | None
    p0_origin: dict  # what p_0 was estimated from
    args: dict  # the arguments of the run, as plain values
    step: int = 0  # finished steps
    best: float = -1.0  # the validation accuracy that best.pt was saved for
    rollbacks: int = 0  # each gives the run other random numbers
    lr_factor: float = 1.0  # what rollbacks have made of the learning rate
    guard: dict = field(default_factory=dict)  # what the guard remembers
    log_lines: int = 0  # of train.jsonl when this was saved
    saved_at: int = 0  # step of last.pt
    candidate_at: int = 0  # step of candidate.pt
    average: AveragedModel | None = None  # --ema: the running average of the weights

    def __post_init__(self):
        self.net = distributed.wrap(self.model)  # what training passes go through

    @property
    def seed(self):
        """What random streams are seeded by: the run's seed, and its rollbacks if there were."""
        return stream_seed(self.args["seed"], self.rollbacks)

    def whole_buffer(self):
        """The replay buffer of all ranks [|B|, 3, H, W] (a call that every rank makes), or None."""
        if self.buffer is None:
            return None
        return distributed.interleave(self.buffer.images)

    def parts(self, judged=None):
        """The state dicts of a file: all that resuming needs, or the network ``judged`` alone."""
        if judged is not None:
            return {"model": judged.state_dict()}
        parts = {"model": self.model, "optimizer": self.optimizer, "average": self.average}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def is_finite(self, judged=None):
        """Whether all that is saved, on all ranks, is free of NaN and infinity."""
        buffer = None if self.buffer is None else self.buffer.images
        return all(distributed.gather(all_finite({**self.parts(judged), "buffer": buffer})))

    def load(self, content, path):
        """Become the state that ``content`` of the resumable file ``path`` was saved from."""
        if content["p0"] != self.p0_origin:
            raise InputError(f"{path} was trained on other images than --data_root holds now")
        if "optimizer" not in content:
            raise InputError(f"{path} cannot be resumed: it holds no optimiser state (use last.pt)")
        try:
            self.model.load_state_dict(content["model"])
            load_optimizer(self.optimizer, content["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(content["average"])
            if self.buffer is not None:
                images = own_share(content["buffer"])
                if images.shape != self.buffer.images.shape:  # copy_ would repeat one image
                    raise ValueError(f"a buffer of shape {tuple(content['buffer'].shape)}")
                self.buffer.images.copy_(images)
            self.step, self.best = content["step"], content["best"]
            self.rollbacks, self.lr_factor = content["rng"]["stream"], content["lr_factor"]
            self.guard, self.log_lines = dict(content["guard"]), content["log_lines"]
            self.saved_at = self.step
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} does not fit this run [{one_line(error)}]") from error

    def become(self, other):
        """Take over all that ``other``, a state of the same run, holds."""
        vars(self).update(vars(other))


def load_optimizer(optimizer, saved):
    """Take over momenta and the like; settings are the run's own, whatever the file says."""
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group |= settings
    for p, kept in optimizer.state.items():
        for name, value in kept.items():
            if not isinstance(value, torch.Tensor) or value.shape not in (p.shape, ()):
                raise ValueError(f"an optimiser's {name} that is no tensor of its weight's shape")


def stream_seed(seed, rollbacks):
    """The seed of a run's random streams after so many rollbacks."""
    return seed if rollbacks == 0 else f"{seed}.{rollbacks}"


def save(path, state, epoch, *, judged=None, keep_as=None):
    """Write ``state``, or the network ``judged`` in place of what resuming needs (best.pt).

    Every rank makes this call; the first one writes. ``keep_as``: the name that the file which
    stood there goes on under.
    """
    distributed.same_buffers(state.model)
    buffer = state.whole_buffer()
    if distributed.rank() == 0:
        write(path, state, buffer, epoch, judged, keep_as)
    distributed.barrier()


def write(path, state, buffer, epoch, judged, keep_as):
    content = {
        "format": FORMAT, **state.parts(judged), "config": dict(state.model.config),
        "buffer": buffer, "p0": state.p0_origin,
        "step": state.step, "epoch": epoch, "best": state.best, "args": state.args,
        # every random number is a function of these three
        "rng": {"seed": state.args["seed"], "stream": state.rollbacks, "step": state.step},
        "lr_factor": state.lr_factor, "guard": state.guard, "log_lines": state.log_lines,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()}}
    content["sha256"] = digest(content)
    with replacing(path, keep_as=keep_as) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch says what the disk said behind its own words
            told = error.__context__
            if not isinstance(told, OSError):
                told = OSError(errno.EIO, f"cannot be written [{one_line(error)}]")
            raise OSError(told.errno, told.strerror, str(path)) from error


def digest(content):
    """SHA-256 over all that ``content`` holds: names, types and values, tensors by their bytes.
    Files of the older format have one over their tensors alone."""
    sha, whole = hashlib.sha256(), content.get("format") != OLD_FORMAT
    for name, value in leaves({k: v for k, v in content.items() if k != "sha256"}):
        if isinstance(value, torch.Tensor):
            sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif whole:
            sha.update(f"{name} {type(value).__name__} {value!r}\n".encode())
    return sha.hexdigest()


def is_ours(content):
    """Whether ``save`` may have written it, in whatever version."""
    return isinstance(content, dict) and bool({"format", "sha256"} & content.keys())


def check(content, path):
    """``content`` if it is what ``save`` wrote; InputError, in one line, if not."""
    if not is_ours(content) or content.get("format") not in (FORMAT, OLD_FORMAT):
        raise InputError(f"{path} is not a checkpoint of this code")
    if missing := KEYS - content.keys():
        raise Damaged(f"{path} lacks {', '.join(sorted(missing))}")
    if wrong := [name for name, is_right in RIGHT.items() if not is_right(content[name])]:
        raise InputError(f"{path}: {', '.join(wrong)} of the wrong type or size")
    try:
        same = digest(content) == content["sha256"]
    except (TypeError, RuntimeError, ValueError) as error:
        raise InputError(f"{path} holds tensors of a kind that is never saved "
                         f"[{one_line(error)}]") from error
    if not same:
        raise Damaged(f"{path} is damaged: its content is not what was saved")
    return content


def is_dict(value):
    return isinstance(value, dict)


def is_count(value):
    return type(value) is int and 0 <= value <= MOST_STEPS


def is_number(value):
    return isinstance(value, float) and math.isfinite(value)


# What a checkpoint holds besides tensors, and a test for each.
RIGHT = {"model": is_dict, "config": is_dict, "args": is_dict, "p0": is_dict, "step": is_count,
         "log_lines": is_count, "lr_factor": is_number, "best": is_number,
         "epoch": lambda value: value is None or is_count(value),
         "rng": lambda rng: is_dict(rng) and is_count(rng.get("stream")),
         "guard": lambda guard: is_dict(guard) and all(map(is_number, guard.values()))}


def load(path):
    """The checked content of a checkpoint of ours."""
    return check(read(path), path)


@contextmanager
def locked(run_dir):
    """Hold RUN/.lock, so that no second process writes to the folder; InputError if one does.
    What a killed process left half written is cleared away."""
    with regular(Path(run_dir) / ".lock", "ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in LOCKED:
                    raise InputError(f"another process is using {run_dir}: wait for it, or choose "
                                     "another --run_dir") from error
                say(f"{run_dir} lies where files cannot be locked [{error.strerror}]: see to it "
                    "that no second process uses it")
        for folder in (Path(run_dir), Path(run_dir) / "samples"):
            for partial in folder.glob(".*.partial"):
                partial.unlink(missing_ok=True)
        yield


def step_of(path):
    """After which step a checkpoint of ours was saved."""
    return load(path)["step"]


def sha256_of(path):
    """The SHA-256 that ``open_any(path).sha256`` is."""
    with refusing(path), regular(path, most=MOST_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Ours, a released file of JEM, JEM++ or SADA-JEM, or bare weights, told apart by content: an
    ``Opened`` with its network on the CPU in eval mode."""
    content, sha256 = read_hashed(path)
    args = step = epoch = None
    if is_ours(content):
        content = check(content, path)
        config, weights, buffer = (content[name] for name in ("config", "model", "buffer"))
        args, step, epoch = (content[name] for name in ("args", "step", "epoch"))
    elif official.is_official(content):
        try:
            config, weights, buffer = official.translate(content)
        except ValueError as error:
            raise InputError(f"{path} is no released checkpoint: {one_line(error, 200)}") from error
    else:
        raise InputError(f"{path} is not a checkpoint that is read here. These are: {READABLE}")
    model = network(config, weights, path)
    if isinstance(buffer, torch.Tensor) and buffer.dtype == torch.uint8:  # a published model's
        buffer = to_pixels(buffer)
    if buffer is not None and not (isinstance(buffer, torch.Tensor) and buffer.dim() == 4
                                   and buffer.shape[1] == 3 and buffer.is_floating_point()):
        raise InputError(f"{path}: its replay buffer is no image tensor [n, 3, H, W]")
    return Opened(str(path), sha256, model, buffer, args, step, epoch)


def network(config, weights, path):
    """The JEM of ``config`` with the ``weights`` of the file ``path``, in eval mode."""
    try:
        check_config(config)
        with torch.device("meta"):  # what does not fit is told before memory is taken for it
            JEM.build(**config).load_state_dict(weights, assign=True)
        model = JEM.build(**config)
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its weights do not fit its network "
                         f"[{one_line(error)}]") from error
    if not all_finite(model.state_dict()):
        raise InputError(f"{path}: its weights are not all finite numbers")
    return model.eval()


def check_config(config):
    """ValueError for the words of a network beyond all use, and for what is no word of one."""
    most = {"depth": 1000, "width": 100}
    for name, value in config.items():
        good = (isinstance(value, bool | str) or type(value) is float and 0 < value <= 1
                or type(value) is int and 0 < value <= most.get(name, 100_000))
        if not good:
            raise ValueError(f"no network that is evaluated has {name} {str(value)[:80]}")


def all_finite(content):
    """Whether no tensor in nested dictionaries and lists holds a NaN or an infinity."""
    flags = {}
    for _, leaf in leaves(content):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            flags.setdefault(leaf.device, []).append(torch.isfinite(leaf).all())
    return all(bool(torch.stack(of_device).all()) for of_device in flags.values())


def own_share(rows):
    """The slots of the replay buffer that this rank owns."""
    return rows[distributed.rank()::distributed.world()]
