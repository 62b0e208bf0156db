"""The cells of the paper's tables: our number from the records, its † and its footnote."""

import statistics
from typing import NamedTuple

from scripts.tables.protocol import papers_training
from scripts.tables.sources import comparable, diverged, measures, of_row, seed_of, timed

NOTHING = "–"
OURS_ALONE, PAPER_ALONE = ("fd_features", "iteration_ms"), ("minutes_per_epoch",)
NOT_APPLICABLE = ("", "N/A")  # the paper prints these where there is nothing to measure
FORMAT = {"accuracy": (100, 1), "ece": (100, 2), "is_mean": (1, 2), "fid": (1, 1),  # scale, digits
          "fd_features": (1, 2), "auroc": (1, 2), "speedup": (1, 2), "iteration_ms": (1, 0)}
IN_EVERY_FOOTNOTE = ("network", "depth", "width", "n_epochs", "n_train", "step", "batch_size")
AT_LEAST = ("n_epochs",)  # may exceed the paper's; all other arguments must equal it


class Cell(NamedTuple):
    """Our cell: text, mean in the record's unit, and a footnote if it falls short of the paper."""

    text: str
    value: float | None = None
    footnote: str | None = None
    extras: tuple = ()


def shown(number, value, signed=False):
    scale, digits = FORMAT[number["column"]]
    return f"{scale * value:{'+' * signed},.{digits}f}"


def cell_of(number, records, timings, full_scale):
    """Our cell for one number of the paper."""
    if number["column"] in PAPER_ALONE:
        return Cell("")
    cell = (time_cell(number, timings, full_scale)
            if number["column"] in ("speedup", "iteration_ms") else
            metric_cell(number, of_row(number["row"], number["dataset"], records), full_scale))
    return Cell("") if cell.text == NOTHING and number["printed"] in NOT_APPLICABLE else cell


def metric_cell(number, records, full_scale):
    """Mean ± sample standard deviation over seeds, from the latest record of each.

    A seed that diverged is listed with its step and is not part of the mean.
    """
    lost = diverged(records)
    latest = comparable({seed_of(r): r for r in records if measures(r, number)})
    kept = [r for seed, r in latest.items() if seed not in lost]
    values, words = [r["value"] for r in kept], []
    if kept:
        words.append(shown(number, statistics.fmean(values)))
        if len(kept) > 1:
            words[0] += f" ± {shown(number, statistics.stdev(values))} (n={len(kept)})"
    if lost:
        seeds = {seed_of(r) for r in records}
        words.append(divergence(number, lost, latest, len(seeds)))
    if not words:
        return Cell(NOTHING)
    if n := sum(rollbacks(records).values()):
        words.append(f"{n} rollback{'s' * (n > 1)}")
    return Cell("; ".join(words), statistics.fmean(values) if kept else None,
                *provenance(number, [*kept, *lost.values()], full_scale))


def rollbacks(records):
    """{seed: the number of rollbacks of its run}, for seeds whose records tell."""
    return {seed_of(r): r["protocol"].get("rollbacks", 0) for r in records
            if r["metric"] == "steps"}


def divergence(number, lost, latest, n_seeds):
    """"2 of 3 diverged (steps 120, 340)", with the values of the last good checkpoints."""
    runs = sorted(lost.values(), key=lambda r: r["value"])
    steps = ", ".join(f"{r['value']:,.0f}" for r in runs)
    before = [shown(number, latest[seed]["value"]) for seed in map(seed_of, runs) if seed in latest]
    reached = f"last good checkpoint {', '.join(before)}" if before else ""
    if n_seeds == 1:
        return f"diverged at step {steps}" + f" ({reached})" * bool(reached)
    return (f"{len(runs)} of {n_seeds} diverged (step{'s' * (len(runs) > 1)} {steps}"
            + f"; {reached}" * bool(reached) + ")")


def time_cell(number, timings, full_scale):
    """Speed-up or ms per iteration, from the latest run with this sampler and its reference."""
    for record in reversed(timings):
        s = timed(record)
        if record["dataset"] != number["dataset"] or any(
                s[key] != number.get(key) for key in ("n_steps", "in_steps")):
            continue
        reference = [r["value"] for r in timings if r["method"] == s["reference"]
                     and timed(r)["run"] == s["run"]]
        if reference:
            value = record["value"]
            value = reference[-1] / value if number["column"] == "speedup" else value
            return Cell(shown(number, value), value, *provenance(number, [record], full_scale))
    return Cell(NOTHING)


def delta(number, cell):
    """Ours - paper, in the paper's unit, with its sign."""
    if cell.value is None or number["value"] is None:
        return NOTHING if cell.text else ""
    return shown(number, cell.value - number["value"], signed=True)


def shortfalls(number, record, full_scale):
    """{setting: (found, the paper's)} where a record falls short of the paper's protocol.

    Settings that the record does not mention are ignored.
    """
    if record["metric"] == "iteration_ms":
        return fewer(timed(record), papers_training(number["row"], number["dataset"]),
                     ("depth", "width", "batch_size"))
    trained = record["training"] or {}
    wanted = papers_training(number["row"], number["dataset"])
    short = fewer(trained, wanted, wanted)
    for name in ("global_batch_size", "labelled_batch"):
        if trained.get(name) == trained.get("batch_size"):  # the batch size in other words
            short.pop(name, None)
    found = {"n_train": trained.get("n_train")}
    if record["metric"] != "diverged":
        found |= record["protocol"] | {"n": record["n"]}
    about = {"row": number["row"], "dataset": number["dataset"], "out": number.get("out"),
             "of": number["column"], "selection": number.get("selection")}
    for line in full_scale:
        have, wanted = found.get(line["column"]), line["value"]
        applies = all(value in line.get(key, [value]) for key, value in about.items())
        if applies and have is not None and (
                have < wanted if line["compare"] == "at least" else have != wanted):
            short[line["column"]] = have, wanted
    if trained and record["metric"] != "diverged" and trained["step"] < all_steps(trained):
        short["step"] = trained["step"], all_steps(trained)
    return short


def fewer(found, wanted, names):
    """{name: (found, wanted)} where the two differ, or, for AT_LEAST, where found is less."""
    return {name: (found[name], wanted[name]) for name in names
            if name in found and (found[name] < wanted[name] if name in AT_LEAST
                                  else found[name] != wanted[name])}


def all_steps(s):
    """Steps of a whole training, without partial batches. 0 if unknown."""
    batch = s.get("labelled_batch", s["batch_size"])
    return s["n_epochs"] * ((s["n_train"] or 0) // batch)


def provenance(number, used, full_scale):
    """(footnote or None, additions to it) for the records that a cell is made from."""
    short = {}
    for record in used:
        short |= shortfalls(number, record, full_scale)
    where = {"n": f" of {number['column']}", "n_out": f" of {number.get('out')}"}
    extras = [f"{name}{where.get(name, '')} {word(have)} (paper {word(wanted)})"
              for name, (have, wanted) in short.items() if name not in IN_EVERY_FOOTNOTE]
    origins = {r["protocol"]["origin"] for r in used if "origin" in (r["protocol"] or {})}
    if origins:  # the user's own files, given the name of the paper's out set
        extras.append(f"{number['out']} from {listed(origins)}")
    judges = [str(r["protocol"].get("features_sha256"))[:8] for r in used
              if r["metric"] == "fd_features"]
    if judges:
        extras.append("fd_features, which is not FID: Fréchet distance in the features of "
                      f"classifier {listed(judges)}")
    foreign = any(r["metric"] != "iteration_ms" and seed_of(r) is None for r in used)
    if not (short or extras or foreign):
        return None, ()
    # What rows may differ in comes apart from the footnote, so that they share one.
    return described(used), (commits(used), *epochs(used), *extras)


def epochs(used):
    """["measured after epochs 8, 9"] where best.pt is older than the end, else []."""
    after = {r["checkpoint"]["epoch"]: r["training"]["n_epochs"] for r in used
             if r["training"] and (r.get("checkpoint") or {}).get("epoch")}
    if all(epoch >= whole for epoch, whole in after.items()):
        return []
    return [f"measured after epoch{'s' * (len(after) > 1)} {listed(after)}"]


def word(value):
    """5000 -> "5,000"; 1.0 -> "1"; True -> "on"; [25, 50] -> "25 50"."""
    if isinstance(value, list):
        return " ".join(map(word, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else f"{value:,}"


def listed(values):
    """[1, 2, 3] -> "1–3"; [1, 5000] -> "1, 5,000"; strings are joined by commas."""
    values = sorted(set(values))
    if any(isinstance(v, str) for v in values):
        return ", ".join(values)
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}–{values[-1]}"
    return ", ".join(f"{v:,}" for v in values)


def described(used, whole=True):
    """Network, training, seeds and machine of records trained with the same settings.

    ``whole``: if a run stopped early, also give the number of steps of the whole training.
    """
    last = used[-1]
    if last["metric"] == "iteration_ms":
        s = timed(last)
        network = (last.get("training") or {}).get("network", f"WRN-{s['depth']}-{s['width']}")
        words = [f"the time of an iteration of {network}", f"batch {s['batch_size']}",
                 f"median of {last['n']} turns"]
        words += [f"{name} {last['protocol'][name]}" for name in ("amp", "compile")
                  if last["protocol"].get(name, "off") != "off"]
    else:
        own = [r for r in used if r["training"]]
        words = training_words(own[-1]["training"], own, whole) if own else []
        if foreign := [str(r["checkpoint"]["sha256"])[:8] for r in used if not r["training"]]:
            words.append(f"weights trained by others (sha256 {listed(foreign)})")
    return ", ".join(dict.fromkeys([*words, *map(machine, used)]))


def training_words(s, used, whole):
    """["WRN-10-1", "3 epochs of 4,800 images (450 steps)", "batch 32", "seeds 1–3"]"""
    images = f"{s['n_train']:,}" if s["n_train"] else "all"
    ended = [r["training"] for r in used if r["metric"] != "diverged"]  # others' steps: in the cell
    steps = listed([t["step"] for t in ended])
    missing = [all_steps(t) for t in ended if t["step"] < all_steps(t)]
    of_all = f" of {listed(missing)}" if missing and whole else ""
    epochs, batches, seeds = (listed([r["training"][name] for r in used])
                              for name in ("n_epochs", "batch_size", "seed"))
    trained = [r["training"] for r in used]
    networks = dict.fromkeys(t.get("network", f"WRN-{t['depth']}-{t['width']}") for t in trained)
    return [" and ".join(networks), f"{epochs} epoch{'s' * (epochs != '1')} of {images} images"
            + f" ({steps}{of_all} steps)" * bool(steps), f"batch {batches}",
            f"seed{'s' * ('–' in seeds or ',' in seeds)} {seeds}"]


def machine(record):
    env = record["env"]
    return f"cpu ({env['cpu']})" if env["device"] == "cpu" else env["device"]


def commits(used):
    """"commit 33ad54b", or "trained at 14c7b30 with changes, measured at 33ad54b, 9bec867"."""
    of_a_checkpoint = [r for r in used if r.get("checkpoint")] or used  # others come from the log
    trained, measured = (
        ", ".join(dict.fromkeys(env["commit"][:7] + " with changes" * bool(env.get("dirty"))
                                if env["commit"] else "no commit" for env in envs))
        for envs in ([r.get("trained_env", r["env"]) for r in used],
                     [r["env"] for r in of_a_checkpoint]))
    return (f"trained at {trained}, measured at {measured}" if trained != measured else
            measured if measured == "no commit" else
            f"commit{'s' * (',' in measured)} {measured}")
