"""Tables with only our numbers: variants compared over seeds, and the published models."""

import statistics

from scripts.tables import sources
from scripts.tables.cells import NOTHING, commits, described, listed, rollbacks
from utils.files import records

MARGIN = {"attack": "margin", "norm": "linf", "eps_255": 2.0}
LOG_P_X = {"score": "log_p_x"}
COMPARED = {  # column: (metric, protocol to match, factor)
    "accuracy %": ("accuracy", {}, 100), "ECE %": ("ece", {}, 100), "gap": ("energy_gap", {}, 1),
    "fd_features": ("fd_features", {}, 1), "L∞ 2/255 %": ("robust_accuracy", MARGIN, 100),
    "L∞ 16/255 %": ("robust_accuracy", MARGIN | {"eps_255": 16.0}, 100),
    "recalibrated: accuracy %": ("accuracy", {"recalibrated": True}, 100),
    "recalibrated: ECE %": ("ece", {"recalibrated": True}, 100),
    "AUROC CIFAR-100": ("auroc", LOG_P_X | {"out": "cifar100"}, 1),
    "SVHN": ("auroc", LOG_P_X | {"out": "svhn"}, 1),
    "AUROC interp": ("auroc", LOG_P_X | {"out": "interp"}, 1),
    "interp by confidence": ("auroc", {"score": "max_p_y", "out": "interp"}, 1),
    "AUROC uniform": ("auroc", LOG_P_X | {"out": "uniform"}, 1)}
PUBLISHED = {  # column: (metric, protocol to match, factor, the paper's number for M = 5)
    "accuracy %": ("accuracy", {"split": "test"}, 100, ("table2", "accuracy", {})),
    "ECE %": ("ece", {"split": "test"}, 100, None),
    "AUROC log p(x), CIFAR-100": ("auroc", LOG_P_X | {"out": "cifar100"}, 1,
                                  ("table7", "auroc", LOG_P_X | {"out": "cifar100"})),
    "interp": ("auroc", LOG_P_X | {"out": "interp"}, 1,
               ("table7", "auroc", LOG_P_X | {"out": "interp"})),
    "SVHN": ("auroc", LOG_P_X | {"out": "svhn"}, 1,
             ("table7", "auroc", LOG_P_X | {"out": "svhn"})),
    "L∞ 2/255 %": ("robust_accuracy", MARGIN, 100, None),
    "L∞ 8/255 %": ("robust_accuracy", MARGIN | {"eps_255": 8.0}, 100, None),
}
MINUTES = ("Minutes: the mean over seeds of the time of training steps, diverged runs and undone "
           "steps included, with other work on the machine.")


def markdown_row(cells):
    return f"| {' | '.join(cells)} |"


def compared(title, own_records, command):
    """A table of methods, each trained with one setting and several seeds, by ``command``.

    It gives means ± standard deviation over the seeds that did not diverge (with their number if
    not all did), the numbers of diverged seeds and of rollbacks, and the mean minutes of a seed's
    training where they are known.
    """
    columns = [c for c in COMPARED if any(fills(r, c) for r in own_records)]
    timed = any(seconds(own_records))
    head = ["", *columns, "seeds", "diverged", "rollbacks", *["minutes†"] * timed]
    lines = [f"### {title}", "", markdown_row(head),
             markdown_row(["---"] + ["---:"] * (len(head) - 1))]
    used, in_time = [], sources.by_time(own_records)
    rows = dict.fromkeys((r["method"], r["dataset"]) for r in own_records
                         if r["metric"] in ("accuracy", "diverged"))
    datasets = list(dict.fromkeys(dataset for _, dataset in rows))
    for method, dataset in rows:
        of_row = sources.of_row(method, dataset, in_time)
        lost = sources.diverged(of_row)
        cells = [mean(of_row, column, lost) for column in columns]
        seeds = {sources.seed_of(r) for r in of_row}
        counts = [str(n) for n in (len(seeds), len(lost), sum(rollbacks(of_row).values()))]
        if timed:
            counts.append(minutes(of_row))
        where = f" {dataset}" * (len(datasets) > 1)
        lines.append(markdown_row([f"`{method}`{where}", *cells, *counts]))
        used += [r for r in of_row if any(fills(r, c) for c in columns)]
    about = (f"{', '.join(datasets)}: {described(used, whole=False)}, {commits(used)}" if used
             else "")
    last = f"† {about}; `{command}`. {counted(used, columns)}" + f" {MINUTES}" * timed
    return "\n".join([*lines, "", last])


def fills(record, column):
    """Whether a record's value, on the test split, stands in this column."""
    metric, wanted, _ = COMPARED[column]
    protocol = {"split": "test"} | (record["protocol"] or {})
    protocol["recalibrated"] = bool(protocol.get("recalibrate_bn"))
    wanted = {"split": "test", "recalibrated": False} | wanted
    return record["metric"] == metric and protocol | wanted == protocol


def counted(used, columns):
    """What the columns' numbers were measured on, and the judge of fd_features."""
    of = {}
    for column in columns:
        counts = listed(r["n"] for r in used if fills(r, column) and r["n"] > 1)  # a gap's is 1
        if counts:
            of.setdefault(counts, []).append(column.removesuffix(" %"))
    words = [f"n is {counts} for {', '.join(names)}." for counts, names in of.items()]
    judged = [r["protocol"] for r in used if r["metric"] == "fd_features"]
    judges = dict.fromkeys(f"in the features of classifier {p['features_sha256'][:8]}, against "
                           f"{p['n_reference']:,} images of {p['reference']}" for p in judged)
    return " ".join([*words, *(f"fd_features is not FID: Fréchet distance {judge}."
                               for judge in judges)])


def mean(of_row, column, lost):
    """The cell of one method and column, from the latest record of each seed."""
    latest = sources.comparable({sources.seed_of(r): r for r in of_row if fills(r, column)})
    x = [COMPARED[column][2] * r["value"] for seed, r in latest.items() if seed not in lost]
    spread = f" ± {statistics.stdev(x):.2f}" if len(x) > 1 else ""
    if x and len(x) < len({sources.seed_of(r) for r in of_row}):
        spread += f" (n={len(x)})"
    return f"{statistics.mean(x):.2f}{spread}†" if x else NOTHING


def seconds(own_records):
    """The seconds of training of each seed, from the records of its last step."""
    return {sources.seed_of(r): r["seconds"] for r in own_records
            if r["metric"] == "steps" and r.get("seconds")}


def minutes(of_row):
    """The cell of the minutes that a seed's training took."""
    taken = seconds(of_row).values()
    return f"{statistics.mean(taken) / 60:,.1f}" if taken else NOTHING


def distances(title, own_records):
    """A table of fd_features, the nearest images first: the latest record of each row."""
    latest = {r["method"]: r for r in sources.by_time(own_records) if r["metric"] == "fd_features"}
    lines = [f"### {title}", "", markdown_row(["images", "fd_features", "n", "against"]),
             markdown_row(["---"] + ["---:"] * 3)]
    for method, r in sorted(latest.items(), key=lambda pair: pair[1]["value"]):
        against = f"{r['protocol']['reference']}, {r['protocol']['n_reference']:,}"
        lines.append(markdown_row([method, f"{r['value']:.3g}†", f"{r['n']:,}", against]))
    judges = ", ".join(dict.fromkeys(r["protocol"]["features_sha256"][:8] for r in latest.values()))
    return "\n".join([*lines, "", f"† not FID: the Fréchet distance in the features of classifier "
                      f"{judges}; `bash scripts/judge.sh`."])


def published(title, folder, numbers):
    """A table of the models in results/models and the paper's M = 5, from the models' records."""
    def find(lines, wanted):
        wanted = {"recalibrate_bn": None} | wanted  # the checkpoint as it is
        return next((r for r in reversed(lines) if all(
            r.get(k, r.get("protocol", {}).get(k)) == v for k, v in wanted.items())), None)

    lines = [f"### {title}", "", markdown_row(["model", "weight of log p(x)", *PUBLISHED]),
             markdown_row(["---"] + ["---:"] * (1 + len(PUBLISHED)))]
    words = ["paper, JEM++ (M=5)", "1"]
    for _, _, _, paper in PUBLISHED.values():
        found = paper and find(numbers, {"row": "JEM++ (M=5)", "dataset": "cifar10",
                                         "table": paper[0], "column": paper[1]} | paper[2])
        words.append(found["printed"] if found else NOTHING)
    lines.append(markdown_row(words))
    for path in sorted(folder.glob("models/*/*.jsonl")):
        of_model = records.read_jsonl(path)
        weight = (of_model[-1].get("training") or {}).get("p_x_weight") if of_model else None
        words = [NOTHING if weight is None else f"{weight:g}"]
        for metric, protocol, factor, _ in PUBLISHED.values():
            r = find(of_model, {"metric": metric} | protocol)
            words.append(f"{factor * r['value']:.{2 if factor == 1 else 1}f}†" if r else NOTHING)
        model = path.parent.name
        link = f"[{model}](models/{model}/README.md)"
        lines.append(markdown_row([link if path.stem == "records" else f"{link}, {path.stem}",
                                   *words]))
    return "\n".join([*lines, "", "† far smaller than the paper's protocol: each model's page says "
                      "how it was trained, and n of each number."])
