"""The benchmark: what it reports, what it counts, and that both of its sides compute the same."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, TINY

import train_jempp
from samplers import make_sampler
from scripts import (
    benchmark,
    benchmark_scaling,
    benchmark_switches,
    benchmark_table4,
    figures,
    literal,
    operations,
)
from utils import cli
from utils.files.records import read_jsonl
from utils.machine import pick_device
from utils.training.build import Setup, build


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


def test_the_benchmark_times_both_sides(call, tmp_path):
    file = tmp_path / "profile.txt"
    code, out, err = call(benchmark.main, [*TINY, "--repeats", "2", "--json", "--profile", file])
    assert code == 0, err
    (result,) = lines(out)
    assert result["ratio"] == pytest.approx(result["literal_ms"] / result["fast_ms"])
    assert result["sampling_ms"] < result["fast_ms"]
    assert result["ceiling_share"] == pytest.approx(result["tflops"] / result["ceiling_tflops"])
    flop = result["tflops"] * result["fast_ms"] * 1e9
    assert flop == pytest.approx(16 * (2 * 2 + 9) * operations.forward_flop(
        {"depth": 10, "width": 1, "stride_first": True, "stem_stride": 2}, 16, 1))
    assert result["images_per_s"] == pytest.approx(16000 / result["fast_ms"])
    assert result["ceiling_precision"] == "float32" and result["device"] == "cpu"
    assert result["first_step_s"] > 0 and result["peak_gib"] is None
    assert [len(times) for times in result["times_ms"].values()] == [2] * 4
    assert re.search(r"\d ms +\d+\.\d % +\d+ x +aten::mkldnn_convolution", file.read_text())


def test_a_grid_shares_its_rounds_with_jem(call, tmp_path):
    code, out, err = call(benchmark.main, [
        *TINY, "--networks", "10-1", "10-2", "--M", "1", "2", "--N", "5",
        "--jem", "--only", "ours", "--repeats", "1", "--json"])
    assert code == 0, err
    results = lines(out)
    assert len(results) == 2 * (2 + 2)
    for width in (1, 2):
        jempp, jem = [[r for r in results if r["args"]["width"] == width
                       and (r["method"] == "JEM++") == ours] for ours in (True, False)]
        assert [(r["args"]["n_steps"], r["args"]["in_steps"]) for r in jempp] == [(1, 5), (2, 5)]
        assert [(r["method"], r["args"]["norm"], r["args"]["n_steps"]) for r in jem] == [
            ("JEM", "none", 20), ("JEM, same norm", "batch", 20)]
        for r in jempp:
            assert r["literal_ms"] is None and r["ratio"] is None
            assert r["speedup_over"]["JEM"] == pytest.approx(jem[0]["fast_ms"] / r["fast_ms"])
    (tmp_path / "out.jsonl").write_text(out)
    code, shown, err = call(benchmark.main, ["--show", tmp_path / "out.jsonl"])
    assert code == 0 and len(shown.splitlines()) == 2 * len(results), err


def test_the_committed_records_can_be_shown(call):
    file = ROOT / "results" / "benchmark.jsonl"
    code, out, err = call(benchmark.main, ["--show", file])
    assert code == 0 and len(out.splitlines()) >= len(read_jsonl(file)), err


@pytest.mark.parametrize(("flags", "word"), (
    (["--sam", "0.1", "--only", "ours"], "--sam"), (["--sgld_std", "0.1"], "--sgld_std"),
    (["--networks", "28x10"], "28-10"), (["--networks", "27-10"], "6n + 4")))
def test_what_cannot_be_measured_is_refused(call, flags, word):
    code, _, err = call(benchmark.main, [*TINY, *flags])
    assert code == 2 and word in err and "Traceback" not in err


def test_passes_per_step_are_the_papers_cost():
    cost = {m: operations.forward_images(vars(cli.train_args(["--n_steps", str(m)]))) / 64
            for m in (5, 10, 20)}
    assert cost == {5: 19, 10: 29, 20: 49}


@pytest.mark.parametrize(("words", "passes"), [
    (["--p_x_weight", "0"], 3), (["--p_x_y_weight", "1"], 2 * 29 - 6),
    (["--p_x_weight", "0", "--adversarial", "linf"], 3 + 2 * 7), (["--sam", "0.1"], 20 + 2 * 9),
    (["--batch_size", "32", "--labelled_batch", "128"], 26 / 2 + 3 * 2),
    (["--accumulate", "2"], 2 * 29)])
def test_passes_per_step_of_other_runs(words, passes):
    args = vars(cli.train_args(words))
    assert operations.forward_images(args) / 64 == passes


def test_two_stages_cost_what_their_steps_do():
    args = vars(cli.train_args(["--p_x_from", "2", "--batch_size", "100", "--depth", "10",
                                "--width", "1"]))
    config = {"depth": 10, "width": 1, "n_classes": 10}
    a_pass = operations.forward_flop(config, 32, 100) / 1e15
    for steps, passes in ((15, 15 * 3), (20, 20 * 3), (25, 20 * 3 + 5 * 29)):
        cost = operations.run_pflop(args, config, 1099, steps)
        assert cost == pytest.approx(passes * a_pass)
    paper = operations.run_pflop(vars(cli.train_args([])), {"depth": 28, "width": 10}, 45000,
                                 150 * 703)
    assert paper == pytest.approx(2300, rel=0.02)


def test_the_figure_of_costs_has_the_papers_rows(call, tmp_path):
    costs = {row: pflop for row, pflop, _ in figures.papers_costs()}
    relative = {row: pflop / costs["JEM++ (M=10)"] for row, pflop in costs.items()}
    assert relative == pytest.approx({"JEM++ (M=5)": 19 / 29, "JEM++ (M=10)": 1,
                                      "JEM++ (M=20)": 49 / 29, "WRN w/ BN": 3 / 29})
    code, _, err = call(figures.main, ["cost", "--out", tmp_path / "cost.png"])
    assert code == 0 and (tmp_path / "cost.png").stat().st_size > 5000, err


def test_the_papers_network_has_the_operations_that_are_known():
    config = {"depth": 28, "width": 10, "n_classes": 10}
    assert operations.forward_flop(config, 32, 1) / 2 == pytest.approx(5.95e9, rel=0.01)


def sides(*flags):
    """(args, our state, data, p_0) on digits, past the warm-up."""
    args = cli.train_args([*TINY, "--reinit_freq", "0", *flags])
    state, data, p0, _, _ = build(args, pick_device("cpu", 1))
    state.step = args.warmup_iters
    return args, state, data, p0


@pytest.mark.parametrize("norm", ("batch", "none"))
def test_the_literal_iteration_takes_the_same_step(norm):
    """Weights, running statistics (and so order and mode of the passes) and buffer move alike."""
    for found in literal.check(*sides("--norm", norm), torch.float64):
        assert found["lr"] == 0.1
        for name in ("weights", "statistics", "buffer", "relative"):
            assert found[name] < 1e-12, name


def test_the_literal_iteration_takes_the_same_step_in_float32():
    """Within rounding, but for a step on which an activation falls to the other side of a kink."""
    found = literal.check(*sides("--n_steps", "10"), steps=5)
    assert sorted(f["relative"] for f in found)[1] < 1e-5
    assert all(f["relative"] < 0.05 and f["statistics"] < 1e-4 and f["buffer"] < 0.02
               for f in found)


def test_the_comparison_sees_another_step():
    found = literal.check(*sides("--step_decay", "0.9"), torch.float64, steps=1)[0]
    assert found["relative"] > 1e-3 and found["buffer"] > 1e-4 and found["statistics"] > 1e-6


def test_the_literal_side_has_none_of_our_switches(monkeypatch):
    args, _, data, p0 = sides("--compile", "default", "--amp", "bf16", "--tf32")
    matmul, cudnn, seen = torch.backends.cuda.matmul, torch.backends.cudnn, []
    monkeypatch.setattr(literal, "literal_step",
                        lambda *_: seen.append((matmul.allow_tf32, cudnn.allow_tf32)))
    other = literal.Literal(args, data, p0)
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        other.step(args)
        assert seen == [(False, False)] and matmul.allow_tf32 and cudnn.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
    model = other.state.model
    assert other.state.step == 1 and not model.bf16 and model._compiled_call_impl is None
    assert all(p.is_contiguous() for p in model.parameters())
    assert not any(getattr(module, "inplace", False) for module in model.modules())


def test_table_4s_records_name_their_switches(call, tmp_path, monkeypatch):
    rows = {row: benchmark_table4.ROWS[row] for row in ("JEM", "JEM++ M=5 N=5", "JEM++ M=5 N=20")}
    monkeypatch.setattr(benchmark_table4, "ROWS", rows)
    file = tmp_path / "table4.jsonl"
    code, out, err = call(benchmark_table4.main, [*TINY, "--amp", "bf16", "--repeats", "1",
                                                  "--results", file])
    assert code == 0 and sum(" ms" in line for line in out.splitlines()) == 3, (out, err)
    records = read_jsonl(file)
    assert [r["method"] for r in records] == list(rows)
    assert {r["protocol"]["amp"] for r in records} == {"bf16"}
    assert {r["protocol"]["compile"] for r in records} == {"off"}
    assert [r["training"]["norm"] for r in records] == ["none", "batch", "batch"]
    assert [r["protocol"]["in_steps"] for r in records] == [0, 5, 20]


def test_each_row_of_the_switches_lacks_what_it_says(call, tmp_path):
    file = tmp_path / "switches.jsonl"
    code, out, err = call(benchmark_switches.main, [*TINY, "--compile", "off", "--amp", "off",
                                                    "--repeats", "1", "--results", file])
    found = {r["method"]: r["protocol"] for r in read_jsonl(file)}
    assert code == 0 and len(out.splitlines()) == len(found) == len(benchmark_switches.ROWS), err
    assert found["all"]["ratio"] == 1 and found["all"]["channels_last"]
    assert not found["without --channels_last"]["channels_last"]
    assert found["with the other precision"]["amp"] == "bf16"
    side = benchmark_switches.prepare("without activations in place", TINY, torch.device("cpu"))
    assert not any(getattr(module, "inplace", False) for module in side[1].model.modules())


@pytest.mark.parametrize("script", (benchmark_table4, benchmark_switches, benchmark_scaling))
def test_a_place_that_cannot_be_written_is_named_before_the_timing(call, tmp_path, script):
    code, out, err = call(script.main, [*TINY, "--results", tmp_path])
    assert code == 2 and "--results" in err and not out


def test_the_other_compilation_is_the_other_one():
    for typed, other in (("off", "default"), ("default", "off")):
        args = benchmark_switches.prepare("with the other compilation",
                                          [*TINY, "--compile", typed], torch.device("cpu"))[0]
        assert args.compile == other


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "dtype", "bound"), (
    pytest.param("batch", torch.float64, 1e-12, marks=pytest.mark.long),
    ("none", torch.float64, 1e-12), ("batch", torch.float32, 0.05)
), ids=str)
def test_compiled_steps_are_the_eager_ones(norm, dtype, bound):
    """From the same state each time; ``bound`` is on the weights' difference over the step's size,
    in float32 with room for the activations at a kink (see literal.check)."""
    args, state, data, p0 = sides("--norm", norm)
    compiled_args, compiled, *_ = sides("--norm", norm, "--compile", "default")
    assert compiled.model._compiled_call_impl is not None
    literal.in_precision(dtype, data, state, compiled)
    for _ in range(3):
        literal.copy_state(compiled, state)
        before = literal.vector(state.model.parameters())
        metrics = [train_jempp.train_step(a, Setup(s, data, p0), make_sampler(a))
                   for a, s in ((args, state), (compiled_args, compiled))]
        found = literal.differences(state, compiled, before, torch.arange(len(state.buffer)))
        assert found["relative"] < bound
        assert found["statistics"] < bound / 100 and found["buffer"] < bound
        for name, value in metrics[0].items():
            assert float(value) == pytest.approx(float(metrics[1][name]), rel=bound), name


@pytest.mark.long
def test_the_gpu_session_runs_on_a_cpu(tmp_path):
    env = {**os.environ, "DEVICE": "cpu", "TINY": "1", "BUDGET": "3000", "OUT": str(tmp_path),
           "PYTHON": sys.executable}
    done = subprocess.run(["bash", "scripts/gpu_check.sh"], cwd=ROOT, env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "FAILED" not in done.stdout and "skipped" not in done.stdout
    results = read_jsonl(tmp_path / "benchmark.jsonl")
    assert sum("check" in r for r in results) == 4
    assert any(r.get("literal_ms") and r["args"]["compile"] != "off" for r in results)
    assert read_jsonl(tmp_path / "build.jsonl") and (tmp_path / "profile.txt").read_text()
    env["BUDGET"] = "0"
    done = subprocess.run(["bash", "scripts/gpu_check.sh"], cwd=ROOT, env=env, text=True,
                          capture_output=True)
    assert "skipped: it takes about" in done.stdout
