#!/usr/bin/env python3
"""Train the runs that table and figure scripts would train, several at a time.

    PLAN=1 bash scripts/table2.sh | python scripts/train_all.py --jobs 2

Reads the plan from standard input. Before each run a line tells its cost in operations, and about
how long it takes at the rate of the runs in the same folder so far, or else of the rows of this
scale in --records. A run's own output goes to RUN.log. The same command again goes on. Exit codes:
0 all ended, 2 some could not be trained, 75 stopped early.
"""

import functools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import start  # noqa: E402

if __name__ == "__main__":
    start.begin()  # before the imports, which take seconds

import torch  # noqa: E402

from scripts.operations import network_of, pflop_of, run_pflop  # noqa: E402
from scripts.tables import sources  # noqa: E402
from utils import cli, flags, program  # noqa: E402
from utils.data import load_splits, spec_of  # noqa: E402
from utils.files import records  # noqa: E402

MARK = "train_jempp.py\t"  # begins a line of the plan
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Stop:
    """Whether the work has to end: a signal came, or the time is over."""

    def __init__(self, minutes):
        self.end = time.monotonic() + 60 * minutes
        self.signal = False
        for number in STOPPING:
            signal.signal(number, self.received)

    def received(self, number, frame):
        self.signal = True

    def minutes(self):
        return max(0.0, (self.end - time.monotonic()) / 60)


def planned(lines):
    """{run folder: words of train_jempp.py} in the plan's order, each folder once."""
    runs = {}
    for line in lines:
        if line.startswith(MARK):
            words = line.rstrip("\n").split("\t")[1:]
            if "--run_dir" not in words[:-1]:
                raise program.InputError(f"a line of the plan has no --run_dir: {' '.join(words)}")
            runs.setdefault(words[words.index("--run_dir") + 1], words)
    return runs


def config_of(args):
    """The network of training arguments."""
    return {"n_classes": spec_of(args.dataset).n_classes, **network_of(vars(args))}


@functools.cache
def n_train(dataset, data_root, n_valid, n_train, size):
    """The number of training images."""
    return len(load_splits(dataset, data_root, n_valid=n_valid, n_train=n_train, download=False,
                           size=size)[0].y)


def cost(words, taken):
    """10^15 operations of what is left of a run after ``taken`` steps."""
    args = cli.train_args(words)
    n = n_train(args.dataset, args.data_root, args.n_valid, args.n_train, args.image_size)
    steps = args.n_epochs * (n // args.labelled_batch)
    done, whole = (run_pflop(vars(args), config_of(args), n, k) for k in (min(taken, steps), steps))
    return whole - done


def so_far(run):
    """(10^15 operations, seconds) of the steps of a run folder, and how many there are."""
    log = records.read_log(run)
    taken = max((r["step"] for r in log if r["kind"] == "step"), default=0)
    if not taken:
        return 0.0, 0.0, 0
    header, seconds = records.header_of(log), records.seconds_of(log)
    args = SimpleNamespace(**vars(cli.train_args([])) | header["args"])  # an older run knows fewer
    return run_pflop(vars(args), config_of(args), header["n_train"], taken), seconds, taken


def timed_rows(files):
    """The records of all runs' last steps in files of records, where they tell the seconds."""
    return [r for file in files for r in sources.read_lines(Path(file), sources.complain_of_record)
            if r["metric"] == "steps" and r.get("seconds") and "run" in r]


def about(run, words, rows=()):
    """The line before a run: its cost, and its time at the rate of all runs beside it.

    If there are none, at the rate of those ``rows`` (records) that are of the same scale.
    """
    try:
        left = cost(words, so_far(run)[2])
        done = [so_far(path.parent) for path in Path(run).parent.glob("*/train.jsonl")]
    except program.InputError:  # training will tell
        return run
    rates, where = [(pflop, seconds) for pflop, seconds, _ in done if seconds], ""
    if not rates:
        rows = [r for r in rows if r["run"].startswith(f"{Path(run).parent.name}/")]
        rates = [(pflop_of(r["training"]), r["seconds"]) for r in rows]
        where = "".join(f" on the {r['env']['device']} of the records ({r['env']['cpu']})"
                        for r in rows[-1:])
    line = f"{run}: {left:.2g}·10¹⁵ operations"
    if not rates:
        return f"{line} (how long they take here is known after the first run)"
    minutes = left * sum(s for _, s in rates) / sum(pflop for pflop, _ in rates) / 60
    return f"{line}, about {minutes:,.0f} minutes{where}"


def begin(run, words, stop, threads, slot=0):
    """Start a run. Returns its process, whose output goes to RUN.log.

    Of several GPUs, runs at a time (``slot`` 0, 1, ...) take one each.
    """
    own = {"OMP_NUM_THREADS": str(threads)}
    if (n_gpus := torch.cuda.device_count()) > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        own["CUDA_VISIBLE_DEVICES"] = str(slot % n_gpus)
    if not math.isinf(stop.end):
        words = [*words, "--max_minutes", f"{max(0.01, stop.minutes()):.2f}"]
    Path(run).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run}.log", "a") as log:
        return subprocess.Popen([sys.executable, str(ROOT / "train_jempp.py"), *words], stdout=log,
                                stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT,
                                env=os.environ | own)


def train_all(runs, jobs, stop, rows=()):
    """Train all ``runs``, ``jobs`` at a time. Returns the exit codes by run.

    Records of other ``rows`` tell about how long a run takes.
    """
    waiting, running, codes, slots = list(runs), {}, {}, {}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    told = False
    while running or (waiting and not stop.signal and stop.minutes() > 0):
        while waiting and len(running) < jobs and not stop.signal and stop.minutes() > 0:
            run = waiting.pop(0)
            program.say(about(run, runs[run], rows))
            slots[run] = min(set(range(jobs)) - {slots[other] for other in running})
            running[run] = begin(run, runs[run], stop, threads, slots[run])
        if stop.signal and not told:
            told = True
            for process in running.values():
                process.terminate()  # it saves its state
        for run, process in list(running.items()):
            if process.poll() is not None:
                codes[run] = running.pop(run).returncode
                how = ENDED.get(codes[run]) or f"failed: {last_line(f'{run}.log')}"
                program.say(f"{run}: {how} (code {codes[run]}, {run}.log)")
        time.sleep(0.2)
    return codes | dict.fromkeys(waiting, program.EXIT_STOPPED)


def last_line(log):
    """The last line of a run's output, which says why it failed."""
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


ENDED = {program.EXIT_OK: "finished", program.EXIT_DIVERGED: "diverged",
         program.EXIT_STOPPED: "stopped early"}


def main(argv=None):
    p = program.parser(__doc__.splitlines()[0])
    p.add_argument("--jobs", type=flags.POSITIVE, default=1,
                   help="runs at a time, each with its share of the CPU's cores")
    p.add_argument("--max_minutes", type=flags.STEP, default=math.inf,
                   help="save and stop after this many minutes (exit code 75)")
    p.add_argument("--records", type=program.path, nargs="*", default=[], metavar="FILE",
                   help="tables' records, which tell how long a row takes")
    args = p.parse_args(argv)
    runs = planned(sys.stdin)
    codes = train_all(runs, args.jobs, Stop(args.max_minutes),
                      timed_rows(args.records)).values()
    if program.EXIT_STOPPED in codes or -signal.SIGTERM in codes:
        return program.EXIT_STOPPED
    return program.EXIT_INPUT if set(codes) - {program.EXIT_OK, program.EXIT_DIVERGED} else 0


if __name__ == "__main__":
    program.run(main)
