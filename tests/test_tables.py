"""The paper's numbers as data, and the tables made from them and from records."""

import json
import statistics
from collections import Counter

import pytest
from helpers import ROOT

from models import network_name
from scripts import make_tables
from scripts.tables import protocol
from scripts.tables.cells import shortfalls
from scripts.tables.sources import NUMBER
from utils import cli
from utils.files.records import training_of

PAPER = [json.loads(line) for line in (ROOT / "results" / "paper.jsonl").read_text().splitlines()]
NUMBERS = [n for n in PAPER if n["table"] != "protocol"]
ROWS = {
    "table2": ["Residual Flow", "Glow", "IGEBM", "JEM (K=20)", "JEM++ (M=5)", "JEM++ (M=10)",
               "JEM++ (M=20)", "VERA (α=100)", "VERA (α=1)", "WRN w/ BN", "SNGAN", "NCSN"],
    "table3": ["Softmax (w/ BN)", "VERA", "JEM (K=20)", "JEM++ (M=5)", "JEM++ (M=10)"],
    "table4": ["JEM", *(f"JEM++ M={m} N={n}" for m in (5, 10, 20) for n in (5, 10, 20))],
    "table5": ["JEM++", "w/o Proximity", "w/ Adam", "random init (w/ BN)",
               "random init (w/o BN)", "informative init (w/o BN)"],
    "table7": ["Uncond Glow", "IGEBM", "JEM (K=20)", "JEM++ (M=5)", "JEM++ (M=10)",
               "JEM++ (M=20)", "WideResNet"],
    "ece": ["Standard Softmax", "JEM (K=20)", "JEM++ (M=5)", "JEM++ (M=10)"],
    "sada_jem": ["SADA-JEM (K=5)"],
}
GENERATED = {"source": "buffer", "selection": "all", "reference": "train+test"}


# ------------------------------------------------------------------------- the paper's numbers

def paper(table, row, column, **keys):
    found = [n for n in NUMBERS if (n["table"], n["row"], n["column"]) == (table, row, column)
             and n.items() >= keys.items()]
    assert len(found) == 1, found
    return found[0]["value"]


@pytest.mark.parametrize(("value", "where"), [
    (0.935, ("table2", "JEM++ (M=10)", "accuracy")), (8.29, ("table2", "JEM++ (M=10)", "is_mean")),
    (37.1, ("table2", "JEM++ (M=10)", "fid")), (1.5, ("table2", "JEM++ (M=10)", "speedup")),
    (0.92, ("table2", "JEM++ (M=20)", "speedup")), (38.4, ("table2", "JEM (K=20)", "fid")),
    (0.491, ("table2", "IGEBM", "accuracy")), (0.958, ("table2", "WRN w/ BN", "accuracy")),
    (None, ("table2", "WRN w/ BN", "fid")), (25.3, ("table2", "NCSN", "fid")),
    (30.1, ("table4", "JEM", "minutes_per_epoch")), (2.31, ("table4", "JEM++ M=5 N=20", "speedup")),
    (20.1, ("table4", "JEM++ M=10 N=5", "minutes_per_epoch")),
    (0.93, ("table4", "JEM++ M=20 N=5", "speedup")), (0.925, ("table5", "w/ Adam", "accuracy")),
    (42.7, ("table5", "w/ Adam", "fid")), (36.0, ("table5", "w/o Proximity", "fid")),
    (None, ("table5", "random init (w/ BN)", "accuracy")),
    (0.886, ("table5", "random init (w/o BN)", "accuracy")),
    (7.92, ("table5", "informative init (w/o BN)", "is_mean"))])
def test_numbers_are_those_printed_in_the_paper(value, where):
    assert paper(*where) == value


def test_data_set_score_and_out_set_tell_the_papers_numbers_apart():
    assert paper("table3", "JEM++ (M=10)", "accuracy", dataset="svhn") == 0.969
    assert paper("table3", "JEM++ (M=10)", "accuracy", dataset="cifar100") == 0.745
    assert paper("table3", "Softmax (w/ BN)", "accuracy", dataset="cifar100") == 0.789
    assert paper("table7", "JEM++ (M=5)", "auroc", score="log_p_x", out="svhn") == 0.89
    assert paper("table7", "JEM++ (M=10)", "auroc", score="log_p_x", out="celeba") == 0.59
    assert paper("table7", "JEM++ (M=20)", "auroc", score="max_p_y", out="celeba") == 0.90
    assert paper("table7", "WideResNet", "auroc", score="max_p_y", out="interp") == 0.77
    assert paper("ece", "JEM++ (M=10)", "ece", dataset="cifar10") == 0.0235
    assert paper("ece", "JEM (K=20)", "ece", dataset="cifar100") == 0.0487
    assert paper("table6", "Number of outer steps M", "n_steps") == [5, 10]


def test_all_rows_and_columns_are_there_once():
    for table, rows in ROWS.items():
        assert list(dict.fromkeys(n["row"] for n in NUMBERS if n["table"] == table)) == rows
    keys = [tuple(str(v) for k, v in sorted(n.items()) if k not in ("value", "printed", "note"))
            for n in NUMBERS]
    assert max(Counter(keys).values()) == 1
    size = Counter(n["table"] for n in NUMBERS)
    assert size == {"table2": 48, "table3": 10, "table4": 20, "table5": 18, "table6": 6,
                    "table7": 48, "ece": 8, "sada_jem": 2}


def test_values_are_what_the_paper_prints():
    for n in NUMBERS:
        if n["value"] is None:
            assert n["printed"] in ("", "-", "N/A", "Fig. 10", "Fig. 11")
        elif n["table"] != "table6":
            scale = 100 if n["column"] in ("accuracy", "ece") else 1
            assert float(n["printed"].rstrip("×")) == pytest.approx(scale * n["value"]), n


def test_cited_rows_are_those_of_others():
    assert {n["row"] for n in NUMBERS if n.get("cited")} == {
        "Residual Flow", "Glow", "VERA (α=100)", "VERA (α=1)", "SNGAN", "NCSN", "VERA",
        "Uncond Glow"}


def test_scripts_named_below_the_tables_exist():
    for table in ROWS:
        assert (ROOT / "scripts" / f"{make_tables.SCRIPTS.get(table, table)}.sh").exists()


# --------------------------------------------------------------------------- synthetic records

def record(metric, value, method="JEM++ (M=10)", *, seed=1, time="2026-01-01T00:00:00Z", n=10000,
           dataset="cifar10", protocol=None, **training):
    """As eval_jempp.py writes it; the paper's full training unless ``training`` says less."""
    trained = {"dataset": dataset, "depth": 28, "width": 10, "norm": "batch", "batch_size": 64,
               "n_epochs": 150, "n_train": None, "n_steps": 10, "in_steps": 5, "optimizer": "sgd",
               "lr": 0.1, "init": "informative", "seed": seed, "step": 105450, **training}
    if protocol is None:
        protocol = {"accuracy": {"split": "test", "sigma": 0.0}, "diverged": {"cause": "NaN"},
                    "ece": {"split": "test", "bins": 20}}.get(metric, GENERATED)
    return {"metric": metric, "value": value, "unit": "", "n": n, "protocol": protocol,
            "checkpoint": {"path": "best.pt", "sha256": "f" * 64, "step": 1,
                           "epoch": trained["n_epochs"]},
            "overrides": {}, "method": method, "training": trained, "dataset": dataset, "seed": 0,
            "env": {"torch": "2.11.0", "device": "cpu", "cpu": "Imagined CPU, 2 cores",
                    "commit": "abc1234def", "dirty": False}, "seconds": 1.0, "time": time}


SMALL = {"depth": 10, "width": 1, "n_epochs": 3, "n_train": 4800, "batch_size": 32, "step": 450}


@pytest.fixture
def tables(tmp_path, call):
    """Write {table: records}, run make_tables.py with words; returns (code, stdout, stderr)."""
    def run(files, *words):
        for table, found in files.items():
            text = "".join(json.dumps(r) + "\n" for r in found)
            (tmp_path / f"{table}.jsonl").write_text(text)
        return call(make_tables.main, ["--results", tmp_path, *words])

    run.folder = tmp_path
    return run


def table_of(out, title):
    """The text of the table whose title begins so, and its rows as lists of cells."""
    text = next(t for t in out.split("### ") if t.startswith(title))
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return text, {cells[0]: [c.strip() for c in cells[1:]] for cells in lines}


def test_mean_and_sample_deviation_over_seeds(tables):
    values = [0.40, 0.46, 0.52]
    code, out, err = tables({"table2": [record("accuracy", v, seed=s, **SMALL)
                                        for s, v in enumerate(values, 1)]})
    text, rows = table_of(out, "Table 2")
    assert (code, err) == (0, "")
    assert statistics.stdev(values) == pytest.approx(0.06)
    assert rows["JEM++ (M=10)"][:3] == ["93.5", "46.0 ± 6.0 (n=3)†", "-47.5"]
    assert ("† JEM++ (M=10): WRN-10-1, 3 epochs of 4,800 images (450 steps), batch 32, seeds 1–3, "
            "cpu (Imagined CPU, 2 cores); commit abc1234.") in text
    assert "bash scripts/table2.sh" in text and "Inception weights" in text


def test_rows_of_different_commits_share_a_footnote_that_names_them(tables):
    found = [record("accuracy", 0.4, "JEM++ (M=5)", n_steps=5, **SMALL),
             record("accuracy", 0.5, "JEM++ (M=10)", **SMALL)]
    found[1]["env"] = found[1]["env"] | {"commit": "def5678abc", "dirty": True}
    text, _ = table_of(tables({"table2": found})[1], "Table 2")
    assert text.count("†") == 3 and ("cores). JEM++ (M=5): commit abc1234. JEM++ (M=10): commit "
                                     "def5678 with changes.") in text


def test_a_footnote_tells_where_a_row_was_trained_and_after_which_epoch_it_was_measured(tables):
    end = record("steps", 450, protocol={"rollbacks": 0}, **SMALL)
    end["env"] = end["env"] | {"commit": "def5678abc", "dirty": True}
    best = record("accuracy", 0.5, **SMALL)
    best["checkpoint"] = best["checkpoint"] | {"epoch": 2}
    text, _ = table_of(tables({"table2": [end, best]})[1], "Table 2")
    assert ("trained at def5678 with changes, measured at abc1234; measured after epoch 2."
            in text)


def test_footnotes_of_two_data_sets_stay_apart(tables):
    found = [record("ece", 0.02, "JEM++ (M=10)", dataset=dataset, **SMALL)
             for dataset in ("cifar10", "cifar100")]
    text, _ = table_of(tables({"ece": found})[1], "Calibration")
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("†")] == [
        "† CIFAR-10, JEM++ (M=10)", "† CIFAR-100, JEM++ (M=10)"]


@pytest.mark.parametrize(("judges", "in_table_2", "in_ours"), [
    ("bb", "3.00 ± 1.41 (n=2)†", "3.00 ± 1.41†"), ("ab", "4.00†", "4.00 (n=1)†")])
def test_distances_by_another_judge_are_not_averaged(tables, judges, in_table_2, in_ours):
    found = [record("accuracy", 0.5, seed=seed, **SMALL) for seed in (1, 2)]
    found += [record("fd_features", 2.0 * seed, seed=seed, **SMALL, protocol=GENERATED | {
        "features_sha256": judge * 64, "n_reference": 9}) for seed, judge in enumerate(judges, 1)]
    out = tables({"table2": found, "options": found}, "--print")[1]
    assert f"| {in_table_2} |" in out and f"| {in_ours} |" in out


def test_full_scale_has_no_dagger(tables):
    full = [record("accuracy", 0.941), record("is_mean", 8.5), record("fid", 36.0)]
    text, rows = table_of(tables({"table2": full})[1], "Table 2")
    assert rows["JEM++ (M=10)"][:9] == ["93.5", "94.1", "+0.6", "8.29", "8.50", "+0.21", "37.1",
                                        "36.0", "-1.1"]
    assert "†" not in text


@pytest.mark.parametrize(("less", "words"), [
    ({"depth": 16}, "WRN-16-10"), ({"width": 2}, "WRN-28-2"), ({"n_epochs": 149}, "149 epochs"),
    ({"n_train": 44999}, "44,999 images"), ({"step": 1000}, "(1,000 of 105,450 steps)"),
    ({"n": 9999}, "n of accuracy 9,999 (paper 10,000)"), ({"n_steps": 5}, "n_steps 5 (paper 10)"),
    ({"optimizer": "adam"}, "optimizer adam (paper sgd)"),
    ({"protocol": {"split": "test", "sigma": 0.03}}, "sigma 0.03 (paper 0)")])
def test_each_way_to_be_smaller_has_a_dagger_and_a_footnote(tables, less, words):
    text, rows = table_of(tables({"table2": [record("accuracy", 0.9, **less)]})[1], "Table 2")
    assert rows["JEM++ (M=10)"][1] == "90.0†"
    assert text.count("\n† ") == 1 and words in text


def test_the_best_checkpoint_of_a_whole_run_is_full_scale(tables):
    """best.pt may be from before the end; record_run.py's record tells how far the run went."""
    best, end = record("accuracy", 0.9, step=100000), record("steps", 105450)
    for found, cell in (([best], "90.0†"), ([end, best], "90.0")):
        assert table_of(tables({"table2": found})[1], "Table 2")[1]["JEM++ (M=10)"][1] == cell


def test_jem_needs_its_200_epochs(tables):
    jem = {"method": "JEM (K=20)", "norm": "none", "in_steps": 0, "n_steps": 20,
           "optimizer": "adam", "lr": 1e-4, "init": "uniform"}
    for epochs, cell in ((150, "92.0†"), (200, "92.0")):
        found = record("accuracy", 0.92, n_epochs=epochs, step=703 * epochs, **jem)
        _, rows = table_of(tables({"table2": [found]})[1], "Table 2")
        assert rows["JEM (K=20)"][1] == cell


def test_weights_of_others_are_marked(tables):
    released = record("accuracy", 0.93) | {"training": None}
    text, rows = table_of(tables({"table2": [released]})[1], "Table 2")
    assert rows["JEM++ (M=10)"][1] == "93.0†"
    assert "weights trained by others (sha256 ffffffff)" in text


def test_fd_features_is_a_column_of_its_own_and_never_fid(tables):
    found = record("fd_features", 12.345, protocol={**GENERATED, "n_reference": 60000,
                                                    "features_sha256": "0123456789"})
    _, before = table_of(tables({})[1], "Table 5")
    assert "fd_features" not in str(before)
    text, rows = table_of(tables({"table5": [found | {"method": "JEM++"}]})[1], "Table 5")
    assert rows["model"][-1] == "fd_features† ours" and rows["JEM++"][-1] == "12.35†"
    assert rows["JEM++"][6:9] == ["37.1", "–", "–"]
    assert "not FID" in text and "classifier 01234567" in text


def test_judged_images_are_in_order_of_their_distance(tables):
    protocol = {"reference": "train+test", "n_reference": 60000, "features_sha256": "0123456789"}
    found = [record("fd_features", value, name, protocol=protocol, n=2000, time=time)
             for name, value, time in (("buffer of a", 3.0, "2026-01-02"), ("test", 0.01, "2026"),
                                       ("noise", 7.5, "2026"), ("buffer of a", 9.0, "2026-01-01"))]
    text, rows = table_of(tables({"judge": found})[1], "A classifier as the judge")
    assert list(rows)[2:] == ["test", "buffer of a", "noise"]
    assert rows["buffer of a"] == ["3†", "2,000", "train+test, 60,000"]
    assert "not FID" in text and "classifier 01234567;" in text


def test_columns_are_told_apart_by_the_protocol(tables):
    def auroc(value, score, out, **origin):
        return record("auroc", value, n=20000, protocol={"score": score, "out": out, **origin,
                                                         "n_in": 10000, "n_out": 10000})
    wrong_split = record("accuracy", 0.99, protocol={"split": "train", "sigma": 0.0})
    out = tables({"table7": [auroc(0.70, "log_p_x", "interp"), auroc(0.80, "max_p_y", "cifar100"),
                             auroc(0.90, "max_p_y", "svhn", origin="folder:digits")],
                  "table2": [wrong_split]})[1]
    density = table_of(out, "Table 7. AUROC of out-of-distribution detection, trained on CIFAR-10, "
                            "by log")[1]["JEM++ (M=10)"]
    assert density == [".63", "–", "–", ".68", "0.70", "+0.02", ".64", "–", "–", ".59", "–", "–"]
    text, rows = table_of(out, "Table 7. AUROC of out-of-distribution detection, trained on "
                               "CIFAR-10, by max")
    assert rows["JEM++ (M=10)"][:3] == [".91", "0.90†", "-0.01"]
    assert rows["JEM++ (M=10)"][6:9] == [".88", "0.80", "-0.08"]
    assert "n_out of svhn 10,000 (paper 26,032)" in text and "svhn from folder:digits" in text
    assert table_of(out, "Table 2")[1]["JEM++ (M=10)"][1] == "–"


def test_the_latest_record_of_a_seed_wins(tables):
    late = record("accuracy", 0.90, time="2026-02-01T00:00:00Z")
    early = record("accuracy", 0.80, time="2026-01-01T00:00:00Z")
    for order in ([late, early], [early, late]):
        assert table_of(tables({"table2": order})[1], "Table 2")[1]["JEM++ (M=10)"][1] == "90.0"
    same_second = [early, {**early, "value": 0.81}]
    _, rows = table_of(tables({"table2": same_second})[1], "Table 2")
    assert rows["JEM++ (M=10)"][1] == "81.0"


def test_trainings_are_not_mixed(tables):
    old = [record("accuracy", 0.40, seed=s, **SMALL) for s in (1, 2)]
    new = record("accuracy", 0.60, seed=3, time="2026-02-01T00:00:00Z", **SMALL | {"width": 2})
    code, out, err = tables({"table2": [*old, new]})
    assert code == 0 and table_of(out, "Table 2")[1]["JEM++ (M=10)"][1] == "60.0†"
    assert "2 records of 'JEM++ (M=10)' trained with other settings" in err


def test_a_row_that_the_paper_lacks_is_said(tables):
    code, out, err = tables({"table2": [record("accuracy", 0.9, method="JEM++ (M=11)")]})
    assert code == 0 and "M=11" not in out
    assert err.count("\n") == 1 and "table2.jsonl: 'JEM++ (M=11)' on cifar10 is no row" in err


def test_divergence_is_shown_and_not_averaged(tables):
    def row(*found):
        text, rows = table_of(tables({"table5": found})[1], "Table 5")
        return rows["w/o Proximity"], text

    name = {"method": "w/o Proximity", **SMALL}
    lost = [record("diverged", step, seed=s, n=1, **name) for s, step in ((1, 340), (2, 120))]
    good = record("accuracy", 0.50, seed=3, **name)
    cells, text = row(*lost, good)
    assert cells[:3] == ["92.9", "50.0; 2 of 3 diverged (steps 120, 340)†", "-42.9"]
    assert "seeds 1–3" in text
    before = record("accuracy", 0.30, seed=2, **name)
    cells, _ = row(*lost, good, before)
    assert cells[1] == "50.0; 2 of 3 diverged (steps 120, 340; last good checkpoint 30.0)†"
    cells, _ = row(lost[0])
    assert cells[:3] == ["92.9", "diverged at step 340†", "–"]
    ended = record("steps", 450, seed=2, n=1, time="2026-03-01T00:00:00Z", **name,
                   protocol={"reason": "finished", "rollbacks": 0})  # trained once more, and held
    cells, _ = row(*lost, good, before, ended)
    assert cells[1] == "40.0 ± 14.1 (n=2); 1 of 3 diverged (step 340)†"
    full = record("diverged", 20000, method="w/o Proximity", n=1, step=20000)
    assert row(full)[0][1] == "diverged at step 20,000"


def timing(method, value, run="a", **less):
    n_steps, in_steps = {"JEM": (20, 0), "JEM++ M=10 N=5": (10, 5)}[method]
    found = record("iteration_ms", value, method, n=5, n_steps=n_steps, in_steps=in_steps,
                   protocol={"run": run, "reference": "JEM", "n_steps": n_steps,
                             "in_steps": in_steps}, time=f"2026-01-01T00:00:00{run}", **less)
    found["training"]["step"] = None
    return found


def test_speed_up_is_the_ratio_within_one_run(tables):
    found = [timing("JEM", 300.0), timing("JEM++ M=10 N=5", 150.0), timing("JEM", 900.0, "b"),
             timing("JEM++ M=10 N=5", 500.0, "b"), timing("JEM++ M=10 N=5", 1.0, "c")]
    out = tables({"table4": found})[1]
    text, rows = table_of(out, "Table 4")
    assert rows["JEM++ M=10 N=5"] == ["20.1", "1.49×", "1.80", "+0.31", "500"]
    assert rows["JEM"] == ["30.1", "1×", "1.00", "+0.00", "900"] and "†" not in text
    assert table_of(out, "Table 2")[1]["JEM++ (M=10)"][9:] == ["1.5×", "1.80", "+0.30"]
    small = [timing("JEM", 30.0, depth=10), timing("JEM++ M=10 N=5", 20.0, depth=10)]
    text, rows = table_of(tables({"table4": small})[1], "Table 4")
    assert rows["JEM++ M=10 N=5"][2] == "1.50†"
    assert "† JEM, JEM++ M=10 N=5: the time of an iteration of WRN-10-10, batch 64" in text


def test_a_time_on_another_data_set_is_not_the_papers(tables):
    other = [timing("JEM", 900.0, "b", dataset="svhn"),
             timing("JEM++ M=10 N=5", 100.0, "b", dataset="svhn")]
    found = [timing("JEM", 300.0), timing("JEM++ M=10 N=5", 150.0), *other]
    _, rows = table_of(tables({"table4": found})[1], "Table 4")
    assert rows["JEM++ M=10 N=5"][2] == "2.00"


def test_published_models_show_the_latest_number_of_the_checkpoint_as_it_is(tables):
    folder = tables.folder / "models" / "a"
    folder.mkdir(parents=True)
    (tables.folder / "README.md").write_text(f"{make_tables.BEGIN}\n{make_tables.END}\n")
    anew = {"split": "test", "recalibrate_bn": 5000}
    train = record("accuracy", 0.99, protocol={"split": "train"}, **SMALL)
    found = [record("accuracy", 0.5, **SMALL), record("accuracy", 0.6, p_x_weight=0.3, **SMALL),
             record("accuracy", 0.7, protocol=anew, p_x_weight=0.3, **SMALL), train]
    found[-1]["training"]["p_x_weight"] = 0.3
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    _, rows = table_of(tables({})[1], make_tables.MODELS)
    assert rows["[a](models/a/README.md)"][:2] == ["0.3", "60.0†"]


# ------------------------------------------------------------------------- page and errors

def test_page_is_written_checked_and_goes_stale(tables):
    readme = tables.folder / "README.md"
    readme.write_text(f"before\n{make_tables.BEGIN}\nold\n{make_tables.END}\nafter\n")
    found = [record("accuracy", 0.9, seed=1, **SMALL)]
    words = ["--write", readme]
    code, out, err = tables({"table2": found}, *words, "--check")
    assert code == 1 and err.count("\n") == 1
    assert tables({}, *words)[0] == 0 and tables({}, *words, "--check") == (0, "", "")
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "90.0†" in text
    assert tables({}, *words)[0] == 0 and readme.read_text() == text

    code, out, err = tables({"table2": []}, *words, "--check")
    assert code == 1 and "Table 2" in err and "Table 3" not in err and err.count("\n") == 1
    assert readme.read_text() == text
    assert tables({}, *words)[0] == 0 and tables({}, *words, "--check")[0] == 0
    assert table_of(readme.read_text(), "Table 2")[1]["JEM++ (M=10)"][1] == "–"


def test_missing_markers_are_one_line(tables):
    readme = tables.folder / "README.md"
    for text in ("nothing", f"{make_tables.END} {make_tables.BEGIN}", make_tables.BEGIN):
        readme.write_text(text)
        code, out, err = tables({}, "--write", readme)
        assert code == 2 and err.count("\n") == 1 and make_tables.BEGIN in err
        assert readme.read_text() == text


@pytest.mark.parametrize(("line", "complaint"), [
    ("{", "not JSON"), ("3", "not a JSON object"), ('{"metric": "accuracy"}', "lacks value"),
    (json.dumps(record("accuracy", "nan")), "not a finite number"),
    (json.dumps(record("energy_gap", "inf")), "not a finite number"),
    *((json.dumps(record("steps", 3) | {name: value}), f"{name} {value!r} is no")
      for name, value in (("method", []), ("dataset", None), ("time", {}), ("run", 3), ("n", "3"),
                          ("seconds", "3"), ("seconds", -1.0), ("seconds", True))),
    (json.dumps(record("steps", 3, protocol={"rollbacks": None})), "rollbacks None is no"),
    (json.dumps(record("accuracy", 0.5) | {"training": None, "checkpoint": None}), "checkpoint"),
    (json.dumps({k: v for k, v in record("fid", 1.0).items() if k != "training"}), "training"),
    (json.dumps(record("fid", 1.0) | {"training": {"seed": 1}}), "training lacks dataset"),
    (json.dumps(record("fd_features", 1.0, protocol={})), "protocol lacks reference"),
    (json.dumps(timing("JEM", 1.0) | {"protocol": {}}), "protocol lacks run, reference")])
def test_a_bad_line_is_named_by_file_and_number(tables, line, complaint):
    good = json.dumps(record("accuracy", 0.9))
    (tables.folder / "table3.jsonl").write_text(f"{good}\n{line}\n")
    code, out, err = tables({})
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "table3.jsonl:2: " in err and complaint in err


def test_blank_lines_are_skipped(tables):
    (tables.folder / "table3.jsonl").write_text(f"\n{json.dumps(record('accuracy', 0.9))}\n\n")
    assert tables({})[0] == 0


def test_a_device_among_the_records_is_one_line(tables):
    (tables.folder / "table3.jsonl").symlink_to("/dev/null")
    code, _, err = tables({})
    assert code == 2 and "is a device" in err and err.count("\n") == 1


def test_a_folder_without_published_models_is_checked(tables):
    code, _, err = tables({}, "--check")
    assert code == 1 and "results/README.md" in err and err.count("\n") == 1


def test_numbers_of_the_paper_are_checked_as_well(tables):
    (tables.folder / "paper.jsonl").write_text('{"table": "table2"}\n')
    code, _, err = tables({})
    assert code == 2 and "paper.jsonl:1: " in err and set(NUMBER[1:]) <= set(
        err.replace(",", "").split())


def test_page_of_results_agrees_with_its_records(call):
    code, _, err = call(make_tables.main, ["--check"])
    assert code == 0, err


def test_ours_alone_are_means_over_training_seeds_without_those_that_diverged(tables):
    def run(method, seed, accuracy, gap):
        return [record("accuracy", accuracy, method, seed=seed, **SMALL),
                record("energy_gap", gap, method, seed=seed, protocol={}, **SMALL)]

    found = [*run("base", 1, 0.5, 0.1), *run("base", 2, 0.7, 0.3), *run("sam", 1, 0.6, 0.2),
             *run("sam", 2, 0.1, 9.0),
             record("diverged", 450, "sam", seed=2, **SMALL)]
    code, out, err = tables({"options": found}, "--print")
    assert code == 0, err
    assert "| `base` | 60.00 ± 14.14† | 0.20 ± 0.14† | 2 | 0 | 0 |" in out
    assert "| `sam` | 60.00 (n=1)† | 0.20 (n=1)† | 2 | 1 | 0 |" in out
    assert "n is 10,000 for accuracy, gap." in out


def test_ours_alone_are_numbers_of_the_test_split(tables):
    train = record("accuracy", 0.99, "base", protocol={"split": "train"}, time="2027", **SMALL)
    found = [record("accuracy", 0.5, "base", **SMALL), train]
    assert "| `base` | 50.00† |" in tables({"options": found}, "--print")[1]


def test_recalibrated_numbers_stand_beside_those_of_the_checkpoint_not_in_their_place(tables):
    anew = {"split": "test", "sigma": 0.0, "recalibrate_bn": 5000}
    found = [record("accuracy", 0.80, **SMALL), record("ece", 0.09, **SMALL),
             record("accuracy", 0.84, protocol=anew, time="2026-02-01T00:00:00Z", **SMALL),
             record("accuracy", 0.60, "JEM (K=20)", **SMALL)]
    code, out, err = tables({"table2": found})
    assert code == 0, err
    text, rows = table_of(out, "Table 2")
    assert rows["JEM++ (M=10)"][1] == "80.0†"
    text, rows = table_of(out, make_tables.TOGETHER)
    assert rows["`JEM++ (M=10)`"][:3] == ["80.00†", "9.00†", "84.00†"]
    assert rows["`JEM (K=20)`"][:3] == ["60.00†", "–", "–"] and "minutes" not in text


def test_a_run_that_two_tables_share_stands_once_with_its_minutes(tables):
    def row(method, run, seconds):
        ended = {"run": f"cpu/{run}-seed1", "seconds": seconds}
        return [record("accuracy", 0.8, method, **SMALL),
                record("steps", 450, method, protocol={"reason": "finished"}, **SMALL) | ended]

    anew = record("accuracy", 0.84, protocol={"split": "test", "recalibrate_bn": 5000}, **SMALL)
    code, out, err = tables({
        "table2": [*row("JEM++ (M=10)", "jempp-m10", 90.0), anew,
                   *row("WRN w/ BN", "softmax", None)],
        "table5": [*row("JEM++", "jempp-m10", 90.0), *row("w/ Adam", "adam", 6000.0)]})
    assert code == 0, err
    _, rows = table_of(out, make_tables.TOGETHER)
    assert {row: cells[-1] for row, cells in rows.items() if row.startswith("`")} == {
        "`JEM++ (M=10)`": "1.5", "`WRN w/ BN`": "–", "`w/ Adam`": "100.0"}


def test_a_table_of_several_networks_names_them_all(tables):
    found = [record("accuracy", 0.6, "a", **SMALL), record("accuracy", 0.7, "b", **SMALL | {
        "width": 2})]
    code, out, err = tables({"probes": found})
    assert code == 0 and "cifar10: WRN-10-1 and WRN-10-2, 3 epochs" in out, err


# --------------------------------------------------- records that tell all arguments of a run

def whole(metric, value, method="JEM++ (M=10)", *, flags=(), **more):
    """A record of the second kind: ``training`` as the run's resolved arguments give it."""
    old = record(metric, value, method, **more)
    words = [*protocol.ROWS.get(method, "").split(), *flags, "--seed", str(more.get("seed", 1))]
    args = vars(cli.train_args(["--dataset", old["dataset"], *words]))
    return old | {"training": training_of(args, more.get("step", 703 * args["n_epochs"]),
                                          "PYLD-10-5", network_name(args))}


@pytest.mark.parametrize("row", protocol.ROWS)
def test_the_papers_run_of_each_row_has_no_dagger(row):
    assert not shortfalls({"row": row, "dataset": "cifar10", "column": "accuracy"},
                          whole("accuracy", 0.9, row, step=10**9), [])


@pytest.mark.parametrize(("flags", "words"), [
    (["--p_x_weight", "0.1"], "p_x_weight 0.1 (paper 1)"), (["--eps", "inf"], "eps inf (paper 1)"),
    (["--ema", "0.99"], "ema 0.99 (paper 0)"), (["--amp", "bf16"], "amp bf16 (paper off)"),
    (["--labelled_batch", "128"], "labelled_batch 128 (paper 64)"),
    (["--clean_p_x"], "clean_p_x on (paper off)"),
    (["--decay_epochs", "9", "99"], "decay_epochs 9 99 (paper 50 100 125)")])
def test_any_argument_that_is_not_the_papers_has_a_dagger_and_is_named(tables, flags, words):
    found = whole("accuracy", 0.9, flags=flags, step=10**9)
    text, rows = table_of(tables({"table2": [found]})[1], "Table 2")
    assert rows["JEM++ (M=10)"][1] == "90.0†"
    assert f"; {words}." in text and text.count("(paper") == 1


def test_a_run_that_only_treats_divergence_otherwise_is_the_papers(tables):
    found = whole("accuracy", 0.9, flags=["--max_gap", "20", "--on_divergence", "stop"])
    assert table_of(tables({"table2": [found]})[1], "Table 2")[1]["JEM++ (M=10)"][1] == "90.0"


def test_what_a_softmax_network_never_samples_with_is_not_compared(tables):
    found = whole("accuracy", 0.95, "WRN w/ BN", flags=["--n_steps", "5", "--eps", "inf"])
    assert table_of(tables({"table2": [found]})[1], "Table 2")[1]["WRN w/ BN"][1] == "95.0"


def test_runs_that_differ_only_in_a_weight_are_not_averaged_as_seeds(tables):
    found = [whole("accuracy", 0.80, seed=1, flags=["--p_x_weight", "0.1"]),
             whole("accuracy", 0.90, seed=2), whole("accuracy", 0.92, seed=3)]
    code, out, err = tables({"table2": found})
    assert code == 0 and table_of(out, "Table 2")[1]["JEM++ (M=10)"][1] == "91.0 ± 1.4 (n=2)"
    assert "1 records of 'JEM++ (M=10)' trained with other settings" in err


def test_old_and_new_records_live_in_one_file(tables):
    """What the old ones do not tell is not compared; the new ones are, also where an old one came
    last and would go with either."""
    old = record("accuracy", 0.94, seed=1)
    new, other = whole("accuracy", 0.90, seed=2), whole("accuracy", 0.1, seed=3,
                                                        flags=["--p_x_weight", "0.1"])
    for order in ([old, other, new], [other, new, old]):
        _, out, err = tables({"table2": order})
        assert table_of(out, "Table 2")[1]["JEM++ (M=10)"][1] == "92.0 ± 2.8 (n=2)"
        assert "1 records of" in err


def test_a_footnote_of_several_rows_says_which_row_is_otherwise(tables):
    found = [whole("accuracy", 0.9, "JEM++ (M=5)", flags=["--depth", "16", "--p_x_weight", "0.1"]),
             whole("accuracy", 0.9, "JEM++ (M=10)", flags=["--depth", "16"])]
    text, _ = table_of(tables({"table2": found})[1], "Table 2")
    assert "† JEM++ (M=5), JEM++ (M=10): WRN" in text
    assert ". JEM++ (M=5): p_x_weight 0.1 (paper 1)." in text


def test_weights_of_others_stand_beside_ours_in_a_table_of_all_rows(tables):
    anew = {"split": "test", "sigma": 0.0, "recalibrate_bn": 5000}
    found = [record("accuracy", 0.93, "WRN w/ BN") | {"training": None},
             record("accuracy", 0.84, protocol=anew, **SMALL), record("accuracy", 0.80, **SMALL)]
    for order in (found, found[::-1]):
        code, out, err = tables({"table2": order})
        text, rows = table_of(out, make_tables.TOGETHER)
        assert code == 0 and rows["`WRN w/ BN`"][0] == "93.00†", err
        assert "WRN-10-1, 3 epochs" in text and "by others (sha256 ffffffff)" in text


@pytest.mark.parametrize("other", ({"n": 100}, {"protocol": {"split": "test", "sigma": 0.3}}))
def test_seeds_measured_in_other_ways_are_not_averaged(tables, other):
    found = [record("accuracy", 0.5, seed=1, **SMALL | other),
             record("accuracy", 0.9, seed=2, time="2026-02", **SMALL)]
    _, rows = table_of(tables({"table2": found})[1], "Table 2")
    assert rows["JEM++ (M=10)"][1].startswith("90.0")


def test_the_judge_of_a_row_is_that_of_its_latest_record(tables):
    found = [record("fd_features", value, seed=seed, time=time, **SMALL, protocol=GENERATED | {
        "features_sha256": judge * 64, "n_reference": 9}) for value, seed, judge, time in (
            (1.0, 1, "a", "2026-01-01"), (2.0, 2, "a", "2026-01-02"), (9.0, 1, "b", "2026-02"))]
    _, rows = table_of(tables({"table2": found})[1], "Table 2")
    assert rows["JEM++ (M=10)"][-1] == "9.00†"


def test_rollbacks_are_shown(tables):
    def steps(seed, rollbacks):
        return whole("steps", 105450, seed=seed, n=1,
                     protocol={"reason": "finished", "rollbacks": rollbacks})

    found = [whole("accuracy", 0.9, seed=1), steps(1, 2), whole("accuracy", 0.9, seed=2),
             steps(2, 1)]
    _, rows = table_of(tables({"table2": found})[1], "Table 2")
    assert rows["JEM++ (M=10)"][1] == "90.0 ± 0.0 (n=2); 3 rollbacks"
    assert rows["JEM++ (M=10)"][4] == "–"


def test_digits_have_a_section_of_their_own_and_stay_out_of_the_papers_tables(tables):
    words = ["--depth", "10", "--width", "1", "--n_epochs", "75"]

    def run(method, seed, accuracy, rollbacks=0):
        more = {"dataset": "digits", "seed": seed, "step": 3000, "flags": words}
        return [whole("accuracy", accuracy, method, n=360, **more),
                whole("energy_gap", 0.5, method, protocol={}, **more),
                whole("steps", 3000, method, **more, protocol={
                    "reason": "finished", "rollbacks": rollbacks}) | {"seconds": 60.0 * seed}]

    (tables.folder / "digits").mkdir()
    lost = whole("diverged", 90, "JEM (K=20)", dataset="digits", flags=words, step=90, n=1)
    found = [*run("JEM++ (M=10)", 1, 0.96), *run("JEM++ (M=10)", 2, 0.98, 2), lost]
    code, out, err = tables({"digits/rows": found})
    assert (code, err) == (0, "")
    text, rows = table_of(out, make_tables.DIGITS)
    assert rows["`JEM++ (M=10)`"] == ["97.00 ± 1.41†", "0.50 ± 0.00†", "2", "0", "2", "1.5"]
    assert rows["`JEM (K=20)`"] == ["–", "–", "1", "1", "0", "–"]
    assert "75 epochs of all images (3,000 steps)" in text and "scripts/digits.sh" in text
    assert table_of(out, "Table 2")[1]["JEM++ (M=10)"][1] == "–"


def test_another_network_has_a_dagger_and_its_name(tables):
    found = whole("accuracy", 0.9, flags=["--network", "resnet18"], step=10**9)
    assert found["training"]["depth"] is None
    text, rows = table_of(tables({"table2": [found]})[1], "Table 2")
    assert rows["JEM++ (M=10)"][1] == "90.0†"
    assert f"† JEM++ (M=10): {found['training']['network']}, 150 epochs" in text
