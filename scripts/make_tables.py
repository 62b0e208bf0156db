#!/usr/bin/env python3
"""Print the paper's tables as Markdown, paper | ours | Δ, from the records in results/.

    python scripts/make_tables.py              # on the terminal
    python scripts/make_tables.py --readme     # between the markers in README.md
    python scripts/make_tables.py --check      # exit code 1 where README.md is out of date

No number stands in this file: the paper's are in results/paper.jsonl, ours in results/TABLE.jsonl.
Ours is the mean over training seeds ± sample standard deviation, – where nothing was measured, and
carries † where its protocol is smaller than the paper's (the lines "protocol" of paper.jsonl), with
a footnote made from the records. How cells come from records is in scripts/tables/cells.py.
"""

import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.tables import sources  # noqa: E402
from scripts.tables.cells import NOTHING, OURS_ALONE, PAPER_ALONE, cell_of, delta  # noqa: E402
from utils import flags, program  # noqa: E402
from utils.files import records  # noqa: E402

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
TITLES = {
    "table2": "Table 2. Hybrid models on CIFAR-10",
    "table3": "Table 3. Test accuracy (%) on SVHN and CIFAR-100",
    "table4": "Table 4. Run time on CIFAR-10, speed-up over JEM",
    "table5": "Table 5. Ablation on CIFAR-10, M = 10, N = 5",
    "table6": "Table 6. Hyper-parameters for CIFAR-10",
    "table7": "Table 7. AUROC of out-of-distribution detection, trained on CIFAR-10",
    "ece": "Calibration (Section C.2). Expected calibration error (%), 20 bins",
}
MODELS = "Models to load (results/models)"
OURS = {
    "options": "Options past the paper, one at a time (JEM++, M = 5)",
    "precision": "bfloat16 against float32",
}
HEADS = {
    "accuracy": "accuracy %", "is_mean": "IS", "fid": "FID", "speedup": "speed-up",
    "minutes_per_epoch": "min/epoch", "fd_features": "fd_features†", "iteration_ms": "ms/iteration",
    "svhn": "SVHN", "interp": "CIFAR-10 interp", "cifar100": "CIFAR-100", "celeba": "CelebA",
    "cifar10": "CIFAR-10", "log_p_x": "log p(x)", "max_p_y": "max p(y|x)",
}
SCRIPTS = {"table4": "table4_speed", "ece": "fig10_11"}  # of the others, the table's own name
NEEDS = {  # what has to be brought along, by column or data set
    "is_mean": "IS and FID need Inception weights (`eval_jempp.py --inception_weights FILE`)",
    "fid": "IS and FID need Inception weights (`eval_jempp.py --inception_weights FILE`)",
    "svhn": "SVHN needs train_32x32.mat and test_32x32.mat in `--data_root`",
    "celeba": "CelebA is never downloaded: put its aligned images under celeba/ in `--data_root`",
}


def markdown_row(cells):
    return f"| {' | '.join(cells)} |"


def header(columns):
    """The two first lines of a table; one to three words for a number, as ``body`` has cells."""
    words = ["model"]
    several = len({n["dataset"] for n in columns}) > 1
    for number in columns:
        head = HEADS[number.get("out") or (number["dataset"] if several else number["column"])]
        if number["column"] in OURS_ALONE:
            words.append(f"{head} ours")
        elif number["column"] in PAPER_ALONE:
            words.append(f"{head} paper")
        else:
            words += [f"{head} paper", "ours", "Δ"]
    return [markdown_row(words), markdown_row(["---"] + ["---:"] * (len(words) - 1))]


def body(rows):
    """One line a row of {row: [(number, cell)]}: paper, ours, Δ, as far as the column has them."""
    for row, pairs in rows.items():
        words = [row]
        for number, cell in pairs:
            if number["column"] not in OURS_ALONE:
                words.append(number["printed"])
            if number["column"] not in PAPER_ALONE:
                words.append(cell.text + "†" * bool(cell.footnote))
            if number["column"] not in OURS_ALONE + PAPER_ALONE:
                words.append(delta(number, cell))
        yield markdown_row(words)


def footnotes(rows):
    """One † line for each way in which cells of these rows were measured."""
    notes = {}
    for row, pairs in rows.items():
        for _, cell in pairs:
            if cell.footnote:
                names, extras = notes.setdefault(cell.footnote, ({}, {}))
                names[row] = None
                extras |= dict.fromkeys(cell.extras)
    for words, (names, extras) in notes.items():
        about = ", ".join(names) if names.keys() < rows.keys() else "all rows"
        yield f"† {about}: {'; '.join([words, *extras])}"


def not_measured(table, rows):
    """The line that says what – stands for and how to measure it."""
    missing = [n for pairs in rows.values() for n, cell in pairs
               if cell.text == NOTHING and not n.get("cited")
               and n["column"] not in OURS_ALONE + PAPER_ALONE]
    if missing:
        scripts = sorted({"table4" if n["column"] == "speedup" else table for n in missing})
        needs = dict.fromkeys(NEEDS[key] for n in missing
                              for key in (n["column"], n["dataset"], n.get("out")) if key in NEEDS)
        commands = " and ".join(f"`bash scripts/{SCRIPTS.get(t, t)}.sh`" for t in scripts)
        yield "; ".join([f"{NOTHING} not measured here; measure with {commands}", *needs])


def papers_notes(rows):
    """What the paper itself says about its numbers, and whose rows it cites from elsewhere."""
    cited = [row for row, pairs in rows.items() if any(n.get("cited") for n, _ in pairs)]
    if cited:
        yield f"Results of others that the paper cites, not trained here: {', '.join(cited)}"
    notes = {}
    for row, pairs in rows.items():
        for number, _ in pairs:
            if "note" in number:
                notes.setdefault(number["note"], {})[row] = None
    yield from (f"Paper, {', '.join(names)}: {note}" for note, names in notes.items())


def section(table, title, numbers, results, full_scale):
    """A table of paper numbers beside ours, as Markdown with its footnotes."""
    timings = [r for r in results["table4"] if r["metric"] == "iteration_ms"]
    rows = {}
    for number in sources.with_ours_alone(numbers, results[table], timings):
        cell = cell_of(number, results[table], timings, full_scale)
        rows.setdefault(number["row"], []).append((number, cell))
    columns = [number for number, _ in next(iter(rows.values()))]
    lines = [f"### {title}", "", *header(columns), *body(rows)]
    for line in (*footnotes(rows), *not_measured(table, rows), *papers_notes(rows)):
        lines += ["", f"{line}."]
    return "\n".join(lines)


def hyper_parameters(title, numbers):
    """Table 6 beside the defaults of our flags."""
    parser = program.parser("")
    flags.add_sampler(parser)
    ours = vars(parser.parse_args([]))
    lines = [f"### {title}", "", *map(markdown_row, (["variable", "paper", "flag", "our default"],
                                                     ["---", "---:", "---", "---:"]))]
    lines += [markdown_row([n["row"].replace("|", r"\|"), n["printed"], f"`--{n['column']}`",
                            f"{ours[n['column']]:g}"]) for n in numbers]
    for number in numbers:
        if "note" in number:
            lines += ["", f"Paper, {number['row']}: {number['note']}."]
    return "\n".join(lines)


def compared(title, own_records, script):
    """A table of ours alone: each method's mean over seeds ± standard deviation, and how many."""
    shown = {"accuracy": ("accuracy %", 100), "ece": ("ECE %", 100), "energy_gap": ("gap", 1)}
    values, lost, about = {}, set(), {}
    for r in own_records:
        run = r["method"], sources.seed_of(r)
        if r["metric"] == "diverged":
            lost.add(run)
        if r["metric"] in shown and r["protocol"].get("split", "test") == "test":
            values.setdefault(run[0], {}).setdefault(r["metric"], {})[run[1]] = r["value"]
            t, env = r["training"], r["env"]
            n_train = f"{t['n_train']:,} images" if t["n_train"] else "all images"
            about[f"WRN-{t['depth']}-{t['width']}, M={t['n_steps']}, {t['n_epochs']} epochs of "
                  f"{n_train} of {t['dataset']}, batch {t['batch_size']}, {env['device']} "
                  f"({env['cpu']}), commit {str(env['commit'])[:7]}"] = None
    head = ["", *(words for words, _ in shown.values()), "seeds"]
    lines = [f"### {title}", "", markdown_row(head), markdown_row(["---"] + ["---:"] * 4)]
    for method, by_metric in values.items():
        cells = []
        for metric, (_, factor) in shown.items():
            x = [factor * v for seed, v in by_metric.get(metric, {}).items()
                 if (method, seed) not in lost]
            spread = f" ± {statistics.stdev(x):.2f}" if len(x) > 1 else ""
            cells.append(f"{statistics.mean(x):.2f}{spread}†" if x else NOTHING)
        seeds = {seed for by_seed in by_metric.values() for seed in by_seed}
        n_lost = sum((method, seed) in lost for seed in seeds)
        diverged = f", {n_lost} diverged and not counted" * bool(n_lost)
        lines.append(markdown_row([f"`{method}`", *cells, f"{len(seeds)}{diverged}"]))
    return "\n".join([*lines, "", f"† {'; '.join(about)}; `bash scripts/{script}.sh`."])


PUBLISHED = {  # column: (metric, what its protocol says, factor, the paper's number for M = 5)
    "accuracy %": ("accuracy", {"split": "test"}, 100, ("table2", "accuracy", {})),
    "ECE %": ("ece", {"split": "test"}, 100, None),
    "AUROC log p(x), CIFAR-100": ("auroc", {"score": "log_p_x", "out": "cifar100"}, 1,
                                  ("table7", "auroc", {"score": "log_p_x", "out": "cifar100"})),
    "interp": ("auroc", {"score": "log_p_x", "out": "interp"}, 1,
               ("table7", "auroc", {"score": "log_p_x", "out": "interp"})),
    "L∞ 2/255 %": ("robust_accuracy", {"attack": "margin", "norm": "linf", "eps_255": 2.0}, 100,
                   None),
    "L∞ 8/255 %": ("robust_accuracy", {"attack": "margin", "norm": "linf", "eps_255": 8.0}, 100,
                   None),
}


def published(title, folder, numbers):
    """The models of results/models beside the paper's M = 5, by the records next to their files."""
    def find(lines, wanted):
        return next((r for r in lines if all(r.get(k, r.get("protocol", {}).get(k)) == v
                                             for k, v in wanted.items())), None)

    lines = [f"### {title}", "", markdown_row(["model", *PUBLISHED]),
             markdown_row(["---"] + ["---:"] * len(PUBLISHED))]
    words = ["paper, JEM++ (M=5)"]
    for _, _, _, paper in PUBLISHED.values():
        found = paper and find(numbers, {"row": "JEM++ (M=5)", "dataset": "cifar10",
                                         "table": paper[0], "column": paper[1]} | paper[2])
        words.append(found["printed"] if found else NOTHING)
    lines.append(markdown_row(words))
    for path in sorted(folder.glob("models/*/*.jsonl")):
        of_model, words = records.read_jsonl(path), []
        for metric, protocol, factor, _ in PUBLISHED.values():
            r = find(of_model, {"metric": metric} | protocol)
            words.append(f"{factor * r['value']:.{2 if factor == 1 else 1}f}†" if r else NOTHING)
        model = path.parent.name
        link = f"[{model}](results/models/{model}/README.md)"
        lines.append(markdown_row([link if path.stem == "records" else f"{link}, {path.stem}",
                                   *words]))
    return "\n".join([*lines, "", "† far smaller than the paper's protocol: each model's page says "
                      "how it was trained, and n of each number."])


def all_tables(folder):
    """{title: Markdown} of every table, in the paper's order; Table 7 is one for each score. Ours
    alone, where there are records, come last."""
    numbers, full_scale = sources.read_paper(folder, ROOT / "results")
    results = {table: sources.read_results(folder / f"{table}.jsonl", full_scale)
               for table in TITLES}
    texts = {}
    for table, title in TITLES.items():
        of_table = [n for n in numbers if n["table"] == table]
        for sentence in sources.left_out(of_table, results[table]):
            print(f"left out: {table}.jsonl: {sentence}", file=sys.stderr)
        for score in dict.fromkeys(n.get("score") for n in of_table):
            part = [n for n in of_table if n.get("score") == score]
            full_title = f"{title}, by {HEADS[score]}" if score else title
            texts[full_title] = (hyper_parameters(title, part) if table == "table6" else
                                 section(table, full_title, part, results, full_scale))
    if any(folder.glob("models/*/records.jsonl")):
        texts[MODELS] = published(MODELS, folder, numbers)
    for table, title in OURS.items():
        own = records.read_jsonl(folder / f"{table}.jsonl")
        if own:
            texts[title] = compared(title, own, table)
    return texts


def split_readme(path):
    """(before, between, after) the two markers of a README."""
    text = path.read_text(encoding="utf-8")
    parts = re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", text)
    if len(parts) != 3 or not text.index(BEGIN) < text.index(END):
        raise program.InputError(f"{path} needs the lines {BEGIN} and {END}, once each, in this "
                                 "order")
    return parts


def disagreements(between, texts):
    """Titles of the tables that a README does not hold as they are now."""
    held = {part.splitlines()[0]: f"### {part}".strip()
            for part in re.split("^### ", between, flags=re.M)[1:]}
    wrong = [title for title in {**texts, **held} if texts.get(title) != held.get(title)]
    return wrong or ([] if between.strip() == "\n\n".join(texts.values()) else ["the text around"])


def main(argv=None):
    p = program.parser(__doc__.splitlines()[0])
    p.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR",
                   help="folder of the records; without a paper.jsonl there, results/ has it")
    p.add_argument("--print", action="store_true", help="to the terminal (without other words)")
    p.add_argument("--readme", type=Path, nargs="?", const=ROOT / "README.md", metavar="FILE",
                   help=f"write the tables between {BEGIN} and {END} of FILE (README.md)")
    p.add_argument("--check", action="store_true",
                   help="write nothing; exit code 1 if --readme and the records disagree")
    args = p.parse_args(argv)
    if not args.results.is_dir():
        raise program.InputError(f"--results {args.results} is no folder")
    texts = all_tables(args.results)
    if args.print or not (args.readme or args.check):
        print("\n\n".join(texts.values()))
    if not (args.readme or args.check):
        return program.EXIT_OK
    readme = args.readme or ROOT / "README.md"
    before, between, after = split_readme(readme)
    if args.check:
        wrong = disagreements(between, texts)
        if wrong:
            print(f"{readme} and {args.results} disagree ({'; '.join(wrong)}): run "
                  "python scripts/make_tables.py --readme", file=sys.stderr)
        return int(bool(wrong))
    with records.replacing(readme) as file:
        file.write("".join([before, BEGIN, "\n\n", "\n\n".join(texts.values()), "\n\n", END,
                            after]).encode())
    return program.EXIT_OK


if __name__ == "__main__":
    program.run(main)
