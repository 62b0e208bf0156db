"""Generation metrics against closed forms, loops, and pytorch-fid's own command.

The Inception weights here are random, with batch norm statistics of one batch so that features
neither vanish nor explode; only the published ones would make FIDs of these numbers.
"""

import hashlib
import os
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import pytorch_fid.inception
import torch
import torchvision
from PIL import Image
from pytorch_fid.fid_score import get_activations

from models import JEM
from utils.evaluation import generation
from utils.program import InputError

# scipy's remark on how pytorch-fid calls it; scipy is pinned below the version that would fail.
pytestmark = [pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning"),
              pytest.mark.filterwarnings("ignore:Matrix is singular")]  # few images


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    """A TORCH_HOME whose hub cache holds random Inception weights."""
    torch.manual_seed(0)
    with (mock.patch.object(pytorch_fid.inception, "load_state_dict_from_url"),
          mock.patch.object(torchvision.models.Inception3, "load_state_dict")):
        network = pytorch_fid.inception.fid_inception_v3()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        x = torch.nn.functional.interpolate(some_images(6, 1) / 127.5 - 1, size=(299, 299),
                                            mode="bilinear")
        network.train()(x)
        network.fc.weight.mul_(4)  # probabilities far from uniform
        network.fc.bias.normal_(0, 10)  # a bias that would show
    home = tmp_path_factory.mktemp("torch_home")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), weights_in(home))
    return home


@pytest.fixture(scope="module")
def network(torch_home):
    return generation.inception(weights_in(torch_home))[0]


def weights_in(home):
    return home / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"


def some_images(n, seed):
    """Smooth coloured blots, uint8 [n, 3, 32, 32], the brighter the higher the seed."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=draw) * 200 + 10 * seed
    x = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    return x.clamp(0, 255).round().to(torch.uint8)


def frechet_by_singular_values(a, b):
    """The distance without a matrix square root: Tr (S_a S_b)^(1/2) is the sum of the singular
    values of A B^T where S = A^T A, which few images make small and exact."""
    rows = [(f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (a, b)]
    between = np.linalg.svd(rows[0] @ rows[1].T, compute_uv=False).sum()
    return (((a.mean(0) - b.mean(0)) ** 2).sum() + (rows[0] ** 2).sum() + (rows[1] ** 2).sum()
            - 2 * between)


def test_frechet_distance_of_diagonal_gaussians_has_its_closed_form():
    mean_a, mean_b = np.array([0.0, 1.0, 2.0]), np.array([1.0, -1.0, 2.5])
    var_a, var_b = np.array([1.0, 4.0, 9.0]), np.array([16.0, 4.0, 0.25])
    want = ((mean_a - mean_b) ** 2).sum() + ((var_a**0.5 - var_b**0.5) ** 2).sum()
    got = generation.frechet_distance((mean_a, np.diag(var_a)), (mean_b, np.diag(var_b)))
    assert got == pytest.approx(want, rel=1e-12)


def test_frechet_distance_of_correlated_features_is_that_by_singular_values():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(200, 4)) @ random.normal(size=(4, 4)), random.normal(size=(90, 4))
    mean, covariance = generation.statistics(a.astype(np.float32))
    assert mean.dtype == covariance.dtype == np.float64
    assert covariance == pytest.approx((a - a.mean(0)).T @ (a - a.mean(0)) / 199, rel=1e-5)
    got = generation.frechet_distance(generation.statistics(a), generation.statistics(b))
    assert got == pytest.approx(frechet_by_singular_values(a, b), rel=1e-9)
    assert generation.frechet_distance((mean, covariance), (mean, covariance)) == pytest.approx(
        0, abs=1e-6)
    with pytest.raises(InputError, match="two networks"):
        generation.frechet_distance((mean, covariance), generation.statistics(b[:, :3]))


def test_inception_score_has_its_known_answers():
    one_hot = np.tile(np.eye(7), (6, 1))
    assert generation.inception_score(one_hot, 3) == (pytest.approx(7, rel=1e-12),
                                                      pytest.approx(0, abs=1e-12))
    constant = np.tile([0.5, 0.3, 0.2], (10, 1))
    assert generation.inception_score(constant, 1)[0] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("splits", [1, 4, 7])
def test_inception_score_equals_its_form_in_entropies(splits):
    """log IS is also the entropy of the mean less the mean entropy."""
    p = np.random.default_rng(1).dirichlet(np.full(6, 0.3), size=50)
    scores = []
    for part in (p[50 * k // splits:50 * (k + 1) // splits] for k in range(splits)):
        marginal = part.mean(0)
        scores.append(np.exp((part * np.log(part)).sum(1).mean()
                             - (marginal * np.log(marginal)).sum()))
    want = np.mean(scores), np.std(scores)
    assert generation.inception_score(p, splits) == pytest.approx(want, rel=1e-10, abs=1e-12)


def test_kid_equals_the_sum_over_pairs():
    """With subsets of everything there is one value: the sums over pairs written out."""
    random = np.random.default_rng(2)
    a, b = random.normal(size=(6, 3)), random.normal(0.5, 2, size=(6, 3))
    total = 0.0
    for i in range(6):
        for j in range(6):
            for sign, x, y in ((1, a, a), (1, b, b), (-2, a, b)):
                if sign == -2 or i != j:
                    dot = sum(x[i, k] * y[j, k] for k in range(3))
                    total += sign * (dot / 3 + 1) ** 3 / (36 if sign == -2 else 30)
    mean, std = generation.kernel_inception_distance(a, b, subsets=3, subset_size=6)
    assert mean == pytest.approx(total, rel=1e-10)
    assert std == pytest.approx(0, abs=1e-10)


def test_kid_is_unbiased_and_a_function_of_its_seed():
    random = np.random.default_rng(3)
    a, b, far = (random.normal(shift, size=(4000, 4)) for shift in (0, 0, 1))
    kid = generation.kernel_inception_distance
    mean, std = kid(a, b, subsets=200, subset_size=50)
    assert abs(mean) < 4 * std / 80**0.5  # 4000 images make 80 subsets without overlap
    assert any(kid(a, b, subsets=1, subset_size=50, seed=s)[0] < 0 for s in range(20))
    assert kid(a, far, subsets=10, subset_size=50)[0] > 1
    assert kid(a, b, seed=1, subsets=2) == kid(a, b, seed=1, subsets=2)
    assert kid(a, b, seed=1, subsets=2) != kid(a, b, seed=2, subsets=2)


def test_too_few_images_is_one_line():
    x = np.ones((5, 3))
    for call in (lambda: generation.statistics(x[:1]),
                 lambda: generation.inception_score(x / 3, 6),
                 lambda: generation.inception_score(x[:0], 1),
                 lambda: generation.kernel_inception_distance(x, np.ones((9, 3)), subset_size=6),
                 lambda: generation.kernel_inception_distance(x, x, subset_size=1)):
        with pytest.raises(InputError) as error:
            call()
        assert "\n" not in str(error.value)
    assert generation.rank_deficient(2048) and not generation.rank_deficient(2049)
    assert generation.rank_deficient(640, 640) and not generation.rank_deficient(641, 640)


def test_non_finite_values_are_refused():
    x = np.ones((5, 3))
    x[3, 1] = np.nan
    for call in (lambda: generation.statistics(x), lambda: generation.inception_score(x, 1),
                 lambda: generation.kernel_inception_distance(x, x, subset_size=5),
                 lambda: generation.select_per_class(x[:, 1], np.zeros(5), 0.5)):
        with pytest.raises(InputError, match="NaN"):
            call()


def test_the_most_confident_of_each_class_are_selected():
    p = np.array([0.9, 0.2, 0.9, 0.5, 0.8, 0.9, 0.1])
    y = np.array([3, 3, 3, 3, 0, 0, 5])
    select = generation.select_per_class
    assert select(p, y, 1.0).tolist() == list(range(7))
    assert select(p, y, 0.5).tolist() == [0, 2, 5, 6]
    assert select(p, y, 0.25).tolist() == [0, 4 + 1, 6]  # of two equals the earlier; at least one
    assert select(torch.tensor(p), torch.tensor(y), 0.5).tolist() == [0, 2, 5, 6]
    assert select(p[:0], y[:0], 0.5).tolist() == []
    for fraction in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            select(p, y, fraction)


@pytest.mark.parametrize("training", [True, False])
def test_penultimate_features_feed_the_last_layer(training):
    torch.manual_seed(0)
    model = JEM.build(depth=10, width=1).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = some_images(6, 1)
    features = generation.penultimate_features(model, x, batch_size=4)
    assert features.shape == (6, 64) and features.dtype == np.float64
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        logits = model.eval()(x.float() / 127.5 - 1).numpy()
        head = model.trunk[-1]
        assert features @ head.weight.numpy().T + head.bias.numpy() == pytest.approx(
            logits, abs=1e-5)


def test_reference_statistics_are_computed_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generation, "KEPT_FEATURES", 8)
    features, calls = np.random.default_rng(4).normal(size=(20, 5)), []

    def compute():
        calls.append(1)
        return features

    path = tmp_path / "cache" / "cifar10.npz"
    first = generation.reference_statistics(path, compute)
    again = generation.reference_statistics(path, compute)
    assert len(calls) == 1 and capsys.readouterr() == ("", "")
    assert first.n == again.n == 20 and again.features.shape == (8, 5)
    assert again.features.dtype == np.float32 and np.array_equal(first.features, again.features)
    for got, want in zip(again[:2], generation.statistics(features), strict=True):
        assert np.array_equal(got, want)
    assert generation.frechet_distance(again, first) == pytest.approx(0, abs=1e-6)
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], b"no archive", b"", whole[:300] + b"?" * 300
                    + whole[600:]):
        path.write_bytes(damaged)
        mended = generation.reference_statistics(path, compute)
        assert np.array_equal(mended.covariance, first.covariance)
        assert capsys.readouterr().err.count("\n") == 1
    assert len(calls) == 5 and path.read_bytes() == whole
    assert [file.name for file in path.parent.iterdir()] == ["cifar10.npz"]


def test_inception_weights_are_found_in_the_hub_cache_or_a_file(torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    network, sha256 = generation.inception(download=False)
    assert sha256 == hashlib.sha256(weights_in(torch_home).read_bytes()).hexdigest()
    assert sha256 != generation.WEIGHTS_SHA256
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())


def test_inception_outputs_do_not_depend_on_the_batch(network, torch_home):
    x = some_images(5, 2)
    features, probabilities = generation.inception_outputs(network, x, batch_size=5)
    assert features.shape == (5, 2048) and probabilities.shape == (5, 1008)
    assert features.dtype == probabilities.dtype == np.float64
    assert features.std(0).mean() > 0.01  # not degenerate: the comparisons mean something
    split, _ = generation.inception_outputs(network, x, batch_size=2)
    assert split == pytest.approx(features, rel=1e-6, abs=1e-6 * np.abs(features).max())
    state = torch.load(weights_in(torch_home), weights_only=True)
    logits = features @ state["fc.weight"].double().numpy().T  # no bias
    want = np.exp(logits - logits.max(1, keepdims=True))
    assert probabilities == pytest.approx(want / want.sum(1, keepdims=True), rel=1e-4, abs=1e-9)
    for wrong in (x.float(), x[0], x.permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match="uint8"):
            generation.inception_outputs(network, wrong)


def save_images(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")


def test_the_weights_are_fetched_from_where_pytorch_fid_has_them():
    assert generation.WEIGHTS_URL == pytorch_fid.inception.FID_WEIGHTS_URL


def test_features_equal_pytorch_fids(network, torch_home, tmp_path, monkeypatch):
    """Images from memory against pytorch-fid reading files with its network and our weights."""
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    x = some_images(6, 1)
    save_images(tmp_path / "a", x)
    want = get_activations(sorted((tmp_path / "a").iterdir()), pytorch_fid.inception.InceptionV3(),
                           batch_size=3, num_workers=0)
    got, _ = generation.inception_outputs(network, x, batch_size=3)
    assert got == pytest.approx(want, rel=1e-6, abs=1e-7)


@pytest.mark.slow  # two matrix square roots of 2048 dimensions
def test_fid_equals_pytorch_fids_command(network, torch_home, tmp_path):
    sets = {"a": some_images(10, 0), "b": some_images(12, 1)}
    for name, images in sets.items():
        save_images(tmp_path / name, images)
    command = subprocess.run(
        [sys.executable, "-m", "pytorch_fid", "a", "b", "--device", "cpu", "--batch-size", "6",
         "--num-workers", "0"], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"TORCH_HOME": str(torch_home), "OMP_NUM_THREADS": "1"})
    printed = float(command.stdout.split("FID:")[1])

    features = [generation.inception_outputs(network, x, 6)[0] for x in sets.values()]
    fid = generation.frechet_distance(*(generation.statistics(f) for f in features))
    assert fid == pytest.approx(printed, abs=1e-3)
    assert fid == pytest.approx(frechet_by_singular_values(*features), rel=1e-4)
    assert fid > 1


def test_missing_weights_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    tried, before = [], socket.getdefaulttimeout()

    def no_network(url, *args, **kwargs):
        tried.append((url, socket.getdefaulttimeout()))
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    for options in ({"download": False}, {"weights": tmp_path / "typo.pth"}, {}):
        with pytest.raises(InputError) as error:
            generation.inception(**options)
        assert "\n" not in str(error.value) and "--inception_weights" in str(error.value)
        assert str(options.get("weights", weights_in(tmp_path))) in str(error.value)
    assert tried == [(generation.WEIGHTS_URL, generation.DOWNLOAD_TIMEOUT)]
    assert socket.getdefaulttimeout() == before


def test_corrupt_weights_are_one_line(torch_home, tmp_path):
    whole = weights_in(torch_home).read_bytes()
    state = torch.load(weights_in(torch_home), weights_only=True)
    contents = {"empty": b"", "text": b"<html>not found</html>", "cut": whole[:len(whole) // 3]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list")
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "lacking")
    torch.save({"stranger": Path("a pickled object")}, tmp_path / "objects")
    torch.save(state | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other_classes")
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match="--inception_weights") as error:
            generation.inception(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
