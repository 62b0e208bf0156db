#!/usr/bin/env python3
"""Evaluate our checkpoints and the released files of JEM, JEM++ and SADA-JEM.

    python eval_jempp.py --load_path runs/quickstart/best.pt --eval accuracy calibration ood

Model, data and sampler settings come from the checkpoint. Typed flags override them and are
recorded. Each number becomes one JSON line in --results. Raw scores and pictures are written
beside it. Exit codes: 0 done (a line reports whatever could not be measured), 2 bad input.
"""

from utils import start

if __name__ == "__main__":
    start.begin()  # before the imports, which take seconds

import hashlib
import itertools
import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # or foolbox requires a git binary

from models import network_name
from samplers import sampler_name
from utils import cli, distributed, machine, plots, program
from utils.evaluation import ood
from utils.evaluation.evaluations import EVALUATIONS, file_name, named_by
from utils.evaluation.subject import SOURCES, Output, Subject, skip
from utils.files import checkpoint, records
from utils.own_images import is_own

WRITTEN_OUT = ("seed", "sigma", "recalibrate_bn", "n_images", "company")  # in names of files
USUAL = {"source": "buffer", "reference": "train+test"}  # written out if another one is typed
GENERATING = {"n_samples", "conditional", "y", "chain_steps", "chain_batch"}
DIST_TIMEOUT = 30  # minutes that processes wait for one that is busy


class Entry(NamedTuple):
    """A checkpoint of this command, all its settings, and the fields that its records share."""

    subject: Subject
    settings: dict
    about: dict


def main(argv=None):
    protocol, overrides = cli.evaluation_args(argv, EVALUATIONS)
    ood.check_names(protocol.ood)
    if protocol.source not in SOURCES:
        ood.check_names([protocol.source])
    if protocol.dry_run:
        cli.print_json(vars(protocol) | overrides)
        return program.EXIT_OK

    # report what is wrong before measuring anything
    device = machine.pick_device(overrides.get("device", "auto"), overrides.get("num_threads", 0))
    machine.set_precision(deterministic=overrides.get("deterministic", False))
    distributed.start(device, DIST_TIMEOUT)
    results = Path(protocol.results or beside(protocol.load_path[0]) / "eval/results.jsonl")
    records.read_jsonl(results)  # refuse to append to a file of another kind
    entries = open_all(protocol, overrides, device)
    if distributed.rank() == 0:
        records.check_writable(results)

    # run each evaluation on all checkpoints before the next evaluation
    curves, measured, left_out = {}, False, False
    for name, entry in itertools.product(protocol.eval, entries):
        try:
            for number in measure(name, entry, results):
                if number.metric == "robust_accuracy":
                    collect(curves, entry.subject.label, number)
            measured = True
        except program.Unavailable as error:  # any other InputError ends the command
            skip(f"{name} of {entry.subject.label}", error)
            left_out = True

    # draw the curves of all checkpoints in one figure
    draw(curves, results.parent)
    distributed.barrier()
    if left_out and not measured:
        raise program.InputError("nothing could be measured, for the reasons above")
    program.say(f"records in {results}, pictures and raw scores beside it")
    return program.EXIT_OK


def open_all(protocol, overrides, device):
    """An ``Entry`` for each checkpoint of --load_path."""
    labels = unique(protocol.labels or [label_of(path) for path in protocol.load_path])
    env, entries = records.environment(device), []
    for path, label in zip(protocol.load_path, labels, strict=True):
        opened = checkpoint.open_any(path)
        settings = settings_of(opened, protocol, overrides)
        chosen = named_by(Subject, settings) | {"device": device}
        subject = Subject(opened=opened, label=label, **chosen)
        entries.append(Entry(subject, settings, about(subject, settings, overrides, env)))
    return entries


def settings_of(opened, protocol, overrides):
    """All settings for evaluating one checkpoint. Reports what its file does not tell."""
    if opened.args is None and "dataset" not in overrides:
        raise program.InputError(f"{opened.path} is a released file, which does not say what it "
                                 "was trained on: type --dataset")
    if opened.args is None:
        no_buffer = "" if opened.buffer is not None else "; it holds no buffer"
        program.say(f"{opened.path} holds no arguments: the paper's sampler settings are used "
                    f"where none are typed{no_buffer}")
    return cli.evaluation_settings(opened.args, overrides, protocol)


def about(subject, settings, overrides, env):
    """The fields that all records of a checkpoint share: where a number comes from."""
    opened = subject.opened
    return {
        "checkpoint": {"path": opened.path, "sha256": opened.sha256, "step": opened.step,
                       "epoch": opened.epoch},
        "overrides": overrides_of(opened, overrides), "label": subject.label,
        "method": settings["method"] or method_of(opened.args), "training": training_of(opened),
        "dataset": subject.dataset, "seed": subject.seed, "env": env,
        **({"class_names": subject.class_names} if is_own(subject.dataset) else {})}


def overrides_of(opened, overrides):
    """The typed values that differ from the checkpoint's, for the record."""
    saved = opened.args or {}
    return {k: v for k, v in overrides.items()
            if k not in cli.MACHINE and saved.get(k) != records.jsonable(v)}


def method_of(args):
    """The kind of training that a checkpoint comes from, for the record."""
    if args is None:
        return "released file"
    if not args.get("p_x_weight") and not args.get("p_x_y_weight"):
        return "softmax"
    return f"{'jempp M' if args.get('in_steps') else 'jem K'}={args.get('n_steps')}"


def training_of(opened):
    """How the checkpoint was trained, for the record. None for a released file."""
    if opened.args is None:
        return None
    args = opened.args
    return records.training_of(args, opened.step, sampler_name(SimpleNamespace(**args)),
                               network_name(args))


def beside(path):
    """The folder of a checkpoint: of a published model, its own."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def label_of(path):
    """runs/quickstart/best.pt -> quickstart-best"""
    path = Path(os.path.abspath(path))
    return os.fsencode(f"{path.parent.name}-{path.stem}").decode(errors="replace")


def unique(names):
    """``names`` with -2, -3, ... appended to repeated ones, because they label lines."""
    result = []
    for name in names:
        others = (f"{name}-{k}" for k in itertools.count(2))
        result.append(next(n for n in itertools.chain([name], others) if n not in result))
    return result


def measure(name, entry, results):
    """Run one evaluation of one checkpoint. Yields each number after recording it."""
    started, subject = time.monotonic(), entry.subject
    stem = re.sub(r"[^\w.+=-]+", "_", subject.label)
    out = Output(results.parent, f"{stem}-{subject.opened.sha256[:8]}{apart(name, entry)}")
    evaluate = EVALUATIONS[name]
    for number in evaluate(subject, out, **named_by(evaluate, entry.settings)):
        if subject.recalibrate_bn:
            number.protocol["recalibrate_bn"] = subject.recalibrate_bn
        report(number, entry, time.monotonic() - started, results)
        yield number


def apart(name, entry):
    """What tells the files of one checkpoint's measurements apart: settings that are not usual.

    Some are written out. Six digits stand for all others, so that no file is overwritten while
    records of other settings name it.
    """
    settings = entry.settings | {"recalibrate_bn": entry.subject.recalibrate_bn}
    words = [f"{k}{settings[k]}" for k in WRITTEN_OUT if settings[k]]
    words += [file_name(settings[k])[:60] for k, v in USUAL.items() if settings.get(k, v) != v]
    usual = cli.evaluation_defaults(EVALUATIONS)
    names = named_by(EVALUATIONS[name], settings).keys()
    if name in ("fid", "samples", "best_worst"):  # an exported folder has its settings inside
        names |= GENERATING
    others = {k: settings[k] for k in names if settings[k] != usual[k]} | entry.about["overrides"]
    others = {k: v for k, v in others.items() if k not in (*WRITTEN_OUT, *USUAL)}
    if others and name != "export":
        text = json.dumps(records.jsonable(others), sort_keys=True)
        words.append(hashlib.sha256(text.encode()).hexdigest()[:6])
    return "".join("-" + re.sub(r"[^\w.+=-]+", "_", word) for word in words)


def report(number, entry, seconds, results):
    """Print one number and append its record to the results."""
    if distributed.rank():
        return
    record = number._asdict()
    if not number.files:
        del record["files"]
    records.append_jsonl(results, record | entry.about | {"seconds": round(seconds, 3),
                                                          "time": records.now()})
    program.say(f"{entry.subject.label:24s} {number.metric:16s} {number.value:10.5g} "
                f"{number.unit:9s} n={number.n:<6d} {records.shown(number.protocol)}")


def collect(curves, label, number):
    """Add a point to the curve of its norm, checkpoint and attack."""
    protocol = number.protocol
    eps, accuracy, _ = curves.setdefault(protocol["norm"], {}).setdefault(
        (label, protocol["attack"]), ([], [], number.n))
    eps.append(protocol.get("eps_255", protocol.get("eps")))
    accuracy.append(number.value)


def draw(curves, folder):
    """Draw a figure for each norm with the curves of all checkpoints and attacks."""
    for norm, lines in curves.items():
        n = max(number_n for _, _, number_n in lines.values())
        Output(folder, "robustness").figure(norm, plots.robustness_curves(
            {key: (eps, accuracy) for key, (eps, accuracy, _) in lines.items()}, norm,
            f"Accuracy under attack, n = {n}"))


if __name__ == "__main__":
    program.run(main)
