"""Images out (--eval export), statistics in (--reference), and chains of given classes."""

import numpy as np
import pytest
import torch
from helpers import tiny
from PIL import Image

import eval_jempp
import train_jempp
from utils.evaluation import generation
from utils.files import checkpoint
from utils.files.records import read_jsonl
from utils.plots import to_uint8

SCRATCH = ["--source", "scratch", "--chain_steps", "2", "--chain_batch", "8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert train_jempp.main(tiny(folder, "--n_epochs", "1")) == 0
    return folder / "last.pt"


@pytest.fixture
def evaluate(run, call, tmp_path):
    def evaluate(*words, name="r.jsonl"):
        return call(eval_jempp.main, ["--load_path", run, "--results", tmp_path / name, "--device",
                                      "cpu", "--num_threads", "1", "--no-download", *words])
    return evaluate


def images_in(folder):
    """(the folder of PNGs, {name: pixels}, the .npz) of an export."""
    (png_folder,) = (p for p in folder.glob("*_images") if p.is_dir())
    pixels = {p.name: np.asarray(Image.open(p)) for p in sorted(png_folder.glob("*.png"))}
    return png_folder, pixels, np.load(f"{png_folder}.npz")


def test_the_buffer_is_exported_as_pngs_and_one_array(run, evaluate, tmp_path):
    code, out, err = evaluate("--eval", "export")
    assert code == 0 and "40 images: 40 made, 0 there already" in out, err
    _, pixels, packed = images_in(tmp_path)
    assert list(pixels) == [f"{i:05d}.png" for i in range(40)] and list(packed) == ["arr_0"]
    assert packed["arr_0"].shape == (40, 16, 16, 3) and packed["arr_0"].dtype == np.uint8
    assert np.array_equal(packed["arr_0"], np.stack(list(pixels.values())))
    buffer = to_uint8(checkpoint.open_any(run).buffer.float()).permute(0, 2, 3, 1).numpy()
    assert sorted(x.tobytes() for x in buffer) == sorted(x.tobytes() for x in packed["arr_0"])


def test_an_export_goes_on_and_image_i_depends_on_the_seed_and_i_alone(evaluate, tmp_path):
    assert evaluate("--eval", "export", *SCRATCH, "--n_samples", "20", name="a/r")[0] == 0
    assert evaluate("--eval", "export", *SCRATCH, "--n_samples", "11", name="b/r")[0] == 0
    folder, few, _ = images_in(tmp_path / "b")
    (folder / "00003.png").write_bytes((folder / "00003.png").read_bytes()[:100])  # torn
    before = (folder / "00009.png").stat().st_mtime_ns
    code, out, _ = evaluate("--eval", "export", *SCRATCH, "--n_samples", "11", name="b/r")
    assert code == 0 and "11 images: 8 made, 3 there already" in out
    assert (folder / "00009.png").stat().st_mtime_ns == before
    assert evaluate("--eval", "export", *SCRATCH, "--n_samples", "20", name="b/r")[0] == 0
    (_, whole, packed_a), (_, gone_on, packed_b) = (images_in(tmp_path / x) for x in "ab")
    assert whole.keys() == gone_on.keys() and len(whole) == 20
    assert all(np.array_equal(gone_on[name], x) for name, x in whole.items())
    assert all(np.array_equal(whole[name], x) for name, x in few.items())
    assert np.array_equal(packed_a["arr_0"], packed_b["arr_0"])
    assert evaluate("--eval", "export", *SCRATCH, "--n_samples", "9", "--seed", "1",
                    name="c/r")[0] == 0
    assert not np.array_equal(images_in(tmp_path / "c")[1]["00000.png"], whole["00000.png"])


def test_a_folder_of_other_settings_is_left_alone(evaluate, tmp_path):
    assert evaluate("--eval", "export", *SCRATCH, "--n_samples", "8")[0] == 0
    _, before, _ = images_in(tmp_path)
    code, _, err = evaluate("--eval", "export", *SCRATCH, "--n_samples", "8", "--pyld_lr",
                            "0.1")
    assert code == 2 and err.count("\n") == 1 and "pyld_lr 0.2 there, 0.1 here" in err
    assert all(np.array_equal(x, before[name]) for name, x in images_in(tmp_path)[1].items())


def test_chains_of_classes_named_or_all_in_turn(evaluate, tmp_path):
    assert evaluate("--eval", "export", *SCRATCH, "--n_samples", "12", "--conditional",
                    name="a/r")[0] == 0
    assert images_in(tmp_path / "a")[2]["arr_1"].tolist() == [*range(10), 0, 1]
    code, _, err = evaluate("--eval", "export", *SCRATCH, "--y", "bird", name="b/r")
    assert code == 2 and "--y bird: the classes of" in err and err.count("\n") == 1
    assert evaluate("--eval", "export", *SCRATCH, "--n_samples", "5", "--y", "7", "3",
                    name="b/r")[0] == 0, "the wrong word has not taken the folder"
    assert images_in(tmp_path / "b")[2]["arr_1"].tolist() == [7, 3, 7, 3, 7]
    code, _, err = evaluate("--eval", "export", "--conditional")
    assert code == 2 and "add --source scratch" in err and err.count("\n") == 1


# -- --reference ----------------------------------------------------------------------------------
@pytest.fixture
def inception(monkeypatch):
    """Four features an image instead of Inception's; the sizes of the sets that it is shown."""
    shown = []

    def features(x):
        return torch.cat([x.double().mean((2, 3)), x.double().std((1, 2, 3))[:, None]], 1).numpy()

    def outputs(network, x, batch_size):
        shown.append(len(x))
        return features(x), np.full((len(x), 8), 1 / 8)

    monkeypatch.setattr(generation, "inception", lambda *a: (torch.nn.Identity(), "0" * 64))
    monkeypatch.setattr(generation, "inception_outputs", outputs)
    outputs.features, outputs.shown = features, shown
    return outputs


FID = ["--eval", "fid", "--is_splits", "1", "--kid_subset_size", "5", "--data_root"]


def judged(tmp_path):
    return {r["metric"]: r for r in read_jsonl(tmp_path / "r.jsonl")}


def test_a_folder_of_images_is_a_reference(evaluate, inception, tmp_path):
    folder, x = tmp_path / "real", np.random.RandomState(0).randint(0, 256, (12, 16, 16, 3))
    folder.mkdir()
    for i, image in enumerate(x.astype(np.uint8)):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    code, _, err = evaluate(*FID, tmp_path, "--reference", f"folder:{folder}")
    assert code == 0, err
    found, buffer = judged(tmp_path), inception.shown
    assert sorted(buffer) == [12, 40]
    assert found["fid"]["protocol"].items() >= {"reference": "folder:real",
                                                "n_reference": 12}.items()
    assert "kid" in found and str(tmp_path) not in found["fid"]["protocol"]["reference"]
    code, _, err = evaluate(*FID, tmp_path, "--reference", f"folder:{tmp_path}/none")
    assert code == 2 and "is no folder" in err and err.count("\n") == 1


def test_statistics_of_pytorch_fid_are_a_reference_without_kid(run, evaluate, inception, tmp_path):
    file = tmp_path / "stats.npz"
    mu, sigma = np.arange(4.0), np.diag([1.0, 2.0, 3.0, 4.0])
    np.savez_compressed(file, mu=mu, sigma=sigma)
    code, _, err = evaluate(*FID, tmp_path, "--reference", file)
    assert code == 0 and err.count("\n") == 1 and "left out: KID: stats.npz holds" in err
    found = judged(tmp_path)
    buffer = to_uint8(checkpoint.open_any(run).buffer.float())
    mean, covariance = generation.statistics(inception.features(buffer))
    expected = generation.frechet_distance((mean, covariance), (mu, sigma))
    assert found["fid"]["value"] == pytest.approx(expected, rel=1e-6)
    assert found["fid"]["protocol"]["reference_sha256"] == checkpoint.sha256_of(file)
    assert found["fid"]["protocol"]["reference"] == "stats.npz"
    assert "kid" not in found and "n_reference" not in found["fid"]["protocol"]


@pytest.mark.parametrize("arrays", [
    {"mean": np.zeros(4)}, {"mu": np.zeros(4), "sigma": np.eye(3)},
    {"mu": np.full(4, np.nan), "sigma": np.eye(4)}, {"mu": np.zeros(9000), "sigma": np.eye(4)},
    {"mu": np.array([{"a": 1}], dtype=object), "sigma": np.eye(1)}, None])
def test_another_file_is_one_line(tmp_path, arrays):
    file = tmp_path / "x.npz"
    np.savez(file, **arrays) if arrays else file.write_bytes(b"PK nothing")
    with pytest.raises(generation.InputError, match="no statistics file of pytorch-fid"):
        generation.saved_statistics(file)


def test_conditional_chains_are_judged_and_recorded(evaluate, inception, tmp_path):
    code, _, err = evaluate(*FID, tmp_path, *SCRATCH, "--n_samples", "16", "--conditional")
    assert code == 0, err
    assert judged(tmp_path)["fid"]["protocol"]["conditional"] == "all classes"
    code, _, err = evaluate(*FID, tmp_path, "--reference", tmp_path / "nowhere.npz")
    assert code == 2 and "no statistics file of pytorch-fid" in err and err.count("\n") == 1
    code, _, err = evaluate(*FID, tmp_path, "--reference", "nowhere")
    assert code == 2 and "none of train, train+test, test, folder:PATH and FILE.npz" in err
