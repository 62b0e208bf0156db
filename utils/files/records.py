"""JSON lines and files that are whole or not there: written beside their place and renamed."""

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

# Training arguments that a record leaves aside: those of the machine, of how far a run goes, of how
# often it tells or saves something, the words in its pictures, and the place of a file whose hash
# is recorded.
ASIDE = {"run_dir", "data_root", "download", "device", "num_threads", "deterministic",
         "channels_last", "compile", "fast", "cudnn_benchmark", "dist_timeout", "dry_run",
         "max_steps", "max_minutes", "ckpt_steps", "print_every", "keep_every", "class_names",
         "load_path"}
# What counts as divergence and what follows it: recorded, but runs that differ in these alone are
# runs of one method.
GUARD = {"on_divergence", "max_rollbacks", "rollback_lr_factor", "max_loss", "max_gap",
         "max_saturated", "min_accuracy_ratio", "good_after", "check_every"}
# The words of a protocol that are shown to people; a record holds all of them.
SHOWN = {"split", "score", "out", "attack", "norm", "eps", "eps_255", "source", "selection", "bins",
         "steps", "restarts", "chain_steps", "reference"}


@contextmanager
def replacing(path, mode="wb", keep_as=None):
    """Open a temporary file that becomes ``path`` when the block ends well, and vanishes if not.

    ``keep_as`` is the name that the file which stood there goes on under.
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
    """Make renames in ``folder`` last through a power cut, where the system lets one."""
    if os.name == "posix":
        try:
            handle = os.open(folder, os.O_RDONLY)
        except PermissionError:  # one may write to it, not list it
            return
        try:
            sync(handle)
        finally:
            os.close(handle)


def sync(handle):
    """fsync, which file systems may refuse (CIFS and FUSE for folders); that the disk is full or
    broken is no refusal."""
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
    """What a JSON file holds. ValueError where that is no JSON."""
    try:
        return json.loads(read_bytes(path))
    except RecursionError:
        raise ValueError("nested beyond measure") from None


def read_jsonl(path):
    """The records of a JSON-lines file, without blank lines and a last line torn by a crash; []
    for no file."""
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


def append_jsonl(path, record):
    """Append one record; a torn last line, left by a crash, is first cut off. A whole one without
    its newline stays, and a file of another kind is refused (InputError). Of several processes,
    one appends at a time."""
    data = json.dumps(jsonable(record)) + "\n"
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
        file.write(data.encode())


def check_writable(path):
    """Make the file ``path`` and its folder where they are missing; InputError where one cannot."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with regular(path, "ab"):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): name another place with "
                         "--results") from error


def wait_for_lock(file):
    """Have ``file`` for this process alone until it is closed, where the file system can lock."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)


def jsonable(value):
    """``value`` in JSON's own types; non-finite floats become "inf", "-inf" or "nan"."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def training_of(args, step, sampler=None, network=None):
    """What a record says of the run that its number comes from: the resolved arguments (a dict) but
    those left ASIDE, the names of ``sampler`` and ``network`` where known, and the step."""
    kept = {name: value for name, value in jsonable(args).items() if name not in ASIDE}
    names = {"sampler": sampler, "network": network}
    return kept | {k: v for k, v in names.items() if v is not None} | {"step": step}


def shown(protocol):
    """The words of a record's protocol to show: "split=test", noise only where there is some."""
    return " ".join(f"{name}={value}" for name, value in sorted(protocol.items())
                    if name in SHOWN or (name == "sigma" and value))


def git_state():
    """(commit, dirty) of this code, or (None, None) outside a git checkout."""
    here = Path(__file__).resolve().parent.parent

    def git(*words):
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True,
                              check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
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
    """What a number was measured with: versions, device, processor, commit."""
    import torch  # here: what only reads and writes records does not wait for it

    commit, dirty = git_state()
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"torch": str(torch.__version__), "python": platform.python_version(), "device": name,
            "cpu": cpu_name(), "commit": commit, "dirty": dirty}


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
