#!/usr/bin/env python3
"""Images per second of training by 1, 2, ... processes at one global batch, turn by turn.

    python scripts/benchmark_scaling.py --processes 1 2 --results results/scaling.jsonl --depth 10

Other flags go to train_jempp.py. Each process has one CPU thread (or one GPU). Rows with fewer
processes accumulate gradients over the parts of the global batch, so all rows compute the same. On
CPUs one more row is a single process with as many threads as the largest row has processes.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import start  # noqa: E402

if __name__ == "__main__":
    start.begin()  # before the imports, which take seconds

from models import network_name  # noqa: E402
from samplers import sampler_name  # noqa: E402
from utils import cli, flags, machine, program  # noqa: E402
from utils.files import records  # noqa: E402

STEPS = 8  # timed steps of a turn, after as many untimed ones


def images_per_s(processes, threads, parts, words):
    """One turn: train for 2 * STEPS steps in a temporary folder. The speed of the second half."""
    with tempfile.TemporaryDirectory() as run_dir:
        launcher = ["-m", "torch.distributed.run", "--standalone",
                    f"--nproc_per_node={processes}"] if processes > 1 else []
        done = subprocess.run(
            [sys.executable, *launcher, str(ROOT / "train_jempp.py"), *words, "--accumulate",
             str(parts // processes), "--num_threads", str(threads), "--max_steps", str(2 * STEPS),
             "--print_every", str(STEPS), "--run_dir", run_dir],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "rror:" in line]
            raise program.InputError(f"a turn with {processes} processes failed: "
                                 f"{said[0] if said else f'exit code {done.returncode}'}")
        steps = [r for r in records.read_jsonl(Path(run_dir) / "train.jsonl")
                 if r["kind"] == "step"]
        return steps[-1]["images_per_s"]


def main(argv=None):
    p = program.parser(__doc__.splitlines()[0])
    p.add_argument("--processes", nargs="+", type=flags.POSITIVE, default=[1, 2], metavar="n",
                   help="rows; each divides the largest")
    p.add_argument("--repeats", type=flags.POSITIVE, default=3, help="turns of every row")
    p.add_argument("--results", type=program.path, required=True, metavar="OUT.jsonl",
                   help="append records here")
    own, words = p.parse_known_args(argv)
    args, parts, started = cli.train_args(words), max(own.processes), records.now()
    device = machine.pick_device(args.device, 0)
    program.refuse_torchrun("starts torchrun itself")
    if args.dry_run:
        cli.print_json(vars(args))
        return program.EXIT_OK
    if any(parts % n for n in own.processes):
        raise program.InputError(f"each of --processes {own.processes} has to divide {parts}")
    records.check_writable(own.results)  # now, not after all turns
    rows = {f"{n} x 1": (n, 1) for n in own.processes}
    if device.type == "cpu" and parts > 1:
        rows[f"1 x {parts}"] = (1, parts)
    speeds = {row: [] for row in rows}
    for _ in range(own.repeats):
        for row, (processes, threads) in rows.items():
            speeds[row].append(images_per_s(processes, threads, parts, words))
    first, env = statistics.median(speeds[next(iter(rows))]), records.environment(device)
    for row, (processes, threads) in rows.items():
        value = statistics.median(speeds[row])
        records.append_jsonl(own.results, {
            "metric": "images_per_s", "value": value, "unit": "images/s", "n": own.repeats,
            "protocol": {"run": started, "processes": processes, "threads": threads,
                         "parts": parts, "ratio": value / first, "turns": speeds[row],
                         "command": f"benchmark_scaling.py {' '.join(words)}"},
            "method": row, "dataset": args.dataset, "seed": args.seed,
            "training": records.training_of(
                vars(args), None, sampler_name(args), network_name(vars(args))),
            "env": env, "time": records.now()})
        print(f"{row:8s} processes x threads {value:9.1f} images/s   ratio {value / first:.2f}")
    return program.EXIT_OK


if __name__ == "__main__":
    program.run(main)
