"""When a run has to stop or go back: divergence, signals, the time limit.

Divergence is judged every few steps, by scalars that the steps left on the device.
"""

import math
import signal
import time
from pathlib import Path

import torch

from utils import checkpoint

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
        gap = row["e_pos"] - row["e_neg"] if "e_pos" in row else 0.0
        if abs(gap) > self.max_gap:
            return f"the energy gap is {gap:.3g}, beyond --max_gap {self.max_gap:g}"
        if row.get("saturated", 0.0) > SATURATED:
            return f"{100 * row['saturated']:.1f} % of the chains' pixels are at their bounds"
        if "accuracy" in row:
            mean = MEMORY * memory.get("mean", self.chance) + (1 - MEMORY) * row["accuracy"]
            peak = max(memory.get("peak", self.chance), mean)
            memory |= {"mean": mean, "peak": peak}
            if mean < COLLAPSED * peak and peak > 3 * self.chance:
                return f"training accuracy fell to {100 * mean:.1f} % from {100 * peak:.1f} %"
        return None


def fetch(window):
    """The scalars of a window of steps [{name: tensor}] as numbers, by one copy from the device."""
    names = list(window[0])
    values = torch.stack([torch.stack([m[k] for k in names]) for m in window]).tolist()
    return [dict(zip(names, row, strict=True)) for row in values]


def save_last(run_dir, state, args, epoch, log):
    """Write RUN/last.pt. The one that stood there goes on as good.pt if the run has survived it for
    --good_after steps: what a run goes back to must not be poisoned already."""
    last = Path(run_dir) / "last.pt"
    survived = last.exists() and state.step - state.saved_at >= args.good_after
    state.log_lines, state.saved_at = log.lines, state.step
    checkpoint.save(last, state, args, epoch, keep_as="good.pt" if survived else None)


def roll_back(step, cause, run_dir, state, args, fresh, log):
    """Put ``state`` back to what the run had survived for --good_after steps before the fault at
    ``step``: last.pt, else good.pt, else ``fresh()``; with other random numbers from there on, and
    the learning rate lowered by --rollback_lr_factor. The outcome is saved as last.pt at once, so
    that a crash cannot undo the decision."""
    stream, lr_factor = state.stream + 1, state.lr_factor * args.rollback_lr_factor
    best = state.best  # best.pt stays the best of the whole run, what was rolled back included
    for name in ("last.pt", "good.pt"):
        path = Path(run_dir) / name
        if path.exists() and step - checkpoint.step_of(path) > args.good_after:
            checkpoint.restore(state, path, args)
            break
    else:
        vars(state).update(vars(fresh(stream)))
    state.stream, state.lr_factor, state.best = stream, lr_factor, best
    log.write("rollback", step, to_step=state.step, cause=cause, rollbacks=stream)
    state.log_lines, state.saved_at = log.lines, state.step
    checkpoint.save(Path(run_dir) / "last.pt", state, args, None)


class Stop:
    """Why to stop early: SIGTERM, SIGINT or --max_minutes. A second signal quits at once."""

    def __init__(self, max_minutes):
        self.why, self.deadline = None, time.monotonic() + 60 * (max_minutes or math.inf)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.why = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def reason(self):
        return self.why or ("max_minutes" if time.monotonic() > self.deadline else None)
