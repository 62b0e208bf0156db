"""The switches: what --fast stands for, and that a missing compiler is one line."""

import copy
import os
import shlex

import pytest
import torch
from helpers import ROOT, TINY

import train_jempp
from models import JEM, frozen
from samplers import ClassGaussians
from scripts import benchmark_switches, train_all
from utils import cli, distributed, machine
from utils.evaluation.inference import predict


@pytest.fixture
def wide_vectors(monkeypatch):
    """A CPU on which --fast compiles and leaves bfloat16 off, wherever the tests run."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)


@pytest.mark.usefixtures("wide_vectors")
def test_fast_compiles_only_where_that_pays(monkeypatch):
    words = ["--device", "cpu", "--fast"]
    assert cli.train_args(words).compile == "default"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert cli.train_args(words).compile == "off"
    assert cli.train_args([*words, "--compile", "default"]).compile == "default"


@pytest.mark.usefixtures("wide_vectors")
@pytest.mark.parametrize("kind", ("cpu", "cuda"))
def test_fast_turns_on_what_pays_and_what_is_typed_wins(kind):
    plain = vars(cli.train_args(["--device", kind]))
    assert {k: plain[k] for k in machine.OFF} == machine.OFF
    fast = vars(cli.train_args(["--device", kind, "--fast"]))
    assert {k: fast[k] for k in machine.OFF} == machine.OFF | machine.FAST[kind]
    typed = cli.train_args(["--device", kind, "--fast", "--compile", "off"])
    assert typed.compile == "off"


@pytest.mark.usefixtures("wide_vectors")
def test_a_missing_compiler_is_one_line(tmp_path, call, monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("Failed to find C++ compiler. Please specify via CXX.\nand so on")

    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: no_compiler)
    code, _, err = call(train_jempp.main, [*TINY, "--run_dir", tmp_path / "run", "--fast"])
    assert code == 2 and len(err.splitlines()) == 1 and "--compile off" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bf16", (False, True))
def test_the_compiled_gradient_is_the_eager_one_also_of_a_copy(bf16):
    """And batch norm sees the pass; a copy's gradient is of the copy's weights."""
    torch.manual_seed(0)
    model = JEM.build(depth=10, width=1)
    model.bf16 = bf16
    eager, x, y = copy.deepcopy(model), torch.rand(4, 3, 16, 16) * 2 - 1, torch.arange(4)
    machine.compiled(model, "default")
    assert model.gradient_at is not JEM.gradient_at

    def compare(a, b, labels):
        with frozen(a), frozen(b), torch.no_grad():  # evaluation may switch gradients off
            ours, expected = a.energy_gradient(x, labels), b.energy_gradient(x, labels)
        assert not ours.requires_grad and all(p.grad is None for p in a.parameters())
        cosine = torch.cosine_similarity(ours.flatten(), expected.flatten(), 0)
        assert cosine > (0.9 if bf16 else 0.99999)  # bfloat16's own to float64: 0.98
        assert ours.norm() / expected.norm() == pytest.approx(1, rel=0.05 if bf16 else 1e-3)

    compare(model, eager, None)
    compare(model, eager, y)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in [*copied.parameters(), *eager.parameters()]:
            p.mul_(1.5)
    compare(copied, eager, y)
    means = [dict(m.named_buffers())["trunk.norm.running_mean"] for m in (copied, eager)]
    assert torch.allclose(*means, atol=0.02 if bf16 else 1e-4)


def test_every_row_of_the_options_script_is_a_command_that_parses():
    text = (ROOT / "scripts" / "options.sh").read_text()
    rows = [shlex.split(line) for line in text.splitlines() if line.startswith("row ")]
    assert len(rows) > 10 and len({row[2] for row in rows}) == len({row[3] for row in rows})
    defaults = vars(cli.train_args([]))
    for row in rows:
        flags = [w.replace("$LABELLED", "128") for w in row[4:row.index("--")] if "@" not in w]
        changed = {k for k, v in vars(cli.train_args(flags)).items() if v != defaults[k]}
        assert len(changed) == (row[2] != "baseline"), (row[2], changed)


@pytest.mark.parametrize(("name", "number"), (("auto", 1), ("cuda", 1), ("cuda:0", 0)))
def test_a_gpu_is_chosen_by_its_number(monkeypatch, name, number):
    """torch.cuda.set_device takes no device without one."""
    zeros, chosen = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    assert machine.pick_device(name, 0) == torch.device("cuda", number) and chosen == [number]


def test_a_driver_that_torch_cannot_use_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    assert machine.pick_device("auto", 0).type == machine.pick_device("cpu", 0).type == "cpu"
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_large_images_are_taken_in_parts(monkeypatch):
    sizes = []
    for side in (16, 32, 64):
        x = torch.zeros(501, 3, side, side, dtype=torch.uint8)
        model = torch.nn.Module()
        model.forward = lambda images: sizes.append(len(images)) or images[:, :, 0, 0]
        assert len(predict(model, x)) == 501
    assert sizes == [500, 1, 500, 1, 125, 125, 125, 125, 1]
    x, y = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8), torch.arange(40) % 2
    whole = ClassGaussians.fit(x, y, 2).means()
    monkeypatch.setattr(ClassGaussians, "floats", 48 * 7)
    monkeypatch.setattr(ClassGaussians, "rows", 3)
    assert torch.allclose(ClassGaussians.fit(x, y, 2).means(), whole, atol=1e-5)


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_every_row_of_switches_is_a_command_with_and_without_bf16(monkeypatch, device):
    for native in (True, False):
        monkeypatch.setattr(machine, "native_bf16", lambda n=native: n)
        for words in benchmark_switches.ROWS.values():
            cli.train_args(["--fast", "--device", device, *words])


def test_runs_at_a_time_take_a_gpu_each(monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(train_all.subprocess, "Popen", lambda words, env, **more: begun.append(
        env.get("CUDA_VISIBLE_DEVICES")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    stop = train_all.Stop.__new__(train_all.Stop)
    stop.end = float("inf")
    for slot in range(3):
        train_all.begin(str(tmp_path / "a"), [], stop, 1, slot)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    train_all.begin(str(tmp_path / "a"), [], stop, 1, 1)
    assert begun == ["0", "1", "0", "5"]


def test_several_processes_leave_cuda_graphs_alone(monkeypatch):
    for world, mode in ((1, "reduce-overhead"), (2, "default")):
        monkeypatch.setattr(distributed, "world", lambda n=world: n)
        assert cli.train_args(["--fast", "--device", "cuda"]).compile == mode


@pytest.mark.parametrize("tf32", (False, True))
def test_precision_is_as_typed(monkeypatch, tf32):
    """PyTorch's own default for convolutions is TF32."""
    matmul, cudnn, chosen = torch.backends.cuda.matmul, torch.backends.cudnn, []
    before = matmul.allow_tf32, cudnn.allow_tf32
    monkeypatch.setattr(torch, "use_deterministic_algorithms", chosen.append)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = not tf32
        machine.set_precision(tf32=tf32)
        assert (matmul.allow_tf32, cudnn.allow_tf32, chosen) == (tf32, tf32, [])
        machine.set_precision(deterministic=True)
        assert chosen == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
