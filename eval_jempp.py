#!/usr/bin/env python3
"""Evaluate checkpoints: ours, and the released files of JEM, JEM++ and SADA-JEM.

    python eval_jempp.py --load_path runs/quickstart/best.pt --eval accuracy calibration ood

Model, data and sampler settings come from the checkpoint; what is typed overrides them and is
recorded. Each number becomes one JSON line in --results, raw scores and pictures lie beside it.
Exit codes: 0 done (what could not be measured is said in a line each), 2 bad input.
"""

import argparse
import os
import re
import time
from pathlib import Path

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox would insist on a git binary

from models import network_name
from samplers import sampler_name
from utils import cli, distributed, machine, plots, program
from utils.evaluation import ood
from utils.evaluation.evaluations import EVALUATIONS, skip
from utils.evaluation.subject import Output, Subject
from utils.files import checkpoint, records

DIST_TIMEOUT = 30  # minutes that a process may be busy with its share while others wait


def settings_of(opened, own, typed):
    """The options in force for one checkpoint; says what its file does not tell."""
    if opened.args is None and "dataset" not in typed:
        raise program.InputError(f"{opened.path} is a released file, which does not say what it "
                                 "was trained on: type --dataset")
    if opened.args is None:
        no_buffer = "" if opened.buffer is not None else "; it holds no buffer"
        program.say(f"{opened.path} holds no arguments: the paper's sampler settings are used "
                    f"where none are typed{no_buffer}")
    return argparse.Namespace(**cli.evaluation_settings(opened.args, typed, own))


def overrides_of(opened, typed):
    """What was typed against the checkpoint, for the record."""
    saved = opened.args or {}
    return {k: v for k, v in typed.items()
            if k not in cli.MACHINE and saved.get(k) != records.jsonable(v)}


def method_of(opened, own):
    """A word for the records: what kind of training the checkpoint comes from."""
    if own.method:
        return own.method
    a = opened.args
    if a is None:
        return "released file"
    if not a.get("p_x_weight") and not a.get("p_x_y_weight"):
        return "softmax"
    return f"{'jempp M' if a.get('in_steps') else 'jem K'}={a.get('n_steps')}"


def training_of(opened):
    """How the checkpoint was trained, for the record; None for a released file."""
    if opened.args is None:
        return None
    args = opened.args
    return records.training_of(args, opened.step, sampler_name(argparse.Namespace(**args)),
                               network_name(args))


def label_of(path):
    """runs/quickstart/best.pt -> quickstart-best"""
    path = Path(os.path.abspath(path))
    return os.fsencode(f"{path.parent.name}-{path.stem}").decode(errors="replace")


def unique(names):
    """``names`` with -2, -3, ... behind those that stood there before: they name files."""
    seen, result = {}, []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return result


def main(argv=None):
    own, typed = cli.evaluation_args(argv, EVALUATIONS)
    ood.check_names(own.ood)
    if own.dry_run:
        cli.print_json(vars(own) | typed)
        return program.EXIT_OK
    device = machine.pick_device(typed.get("device", "auto"), typed.get("num_threads", 0))
    machine.set_precision(deterministic=typed.get("deterministic", False))
    distributed.start(device, DIST_TIMEOUT)
    results = Path(own.results or Path(own.load_path[0]).parent / "eval" / "results.jsonl")
    records.read_jsonl(results)  # a file of another kind is not appended to
    labels = unique(own.labels or [label_of(path) for path in own.load_path])
    stems = unique([re.sub(r"[^\w.+=-]+", "_", label) for label in labels])
    subjects = []
    for path, label in zip(own.load_path, labels, strict=True):
        opened = checkpoint.open_any(path)
        subjects.append(Subject(opened, settings_of(opened, own, typed), label, device))
    env = records.environment(device)
    results.parent.mkdir(parents=True, exist_ok=True)
    if distributed.rank() == 0:
        with open(results, "a"):  # what cannot be written is told before anything is measured
            pass
    curves, measured, left_out = {}, False, None
    for name in own.eval:
        for s, stem in zip(subjects, stems, strict=True):
            started = time.monotonic()
            try:
                for number in EVALUATIONS[name](s, Output(results.parent, stem)):
                    report(number, s, typed, own, env, time.monotonic() - started, results)
                    if number.metric == "robust_accuracy":
                        collect(curves, s.label, number)
                measured = True
            except program.Unavailable as error:  # bad input, on the other hand, ends the command
                skip(f"{name} of {s.label}", error)
                left_out = error
    for norm, lines in curves.items():
        n = max(number_n for _, _, number_n in lines.values())
        Output(results.parent, "robustness").figure(norm, plots.robustness_curves(
            {key: (eps, accuracy) for key, (eps, accuracy, _) in lines.items()}, norm,
            f"Accuracy under attack, n = {n}"))
    distributed.barrier()
    if left_out and not measured:
        raise program.InputError("nothing could be measured, for the reasons above")
    program.say(f"records in {results}, pictures and raw scores beside it")
    return program.EXIT_OK


def report(number, s, typed, own, env, seconds, results):
    """One number: a line on the terminal and a record appended to the results."""
    if distributed.rank():
        return
    o = s.opened
    records.append_jsonl(results, {
        "metric": number.metric, "value": number.value, "unit": number.unit, "n": number.n,
        "protocol": number.protocol,
        "checkpoint": {"path": o.path, "sha256": o.sha256, "step": o.step, "epoch": o.epoch},
        "overrides": overrides_of(o, typed), "method": method_of(o, own), "label": s.label,
        "training": training_of(o),
        "dataset": s.args.dataset, "seed": own.seed, "env": env, "seconds": round(seconds, 3),
        "time": records.now()})
    shown = {k: v for k, v in number.protocol.items()
             if k in ("split", "score", "out", "attack", "norm", "eps", "eps_255", "source",
                      "selection", "reference")}
    program.say(f"{s.label:24s} {number.metric:16s} {number.value:10.5g} {number.unit:9s} "
            f"n={number.n:<6d} {' '.join(f'{k}={v}' for k, v in shown.items())}")


def collect(curves, label, number):
    """Add a point to the curve of its norm, checkpoint and attack."""
    protocol = number.protocol
    key = label, protocol["attack"]
    line = curves.setdefault(protocol["norm"], {}).setdefault(key, ([], [], number.n))
    line[0].append(protocol.get("eps_255", protocol.get("eps")))
    line[1].append(number.value)


if __name__ == "__main__":
    program.run(main)
