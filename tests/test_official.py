"""The released files of JEM and JEM++ load, and give the released code's numbers."""

import numpy as np
import pytest
import torch
from helpers import FIXTURE, legacy_copy, released_file

from models.official import load_official, our_name
from samplers import pyld, pyld_collapsed, sgld
from samplers.sgld import input_gradient
from utils.files.checkpoint import open_any
from utils.program import InputError

NORMS = ("batch", "none")
CHAIN = {"n_outer": 3, "n_inner": 5, "step_size": 0.2, "clip": 1.0}


def reference(name):
    return np.load(FIXTURE / f"{name}.npz")


def model64(name, mode):
    model, _ = load_official(FIXTURE / f"{name}.pt")
    return model.double().train(mode == "train")


def tensor64(array):
    return torch.from_numpy(array).double()


def close(ours, theirs, tolerance=1e-6):
    """Equal within ``tolerance``, for as many images as the fixture keeps of a result."""
    assert np.abs(ours.detach().numpy()[:len(theirs)] - theirs).max() <= tolerance


@pytest.mark.parametrize("norm", NORMS)
def test_zip_and_legacy_files_hold_the_same_network_and_buffer(tmp_path, norm):
    path = FIXTURE / f"official_wrn10_1_{norm}.pt"
    model, buffer = load_official(path)
    legacy, legacy_buffer = load_official(legacy_copy(path, tmp_path / "legacy.pt"))
    assert model.config == {"network": "wrn", "depth": 10, "width": 1, "n_classes": 10,
                            "norm": norm, "bn_momentum": 0.9, "stride_first": False,
                            "stem_stride": 1}
    assert buffer.shape == (2, 3, 32, 32) and torch.equal(buffer, legacy_buffer)
    for (name, ours), theirs in zip(model.state_dict().items(), legacy.state_dict().values(),
                                    strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("mode", ("train", "eval"))
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("source", ("official", "jem"))
def test_logits_equal_those_of_the_released_code(source, norm, mode):
    name = f"{source}_wrn10_1_{norm}"
    theirs = reference(name)
    close(model64(name, mode)(tensor64(theirs["x"])), theirs[f"f64_logits_{mode}"])


@pytest.mark.parametrize("mode", ("train", "eval"))
@pytest.mark.parametrize("norm", NORMS)
def test_energies_and_input_gradients_equal_those_of_the_released_code(norm, mode):
    name = f"official_wrn10_1_{norm}"
    theirs = reference(name)
    x, y = tensor64(theirs["x"]), torch.from_numpy(theirs["y_cond"])
    close(-model64(name, mode).energy(x), theirs[f"f64_lse_{mode}"])
    close(-input_gradient(model64(name, mode).energy, x), theirs[f"f64_grad_lse_{mode}"])
    # E(x, y): the fixture holds these in float32 only
    model = model64(name, mode)
    close(-model.energy(x, y)[:, None], theirs[f"logit_y_{mode}"], 1e-4)
    model = model64(name, mode)
    gradient = input_gradient(lambda x: model.energy(x, y), x)
    close(-gradient, theirs[f"grad_logit_y_{mode}"], 1e-5)


@pytest.mark.parametrize("sampler", (pyld, pyld_collapsed))
@pytest.mark.parametrize("mode", ("train", "eval"))
@pytest.mark.parametrize("norm", NORMS)
def test_pyld_samples_equal_those_of_the_released_code(sampler, norm, mode):
    name = f"official_wrn10_1_{norm}"
    theirs = reference(name)
    x, y = tensor64(theirs["x_init"]), torch.from_numpy(theirs["y_cond"])
    close(sampler(model64(name, mode), x, **CHAIN), theirs[f"f64_samples_{mode}"])
    conditional = sampler(model64(name, mode), x, y=y, **CHAIN)
    if mode == "train":
        close(conditional, theirs["f64_samples_cond_train"])
    else:  # the fixture's is float32
        close(conditional, theirs["samples_cond_eval"], 1e-4)


@pytest.mark.parametrize("sampler", (pyld, pyld_collapsed))
@pytest.mark.parametrize("norm", NORMS)
def test_pyld_clipped_or_from_outside_the_pixels_equals_the_released_codes(sampler, norm):
    name = f"official_wrn10_1_{norm}"
    theirs = reference(name)
    x = tensor64(theirs["x_init"])
    close(sampler(model64(name, "train"), x, **CHAIN | {"clip": 0.05}),
          theirs["f64_samples_eps0.05_train"])
    close(sampler(model64(name, "train"), 1.25 * x, **CHAIN | {"n_outer": 1}),
          theirs["f64_samples_outside_1step_train"])


@pytest.mark.parametrize("norm", NORMS)
def test_sgld_samples_equal_those_of_the_released_code(norm):
    name = f"official_wrn10_1_{norm}"
    theirs = reference(name)
    model = model64(name, "train")
    x = sgld(model.energy, tensor64(theirs["x_init"]), n_steps=3, step_size=0.5, clip=1.0)
    close(x, theirs["samples_sgldlr0.5_in0_train"], 1e-4)  # the fixture's is float32
    name = f"jem_wrn10_1_{norm}"
    theirs = reference(name)
    x = sgld(model64(name, "eval").energy, tensor64(theirs["x_init"]), n_steps=3, step_size=1.0,
             pixels=None)
    close(x, theirs["jem_samples"], 1e-4)


@pytest.mark.parametrize("sampler", (pyld, pyld_collapsed))
def test_sampling_moves_the_running_statistics_as_the_released_code_does(sampler):
    name = "official_wrn10_1_batch"
    theirs = reference(name)
    model = model64(name, "train")
    sampler(model, tensor64(theirs["x_init"]), **CHAIN)
    state = model.state_dict()
    entries = [k for k in theirs.files if k.startswith("after_sampling/")]
    assert len(entries) == 14
    for entry in entries:
        close(state[our_name(entry.removeprefix("after_sampling/"))], theirs[entry], 1e-5)


def test_bare_and_data_parallel_state_dicts_hold_the_same_network(tmp_path):
    content = released_file(tmp_path / "a.pt")
    state = content["model_state_dict"]
    torch.save(state, tmp_path / "bare.pt")
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "parallel.pt")
    expected = load_official(tmp_path / "a.pt")[0].state_dict()
    for name in ("bare.pt", "parallel.pt"):
        model, buffer = load_official(tmp_path / name)
        assert buffer is None
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_weights_alone_under_our_names_do_not_tell_strides_which_a_line_says(tmp_path, capsys):
    released_file(tmp_path / "a.pt")
    torch.save(open_any(tmp_path / "a.pt").model.state_dict(), tmp_path / "ours.pt")
    assert not capsys.readouterr().out
    open_any(tmp_path / "ours.pt")
    assert "--stem_stride" in capsys.readouterr().out


@pytest.mark.parametrize("changes, message", [
    ({"f.layer1.0.conv1.weight": None}, "no Wide-ResNet"),
    ({"f.layer2.0.conv1.weight": None}, "Missing key"),
    ({"class_output.weight": torch.zeros(10, 63)}, "size mismatch"),
    ({"f.attention.weight": torch.zeros(1)}, "unknown tensor"),
    ({"f.bn1.running_mean": None}, "norm without running statistics"),
])
def test_foreign_content_is_refused_in_one_line(tmp_path, changes, message):
    released_file(tmp_path / "a.pt", **changes)
    with pytest.raises(InputError, match=message) as error:
        open_any(tmp_path / "a.pt")
    assert "\n" not in str(error.value)
