"""Pictures and figures, saved as small PNGs."""

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # a $ in a label is a dollar
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from matplotlib.ticker import LogFormatter  # noqa: E402
from PIL import Image  # noqa: E402

from utils.files.records import replacing  # noqa: E402


def to_uint8(x):
    """Convert images in [-1, 1] to uint8, clamped and rounded. All output goes through here."""
    return x.detach().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def grid(x, columns=10, side=640):
    """Images [n, 3, H, W] in [-1, 1] as one uint8 picture [3, h, w], about ``side`` pixels wide.

    Each image is magnified by a whole number.
    """
    factor = max(1, round(side / (columns * x.shape[-1])))
    x = to_uint8(x).cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return tiled(x, columns)


def tiled(x, columns, gap=2):
    """Images [n, 3, h, w], n > 0, in rows of ``columns`` on white, as one picture [3, H, W].

    torchvision's make_grid does the same, but its import is half of a program's start.
    """
    columns = min(columns, len(x))
    x = F.pad(x, (gap, 0, gap, 0), value=255)
    missing = -len(x) % columns
    x = torch.cat([x, x.new_full((missing, *x.shape[1:]), 255)])
    rows = x.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)
    return F.pad(rows.flatten(1, 2).flatten(2), (0, gap, 0, gap), value=255)


def save_image(path, picture):
    """Write a uint8 picture [3, h, w] as PNG."""
    with replacing(path) as file:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, format="PNG")


def save_figure(path, figure):
    """Write a matplotlib figure as a small PNG and close it."""
    figure.tight_layout()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def reliability_diagram(bins, ece, title):
    """Accuracy in each confidence bin against the diagonal, and each bin's share (Fig. 10)."""
    figure, (top, below) = plt.subplots(2, 1, figsize=(4.2, 5), sharex=True,
                                        gridspec_kw={"height_ratios": [3, 1]})
    middle, width = bins.edges[:-1] + np.diff(bins.edges) / 2, np.diff(bins.edges)
    full = bins.count > 0
    low, high = (f(bins.accuracy, bins.confidence)[full] for f in (np.minimum, np.maximum))
    top.bar(middle[full], bins.accuracy[full], width[full], color="tab:blue", edgecolor="white",
            label="accuracy")
    top.bar(middle[full], high - low, width[full], bottom=low, color="none", edgecolor="tab:red",
            hatch="////", linewidth=0.8, label="gap to confidence")
    top.plot([0, 1], [0, 1], "--", color="0.3", linewidth=1)
    top.set(ylabel="accuracy", ylim=(0, 1), title=f"{title}, ECE {100 * ece:.2f} %")
    top.title.set_fontsize(8)
    top.legend(loc="upper left", fontsize=7, framealpha=0.9)
    below.bar(middle, bins.count / bins.count.sum(), width, color="0.6", edgecolor="white")
    below.set(xlabel="confidence max p(y|x)", ylabel="share", xlim=(0, 1))
    return figure


def score_histograms(score_in, outs, name_in, score_name, title):
    """One panel per out set, with the densities of a score on it and on the in set (Table 8)."""
    columns = min(3, len(outs))
    rows = -(-len(outs) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.4 * rows + 0.5),
                                squeeze=False)
    for axis in axes.flat[len(outs):]:
        axis.axis("off")
    for axis, (name_out, score_out) in zip(axes.flat[:len(outs)], outs.items(),
                                                strict=True):
        low, high = np.percentile(np.concatenate([score_in, score_out]), [0.5, 99.5])
        edges = np.linspace(low, max(high, low + 1e-6), 51)
        for values, name, color in ((score_in, name_in, "tab:blue"),
                                    (score_out, name_out, "tab:orange")):
            inside = np.clip(values, edges[0], edges[-1])
            axis.hist(inside, edges, density=True, alpha=0.55, color=color, label=name)
        axis.legend(fontsize=7)
        axis.set_yticks([])
        axis.set_xlabel(score_name, fontsize=8)
        axis.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=9)
    return figure


def robustness_curves(curves, norm, title):
    """Accuracy against budget (Fig. 9).

    ``curves`` is {(label, attack): (eps, accuracy)}, or (eps, mean, spread) in place of the pair.
    Each label has a colour, each attack a line style.
    """
    figure, axis = plt.subplots(figsize=(5, 3.6))
    labels = list(dict.fromkeys(label for label, _ in curves))
    styles = {"pgd": "o-", "margin": "s--", "autoattack": "^:"}
    for (label, attack), (eps, accuracy, *spread) in curves.items():
        axis.errorbar(eps, 100 * np.asarray(accuracy),
                      yerr=100 * np.asarray(spread[0]) if any(map(any, spread)) else None,
                      fmt=styles[attack], color=f"C{labels.index(label)}", capsize=2,
                      markersize=3.5, linewidth=1.3, label=f"{label}, {attack}")
    axis.set(xlabel="ε · 255, L∞" if norm == "linf" else "ε, L2 (images in [0, 1])",
             ylabel="accuracy, %", ylim=(0, 100), title=title)
    axis.title.set_fontsize(9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure


# The logged quantities by panel: {name in train.jsonl: name in the legend}.
CURVES = {
    "loss and its terms": {"loss": "loss", "ce": "cross-entropy", "l2_pos": "λ E(x+)²",
                           "l2_neg": "λ E(x−)²"},
    "energies": {"e_pos": "E(x+)", "e_neg": "E(x−)", "e_pos_y": "E(x+, y)", "e_neg_y": "E(x−, y)"},
    "energy gap E(x+) − E(x−)": {"gap": "gap"},
    "mean age of the chains, sampler steps": {"chain_age": "age"},
    "gradient norm": {"grad_norm": "norm"},
    "accuracy": {"accuracy": "training batches", "valid_accuracy": "validation",
                 "test_accuracy": "test"},
    "learning rate": {"lr": "rate"},
}


def training_curves(logs, title):
    """Logged quantities against the step. ``logs`` is {label: the lines of RUN/train.jsonl}.

    With one run, each quantity of a panel has a colour. With several, each run has a colour and
    each quantity a line style. Dotted vertical lines mark rollbacks, solid ones final divergences.
    """
    logged = {key for log in logs.values() for line in log for key in line}
    panels = {name: {key: words for key, words in names.items() if key in logged}
              for name, names in CURVES.items() if names.keys() & logged}
    columns, rows = min(3, max(1, len(panels))), max(1, -(-len(panels) // 3))
    figure, axes = plt.subplots(rows, columns, squeeze=False,
                                figsize=(3.5 * columns, 0.5 + 2.4 * rows))
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (name, names) in zip(axes.flat[:len(panels)], panels.items(), strict=True):
        draw_logs(axis, logs, names)
        axis.set_title(name, fontsize=9)
        if name == "gradient norm":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter())  # the default writes mathtext
        axis.tick_params(which="both", labelsize=7)
        axis.grid(alpha=0.3)
        if len(names) > 1 or len(logs) > 1:
            axis.legend(fontsize=6)
    figure.supxlabel("step", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def draw_logs(axis, logs, names):
    """Draw one panel, a line for each run of ``logs`` and each key of ``names``."""
    alone = len(logs) == 1
    for i, (label, log) in enumerate(logs.items()):
        for j, (key, words) in enumerate(names.items()):
            if not any(key in line for line in log):
                continue
            steps, values = series(log, key)
            words = [label] * (not alone) + [words] * (alone or len(names) > 1)
            axis.plot(steps, values, color=f"C{j if alone else i}", linewidth=1, markersize=3,
                      linestyle="-" if alone else ("-", "--", ":", "-.")[j],
                      marker="." if len(steps) < 50 else None, label=", ".join(words))
        for line in log:
            diverged = line.get("reason") == "diverged"
            if line["kind"] == "rollback" or diverged:
                axis.axvline(line["step"], color="tab:red" if alone else f"C{i}", linewidth=1,
                             linestyle="-" if diverged else ":")


def series(log, key):
    """(steps, values) of ``key`` in a log. A NaN breaks the line at a rollback.

    Logs store values that are not finite as strings, which float() parses.
    """
    points = [(line["step"], np.nan if line["kind"] == "rollback" else float(line[key]))
              for line in log if line["kind"] == "rollback" or line.get(key) is not None]
    return tuple(zip(*points, strict=True)) or ((), ())


def image_rows(rows, names, title, columns=None):
    """Rows of images [n_i, 3, H, W] in [-1, 1], each labelled with its name."""
    columns = columns or max(len(row) for row in rows)
    padded = [torch.cat([row.cpu(), torch.ones(columns - len(row), *row.shape[1:])])
              for row in rows]
    height, factor = rows[0].shape[-2], max(1, 48 // rows[0].shape[-1])
    picture = to_uint8(torch.cat(padded)).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    picture = tiled(picture, columns).permute(1, 2, 0).numpy()
    pixels_per_inch = 100
    figure, axis = plt.subplots(figsize=(picture.shape[1] / pixels_per_inch + 0.8,
                                         picture.shape[0] / pixels_per_inch + 0.6))
    axis.imshow(picture, interpolation="nearest")
    step = factor * height + 2
    axis.set_yticks([step * (k + 0.5) for k in range(len(rows))], names, fontsize=7)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=8)
    return figure
