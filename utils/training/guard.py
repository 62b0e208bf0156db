"""When a run has to stop or go back: divergence, signals, the time limit.

Divergence is judged every few steps, by scalars that the steps left on the device.
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
from utils.files import checkpoint
from utils.files.torch_files import Damaged
from utils.program import InputError, launched, say
from utils.training.build import new_state
from utils.training.schedule import check_past_rates

MEMORY = 0.98  # per step, of the running mean that a collapse is seen in


class Guard:
    """Bounds on the logged scalars, and a running mean of the training accuracy.

    ``max_loss`` bounds |loss|, ``max_gap`` |E(x+) - E(x-)|, ``max_saturated`` the fraction of the
    chains' pixels at their bounds, and the mean accuracy may not fall below ``min_accuracy_ratio``
    times its peak. What it remembers lies in the state, so that a resumed run judges alike.
    """

    def __init__(self, args, n_classes):
        self.max_loss, self.max_gap, self.chance = args.max_loss, args.max_gap, 1 / n_classes
        self.max_saturated, self.min_ratio = args.max_saturated, args.min_accuracy_ratio
        self.images = args.labelled_batch / (1 - MEMORY)  # that the running mean is taken over

    def look(self, state, rows, before_saving=False):
        """The (step, cause) of the first fault in ``rows``, the scalars {name: number} of the steps
        up to ``state.step``; or None. ``state.guard`` remembers mean and peak accuracy.
        ``before_saving``: the state itself is looked through as well."""
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
            noise = 5 * (peak * (1 - peak) / self.images) ** 0.5  # of tiny batches
            if mean < self.min_ratio * peak - noise and peak > 3 * self.chance:
                return (f"training accuracy fell to {100 * mean:.1f} % from {100 * peak:.1f} %, "
                        f"beyond --min_accuracy_ratio {self.min_ratio:g}")
        return None


def fetch(window):
    """The scalars of a window of steps [{name: tensor}] as numbers, by one copy from the device;
    of several processes, their means."""
    names = list(window[0])
    values = torch.stack([torch.stack([m[k] for k in names]) for m in window]).double().cpu()
    return [dict(zip(names, row, strict=True)) for row in distributed.mean(values).tolist()]


def save_last(run_dir, state, epoch, log, good_after):
    """Write RUN/last.pt, and see to it that there is something sound to go back to.

    What a run goes back to must not be poisoned already: an earlier last.pt waits as candidate.pt
    and becomes good.pt once the run has survived it for ``good_after`` steps. However often one
    saves, good.pt is then about 2 ``good_after`` steps old.
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
    """The resumable files of a run, newest first. The first is what the same command continues
    from: a crash between two renames may have left no last.pt."""
    paths = [Path(run_dir) / f"{name}.pt" for name in ("last", "candidate", "good", "start")]
    return [path for path in paths if path.exists() or path.is_symlink()]  # not a link to nothing


def set_aside_damaged(run_dir):
    """Rename what is damaged of a run's resumable files to NAME.damaged, where a whole one is left
    to go on from; {name: what is wrong}. InputError where none is. A call that every rank makes."""
    paths, damaged = saved_states(run_dir), {}
    for path in paths:
        try:
            checkpoint.load(path)
        except Damaged as error:
            damaged[path] = str(error)
    if damaged and len(damaged) == len(paths):
        raise InputError(f"{next(iter(damaged.values()))}. No whole file of the run is left "
                         "to go on from: choose another --run_dir")
    distributed.barrier()  # all have looked
    if distributed.rank() == 0:
        for path, fault in damaged.items():
            path.replace(path.with_suffix(".damaged"))
            say(f"{fault}. Kept as {path.stem}.damaged: the run goes on without it")
    distributed.barrier()
    return {path.name: fault for path, fault in damaged.items()}


def candidate_step(run_dir):
    """After which step RUN/candidate.pt was saved; 0 where there is none."""
    path = Path(run_dir) / "candidate.pt"
    return checkpoint.step_of(path) if path.exists() else 0


def resume(run_dir, setup, args):
    """Continue from the newest whole state, if one was saved: what the log's line of it tells
    besides (which files were damaged), or None for a run that begins.

    InputError where the run has other arguments, or took its steps at other learning rates than
    ``args`` would have given them.
    """
    damaged = set_aside_damaged(run_dir)
    saved = saved_states(run_dir)
    if not saved:
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
    """Put the state back to what the run had survived for --good_after steps before the fault at
    ``step``: the newest such file, else good.pt, which was survived once, else a fresh start (with
    --load_path: start.pt).

    Other random numbers follow, at a rate lowered by --rollback_lr_factor. The outcome is saved as
    last.pt at once, so that a crash cannot undo the decision; what lies after it goes.
    """
    state = setup.state
    rollbacks, lr_factor = state.rollbacks + 1, state.lr_factor * args.rollback_lr_factor
    best = state.best  # best.pt stays the best of the whole run, what was rolled back included
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
    """Why to stop early: a signal or --max_minutes. SIGTERM or SIGINT again quits at once, but for
    torchrun's SIGTERM, which may follow one that all processes got: it has SIGKILL for the rest.

    SIGHUP says that the terminal is gone (nohup has it ignored, and it stays so), SIGUSR1 is
    SLURM's warning before the time limit. Both may come twice.
    """

    def __init__(self, max_minutes):
        self.why, self.deadline = None, time.monotonic() + 60 * (max_minutes or math.inf)
        if threading.current_thread() is not threading.main_thread():
            return  # where no handler can be set: a notebook, a framework's worker
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has the first two
            if number is not None and not (name == "SIGHUP"
                                           and signal.getsignal(number) is signal.SIG_IGN):
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.why = signal.Signals(number).name
        quits = number == signal.SIGINT or number == signal.SIGTERM and not launched()
        signal.signal(number, signal.SIG_DFL if quits else signal.SIG_IGN)

    def reason(self):
        return self.why or ("max_minutes" if time.monotonic() > self.deadline else None)
