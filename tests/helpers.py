"""What test files share: paths, the words of a tiny run, small builders and comparisons."""

import os
from pathlib import Path

import torch

import train_jempp
from models import JEM
from utils import cli
from utils.training.build import build

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = ROOT / "tests" / "fixture"  # files and numbers of the released classes: its README.txt

# digits of 16x16, 3 steps an epoch, for any network ...
ANY_NETWORK = ["--dataset", "digits", "--n_train", "48", "--n_valid", "40", "--batch_size", "16",
               "--n_steps", "2", "--buffer_size", "40", "--reinit_freq", "0.3", "--warmup_iters",
               "2", "--print_every", "1", "--num_threads", "1", "--device", "cpu"]
# ... and for WRN-10-1 with a stem of stride 2: about a second
TINY = ["--depth", "10", "--width", "1", "--stride_first", "--stem_stride", "2", *ANY_NETWORK]
RELEASED = ["--no-stride_first", "--stem_stride", "1"]  # WRN-10-1 as in a released file


def tiny(run_dir, *more):
    """The words of a tiny training run in ``run_dir``."""
    return [str(word) for word in (*TINY, "--run_dir", run_dir, *more)]


def inject(monkeypatch, *steps):
    """A NaN loss after each of ``steps``, one a random stream."""
    real, left = train_jempp.train_step, list(steps)

    def step(args, setup, draw):
        metrics, state = real(args, setup, draw), setup.state
        if left and state.step == left[0] and state.rollbacks == len(steps) - len(left):
            left.pop(0)
            metrics["loss"] = metrics["loss"] * float("nan")
        return metrics

    monkeypatch.setattr(train_jempp, "train_step", step)


# -- checkpoints ----------------------------------------------------------------------------------
def flat(content, path=""):
    """(name, tensor) of every tensor in a checkpoint."""
    if isinstance(content, torch.Tensor):
        yield path, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from flat(value, f"{path}/{key}")
    elif isinstance(content, list):
        for key, value in enumerate(content):
            yield from flat(value, f"{path}/{key}")


def same_state(a, b):
    """Assert that two last.pt hold equal tensors, all kinds of them; whether their steps agree."""
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    tensors_a, tensors_b = dict(flat(a)), dict(flat(b))
    assert tensors_a.keys() == tensors_b.keys()
    different = [k for k, v in tensors_a.items() if not torch.equal(v, tensors_b[k])]
    assert not different
    names = " ".join(tensors_a)
    for part in ("/model/stem.weight", "/buffer", "/optimizer/state/0/"):
        assert part in names
    assert ("running_var" in names) == (a["args"]["norm"] == "batch")
    for name in ("epoch", "best", "rng", "lr_factor", "guard"):
        assert a[name] == b[name], name
    return a["step"] == b["step"]


def released_file(path, **changes):
    """A small file in the released format, with random weights; ``changes`` to its state dict."""
    torch.manual_seed(0)
    state = {}
    for name, tensor in JEM.build(depth=10, width=1).state_dict().items():
        name = name.replace("trunk.head", "class_output").replace("trunk.norm", "f.bn1")
        name = name.replace("trunk.", "f.").replace(".norm", ".bn").replace("stem.", "f.conv1.")
        state[name.replace("shortcut.", "shortcut.0.")] = tensor
    state |= changes
    content = {"model_state_dict": {k: v for k, v in state.items() if v is not None},
               "replay_buffer": torch.zeros(4, 3, 32, 32)}
    torch.save(content, path)
    return content


def legacy_copy(source, path):
    """``source`` again at ``path``, in the format of PyTorch before 1.6. Returns ``path``."""
    torch.save(torch.load(source, weights_only=True), path, _use_new_zipfile_serialization=False)
    return path


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


# -- training -------------------------------------------------------------------------------------
def loss_of(monkeypatch, *flags):
    """The terms of loss_terms on one batch with x_neg given: (model, batch, x_neg, metrics)."""
    args = cli.train_args([*TINY, "--norm", "none", *flags])
    setup = build(args, torch.device("cpu"))
    state, batch = setup.state, setup.data.batch(0)
    x_neg = torch.rand(16, 3, 16, 16) * 2 - 1
    monkeypatch.setattr(train_jempp, "sample_negatives", lambda *rest: x_neg)
    streams = train_jempp.seed_step(1, 0, 0, "cpu")
    terms = train_jempp.loss_terms(state, None, batch, None, setup.p0, args, streams,
                                   args.p_x_weight)
    metrics = train_jempp.backward([terms], state.net)
    return state.model, batch, x_neg, {k: v.item() for k, v in metrics.items()}
