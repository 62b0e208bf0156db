"""Every script is at least parsed, README's commands and flags exist."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, tiny
from torch import nn

import train_jempp
from utils import cli
from utils.evaluation.evaluations import EVALUATIONS

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh")) + [ROOT / ".ci" / "run"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MANUAL = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


def shell(*words):
    """Run with this Python first on the path, as in .venv."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(words, cwd=ROOT, env={**os.environ, "PATH": path}, text=True,
                          capture_output=True, timeout=120)


def test_train_cifar10_is_the_papers_run_and_passes_words_on():
    done = shell("bash", "scripts/train_cifar10.sh", "--n_steps", "20", "--dry_run")
    assert done.returncode == 0, done.stderr
    defaults = vars(cli.train_args([]))
    changed = {k: v for k, v in json.loads(done.stdout).items() if v != defaults[k]}
    assert changed == {"n_steps": 20, "run_dir": "runs/cifar10_m10", "dry_run": True}


def test_train_cpu_trains_a_hybrid_its_twin_and_the_papers_objective(monkeypatch, tmp_path):
    def options(model):
        monkeypatch.setenv("MODEL", model)
        monkeypatch.setenv("RUN", str(tmp_path / model))
        done = shell("bash", "scripts/train_cpu.sh", "--seed", "3", "--dry_run")
        assert done.returncode == 0, done.stderr
        *_, last = re.split(r"^(?={)", done.stdout, flags=re.M)
        return json.loads(last)

    start = tmp_path / "hybrid-start"
    start.mkdir()
    (start / "best.pt").write_bytes(b"")
    found = {model: options(model) for model in ("start", "hybrid", "twin", "paper", "judge")}
    assert {a["seed"] for a in found.values()} == {3}
    assert found["hybrid"]["load_path"] == str(start / "best.pt")
    weights = {"start": 0, "hybrid": 0.3, "twin": 0, "paper": 1, "judge": 0}
    assert {model: a["p_x_weight"] for model, a in found.items()} == weights
    judge = found.pop("judge")
    assert (judge["width"], judge["stem_stride"]) == (2, 1)
    assert {(a["depth"], a["width"], a["stem_stride"], a["labelled_batch"])
            for a in found.values()} == {(16, 4, 2, 128)}
    steps = found["start"]["max_steps"] + found["hybrid"]["n_epochs"] * (45000 // 128)
    assert steps <= found["twin"]["n_epochs"] * (45000 // 128)  # the twin is given no less
    monkeypatch.setenv("MODEL", "other")
    assert shell("bash", "scripts/train_cpu.sh").returncode == 2


def test_a_start_that_was_tried_for_some_steps_is_trained_to_its_end(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\n')
    stub.chmod(0o755)
    (tmp_path / "run-start").mkdir()
    env = {**os.environ, "RUN": str(tmp_path / "run"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for steps, n_started in ((100, 1), (4914, 0)):
        (tmp_path / "run-start" / "train.jsonl").write_text(
            f'{{"kind": "end", "step": {steps}, "reason": "max_steps"}}\n')
        (tmp_path / "calls").write_text("")
        subprocess.run(["bash", "scripts/train_cpu.sh"], cwd=tmp_path, env=env, check=True)
        assert (tmp_path / "calls").read_text().count("run-start --depth") == n_started


def test_a_wrong_flag_ends_a_script_with_code_2():
    done = shell("bash", "scripts/train_cifar10.sh", "--depth", "27")
    assert done.returncode == 2 and "6n + 4" in done.stderr and "Traceback" not in done.stderr


def commands(program):
    """README's commands for a program, as lists of words."""
    lines = [line.split("#")[0].split() for line in README.splitlines()
             if line.startswith(f"python {program}")]
    assert lines
    return [words[2:] for words in lines if "--help" not in words]


@pytest.mark.parametrize("words", commands("train_jempp.py"), ids=" ".join)
def test_readmes_training_commands_parse(words):
    cli.train_args(words)


@pytest.mark.parametrize("words", commands("eval_jempp.py"), ids=" ".join)
def test_readmes_evaluation_commands_parse(words):
    cli.evaluation_args(words, EVALUATIONS)


def test_readmes_flags_for_the_papers_models_parse():
    section = README.split("The paper's models are flags")[1].split("## Evaluate")[0]
    rows = [row.split("|")[2] for row in section.splitlines() if row.count("|") == 3]
    flags = [words for row in rows for words in re.findall(r"`(--[^`]+)`", row)]
    assert len(flags) >= 8
    for words in flags:
        cli.train_args(words.split())


def test_readme_has_two_set_up_commands():
    block = README.split("## Two commands")[1].split("```")[1]
    assert re.findall(r"^bash (\S+)", block, re.M) == ["scripts/quickstart.sh", "scripts/test.sh"]


def test_no_path_of_the_machine_it_was_written_on():
    done = shell("git", "ls-files")
    if done.returncode:
        pytest.skip("not a git checkout")
    for name in done.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".sh", ".md", ".jsonl", ".txt", ".toml") and path.exists():
            assert "/wo" + "rk/" not in path.read_text(), name


def test_reproduce_runs_every_script_of_a_table_or_figure():
    text = (ROOT / "scripts" / "reproduce.sh").read_text(encoding="utf-8")
    names = {p.stem for p in SCRIPTS if p.name.startswith(("table", "fig"))}
    assert names == set(re.findall(r"(?:table|fig)\d\w*", text))


def test_reproduce_trains_nothing_if_it_cannot_read_minutes(monkeypatch, tmp_path):
    for name, value in (("MINUTES", "2h"), ("JOBS", "0"), ("SCALE", "tiny"), ("RUNS", tmp_path)):
        monkeypatch.setenv(name, str(value))
    done = shell("bash", "scripts/reproduce.sh")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "==" not in done.stdout


def test_help_of_a_script_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    done = shell("bash", "scripts/table3.sh", "--help")
    assert done.returncode == 0 and not done.stderr and not (tmp_path / "runs").exists()
    assert done.stdout.startswith("Table 3") and "SEEDS" in done.stdout and "#" not in done.stdout


@pytest.mark.slow
def test_every_table_and_figure_is_made_at_tiny_scale_by_one_command(tmp_path):
    """A script that runs once more has nothing left to do."""
    env = {**os.environ, "SCALE": "tiny", "DATASETS": "cifar100",  # one is enough
           "RUNS": str(tmp_path / "runs"), "DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1",
           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out = tmp_path / "runs" / "results"

    def run(name):
        done = subprocess.run(["bash", f"scripts/{name}.sh"], cwd=ROOT, env=env, text=True,
                              capture_output=True)
        assert done.returncode == 0, f"{done.stdout[-1500:]}{done.stderr[-1500:]}"
        return done.stdout, {p.name: len(p.read_text().splitlines()) for p in out.glob("*.jsonl")}

    said, lines = run("reproduce")
    trained = re.findall(r"^(\S+): finished \(code 0", said, re.M)
    assert len(trained) == len(set(trained)) == 18
    assert set(lines) >= {"table2.jsonl", "table3.jsonl", "table5.jsonl",
                          "table7.jsonl", "fig6.jsonl", "fig9.jsonl", "ece.jsonl"}
    assert len(list((out / "figures").glob("*.png"))) >= 5 and "†" in said
    for name in ("table5", "fig5", "fig6"):
        said, after = run(name)
        assert after == lines and "finished at step" not in said


@pytest.mark.parametrize(("name", "env", "complaint"), (
    ("judge", {"JUDGE": "none"}, "MODEL=judge bash scripts/train_cpu.sh"),
    ("judge", {"JUDGE": "README.md", "MODELS": "README.md none"}, "no model none"),
    ("judge", {"JUDGE": "README.md", "MODELS": "README.md", "N": "7"}, "another N or judge"),
    ("judge", {"JUDGE": "README.md", "MODELS": "README.md ./README.md"}, "have one name"),
    ("digits", {"SCALE": "tiny"}, "leave SCALE out"), ("reproduce", {"PLAN": "1"}, "no PLAN"),
    *(("table5", {"SEEDS": seeds}, "whole numbers") for seeds in ("1,2", " ", "*", "01", "1 a")),
    ("table2", {"OUT": "README.md"}, "cannot be written")))
def test_a_script_that_cannot_do_it_says_so_in_a_line(monkeypatch, tmp_path, name, env, complaint):
    (tmp_path / "judge.jsonl").write_text('{"n": 300, "protocol": {"features_sha256": "a"}}\n')
    for key, value in ({"RUNS": str(tmp_path), "OUT": str(tmp_path)} | env).items():
        monkeypatch.setenv(key, value)
    done = shell("bash", f"scripts/{name}.sh")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert complaint in done.stderr and not done.stdout


@pytest.mark.slow
def test_judge_adds_a_row_for_each_kind_of_image_once(tmp_path):
    assert train_jempp.main(tiny(tmp_path / "été", "--n_epochs", "1")) == 0
    env = {**os.environ, "RUNS": str(tmp_path), "OUT": str(tmp_path / "out"),
           **dict.fromkeys(("JUDGE", "MODELS"), str(tmp_path / "été/best.pt")),
           "DATA": str(tmp_path), "N": "20",
           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for _ in range(2):
        done = subprocess.run(["bash", "scripts/judge.sh"], cwd=ROOT, env=env, text=True,
                              capture_output=True)
        assert done.returncode == 2 and "left out: CIFAR-100" in done.stderr  # no data there
    found = [json.loads(line) for line in (tmp_path / "out/judge.jsonl").read_text().splitlines()]
    assert [r["method"] for r in found] == [
        "training images", "training images, against test", "test images",
        "test images with noise 0.1", "class Gaussians", "buffer of été"]
    assert {r["metric"] for r in found} == {"fd_features"} and {r["n"] for r in found} == {20}


def test_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 225


def python_of(heading):
    """The Python block of a section of README."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    (snippet,) = re.findall("```python\n(.*?)```", section, flags=re.S)
    return snippet


def test_readmes_network_runs_as_printed():
    found = {"nn": nn}
    exec(python_of("Train"), found)
    model = found["Mine"](**found["Mine"](n_classes=7).config)
    assert model.trunk(model.stem(torch.zeros(2, 3, 32, 32))).shape == (2, 7)


def test_readmes_five_lines_of_python_run_as_printed():
    snippet = python_of("Load a trained model")
    assert len(snippet.splitlines()) == 5
    found = {}
    exec(snippet.replace("16, n_steps=100", "4, n_steps=2"), found)
    assert found["x"].shape == (4, 3, 32, 32) and found["p"].shape == (4, 10)
    assert found["score"].shape == (4,) and not found["jem"].training


def test_the_manuals_list_of_flags_that_may_change_is_the_codes():
    listed = MANUAL.split("free flags:begin")[1].split("free flags:end")[0]
    assert {name.strip("`.-") for name in re.findall(r"--\w+", listed)} == cli.FREE
    assert all(f"--{name}" in MANUAL for name in cli.SCHEDULE)


def test_every_script_of_a_table_or_figure_is_in_the_manual():
    for script in (ROOT / "scripts").glob("*.sh"):
        if script.name.startswith(("table", "fig")):
            assert f"scripts/{script.name}" in MANUAL
