#!/usr/bin/env python3
"""Table 4: an iteration of JEM++ over M x N and of JEM (K = 20), timed turn by turn in one run.

    python scripts/benchmark_table4.py --results results/table4.jsonl --depth 10 --width 1

Accepts the flags of train_jempp.py. M, N and JEM's flags are set here. Each row's record is the
median of its turns. Rows of one run share ``protocol.run``, and ratios are taken within a run.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import start  # noqa: E402

if __name__ == "__main__":
    start.begin()  # before the imports, which take seconds

from models import network_name  # noqa: E402
from samplers import sampler_name  # noqa: E402
from scripts.benchmark import JEM_FLAGS, SWITCHES, TURN, milliseconds, our_iteration  # noqa: E402
from utils import cli, flags, machine, program  # noqa: E402
from utils.files import records  # noqa: E402
from utils.training.build import build  # noqa: E402

ROWS = {"JEM": JEM_FLAGS} | {f"JEM++ M={m} N={n}": ["--n_steps", str(m), "--in_steps", str(n)]
                             for m in (5, 10, 20) for n in (5, 10, 20)}


def main(argv=None):
    p = program.parser(__doc__.splitlines()[0])
    p.add_argument("--results", type=program.path, required=True, metavar="OUT.jsonl",
                   help="append records here")
    p.add_argument("--repeats", type=flags.POSITIVE, default=5, help="turns of every row")
    p.add_argument("--name", default=None, help="written to each record: what has been timed")
    own, rest = p.parse_known_args(argv)
    program.refuse_torchrun("times one process; benchmark_scaling.py times several")
    records.check_writable(own.results)  # now, not after all turns
    settings = {row: cli.train_args([*rest, *flags]) for row, flags in ROWS.items()}
    args, started = settings["JEM"], records.now()
    device = machine.pick_device(args.device, args.num_threads)
    machine.set_switches(args, device)
    jem = build(args, device)[:3]
    jempp = build(settings["JEM++ M=5 N=5"], device)[:3]  # one network for all M, N

    def turn(row):
        side = jem if row == "JEM" else jempp
        return milliseconds(lambda: our_iteration(settings[row], *side), device, TURN[device.type])

    for row in ROWS:  # warm up
        turn(row)
    times = {row: [] for row in ROWS}
    for _ in range(own.repeats):
        for row, values in times.items():
            values.append(turn(row))
    env = records.environment(device)
    for row, args in settings.items():
        value = statistics.median(times[row])
        records.append_jsonl(own.results, {
            "metric": "iteration_ms", "value": value, "unit": "ms", "n": own.repeats,
            "protocol": {"run": started, "reference": "JEM", "n_steps": args.n_steps,
                         "in_steps": args.in_steps, "times_ms": times[row],
                         "image_size": args.image_size}
            | {name: getattr(args, name) for name in SWITCHES},
            "checkpoint": None, "overrides": {}, "method": row, "dataset": args.dataset,
            "seed": args.seed,
            "training": records.training_of(
                vars(args), None, sampler_name(args), network_name(vars(args))),
            "env": env, "seconds": None, "time": records.now(),
            **({"run": own.name} if own.name else {})})
        ratio = statistics.median(times["JEM"]) / value
        print(f"{row:18s} {value:9.1f} ms   JEM / this {ratio:.2f}")
    return program.EXIT_OK


if __name__ == "__main__":
    program.run(main)
