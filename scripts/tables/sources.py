"""What make_tables.py reads: the paper's numbers and our records, and which belong together.

A *number* is a line of results/paper.jsonl: table, row, column (the metric), dataset, value (None
if the paper has none) and ``printed`` (as the paper prints it). Further keys, such as ``split`` or
``out``, must agree with the ``protocol`` of a record that measures the same. A *record* is a line
of results/TABLE.jsonl. eval_jempp.py, scripts/record_run.py (``diverged``) and
scripts/benchmark_table4.py (``iteration_ms``) write records.
"""

import json
import math

from scripts.tables.protocol import FREE
from utils.files.regular import read_bytes
from utils.program import InputError

NUMBER = ("table", "row", "column", "dataset", "value", "unit", "printed")
FULL_SCALE = ("column", "value", "compare")
RECORD = ("metric", "value", "method", "dataset", "protocol", "env", "time")
TIMING = ("run", "reference", "n_steps", "in_steps", "depth", "width", "batch_size")
JUDGED = ("reference", "n_reference", "features_sha256")
ENV = ("device", "cpu", "commit")
# The training arguments in every record. The oldest records have no others. Later ones have those
# of training_of in utils/files/records.py.
TRAINING = ("dataset", "depth", "width", "norm", "batch_size", "n_epochs", "n_train", "n_steps",
            "in_steps", "optimizer", "lr", "init", "seed")
SHOWN = ("accuracy", "ece", "auroc", "is_mean", "fid", "fd_features", "iteration_ms", "diverged",
         "energy_gap", "robust_accuracy")


def read_lines(path, complaint):
    """The JSON objects of a file, [] if there is no file. Blank lines are skipped.

    InputError names a bad line.
    """
    objects = []
    for number, line in enumerate(read_bytes(path).splitlines() if path.exists() else [], 1):
        if not line.strip():
            continue
        try:
            objects.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON ({error})") from None
        wrong = complaint(objects[-1]) if isinstance(objects[-1], dict) else "not a JSON object"
        if wrong:
            raise InputError(f"{path}:{number}: {wrong}")
    return objects


def lacking(what, keys, name):
    if not isinstance(what, dict):
        return f"{name} is no JSON object"
    absent = [key for key in keys if key not in what]
    return f"{name} lacks {', '.join(absent)}" if absent else None


def complain_of_number(number):
    keys = FULL_SCALE if number.get("table") == "protocol" else NUMBER
    return lacking(number, keys, "the paper's number")


def complain_of_record(record):
    """What is wrong with a measured record, or None."""
    timing = record.get("metric") == "iteration_ms"
    count = () if timing or record.get("metric") == "diverged" else ("n",)
    wrong = lacking(record, (*RECORD, *count), "the record")
    if wrong:
        return wrong
    value = record["value"]
    wrong = (lacking(record["protocol"], (), "protocol") or lacking(record["env"], ENV, "env")
             or complain_of_kinds(record))
    if not wrong and record["metric"] == "fd_features":
        wrong = lacking(record["protocol"], JUDGED, "protocol")
    if wrong:
        return wrong
    if timing:
        return lacking(timed(record), TIMING, "protocol") or (
            f"{value} ms is no time" if value <= 0 else None)
    if "training" not in record:
        return "the record lacks training"
    if record["training"] is None:  # weights trained by others
        return lacking(record.get("checkpoint"), ("sha256",), "checkpoint")
    return complain_of_training(record["training"])


def is_number(value, least=-math.inf):
    """Whether a value is a finite number, and not below ``least``."""
    return (isinstance(value, int | float) and not isinstance(value, bool)
            and math.isfinite(value) and value >= least)


def complain_of_kinds(record):
    """What should be a text or a number in a record, and is none. Else None."""
    for name in ("metric", "method", "dataset", "time", "run"):
        if not isinstance(record.get(name, ""), str):
            return f"{name} {record[name]!r} is no text"
    if record["metric"] in SHOWN and not is_number(record["value"]):
        return f"value {record['value']!r} is not a finite number"
    counts = {name: record[name] for name in ("n", "seconds") if record.get(name) is not None}
    counts["rollbacks"] = record["protocol"].get("rollbacks", 0)
    return next((f"{name} {count!r} is not a finite number" for name, count in counts.items()
                 if not is_number(count, 0)), None)


def complain_of_training(training):
    """What is wrong with the training arguments, or None.

    Only these may be null: n_train (all images), and depth, width and norm, which only Wide-ResNets
    have.
    """
    keys = (*TRAINING, "step")
    wrong = lacking(training, keys, "training")
    null = [] if wrong else [k for k in keys if training[k] is None
                               and k not in ("n_train", "depth", "width", "norm")]
    return wrong or (f"training has no {', '.join(null)}" if null else None)


def read_paper(folder, default):
    """(numbers, full-scale protocol) of paper.jsonl in ``folder``, or in ``default`` if missing."""
    path = folder / "paper.jsonl"
    lines = read_lines(path if path.exists() else default / "paper.jsonl", complain_of_number)
    return ([n for n in lines if n["table"] != "protocol"],
            [n for n in lines if n["table"] == "protocol"])


def read_results(path, full_scale):
    """Measured records in the file's order. If n_train is null, fill in the full training set."""
    found = read_lines(path, complain_of_record)
    for training in (r["training"] for r in found if r.get("training")):
        whole = [line["value"] for line in full_scale if line["column"] == "n_train"
                 and training["dataset"] in line["dataset"]]
        if training["n_train"] is None and whole:
            training["n_train"] = whole[0]
    return found


def by_time(records):
    """Sort records, oldest first. Records of one second keep their order."""
    return sorted(records, key=lambda r: r["time"])


def each_run_once(tables):
    """The records of several tables, without a row whose runs an earlier table shows already."""
    shown, kept = set(), []
    for table in tables:
        runs = {}
        for r in table:
            if "run" in r:
                runs.setdefault((r["method"], r["dataset"]), set()).add(r["run"])
        again = {row for row, names in runs.items() if names <= shown}
        kept += [r for r in table if (r["method"], r["dataset"]) not in again]
        shown.update(*runs.values())
    return kept


def left_out(numbers, records):
    """Yield a sentence for each row that the paper's table lacks or that mixes settings."""
    rows = {(n["row"], n["dataset"]) for n in numbers}
    for row, dataset in dict.fromkeys((r["method"], r["dataset"]) for r in records):
        others = len(trained(row, dataset, records)) - len(of_row(row, dataset, records))
        if (row, dataset) not in rows:
            yield f"{row!r} on {dataset} is no row of the paper's table"
        elif others:
            yield f"{others} records of {row!r} trained with other settings than its latest one"


def with_ours_alone(numbers, records, timings):
    """The numbers, with fd_features and iteration_ms added if there are records of them."""
    extra = []
    if any(r["metric"] == "fd_features" for r in records):
        extra += [n | {"column": "fd_features"} for n in numbers if n["column"] == "fid"]
    if timings and any(n["column"] == "minutes_per_epoch" for n in numbers):
        extra += [n | {"column": "iteration_ms"} for n in numbers if n["column"] == "speedup"]
    return numbers + extra


def seed_of(record):
    """The training seed. None for weights trained by others."""
    return (record["training"] or {}).get("seed")


def diverged(records):
    """{seed: its record of divergence} of the seeds whose latest run did not end otherwise."""
    ends = {seed_of(r): r for r in by_time(records) if r["metric"] == "steps"}
    return {seed_of(r): r for r in records if r["metric"] == "diverged"
            and ends.get(seed_of(r), r)["protocol"].get("reason", "diverged") == "diverged"}


def timed(record):
    """The settings that a time depends on, from the training arguments and the protocol."""
    both = {**(record.get("training") or {}), **record["protocol"]}
    return {key: both[key] for key in TIMING if key in both}


def trained(row, dataset, records):
    """A row's records, except times."""
    return [r for r in records if (r["method"], r["dataset"]) == (row, dataset)
            and r["metric"] != "iteration_ms"]


def of_row(row, dataset, records):
    """A row's records that were trained with the settings of the latest one.

    Arguments that a record lacks are not compared, and those in protocol.FREE may differ. Each
    record gets what its seed's records say of the training: its last step, because best.pt may be
    older, and as ``trained_env`` the ``env`` that it ran in.
    """
    own, known = [], {}
    for r in reversed(trained(row, dataset, records)):
        told = {k: v for k, v in (r["training"] or {}).items() if k not in FREE}
        others = own and bool(told) != bool(known)  # one is our training, the other is not
        if not others and all(known.get(k, v) == v for k, v in told.items()):
            own.insert(0, r)
            known |= told
    end, env = {}, {}
    for r in own:
        end[seed_of(r)] = max(end.get(seed_of(r), 0), (r["training"] or {}).get("step") or 0)
        if r["metric"] == "steps":
            env[seed_of(r)] = {"trained_env": r["env"]}
    return [r if r["training"] is None else
            {**r, **env.get(seed_of(r), {}), "training": r["training"] | {"step": end[seed_of(r)]}}
            for r in own]


def comparable(latest):
    """Of {seed: record}, those that the last one compares with: of its n and noise, and by its
    judge in fd_features."""
    kinds = {seed: (r["n"], *map((r["protocol"] or {}).get, ("sigma", *JUDGED)))
             for seed, r in latest.items()}
    in_time = sorted(latest, key=lambda seed: latest[seed]["time"])
    return {seed: r for seed, r in latest.items() if kinds[seed] == kinds[in_time[-1]]}


def measures(record, number):
    """Whether a record of the number's row measures the number: metric and protocol agree.

    The paper's numbers are those of the checkpoint as it is, without eval_jempp's --recalibrate_bn.
    """
    keys = number.keys() - {*NUMBER, "cited", "note"}
    return (record["metric"] == number["column"] and not record["protocol"].get("recalibrate_bn")
            and all(record["protocol"].get(key) == number[key] for key in keys))
