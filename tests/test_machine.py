"""The switches: what --fast stands for, and that a missing compiler is one line."""

import shlex

import pytest
import torch
from conftest import ROOT, TINY

import train_jempp
from utils import machine


@pytest.mark.parametrize("kind", ("cpu", "cuda"))
def test_fast_turns_on_what_pays_and_what_is_typed_wins(kind):
    plain = vars(train_jempp.parse_args(["--device", kind]))
    assert {k: plain[k] for k in machine.OFF} == machine.OFF
    fast = vars(train_jempp.parse_args(["--device", kind, "--fast"]))
    assert {k: fast[k] for k in machine.OFF} == machine.OFF | machine.FAST[kind]
    typed = train_jempp.parse_args(["--device", kind, "--fast", "--compile", "off"])
    assert typed.compile == "off"


def test_a_missing_compiler_is_one_line(tmp_path, call, monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("Failed to find C++ compiler. Please specify via CXX.\nand so on")

    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: no_compiler)
    code, _, err = call(train_jempp.main, [*TINY, "--run_dir", tmp_path / "run", "--fast"])
    assert code == 2 and len(err.splitlines()) == 1 and "--compile off" in err
    assert not (tmp_path / "run").exists()


def test_every_row_of_the_options_script_is_a_command_that_parses():
    text = (ROOT / "scripts" / "options.sh").read_text()
    rows = [shlex.split(line) for line in text.splitlines() if line.startswith("row ")]
    assert len(rows) > 10 and len({row[2] for row in rows}) == len({row[3] for row in rows})
    defaults = vars(train_jempp.parse_args([]))
    for row in rows:
        flags = [w.replace("$LABELLED", "128") for w in row[4:row.index("--")] if "@" not in w]
        changed = {k for k, v in vars(train_jempp.parse_args(flags)).items() if v != defaults[k]}
        assert len(changed) == (row[2] != "baseline"), (row[2], changed)
