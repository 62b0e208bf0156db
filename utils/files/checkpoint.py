"""Our own checkpoints: dictionaries of tensors and plain values, written atomically.

A resumable file (``last.pt``) holds everything that the next step depends on: weights, optimiser,
replay buffer in full precision, the origin of p_0, step and random seed. Files are read with
``weights_only=True``, so a stranger's checkpoint cannot run code.
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
from utils.files import published
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
MOST_STEPS = 10**9  # in a run (the paper's runs have 10^5)
LOCKED = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}  # flock's errors if another holds the lock
READABLE = ("checkpoints of train_jempp.py, the released files of JEM, JEM++ and SADA-JEM, and "
            "weights under their names or ours, .pt or .safetensors, with or without the prefixes "
            f"module. and _orig_mod., bare or as {', '.join(official.WRAPPERS)}")


@dataclass
class State:
    """Everything that training changes. All of it goes into a checkpoint."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    buffer: ReplayBuffer | None
    p0_origin: dict  # the data that p_0 was estimated from
    args: dict  # the run's arguments as plain values
    step: int = 0  # finished steps
    best: float = -1.0  # validation accuracy of best.pt
    rollbacks: int = 0  # each rollback changes the random numbers
    lr_factor: float = 1.0  # rollbacks multiply the learning rate by this
    guard: dict = field(default_factory=dict)  # the guard's memory
    log_lines: int = 0  # lines in train.jsonl at the time of saving
    saved_at: int = 0  # step of last.pt
    candidate_at: int = 0  # step of candidate.pt
    average: AveragedModel | None = None  # --ema: the running average of the weights

    def __post_init__(self):
        self.net = distributed.wrap(self.model)  # the module that training calls

    @property
    def seed(self):
        """The seed of the random streams: the run's seed and its number of rollbacks."""
        return stream_seed(self.args["seed"], self.rollbacks)

    def whole_buffer(self):
        """The replay buffer of all ranks [|B|, 3, H, W], or None. Every rank must call this."""
        if self.buffer is None:
            return None
        return distributed.interleave(self.buffer.images)

    def whole_ages(self):
        """The ages of all ranks' chains [|B|], or None. Every rank must call this."""
        return None if self.buffer is None else distributed.interleave(self.buffer.ages)

    def parts(self, judged=None):
        """The state dicts to save: all that resuming needs, or only the network ``judged``."""
        if judged is not None:
            return {"model": judged.state_dict()}
        parts = {"model": self.model, "optimizer": self.optimizer, "average": self.average}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def is_finite(self, judged=None):
        """Whether everything to be saved, on all ranks, is free of NaN and infinity."""
        buffer = None if self.buffer is None else self.buffer.images
        return all(distributed.gather(all_finite({**self.parts(judged), "buffer": buffer})))

    def load(self, content, path):
        """Restore the state from ``content``, read from the resumable file ``path``."""
        if content["p0"] != self.p0_origin:
            raise InputError(f"{path} was trained on other images than --data_root holds now")
        if "optimizer" not in content:
            raise InputError(f"{path} cannot be resumed: it holds no optimiser state (use last.pt)")
        try:
            self.model.load_state_dict(content["model"])
            load_optimizer(self.optimizer, content["optimizer"], content["step"])
            if self.average is not None:
                self.average.load_state_dict(content["average"])
            if self.buffer is not None:
                images = own_share(content["buffer"])
                if images.shape != self.buffer.images.shape:  # copy_ would broadcast one image
                    raise ValueError(f"a buffer of shape {tuple(content['buffer'].shape)}")
                self.buffer.images.copy_(images)
                self.buffer.ages.copy_(ages_of(content, path))
            self.step, self.best = content["step"], content["best"]
            self.rollbacks, self.lr_factor = content["rng"]["stream"], content["lr_factor"]
            self.guard, self.log_lines = dict(content["guard"]), content["log_lines"]
            self.saved_at = self.step
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} does not fit this run [{one_line(error)}]") from error

    def become(self, other):
        """Copy all fields from ``other``, a state of the same run."""
        vars(self).update(vars(other))


def ages_of(content, path):
    """The ages of this rank's chains in ``content``. An older file has none: they start at 0."""
    if content.get("ages") is None:
        say(f"{path} was saved before chains had ages: they are counted from here on")
        return torch.zeros(len(own_share(content["buffer"])), dtype=torch.int64)
    return own_share(content["ages"])


KEPT = {"SGD": {"momentum_buffer"}, "Adam": {"step", "exp_avg", "exp_avg_sq"}}  # for each weight


def load_optimizer(optimizer, saved, step):
    """Load the optimiser's tensors, such as momenta, of a run that has taken ``step`` steps.

    Its settings stay those of this run.
    """
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group |= settings
    weights = {p for group in optimizer.param_groups for p in group["params"]}
    if step and (weights != set(optimizer.state) or any(
            kept.keys() != KEPT[type(optimizer).__name__] for kept in optimizer.state.values())):
        raise ValueError("an optimiser's state that is not whole")
    for p, kept in optimizer.state.items():
        for name, value in kept.items():
            if not isinstance(value, torch.Tensor) or value.shape not in (p.shape, ()):
                raise ValueError(f"an optimiser's {name} that is no tensor of its weight's shape")


def stream_seed(seed, rollbacks):
    """The seed of a run's random streams after ``rollbacks`` rollbacks."""
    return seed if rollbacks == 0 else f"{seed}.{rollbacks}"


def save(path, state, epoch, *, judged=None, keep_as=None):
    """Write all of ``state``, or with ``judged`` only that network (best.pt).

    Every rank must call this. Rank 0 writes. ``keep_as`` renames an existing file instead of
    replacing it.
    """
    distributed.same_buffers(state.model)
    chains = {"buffer": state.whole_buffer(), "ages": state.whole_ages()}
    if distributed.rank() == 0:
        write(path, state, chains, epoch, judged, keep_as)
    distributed.barrier()


def write(path, state, chains, epoch, judged, keep_as):
    content = {
        "format": FORMAT, **state.parts(judged), "config": dict(state.model.config),
        **chains, "p0": state.p0_origin,
        "step": state.step, "epoch": epoch, "best": state.best, "args": state.args,
        # these three determine every random number
        "rng": {"seed": state.args["seed"], "stream": state.rollbacks, "step": state.step},
        "lr_factor": state.lr_factor, "guard": state.guard, "log_lines": state.log_lines,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()}}
    content["sha256"] = digest(content)
    with replacing(path, keep_as=keep_as) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides the disk's error in the context of its own
            told = error.__context__
            if not isinstance(told, OSError):
                told = OSError(errno.EIO, f"cannot be written [{one_line(error)}]")
            raise OSError(told.errno, told.strerror, str(path)) from error


def digest(content):
    """SHA-256 over all names, types and values in ``content``, and the bytes of its tensors.

    Files of the older format hash only their tensors.
    """
    sha, whole = hashlib.sha256(), content.get("format") != OLD_FORMAT
    for name, value in leaves({k: v for k, v in content.items() if k != "sha256"}):
        if isinstance(value, torch.Tensor):
            sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif whole:
            sha.update(f"{name} {type(value).__name__} {value!r}\n".encode())
    return sha.hexdigest()


def is_ours(content):
    """Whether some version of ``save`` may have written ``content``."""
    return isinstance(content, dict) and bool({"format", "sha256"} & content.keys())


def check(content, path):
    """Return ``content`` if ``save`` wrote it. Otherwise raise a one-line InputError."""
    if not is_ours(content) or content.get("format") not in (FORMAT, OLD_FORMAT):
        raise InputError(f"{path} is not a checkpoint of this code")
    if missing := KEYS - content.keys():
        raise Damaged(f"{path} lacks {', '.join(sorted(missing))}")
    wrong = [name for name, is_right in RIGHT.items() if not is_right(content[name])]
    if wrong := wrong + ["ages"] * (not ages_fit(content)):
        raise InputError(f"{path}: {', '.join(wrong)} of the wrong type or size")
    try:
        same = digest(content) == content["sha256"]
    except (TypeError, RuntimeError, ValueError) as error:
        raise InputError(f"{path} holds tensors of a kind that is never saved "
                         f"[{one_line(error)}]") from error
    if not same:
        raise Damaged(f"{path} is damaged: its content is not what was saved")
    return content


def ages_fit(content):
    """Whether the ages are one int64 for each image of the buffer. Older files have none."""
    ages, buffer = content.get("ages"), content["buffer"]
    tensors = isinstance(ages, torch.Tensor) and isinstance(buffer, torch.Tensor)
    return ages is None or (tensors and ages.dtype == torch.int64
                            and ages.shape == buffer.shape[:1])


def is_dict(value):
    return isinstance(value, dict)


def is_count(value):
    return type(value) is int and 0 <= value <= MOST_STEPS


def is_number(value):
    return isinstance(value, float) and math.isfinite(value)


# A test for each entry of a checkpoint.
RIGHT = {"model": is_dict, "config": is_dict, "args": is_dict, "p0": is_dict, "step": is_count,
         "log_lines": is_count, "lr_factor": is_number, "best": is_number,
         "epoch": lambda value: value is None or is_count(value),
         "rng": lambda rng: is_dict(rng) and is_count(rng.get("stream")),
         "guard": lambda guard: is_dict(guard) and all(map(is_number, guard.values()))}


def load(path):
    """Read and check one of our own checkpoints."""
    return check(read(path), path)


@contextmanager
def locked(run_dir):
    """Hold RUN/.lock, so that no second process writes to the folder. Delete partial files.

    InputError if another process holds the lock.
    """
    with regular(Path(run_dir) / ".lock", "ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in LOCKED:
                    raise InputError(f"another process is using {run_dir}: wait for it, or choose "
                                     "another --run_dir") from error
                say(f"files cannot be locked in {run_dir} [{error.strerror}]: make sure that no "
                    "second process uses it")
        for folder in (Path(run_dir), Path(run_dir) / "samples"):
            for partial in folder.glob(".*.partial"):
                partial.unlink(missing_ok=True)
        yield


def step_of(path):
    """The step after which one of our own checkpoints was saved."""
    return load(path)["step"]


def sha256_of(path):
    """The file's SHA-256, equal to ``open_any(path).sha256``."""
    folder = published.folder_of(path)
    path = folder / published.TENSORS if folder else path
    with refusing(path), regular(path, most=MOST_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Opened(NamedTuple):
    """A checkpoint opened for evaluation. Fields that its file lacks are None."""

    path: str
    sha256: str
    model: JEM
    buffer: torch.Tensor | None
    args: dict | None
    step: int | None
    epoch: int | None
    ages: torch.Tensor | None  # of the buffer's chains
    p0: dict | None  # the data that p_0 was estimated from


def open_any(path):
    """Open our own checkpoint, a published folder, a released file of JEM, JEM++ or SADA-JEM, or
    bare weights.

    The content decides which of these it is. The network of the ``Opened`` is on the CPU in eval
    mode.
    """
    folder = published.folder_of(path)
    content, sha256 = published.read(folder) if folder else read_hashed(path)
    args = step = epoch = ages = p0 = None
    if is_ours(content):
        content = check(content, path)
        config, weights, buffer = (content[name] for name in ("config", "model", "buffer"))
        args, step, epoch = (content[name] for name in ("args", "step", "epoch"))
        ages, p0 = content.get("ages"), content["p0"]
    elif official.is_official(content):
        try:
            config, weights, buffer = official.translate(content)
        except ValueError as error:
            raise InputError(f"{path} is no released checkpoint: {one_line(error, 200)}") from error
        if official.under_our_names(content):
            say(f"{path} holds weights alone, which do not tell strides: the network is taken to "
                "have the default ones. If it was trained with --stride_first or --stem_stride, "
                "load its checkpoint or published folder")
    else:
        raise InputError(f"{path} is not a checkpoint that is read here. These are: {READABLE}")
    model = network(config, weights, path)
    if isinstance(buffer, torch.Tensor) and buffer.dtype == torch.uint8:  # a published model's
        buffer = to_pixels(buffer)
    if buffer is not None and not (isinstance(buffer, torch.Tensor) and buffer.dim() == 4
                                   and buffer.shape[1] == 3 and buffer.is_floating_point()):
        raise InputError(f"{path}: its replay buffer is no image tensor [n, 3, H, W]")
    return Opened(str(path), sha256, model, buffer, args, step, epoch, ages, p0)


def network(config, weights, path):
    """Build the JEM of ``config`` and load ``weights``, read from ``path``. Eval mode."""
    try:
        check_config(config)
        with torch.device("meta"):  # find a mismatch before allocating memory
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
    """ValueError if a value in ``config`` has the wrong type or is absurdly large."""
    most = {"depth": 1000, "width": 100}
    for name, value in config.items():
        good = (isinstance(value, bool | str) or type(value) is float and 0 < value <= 1
                or type(value) is int and 0 < value <= most.get(name, 100_000))
        if not good:
            raise ValueError(f"no network that is evaluated has {name} {str(value)[:80]}")


def all_finite(content):
    """Whether all tensors in nested dictionaries and lists are free of NaN and infinity."""
    flags = {}
    for _, leaf in leaves(content):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            flags.setdefault(leaf.device, []).append(torch.isfinite(leaf).all())
    return all(bool(torch.stack(of_device).all()) for of_device in flags.values())


def own_share(rows):
    """This rank's slots of the replay buffer."""
    return rows[distributed.rank()::distributed.world()]
