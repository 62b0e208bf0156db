"""The log of a training run: train.jsonl, TensorBoard events, pictures."""

import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from utils import distributed, plots
from utils.files import records


def means_of(rows):
    """{name: its mean over those of ``rows`` [{name: number}] that have it}."""
    values = {name: [row[name] for row in rows if name in row]
              for name in dict.fromkeys(name for row in rows for name in row)}
    return {name: sum(of_name) / len(of_name) for name, of_name in values.items()}


class RunLog:
    """``RUN/train.jsonl`` (header, steps, evaluations, one closing line), scalars and grids.

    A resumed run keeps the ``n_kept`` lines that its checkpoint counts and removes later ones. Then
    the file reads as if the run had never stopped, except for a ``resume`` line. Rollbacks remove
    nothing, so the log also shows what they undid. Only rank 0 writes.
    """

    def __init__(self, run_dir, first_step, header, n_kept=0):
        self.dir, self.lines, self.writes = Path(run_dir), 0, distributed.rank() == 0
        self.file = self.dir / "train.jsonl"
        self.since = time.monotonic(), first_step
        self.title = ", ".join([self.dir.resolve().name, header["args"]["dataset"],
                                header["network"], header["sampler"]])
        if not self.writes:
            return
        kept = records.read_log(self.dir)[:n_kept] if n_kept else []
        opening = {"kind": "resume" if kept else "header", "step": first_step, **header,
                   "time": records.now()}
        records.write_jsonl(self.file, [*kept, opening])
        self.lines = len(kept) + 1
        (self.dir / "samples").mkdir(exist_ok=True)
        self.board = SummaryWriter(self.dir, purge_step=first_step + 1)

    def write(self, kind, step, **values):
        """Write one record, and its numbers as TensorBoard scalars."""
        if not self.writes:
            return
        records.append_jsonl(self.file, {"kind": kind, "step": step, **values})
        self.lines += 1
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def start_clock(self, step):
        """Start measuring images_per_s, so that it excludes evaluating and saving."""
        self.since = time.monotonic(), step

    def steps(self, state, means):
        """Write a record of ``means``, the scalars' means over the steps since the last record.

        If chains ran, it also has ``chain_age``, the mean age of the buffer's chains now, in
        sampler steps. Every rank must call this.
        """
        seconds, n_steps = time.monotonic() - self.since[0], state.step - self.since[1]
        rate = {"lr": state.optimizer.param_groups[0]["lr"],
                "images_per_s": n_steps * state.args["labelled_batch"] / max(seconds, 1e-9)}
        gap = {"gap": means["e_pos"] - means["e_neg"]} if "e_pos" in means else {}
        chains = {}
        if "saturated" in means:
            chains = {"chain_age": state.whole_ages().double().mean().item()}
        self.write("step", state.step, **means, **gap, **chains, **rate)
        self.start_clock(state.step)

    def samples(self, name, x, step):
        """Write a grid of images [n, 3, H, W] to ``RUN/samples/name.png`` and TensorBoard."""
        if not self.writes:
            return
        picture = plots.grid(x)
        plots.save_image(self.dir / "samples" / f"{name}.png", picture)
        self.board.add_image("samples", picture, step)

    def curves(self):
        """Plot everything logged so far to ``RUN/samples/curves.png``."""
        if self.writes:
            plots.save_figure(self.dir / "samples" / "curves.png", plots.training_curves(
                {"": records.read_jsonl(self.file)}, self.title))

    def close(self, step, **values):
        self.write("end", step, **values, time=records.now())
        if self.writes:
            self.board.close()
