"""Shared by all tests: one thread (tiny networks only lose by more), and small digits runs."""

import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)

# WRN-10-1 on 16x16 digits, 3 steps an epoch: a second or two
TINY = ["--dataset", "digits", "--depth", "10", "--width", "1", "--n_valid", "1389",
        "--batch_size", "16", "--n_steps", "2", "--buffer_size", "40", "--reinit_freq", "0.3",
        "--warmup_iters", "2", "--print_every", "1", "--num_threads", "1", "--device", "cpu"]


def pytest_collection_modifyitems(items):
    """Slow tests first: none of them is then what the other process waits for at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a script's main with a list of words; returns (exit code, stdout, stderr)."""
    from utils import program

    def run(main, argv):
        before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
        monkeypatch.setattr(sys, "argv", [Path(sys.modules[main.__module__].__file__).name])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            program.run(lambda: main([str(word) for word in argv]))
        for number, handler in before.items():
            signal.signal(number, handler)
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run
