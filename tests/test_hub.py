"""Trained models from Python and by torch.hub: the lines that README shows, and what they give."""

import sys
import types
import warnings

import pytest
import torch
from helpers import ROOT, released_file, tiny

import hubconf
import train_jempp
from samplers import ClassGaussians
from utils import load_model
from utils.data import load_splits
from utils.files import checkpoint
from utils.program import InputError

NAME = "cifar10_wrn16_4"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    assert train_jempp.main(tiny(run, "--n_epochs", "1")) == 0
    return run


def test_readmes_lines_run_in_a_clone_without_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jem = load_model(ROOT / "results" / "models" / NAME)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    p = jem.log_p_y_given_x(x).exp()
    score = -jem.energy(x)
    with pytest.warns(UserWarning, match="give load_model their data_root .no data folder"):
        images = jem.sample(16, y=5, n_steps=2)
    assert not jem.training and torch.allclose(p.sum(1), torch.ones(2)) and score.shape == (2,)
    assert images.shape == (16, 3, 32, 32) and images.abs().max() <= 1
    with pytest.raises(InputError, match="data_root"):
        jem.sample(1, n_steps=1, start="p0")


def test_torch_hub_lists_and_loads_the_published_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {path.parent.name for path in (ROOT / "results/models").glob("*/config.json")}
    assert {name for name in dir(hubconf) if callable(getattr(hubconf, name))
            and not name.startswith("_")} == folders  # as torch.hub.list finds them
    assert "sample()" in getattr(hubconf, NAME).__doc__
    jem = torch.hub.load(str(ROOT), NAME, source="local")
    x = torch.rand(2, 3, 32, 32)
    same = load_model(ROOT / "results/models" / NAME / "model.safetensors")
    assert torch.equal(jem(x), same(x)) and not jem.training
    assert len(jem.sample(2, n_steps=1, start="buffer")) == 2


def test_fresh_chains_are_the_training_samplers(run):
    jem = load_model(run / "best.pt")
    before = {k: v.clone() for k, v in jem.state_dict().items()}
    with warnings.catch_warnings(action="error"):  # digits are always at hand
        x = jem.sample(4, y=[0, 1, 2, 3], n_steps=3, seed=1)
    assert torch.equal(x, jem.sample(4, y=[0, 1, 2, 3], n_steps=3, seed=1, start="p0"))
    assert not torch.equal(x, jem.sample(4, y=[0, 1, 2, 3], n_steps=3, seed=2))
    assert all(torch.equal(v, before[k]) for k, v in jem.state_dict().items())
    assert not any(p.grad is not None or not p.requires_grad for p in jem.parameters())
    jem.settings.pyld_lr = 1e-9  # then chains stay where p_0 put them
    assert not torch.allclose(x, jem.sample(4, y=[0, 1, 2, 3], n_steps=3, seed=1), atol=1e-4)


def test_chains_are_in_the_company_of_the_buffer_which_acts_through_batch_statistics(run):
    def images(mode, company):
        jem = load_model(run / "best.pt")
        jem.settings.sample_mode = mode
        if not company:
            jem.replay_buffer = None
        return jem.sample(3, y=[1, 2, 3], n_steps=5, start="p0")

    torch.testing.assert_close(images("eval", True), images("eval", False), rtol=0, atol=1e-4)
    assert (images("train", True) - images("train", False)).abs().max() > 1e-3


def test_fresh_chains_start_from_the_labelled_images_of_training(run):
    jem = load_model(run / "best.pt")
    every = jem.p0.means()
    jem = load_model(run / "best.pt")
    jem.settings.labels_per_class = 2
    assert not torch.equal(jem.p0.means(), every)


def test_fresh_chains_start_from_the_training_images_alone(run):
    args = checkpoint.load(run / "best.pt")["args"]
    train = load_splits("digits", "", n_valid=args["n_valid"], n_train=args["n_train"], size=16)[0]
    means = load_model(run / "best.pt").p0.means()
    assert torch.equal(means, ClassGaussians.fit(train.x, train.y, 10).means())


def test_chains_of_a_later_batch_have_labels_and_noise_of_their_own(run, monkeypatch):
    jem, y, given = load_model(run / "best.pt"), [0] * 20 + [1] * 20, []
    monkeypatch.setattr(jem, "drawer", lambda n_steps: (
        lambda model, x, y, generator: given.append((y, generator.initial_seed())) or x, 20))
    x = jem.sample(40, y=y, n_steps=1, start="p0")
    assert torch.cat([labels for labels, _ in given]).tolist() == y
    assert len({seed for _, seed in given}) == 2
    x = jem.sample(40, y=0, n_steps=1, start="p0")
    assert not torch.equal(x[:20], x[20:])


def test_chains_go_on_from_images_of_their_class(run):
    jem = load_model(run / "best.pt")
    jem.settings.pyld_lr = 1e-9
    jem.__dict__["buffer_classes"] = torch.eye(10)[torch.arange(40) % 10].double()
    x = jem.sample(8, y=3, n_steps=1, start="buffer")
    stored = checkpoint.load(run / "best.pt")["buffer"]
    distances = torch.cdist(x.flatten(1), stored.flatten(1))
    assert distances.min(1).values.max() < 0.1  # of about 10
    assert set((distances.argmin(1) % 10).tolist()) == {3}


def test_chains_run_in_inference_mode_too(run):
    with torch.inference_mode():
        assert len(load_model(run / "best.pt").sample(2, n_steps=1)) == 2


@pytest.mark.parametrize("y", ("dog", 10**30, 10, [1, 2, 3], 0.5, None))
def test_what_cannot_be_sampled_is_one_line(run, y):
    jem = load_model(run / "best.pt")
    if y is None:  # fresh images of another size than the buffer's
        jem.settings.image_size = 32
    with pytest.raises(InputError, match="y is a class or 2 of them" if y else "32x32 pixels"):
        jem.sample(2, y=y, n_steps=1)


def test_an_image_is_found_where_no_image_of_the_buffer_is_of_the_class(run):
    jem = load_model(run / "best.pt")
    jem.buffer_classes = torch.zeros(len(jem.replay_buffer), 10)
    assert len(jem.sample(2, y=3, n_steps=1, start="buffer")) == 2


def test_packages_of_other_people_under_our_names_are_told(monkeypatch):
    other = types.ModuleType("utils")
    other.__file__ = "/elsewhere/utils/__init__.py"
    monkeypatch.setitem(sys.modules, "utils", other)
    with pytest.raises(ImportError, match="a package utils, and /elsewhere"):
        torch.hub.load(str(ROOT), NAME, source="local")


def test_released_files_load_alike(tmp_path):
    released_file(tmp_path / "a.pt")
    jem = load_model(tmp_path / "a.pt", data_root=tmp_path / "none")
    with pytest.warns(UserWarning):
        assert jem.sample(3, n_steps=1).shape == (3, 3, 32, 32)
    (tmp_path / "b.pt").write_bytes(b"no checkpoint")
    for name in ("b.pt", "c.pt"):
        with pytest.raises(InputError):
            load_model(tmp_path / name)


@pytest.mark.parametrize("words", [
    {"y": 10}, {"y": -1}, {"y": 0.5}, {"start": "noise"}, {"y": [1, 2, 3]}, {"y": [[1, 2]]},
    {"n": 0}, {"n_steps": -3}])
def test_what_cannot_be_sampled(run, words):
    with pytest.raises(InputError):
        load_model(run / "best.pt").sample(**{"n": 2, "n_steps": 1, **words})


def test_chains_go_on_from_the_buffer_where_a_folder_is_gone(run):
    jem = load_model(run / "best.pt")
    jem.settings.dataset = "folder:/nowhere"
    with pytest.warns(UserWarning, match="not there"):
        assert len(jem.sample(2, n_steps=1)) == 2
