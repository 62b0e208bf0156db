#!/usr/bin/env python3
"""Print the paper's tables as Markdown, paper | ours | Δ, from the records in results/.

    python scripts/make_tables.py              # on the terminal
    python scripts/make_tables.py --write      # between the markers in results/README.md
    python scripts/make_tables.py --check      # exit code 1 if results/README.md is out of date

The paper's numbers are in results/paper.jsonl, ours in results/TABLE.jsonl. Ours are means over
training seeds ± sample standard deviation, or – if nothing was measured. A † marks runs that differ
from the paper's (scripts/tables/protocol.py) or measure less (the "protocol" lines of paper.jsonl).
Its footnote is made from the records. scripts/tables/cells.py makes cells from records.
scripts/tables/ours.py makes the tables that hold only our numbers.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.tables import sources  # noqa: E402
from scripts.tables.cells import NOTHING, OURS_ALONE, PAPER_ALONE, cell_of, delta  # noqa: E402
from scripts.tables.ours import compared, distances, markdown_row, published  # noqa: E402
from utils import flags, program  # noqa: E402
from utils.files import records  # noqa: E402

PAGE, FRONT = ROOT / "results" / "README.md", ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
TITLES = {
    "table2": "Table 2. Hybrid models on CIFAR-10",
    "table3": "Table 3. Test accuracy (%) on SVHN and CIFAR-100",
    "table4": "Table 4. Run time on CIFAR-10, speed-up over JEM",
    "table5": "Table 5. Ablation on CIFAR-10, M = 10, N = 5",
    "table6": "Table 6. Hyper-parameters for CIFAR-10",
    "table7": "Table 7. AUROC of out-of-distribution detection, trained on CIFAR-10",
    "ece": "Calibration (Section C.2). Expected calibration error (%), 20 bins",
    "sada_jem": "SADA-JEM on CIFAR-10, beside its own paper (CVPR 2023)",
}
MODELS = "Models to load (results/models)"
DIGITS = "The rows of Tables 2 and 5 on digits"
JUDGE = "A classifier as the judge of images"
TOGETHER = "The rows of Tables 2, 5 and 3, as a run leaves them and recalibrated"
OURS = {
    "options": "Options past the paper, one at a time (JEM++, M = 5)",
    "probes": "Short runs: one thing changed at a time",
    "precision": "bfloat16 against float32",
}
HEADS = {
    "accuracy": "accuracy %", "is_mean": "IS", "fid": "FID", "speedup": "speed-up",
    "minutes_per_epoch": "min/epoch", "fd_features": "fd_features†", "iteration_ms": "ms/iteration",
    "svhn": "SVHN", "interp": "CIFAR-10 interp", "cifar100": "CIFAR-100", "celeba": "CelebA",
    "cifar10": "CIFAR-10", "log_p_x": "log p(x)", "max_p_y": "max p(y|x)",
}
SCRIPTS = {"table4": "table4_speed", "ece": "fig10_11"}  # others are named like their table
NEEDS = {  # what the user has to provide, by column or data set
    "is_mean": "IS and FID need Inception weights (`eval_jempp.py --inception_weights FILE`)",
    "fid": "IS and FID need Inception weights (`eval_jempp.py --inception_weights FILE`)",
    "svhn": "SVHN needs train_32x32.mat and test_32x32.mat in `--data_root`",
    "celeba": "CelebA is never downloaded: put its aligned images under celeba/ in `--data_root`",
}


def header(columns):
    """The first two lines of a table. Each number has one to three columns, as in ``body``."""
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
    """One line for each row of {row: [(number, cell)]}: paper, ours, Δ, where they exist."""
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
    """Yield one † line for each different footnote of the cells of a data set."""
    notes = {}
    several = len({number["dataset"] for pairs in rows.values() for number, _ in pairs}) > 1
    for row, pairs in rows.items():
        for number, cell in pairs:
            if cell.footnote:
                where = f"{HEADS[number['dataset']]}, " * several
                names, extras = notes.setdefault((where, cell.footnote), ({}, {}))
                names[row] = None
                for extra in cell.extras:
                    extras.setdefault(extra, {})[row] = None
    for (where, words), (names, extras) in notes.items():
        about = where + (", ".join(names) if names.keys() < rows.keys() else "all rows")
        groups = {tuple(names): [words]}  # what holds for all of them first, then what for some
        for extra, of in extras.items():
            groups.setdefault(tuple(row for row in names if row in of), []).append(extra)
        yield f"† {about}: " + ". ".join(
            f"{', '.join(of)}: " * (of != tuple(names)) + "; ".join(words)
            for of, words in groups.items())


def not_measured(table, rows):
    """Yield the line that explains – and tells how to measure what is missing."""
    missing = [n for pairs in rows.values() for n, cell in pairs
               if cell.text == NOTHING and not n.get("cited")
               and n["column"] not in OURS_ALONE + PAPER_ALONE]
    if missing:
        scripts = sorted({"table4" if n["column"] == "speedup" else table for n in missing})
        needs = dict.fromkeys(NEEDS[key] for n in missing
                              for key in (n["column"], n["dataset"], n.get("out")) if key in NEEDS)
        commands = " and ".join(f"`bash scripts/{SCRIPTS.get(t, t)}.sh`" for t in scripts)
        yield "; ".join([f"{NOTHING} not measured here; measure with {commands} (the paper's size; "
                         "SCALE=cpu for a small one)", *needs])


def papers_notes(rows):
    """Yield the paper's remarks on its numbers, and which rows it cites from others."""
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


def all_tables(folder):
    """{title: Markdown} of every table, in the paper's order. Table 7 has one table per score.

    Tables with only our numbers come last, if there are records.
    """
    numbers, full_scale = sources.read_paper(folder, ROOT / "results")
    results = {table: sources.by_time(sources.read_results(folder / f"{table}.jsonl", full_scale))
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
    judged = sources.read_results(folder / "judge.jsonl", full_scale)
    if judged:
        texts[JUDGE] = distances(JUDGE, judged)
    for table, title in OURS.items():
        own = sources.read_results(folder / f"{table}.jsonl", full_scale)
        if own:
            texts[title] = compared(title, own, f"bash scripts/{table}.sh")
    rows = sources.each_run_once([results[table] for table in ("table2", "table5", "table3")])
    if any(r["protocol"].get("recalibrate_bn") for r in rows):
        texts[TOGETHER] = compared(TOGETHER, rows, "SCALE=cpu bash scripts/reproduce.sh")
    digits = sources.read_results(folder / "digits" / "rows.jsonl", full_scale)
    if digits:
        texts[DIGITS] = compared(DIGITS, digits, "bash scripts/digits.sh")
    return texts


def split_file(path):
    """The text of a file before, between and after the two markers."""
    text = path.read_text(encoding="utf-8")
    parts = re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", text)
    if len(parts) != 3 or not text.index(BEGIN) < text.index(END):
        raise program.InputError(f"{path} needs the lines {BEGIN} and {END}, once each, in this "
                                 "order")
    return parts


def disagreements(between, texts):
    """Titles of the tables that differ between the file and ``texts``."""
    held = {part.splitlines()[0]: f"### {part}".strip()
            for part in re.split("^### ", between, flags=re.M)[1:]}
    wrong = [title for title in {**texts, **held} if texts.get(title) != held.get(title)]
    return wrong or ([] if between.strip() == "\n\n".join(texts.values()) else ["the text around"])


def main(argv=None):
    p = program.parser(__doc__.splitlines()[0])
    p.add_argument("--results", type=program.path, default=ROOT / "results", metavar="DIR",
                   help="folder of the records; without a paper.jsonl there, results/ has it")
    p.add_argument("--print", action="store_true", help="to the terminal (without other words)")
    p.add_argument("--write", type=program.path, nargs="?", const=True, metavar="FILE",
                   help=f"write the tables between {BEGIN} and {END} of FILE (results/README.md, "
                        "and the table of published models in README.md)")
    p.add_argument("--check", action="store_true",
                   help="write nothing; exit code 1 if a file and the records disagree")
    args = p.parse_args(argv)
    results = Path(args.results)
    if not results.is_dir():
        raise program.InputError(f"--results {results} is no folder")
    texts = all_tables(results)
    if args.print or not (args.write or args.check):
        print("\n\n".join(texts.values()))
    pages = {PAGE: texts} | ({FRONT: front(texts)} if MODELS in texts else {})
    if args.write not in (None, True):
        pages = {Path(args.write): texts}
    if args.check:
        return int(sum(disagree(file, own, results) for file, own in pages.items()) > 0)
    if args.write:
        for file, own in pages.items():
            write(file, own)
    return program.EXIT_OK


def front(texts):
    """What README.md shows: the published models, with links from there."""
    return {MODELS: texts[MODELS].replace("](models/", "](results/models/")}


def disagree(file, texts, results):
    """Whether a file holds other tables than ``texts``, said in a line."""
    wrong = disagreements(split_file(file)[1], texts)
    if wrong:
        print(f"{file} and {results} disagree ({'; '.join(wrong)}): run "
              "python scripts/make_tables.py --write", file=sys.stderr)
    return bool(wrong)


def write(file, texts):
    """Put the tables between the markers of a file."""
    before, _, after = split_file(file)
    with records.replacing(file) as out:
        out.write("".join([before, BEGIN, "\n\n", "\n\n".join(texts.values()), "\n\n", END,
                           after]).encode())


if __name__ == "__main__":
    program.run(main)
