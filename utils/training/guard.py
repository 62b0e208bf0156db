"""When a run must stop or roll back: divergence, signals, the time limit.

Divergence is checked every few steps, from scalars that the steps left on the device.
"""

import argparse
import math
import signal
import threading
import time
from pathlib import Path

import torch

from utils import distributed
from utils.cli import check_same_run
from utils.files import checkpoint, records
from utils.files.torch_files import Damaged
from utils.program import InputError, launched, say
from utils.training.build import new_state
from utils.training.schedule import check_past_rates

MEMORY = 0.98  # decay per step of the running mean accuracy


class Guard:
    """Bounds on the logged scalars, and a running mean of the training accuracy.

    ``max_loss`` bounds |loss|, ``max_gap`` |E(x+) - E(x-)|, ``max_saturated`` the fraction of the
    chains' pixels at their bounds. The mean accuracy may not fall below ``min_accuracy_ratio``
    times its peak. The mean and peak are kept in the state, so that a resumed run decides alike.
    """

    def __init__(self, args, n_classes):
        self.max_loss, self.max_gap, self.chance = args.max_loss, args.max_gap, 1 / n_classes
        self.learnt = min(3 * self.chance, (1 + self.chance) / 2)  # a peak below says nothing
        self.max_saturated, self.min_ratio = args.max_saturated, args.min_accuracy_ratio
        self.images = args.labelled_batch / (1 - MEMORY)  # behind the running mean

    def look(self, state, rows, before_saving=False):
        """The (step, cause) of the first fault in ``rows``, or None.

        ``rows`` are the scalars {name: number} of the steps up to ``state.step``. The mean and peak
        accuracy in ``state.guard`` are updated. ``before_saving``: also check that all is finite.
        """
        for step, row in enumerate(rows, state.step - len(rows) + 1):
            if cause := self.fault(row, state.guard):
                return step, cause
        if before_saving and not state.is_finite():
            return state.step, "weights, their average, optimiser state or buffer are not finite"
        return None

    def fault(self, row, memory):
        for name, value in row.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        if abs(row["loss"]) > self.max_loss:
            return f"|loss| is {abs(row['loss']):.3g}, beyond --max_loss {self.max_loss:g}"
        for pos, neg in (("e_pos", "e_neg"), ("e_pos_y", "e_neg_y")):
            gap = row.get(pos, 0.0) - row.get(neg, 0.0)
            if abs(gap) > self.max_gap:
                return f"the energy gap is {gap:.3g}, beyond --max_gap {self.max_gap:g}"
        if row.get("saturated", 0.0) > self.max_saturated:
            return (f"{100 * row['saturated']:.1f} % of the chains' pixels are at their bounds, "
                    f"beyond --max_saturated {self.max_saturated:g}")
        if "accuracy" in row:
            mean = MEMORY * memory.get("mean", self.chance) + (1 - MEMORY) * row["accuracy"]
            peak = max(memory.get("peak", self.chance), mean)
            memory |= {"mean": mean, "peak": peak}
            noise = 5 * (peak * (1 - peak) / self.images) ** 0.5  # matters for tiny batches
            if mean < self.min_ratio * peak - noise and peak > self.learnt:
                return (f"training accuracy fell to {100 * mean:.1f} % from {100 * peak:.1f} %, "
                        f"beyond --min_accuracy_ratio {self.min_ratio:g}")
        return None


def fetch(window):
    """The scalars of a window of steps [{name: tensor}] as numbers, averaged over the processes.

    They are copied from the device at once. Steps may log different names.
    """
    values = torch.stack([value for row in window for value in row.values()]).double().cpu()
    numbers = iter(distributed.mean(values).tolist())
    return [{name: next(numbers) for name in row} for row in window]


def save_last(run_dir, state, epoch, log, good_after):
    """Write RUN/last.pt, and keep a sound older state to roll back to.

    A recent state may already be affected by a divergence. So an earlier last.pt is kept as
    candidate.pt. It becomes good.pt once the run has survived it for ``good_after`` steps. This way
    good.pt is about 2 ``good_after`` steps old, however often the run saves.
    """
    last, candidate, good = (Path(run_dir) / f"{name}.pt" for name in ("last", "candidate", "good"))
    keep_as = None
    if distributed.rank() == 0:
        if candidate.exists() and state.step - state.candidate_at >= good_after:
            candidate.replace(good)
        if last.exists() and not candidate.exists():
            keep_as, state.candidate_at = candidate.name, state.saved_at
    state.log_lines, state.saved_at = log.lines, state.step
    checkpoint.save(last, state, epoch, keep_as=keep_as)


def saved_states(run_dir):
    """The resumable files of a run, newest first. The run continues from the first.

    last.pt may be missing after a crash between two renames.
    """
    paths = [Path(run_dir) / f"{name}.pt" for name in ("last", "candidate", "good", "start")]
    return [path for path in paths if path.exists() or path.is_symlink()]  # a broken link counts


def set_aside_damaged(run_dir):
    """Rename damaged resumable files of a run to NAME.damaged. Returns {name: what is wrong}.

    InputError if all of them are damaged. Every rank must call this.
    """
    paths, damaged = saved_states(run_dir), {}
    for path in paths:
        try:
            checkpoint.load(path)
        except Damaged as error:
            damaged[path] = str(error)
    if damaged and len(damaged) == len(paths):
        raise InputError(f"{next(iter(damaged.values()))}. No undamaged file of the run is left "
                         "to continue from: choose another --run_dir")
    distributed.barrier()  # all ranks have read the files
    if distributed.rank() == 0:
        for path, fault in damaged.items():
            path.replace(path.with_suffix(".damaged"))
            say(f"{fault}. Kept as {path.stem}.damaged: the run continues without it")
    distributed.barrier()
    return {path.name: fault for path, fault in damaged.items()}


def candidate_step(run_dir):
    """The step of RUN/candidate.pt, or 0 if there is none."""
    path = Path(run_dir) / "candidate.pt"
    return checkpoint.step_of(path) if path.exists() else 0


def check_new(run_dir):
    """InputError if ``run_dir``, which holds nothing to resume, holds the results of a run.

    A run that crashed before its second evaluation is begun again.
    """
    refused = None
    if distributed.rank() == 0 and (Path(run_dir) / "best.pt").exists():
        kinds = [line["kind"] for line in records.read_log(run_dir)]
        if kinds.count("eval") > 1 or "end" in kinds:
            refused = (f"{run_dir} holds the best.pt and the log of a run, but no last.pt to go on "
                       "from: choose another --run_dir, or remove them")
    if refused := distributed.first(refused):
        raise InputError(refused)


def resume(run_dir, setup, args):
    """Continue from the newest undamaged state. Returns None if nothing was saved yet.

    Otherwise returns what the log's resume line adds: which files were damaged. InputError if the
    saved run has other arguments, or took its steps at other learning rates than ``args`` gives, or
    if nothing of a run but its results is there.
    """
    damaged = set_aside_damaged(run_dir)
    saved = saved_states(run_dir)
    if not saved:
        check_new(run_dir)
        return None
    content, state = checkpoint.load(saved[0]), setup.state
    before = check_same_run(saved[0], content["args"], vars(args))
    check_past_rates(argparse.Namespace(**before), args, content["step"],
                     setup.data.steps_per_epoch)
    state.load(content, saved[0])
    state.candidate_at = candidate_step(run_dir)
    setup.data.reseed(state.seed)
    return {"recovered_from": saved[0].name, "damaged": damaged} if damaged else {}


def roll_back(run_dir, setup, args, step, cause, log):
    """Restore a state that the run survived for --good_after steps before the fault at ``step``.
    This is the newest such file, or else good.pt. Without one, the run starts anew (with
    --load_path: from start.pt). It continues with other random numbers, at a learning rate
    multiplied by --rollback_lr_factor. The result is saved as last.pt at once, so that a crash
    cannot undo the rollback. Files of later steps are deleted.
    """
    state = setup.state
    rollbacks, lr_factor = state.rollbacks + 1, state.lr_factor * args.rollback_lr_factor
    best = state.best  # best.pt remains the best of the whole run, including rolled-back steps
    set_aside_damaged(run_dir)
    for path in saved_states(run_dir):
        survived = step - checkpoint.step_of(path) > args.good_after
        if path.name in ("good.pt", "start.pt") or survived:
            state.load(checkpoint.load(path), path)
            break
    else:
        state.become(new_state(args, setup.data, setup.p0, state.p0_origin, rollbacks))
    distributed.barrier()
    state.rollbacks, state.lr_factor, state.best = rollbacks, lr_factor, best
    setup.data.reseed(state.seed)
    log.write("rollback", step, to_step=state.step, cause=cause, rollbacks=rollbacks)
    state.log_lines, state.saved_at = log.lines, state.step
    checkpoint.save(Path(run_dir) / "last.pt", state, None)
    if distributed.rank() == 0:
        for path in saved_states(run_dir)[1:]:
            if checkpoint.step_of(path) > state.step:
                path.unlink()
        state.candidate_at = candidate_step(run_dir)
    log.start_clock(state.step)


class Stop:
    """The reason to stop early: a signal or --max_minutes.

    A second SIGINT or SIGTERM quits at once. Under torchrun a second SIGTERM is ignored: torchrun
    may send one after all processes got the first, and later sends SIGKILL itself. SIGHUP means
    that the terminal is gone (under nohup it stays ignored). SIGUSR1 is SLURM's warning before the
    time limit. Both may come twice.
    """

    def __init__(self, max_minutes):
        self.why, self.deadline = None, time.monotonic() + 60 * (max_minutes or math.inf)
        if threading.current_thread() is not threading.main_thread():
            return  # handlers can only be set in the main thread
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has only the first two
            if number is not None and not (name == "SIGHUP"
                                           and signal.getsignal(number) is signal.SIG_IGN):
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.why = signal.Signals(number).name
        quits = number == signal.SIGINT or number == signal.SIGTERM and not launched()
        signal.signal(number, signal.SIG_DFL if quits else signal.SIG_IGN)

    def reason(self):
        return self.why or ("max_minutes" if time.monotonic() > self.deadline else None)
