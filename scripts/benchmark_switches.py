#!/usr/bin/env python3
"""Time an iteration with all optimisations, and then with all but one, in turn.

    python scripts/benchmark_switches.py --results results/switches.jsonl --depth 10 --width 1

Other flags go to train_jempp.py. The defaults are --fast and M = 10. Each row's record is the
median of its turns. Rows of one run share ``protocol.run``. ``ratio`` compares to the first row.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import start  # noqa: E402

if __name__ == "__main__":
    start.begin()  # before the imports, which take seconds

import torch  # noqa: E402

from models import network_name  # noqa: E402
from samplers import sampler_name  # noqa: E402
from scripts.benchmark import SWITCHES, TURN, milliseconds, our_iteration  # noqa: E402
from utils import cli, flags, machine, program  # noqa: E402
from utils.files import records  # noqa: E402
from utils.training.build import build  # noqa: E402

ALL = "all"
ROWS = {  # name: additional flags
    ALL: [],
    "with the other compilation": [],  # off in place of --compile default, or the reverse
    "without --channels_last": ["--no-channels_last"],
    "in float32 without --compile and the collapsed inner loop":
        ["--amp", "off", "--compile", "off", "--literal_pyld"],
    "without activations in place": [],
    "without keeping freed memory": [],
    "with the other precision": [],  # bf16 in place of float32, or the reverse
}


def prepare(row, words, device):
    """(args, state, data, p0) of a row."""
    args = cli.train_args([*words, *ROWS[row]])
    if "compilation" in row:
        args.compile = "default" if args.compile == "off" else "off"
    if "precision" in row:
        args.amp = {"off": "bf16", "bf16": "off"}[args.amp]
    state, data, p0 = build(args, device)[:3]
    if "in place" in row:
        for module in state.model.modules():
            if isinstance(module, torch.nn.LeakyReLU):
                module.inplace = False
    return args, state, data, p0


def main(argv=None):
    p = program.parser(__doc__.splitlines()[0])
    p.add_argument("--results", type=program.path, required=True, metavar="OUT.jsonl",
                   help="append records here")
    p.add_argument("--repeats", type=flags.POSITIVE, default=5, help="turns of every row")
    own, rest = p.parse_known_args(argv)
    program.refuse_torchrun("times one process; benchmark_scaling.py times several")
    records.check_writable(own.results)  # now, not after all turns
    words, started = ["--fast", *rest], records.now()
    args = cli.train_args(words)
    device = machine.pick_device(args.device, args.num_threads)
    machine.set_switches(args, device)
    sides = {row: prepare(row, words, device) for row in ROWS}
    times = {row: [] for row in ROWS}
    for turn in range(-1, own.repeats):  # turn -1 compiles and is not timed
        for row, side in sides.items():
            machine.keep_freed_memory("freed memory" not in row)
            ms = milliseconds(lambda side=side: our_iteration(*side), device, TURN[device.type])
            if turn >= 0:
                times[row].append(ms)
    machine.keep_freed_memory()
    first, env = statistics.median(times[ALL]), records.environment(device)
    for row, (args, *_) in sides.items():
        value = statistics.median(times[row])
        records.append_jsonl(own.results, {
            "metric": "iteration_ms", "value": value, "unit": "ms", "n": own.repeats,
            "protocol": {"run": started, "ratio": value / first, "times_ms": times[row],
                         "threads": torch.get_num_threads(), "image_size": args.image_size}
            | {name: getattr(args, name) for name in SWITCHES},
            "method": row, "dataset": args.dataset, "seed": args.seed,
            "training": records.training_of(
                vars(args), None, sampler_name(args), network_name(vars(args))),
            "env": env, "time": records.now()})
        print(f"{row:46s} {value:9.1f} ms   x {value / first:.2f}")
    return program.EXIT_OK


if __name__ == "__main__":
    program.run(main)
