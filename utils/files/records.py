"""JSON-lines records, and atomic writing: to a temporary file that is then renamed."""

import errno
import json
import math
import os
import platform
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: no lock there
    fcntl = None

from utils.files.regular import read_bytes, regular
from utils.program import InputError

# Training arguments that a record omits: machine settings, the run's length, how often it logs or
# saves, the class names in pictures, and the path of a file whose hash is recorded.
ASIDE = {"run_dir", "data_root", "download", "device", "num_threads", "deterministic",
         "channels_last", "compile", "fast", "cudnn_benchmark", "dist_timeout", "dry_run",
         "max_steps", "max_minutes", "ckpt_steps", "print_every", "keep_every", "class_names",
         "load_path"}
# The guard's settings. They are recorded, but runs that differ only in these count as one method.
GUARD = {"on_divergence", "max_rollbacks", "rollback_lr_factor", "max_loss", "max_gap",
         "max_saturated", "min_accuracy_ratio", "good_after", "check_every"}
# The protocol entries shown to people. A record holds all entries.
SHOWN = {"split", "score", "out", "attack", "norm", "eps", "eps_255", "source", "selection", "bins",
         "steps", "restarts", "chain_steps", "reference"}
SHOWN_IF = {"sigma", "recalibrate_bn", "company"}

# What the lines of a train.jsonl hold that others read.
STARTED = {"args": dict, "env": dict}
IN_A_LOG = {"header": STARTED, "resume": STARTED, "rollback": {"step": int, "to_step": int},
            "step": {"step": int, "images_per_s": (int, float, type(None))},
            "end": {"step": int, "reason": str, "detail": str, "time": str}}
NOT_FINITE = ("inf", "-inf", "nan")  # how ``jsonable`` writes them
IN_ARGS = {"dataset": str, "seed": int, "batch_size": int}


@contextmanager
def replacing(path, mode="wb", keep_as=None):
    """Open a temporary file. It becomes ``path`` when the block succeeds and is deleted otherwise.

    ``keep_as`` renames an existing file at ``path`` instead of replacing it.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            sync(file.fileno())
        if keep_as and path.exists():
            path.replace(path.with_name(keep_as))
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder):
    """Make renames in ``folder`` survive a power cut, where the system supports it."""
    if os.name == "posix":
        try:
            handle = os.open(folder, os.O_RDONLY)
        except PermissionError:  # the folder can be written but not listed
            return
        try:
            sync(handle)
        finally:
            os.close(handle)


def sync(handle):
    """Call fsync. Ignore that a file system does not support it (CIFS and FUSE for folders).

    OSError if the disk is full or broken.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise


def write_json(path, value):
    with replacing(path, "w") as file:
        json.dump(jsonable(value), file, indent=2, sort_keys=True)
        file.write("\n")


def read_json(path):
    """Read a JSON file. ValueError if it is not JSON."""
    try:
        return json.loads(read_bytes(path))
    except RecursionError:
        raise ValueError("nested beyond measure") from None


def read_jsonl(path):
    """The records of a JSON-lines file, [] if there is none.

    Blank lines are skipped, and so is a last line that a crash cut short. InputError for any other
    line that is not JSON.
    """
    try:
        lines = read_bytes(path).splitlines()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            torn = number == len(lines) - 1 and line.startswith(b"{")
            if not torn:
                raise InputError(f"{path}: line {number + 1} is not JSON") from error
    return records


def write_jsonl(path, records):
    with replacing(path, "w") as file:
        file.writelines(json.dumps(jsonable(record)) + "\n" for record in records)


def append_jsonl(path, *records):
    """Append records, all or none. A lock lets one process append at a time.

    A last line that a crash cut short is removed first. A whole last line without a newline stays.
    InputError if the file is not a JSON-lines file, OSError if there is no room.
    """
    data = "".join(json.dumps(jsonable(record)) + "\n" for record in records)
    with regular(path, "a+b") as file:
        wait_for_lock(file)
        file.seek(0)
        start = max(0, file.seek(0, os.SEEK_END) - 1)
        file.seek(start)
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            text = file.read()
            last = text.rfind(b"\n") + 1
            try:
                json.loads(text[last:])
                data = "\n" + data
            except (ValueError, RecursionError) as error:
                if not text[last:].startswith(b"{"):
                    raise InputError(f"{path} is not a JSON-lines file") from error
                file.truncate(last)
        write_whole(file.fileno(), data.encode())


def write_whole(handle, data):
    """Write ``data`` at the end of an open file, or nothing of it if that fails."""
    end = os.fstat(handle).st_size
    try:
        while data:
            data = data[os.write(handle, data):]
    except OSError:
        os.ftruncate(handle, end)
        raise


def check_writable(path):
    """Create the file ``path`` and its folder if missing. InputError if that is impossible."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with regular(path, "ab"):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): name another place with "
                         "--results") from error


def wait_for_lock(file):
    """Lock ``file`` for this process until it is closed, if the file system supports locks."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)


def jsonable(value):
    """``value`` in JSON's own types. Non-finite floats become "inf", "-inf" or "nan"."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def training_of(args, step, sampler=None, network=None):
    """A record's description of the training run.

    It holds the resolved arguments ``args`` (a dict) without those in ASIDE, the names of
    ``sampler`` and ``network`` if known, and the step.
    """
    kept = {name: value for name, value in jsonable(args).items() if name not in ASIDE}
    names = {"sampler": sampler, "network": network}
    return kept | {k: v for k, v in names.items() if v is not None} | {"step": step}


def header_of(log):
    """The latest header among the lines of a train.jsonl: --n_epochs may have grown since."""
    return [r for r in log if r["kind"] in ("header", "resume")][-1]


def read_log(run_dir):
    """The lines of RUN/train.jsonl, [] if there is none. InputError if it is no such log."""
    path = Path(run_dir) / "train.jsonl"
    log = read_jsonl(path)
    for number, line in enumerate(log, 1):
        wrong = unlike(line, {"kind": str})
        wrong = wrong or unlike(line, {"step": int} | IN_A_LOG.get(line["kind"], {}))
        if not wrong and line["kind"] in ("step", "eval"):
            wrong = next((key for key, value in line.items() if key != "kind" and not
                          isinstance(value, int | float | None) and value not in NOT_FINITE), None)
        if not wrong and "args" in line:
            wrong = unlike(line["args"], IN_ARGS)
        if not wrong and number == 1 and line["kind"] != "header":
            wrong = "a header"
        if wrong:
            raise InputError(f"{path}:{number} is no line of a training log: {wrong} is missing or "
                             "wrong")
    return log


def unlike(line, kinds):
    """The first of the ``kinds`` {key: type} that is not so in ``line``, or None."""
    for key, kind in kinds.items():
        if not isinstance(line, dict) or not isinstance(line.get(key), kind):
            return key
    return None


def seconds_of(log):
    """The seconds that the steps of a train.jsonl took, those that were undone included.

    Steps after the last record, before a rollback or the end, count at that record's speed.
    """
    args, seconds, last, each = header_of(log)["args"], 0.0, 0, 0.0
    n_images = args.get("labelled_batch") or args["batch_size"]
    for r in log:
        if r["kind"] in ("step", "rollback", "end"):
            if r.get("images_per_s"):
                each = n_images / r["images_per_s"]
            seconds += max(0, r["step"] - last) * each
            last = r.get("to_step", r["step"])
    return seconds


def shown(protocol):
    """The protocol entries to show, as in "split=test". Those in SHOWN_IF are not shown if 0."""
    return " ".join(f"{name}={value}" for name, value in sorted(protocol.items())
                    if name in SHOWN or (name in SHOWN_IF and value))


def git_state():
    """(commit, dirty) of this code, or (None, None) outside a git checkout.

    Changes under results/ do not count: a script's first record would make all later ones dirty.
    """
    here = Path(__file__).resolve().parent.parent

    def git(*words):
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True,
                              check=True, timeout=20).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":(top)", ":(top,exclude)results")
        return git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None, None


def cpu_name():
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def environment(device):
    """The environment of a measurement: versions, device, processor, commit."""
    import torch  # here, because code that only reads and writes records does not need it

    commit, dirty = git_state()
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"torch": str(torch.__version__), "python": platform.python_version(), "device": name,
            "cpu": cpu_name(), "commit": commit, "dirty": dirty}


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
