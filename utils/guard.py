"""When a run has to stop or go back: divergence, signals, the time limit.

Divergence is judged every few steps, by scalars that the steps left on the device.
"""

import math
import signal
import time
from pathlib import Path

import torch

from utils import checkpoint, distributed
from utils.cli import launched

SATURATED = 0.995  # of a chain's pixels at their bounds: chains of one flat colour, no image
COLLAPSED = 0.5  # of the best training accuracy so far
MEMORY = 0.98  # per step, of the running mean that a collapse is seen in


class Guard:
    """Bounds on the logged scalars, and a running mean of the training accuracy.

    ``max_loss`` bounds |loss|, ``max_gap`` |E(x+) - E(x-)|. What it remembers lies in the state,
    so that a resumed run judges alike.
    """

    def __init__(self, args, n_classes):
        self.max_loss, self.max_gap, self.chance = args.max_loss, args.max_gap, 1 / n_classes
        self.images = args.labelled_batch / (1 - MEMORY)  # that the running mean is taken over

    def look(self, state, rows):
        """The (step, cause) of the first fault in ``rows``, the scalars {name: number} of the steps
        up to ``state.step``; or None. ``state.guard`` remembers mean and peak accuracy."""
        for step, row in enumerate(rows, state.step - len(rows) + 1):
            if cause := self.fault(row, state.guard):
                return step, cause
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
        if row.get("saturated", 0.0) > SATURATED:
            return f"{100 * row['saturated']:.1f} % of the chains' pixels are at their bounds"
        if "accuracy" in row:
            mean = MEMORY * memory.get("mean", self.chance) + (1 - MEMORY) * row["accuracy"]
            peak = max(memory.get("peak", self.chance), mean)
            memory |= {"mean": mean, "peak": peak}
            noise = 5 * (peak * (1 - peak) / self.images) ** 0.5  # of tiny batches
            if mean < COLLAPSED * peak - noise and peak > 3 * self.chance:
                return f"training accuracy fell to {100 * mean:.1f} % from {100 * peak:.1f} %"
        return None


def fetch(window):
    """The scalars of a window of steps [{name: tensor}] as numbers, by one copy from the device;
    of several processes, their means."""
    names = list(window[0])
    values = torch.stack([torch.stack([m[k] for k in names]) for m in window]).double().cpu()
    return [dict(zip(names, row, strict=True)) for row in distributed.mean(values).tolist()]


def save_last(run_dir, state, args, epoch, log):
    """Write RUN/last.pt, and see to it that there is something sound to go back to.

    What a run goes back to must not be poisoned already: an earlier last.pt waits as candidate.pt
    and becomes good.pt once the run has survived it for --good_after steps. However often one
    saves, good.pt is then about 2 --good_after steps old.
    """
    last, candidate, good = (Path(run_dir) / f"{name}.pt" for name in ("last", "candidate", "good"))
    keep_as = None
    if distributed.rank() == 0:
        if candidate.exists() and state.step - state.candidate_at >= args.good_after:
            candidate.replace(good)
        if last.exists() and not candidate.exists():
            keep_as, state.candidate_at = candidate.name, state.saved_at
    state.log_lines, state.saved_at = log.lines, state.step
    checkpoint.save(last, state, args, epoch, keep_as=keep_as)


def saved_states(run_dir):
    """The resumable files of a run, newest first. The first is what the same command continues
    from: a crash between two renames may have left no last.pt."""
    paths = [Path(run_dir) / f"{name}.pt" for name in ("last", "candidate", "good")]
    return [path for path in paths if path.exists()]


def resume(run_dir, state, args):
    """Put the newest saved state into ``state``, built from the same flags; False for none."""
    saved = saved_states(run_dir)
    if saved:
        checkpoint.restore(state, saved[0], args)
        candidate = Path(run_dir) / "candidate.pt"
        state.candidate_at = checkpoint.step_of(candidate) if candidate.exists() else 0
    return bool(saved)


def roll_back(step, cause, run_dir, state, args, fresh, log):
    """Put ``state`` back to what the run had survived for --good_after steps before the fault at
    ``step``: the newest such file, else good.pt, which was survived once, else ``fresh()``. Other
    random numbers follow, at a rate lowered by --rollback_lr_factor. The outcome is saved as
    last.pt at once, so that a crash cannot undo the decision; what lies after it goes."""
    stream, lr_factor = state.stream + 1, state.lr_factor * args.rollback_lr_factor
    best = state.best  # best.pt stays the best of the whole run, what was rolled back included
    distributed.barrier()  # nobody writes while all look for it
    for path in saved_states(run_dir):
        if path.name == "good.pt" or step - checkpoint.step_of(path) > args.good_after:
            checkpoint.restore(state, path, args)
            break
    else:
        vars(state).update(vars(fresh(stream)))
    distributed.barrier()
    state.stream, state.lr_factor, state.best = stream, lr_factor, best
    log.write("rollback", step, to_step=state.step, cause=cause, rollbacks=stream)
    state.log_lines, state.saved_at = log.lines, state.step
    checkpoint.save(Path(run_dir) / "last.pt", state, args, None)
    if distributed.rank() == 0:
        for path in saved_states(run_dir)[1:]:
            if checkpoint.step_of(path) > state.step:
                path.unlink()
        candidate = Path(run_dir) / "candidate.pt"
        state.candidate_at = checkpoint.step_of(candidate) if candidate.exists() else 0
    log.start_clock(state.step)


class Stop:
    """Why to stop early: SIGTERM, SIGINT or --max_minutes. A second signal quits at once, but for
    torchrun's SIGTERM, which may follow one that all processes got: it has SIGKILL for the rest."""

    def __init__(self, max_minutes):
        self.why, self.deadline = None, time.monotonic() + 60 * (max_minutes or math.inf)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.why = signal.Signals(number).name
        again = signal.SIG_IGN if launched() and number == signal.SIGTERM else signal.SIG_DFL
        signal.signal(number, again)

    def reason(self):
        return self.why or ("max_minutes" if time.monotonic() > self.deadline else None)
