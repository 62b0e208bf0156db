#!/usr/bin/env python3
"""Append facts about a run to a results file: its last step, how it ended, its last energy gap.

The gap is E(x+) - E(x-). All facts are read from the run folder. The seconds are those of the
training steps, without evaluating and saving, and with the steps that a rollback undid.

    python scripts/record_run.py runs/cpu/jempp-m10-seed1 --method JEM++ --results table5.jsonl

--name goes into the record of the last step, so that scripts know what has been measured.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import program  # noqa: E402
from utils.files import records  # noqa: E402


def main(argv=None):
    p = program.parser(__doc__.splitlines()[0])
    p.add_argument("run_dir", type=program.path, help="a run folder of train_jempp.py")
    p.add_argument("--method", required=True, help="its row in the paper")
    p.add_argument("--name", default=None, help="the run's name in the record of its last step")
    p.add_argument("--results", type=program.path, required=True, metavar="OUT.jsonl",
                   help="append records here")
    args = p.parse_args(argv)
    log = records.read_log(args.run_dir)
    if not log or log[-1]["kind"] != "end":
        raise program.InputError(f"{args.run_dir} holds no run that has ended (no train.jsonl with "
                                 "a closing line)")
    header = records.header_of(log)
    end, trained = log[-1], header["args"]
    common = {
        "method": args.method, "dataset": trained["dataset"], "seed": trained["seed"],
        "training": records.training_of(trained, end["step"], header.get("sampler"),
                                        header.get("network")),
        "checkpoint": None, "overrides": {}, "env": header["env"],
        "seconds": round(records.seconds_of(log), 1), "time": end["time"]}
    found = [{"metric": "steps", "value": end["step"], "unit": "step", "n": 1,
              "protocol": {"reason": end["reason"], "rollbacks": end.get("rollbacks", 0)},
              **common, **({"run": args.name} if args.name else {})}]
    if gap := last_gap(log):
        found.append({"metric": "energy_gap", "unit": "nat", "n": 1, **gap, **common})
    if end["reason"] == "diverged":
        found.append({"metric": "diverged", "value": end["step"], "unit": "step", "n": 1,
                      "protocol": {"cause": end["detail"]}, **common})
    records.append_jsonl(args.results, *found)
    return program.EXIT_OK


def last_gap(log):
    """The last gap and its steps. None if no chains ran.

    A gap in the log is the mean over the steps since the record before it.
    """
    since, found = 0, None
    for r in log:
        if r["kind"] == "step" and "gap" in r:
            found = {"value": r["gap"], "protocol": {"from_step": since, "to_step": r["step"]}}
        if r["kind"] in ("step", "rollback"):
            since = r.get("to_step", r["step"])
    return found


if __name__ == "__main__":
    program.run(main)
