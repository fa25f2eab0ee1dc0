"""`dic-repa evaluate SAMPLES --reference REF`: what it takes, what it records, what it warns of and what it refuses."""

from __future__ import annotations

import functools
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from inception import write_inception
from pictures import picture, write_tree
from PIL import Image
from safetensors import SafetensorError
from verbs import invoke

from dic_repa.cli import main
from dic_repa.cli.evaluate import command
from dic_repa.data.digits import Digits, load_digits, resize
from dic_repa.data.images import center_crop
from dic_repa.errors import UserError
from dic_repa.evaluation import Measure, frechet_distance, measure, metrics, open_images, statistics
from dic_repa.evaluation.digits import Digits as DigitsJudge
from dic_repa.evaluation.features import FeatureSet, extract
from dic_repa.evaluation.image_sets import as_uint8
from dic_repa.evaluation.judge import Judge


@pytest.fixture(scope="module")
def digits():
    """300 and 400 real digits, uint8 (N, 3, 16, 16), from two splits."""
    found = []
    for split, count in (("train", 300), ("held-out", 400)):
        images, _ = load_digits(split)
        found.append(as_uint8(resize(images[:count], 16).clamp(0, 1)).expand(-1, 3, -1, -1))
    return found


@pytest.fixture(scope="module")
def places(digits, tmp_path_factory):
    """The first set as a folder, an .npz and a zip-like tree; the second as an .npz."""
    root = tmp_path_factory.mktemp("digits")
    (root / "folder/deep").mkdir(parents=True)
    for i, image in enumerate(digits[0]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / f"folder/{'deep/' if i % 2 else ''}{i:03d}.png")
    for name, images in zip(("samples", "real"), digits):
        np.savez(root / f"{name}.npz", images.permute(0, 2, 3, 1).numpy())
    return root


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Run the verb in an empty folder; gives its standard output, or the error where `fails`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("DIC_REPA_STATISTICS", str(tmp_path / "statistics"))

    return functools.partial(invoke, command)


def features(images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return DigitsJudge().model.features(images[:, :1].float() / 255)


def test_a_folder_and_an_npz_of_the_same_images_score_the_same(evaluate, places, digits):
    expected = frechet_distance(*statistics(features(digits[0])), *statistics(features(digits[1])))
    options = ["--reference", places / "real.npz", "--metrics", "fd-digits,prec-digits", "--no-cache"]
    for samples in ("folder", "samples.npz"):
        output = evaluate(places / samples, *options, "--out", "record.json")
        record = json.loads(Path("record.json").read_text())
        assert record["metrics"]["fd-digits"] == pytest.approx(expected, rel=1e-4)
        assert f"{expected:.2f}" in output
        assert (
            "300 samples are fewer than 50000, which biases upward: fd-digits; the metric fd-digits-infinity" in output
        )
    assert record["samples"]["count"] == 300
    assert record["reference"]["count"] == 400
    assert record["reference"]["size"] == record["samples"]["size"] == [16, 16]
    assert record["extractors"]["digits"]["weights"]
    assert record["packages"]["torch"]
    assert record["reference"]["path"] == str(places / "real.npz")
    assert record["command"]


def test_a_checkpoint_is_sampled_first_and_reused(evaluate, places, checkpoint):
    options = ["--reference", places / "real.npz", "--metrics", "fd-digits", "--num", "30"]
    evaluate(checkpoint, *options)
    (record,) = Path("samples").glob("*/metrics.json")
    content = json.loads(record.read_text())
    assert content["samples"]["sampling"]["sample"]["num"] == 30
    assert content["samples"]["sampling"]["weights"]
    stamps = {file: file.stat().st_mtime_ns for file in record.parent.glob("0*.png")}
    assert len(stamps) == 30
    evaluate(checkpoint, *options)
    assert {file: file.stat().st_mtime_ns for file in record.parent.glob("0*.png")} == stamps


def test_bootstrap_and_infinity(evaluate, places):
    evaluate(
        places / "samples.npz", "--reference", places / "real.npz", "--out", "record.json",
        "--metrics", "fd-digits,fd-digits-infinity,recall-digits", "--bootstrap", "10",
    )  # fmt: skip
    record = json.loads(Path("record.json").read_text())
    for name, value in record["metrics"].items():
        low, high = record["intervals"][name]
        assert low < value < high
    assert record["metrics"]["fd-digits-infinity"] < record["metrics"]["fd-digits"]


def test_cached_statistics_are_read_only_where_all_is_the_same(evaluate, places, digits, monkeypatch):
    run = lambda **options: Measure(["fd-digits"], places / "real.npz", **options)  # noqa: E731
    evaluate(places / "samples.npz", "--reference", places / "real.npz", "--metrics", "fd-digits", "--out", "a.json")
    (file,) = Path("statistics").iterdir()
    broken = "a cached reference must not be extracted"
    monkeypatch.setattr("dic_repa.evaluation.measuring.extract", lambda *a, **k: pytest.fail(broken))
    assert run().reference.count == 400
    for options in ({"resize": 12}, {"cache": False}):
        with pytest.raises(pytest.fail.Exception, match=broken):
            run(**options)
    monkeypatch.setattr("dic_repa.evaluation.digits.tensors_fingerprint", lambda tensors: "other weights")
    with pytest.raises(pytest.fail.Exception, match=broken):
        run()
    with pytest.raises(UserError, match="made with other weights or resizing of the extractor digits"):
        Measure(["fd-digits"], file)


def test_a_cache_that_one_process_lacks_is_read_by_none(places, monkeypatch, tmp_path):
    monkeypatch.setenv("DIC_REPA_STATISTICS", str(tmp_path))
    seen = []
    Measure(["fd-digits"], places / "real.npz")
    for lacks in (False, True):
        gather = lambda mine, lacks=lacks: torch.cat([mine, ~mine]) if lacks and len(mine) == 1 else mine  # noqa: E731
        Measure(
            ["fd-digits"], places / "real.npz", processes=processes(0, 1, gather), progress=lambda n: seen.append(n)
        )
        assert bool(seen) == lacks


def test_a_cache_that_cannot_be_written_is_told(evaluate, places, monkeypatch):
    options = ["--reference", places / "real.npz", "--metrics", "fd-digits"]
    monkeypatch.setenv("DIC_REPA_STATISTICS", "/dev/null/statistics")
    assert "warning: the reference's statistics are not cached" in evaluate(places / "samples.npz", *options)

    def full(_tensors, path, _metadata):
        Path(path).touch()
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("dic_repa.evaluation.reference.save_file", full)
    saving = evaluate(places / "samples.npz", *options, "--no-cache", "--save-statistics", "s.safetensors", fails=True)
    assert "s.safetensors cannot be written (No space left on device)" in saving
    assert not list(Path().glob(".writing-*"))


def test_a_ratio_has_a_column_of_its_own(evaluate, places):
    real = places / "real.npz"
    arguments = [places / "folder", "--reference", real, "--bound", places / "samples.npz", "--metrics", "fdr:digits"]
    shown = evaluate(*arguments, "--out", "record.json").splitlines()
    (heading,) = (i for i, line in enumerate(shown) if line.split()[-3:] == ["FD-digits", "FDr", "(digits)"])
    samples, bound = shown[heading + 1 : heading + 3]
    assert samples.split()[-1] == bound.split()[-1] == "1.00"  # the folder and the .npz hold the same digits
    assert json.loads(Path("record.json").read_text())["metrics"]["fdr:digits"] == pytest.approx(1)


def test_saved_statistics_stand_in_for_the_images(evaluate, places):
    common = ["--metrics", "fd-digits,prec-digits", "--no-cache"]
    evaluate(places / "folder", "--reference", places / "real.npz", *common, "--save-statistics", "real.safetensors", "--out", "a.json")  # fmt: skip # noqa: E501
    evaluate(places / "folder", "--reference", "real.safetensors", *common, "--out", "b.json")
    first, second = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert first["metrics"] == second["metrics"]
    assert first["reference"]["fingerprint"] == second["reference"]["fingerprint"]
    evaluate(places / "folder", "--reference", places / "samples.npz", *common, "--out", "c.json")
    third = json.loads(Path("c.json").read_text())
    assert third["reference"]["fingerprint"] != first["reference"]["fingerprint"] != ""
    assert "not a whole file of statistics" in evaluate(
        places / "folder", "--reference", "b.safetensors", *common, fails=True
    )


class FakeInception(torch.nn.Module):
    layers, resizing, notes, fingerprint = ("pool", "spatial", "logits"), "", (), ""

    def __init__(self, weights=None):
        super().__init__()

    def forward(self, images):
        flat = images.flatten(1).float()
        return {"pool": flat[:, :96], "spatial": flat[:, :33], "logits": flat[:, :8]}


@pytest.fixture
def adm_reference(tmp_path, monkeypatch):
    """ref.npz of statistics and 5 images of 16x16, ttur.npz of statistics alone, and what is in them."""
    generator = torch.Generator().manual_seed(0)
    pool, spatial = (torch.randn(50, dim, generator=generator) for dim in (96, 33))
    (mu, sigma), (mu_s, sigma_s) = statistics(pool), statistics(spatial)
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "ref.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    np.savez(tmp_path / "ttur.npz", mu=mu, sigma=sigma)
    monkeypatch.setattr("dic_repa.evaluation.measuring.extractors.find", lambda name: FakeInception)
    return images, mu, sigma_s


def test_an_adm_reference_gives_its_statistics_and_its_images(tmp_path, adm_reference):
    """FID is against the stored mu and sigma, precision against the images beside them."""
    images, mu, sigma_s = adm_reference
    found = Measure(["fid", "sfid", "prec"], tmp_path / "ref.npz", cache=False).reference
    torch.testing.assert_close(found.gaussians["inception.pool"][0], mu)
    torch.testing.assert_close(found.gaussians["inception.spatial"][1], sigma_s)
    assert torch.equal(
        found.features["inception.pool"], FakeInception()(torch.tensor(images).permute(0, 3, 1, 2))["pool"]
    )
    assert Measure(["fid", "is"], tmp_path / "ttur.npz").reference.features == {}
    with pytest.raises(UserError, match=r"ttur\.npz has statistics but no images, which precision needs"):
        Measure(["fid", "prec"], tmp_path / "ttur.npz")
    with pytest.raises(UserError, match=r"has no statistics of inception.spatial, which sFID needs"):
        Measure(["sfid"], tmp_path / "ttur.npz")


def test_stored_statistics_are_not_resized_in_silence(evaluate, adm_reference):
    """They are of the size of the images beside them, to which samples of another size can be cropped."""
    np.savez("samples.npz", np.random.default_rng(1).integers(0, 256, (9, 24, 24, 3), dtype=np.uint8))
    options = ["samples.npz", "--metrics", "fid", "--no-cache", "--reference"]
    for names in ("fid", "fid,prec"):
        refused = evaluate(*options, "ref.npz", "--metrics", names, "--resize", 12, fails=True)
        assert "ref.npz has statistics of images of 16x16, which cannot be resized to 12" in refused
    assert "the samples are 24x24, the reference 16x16" in evaluate(*options, "ref.npz", fails=True)
    evaluate(*options, "ref.npz", "--resize", 12, "--metrics", "prec")  # of the images, which can be
    evaluate(*options, "ref.npz", "--resize", 16, "--save-statistics", "ref.safetensors")
    assert "images of 16x16, which" in evaluate(*options, "ref.safetensors", "--resize", 12, fails=True)
    told = evaluate(*options, "ttur.npz", "--resize", 16)
    assert "note: the samples were resized to 16; the reference's statistics are as they were stored" in told


def processes(rank, count, gather):
    """One process of several, as an Accelerator tells it."""
    return SimpleNamespace(process_index=rank, num_processes=count, gather=gather)


def test_processes_share_a_set_and_see_all_of_it(places, digits):
    """Three processes in turn, each given what the others would send: the same as one alone."""
    images, network = open_images(places / "samples.npz"), Measure(["fd-digits"], _any()).extractors
    alone = extract(images, network, ["digits.features"], keep=70, statistics=True, batch_size=40)
    sent: list[list] = [[], [], []]
    for rank in range(3):
        extract(images, network, ["digits.features"], batch_size=40, processes=processes(rank, 3, lambda t, r=rank: sent[r].append(t) or t))  # fmt: skip # noqa: E501
    turns = iter(zip(*sent))
    together = extract(
        images, network, ["digits.features"], keep=70, statistics=True, batch_size=40,
        processes=processes(0, 3, lambda tensor: torch.cat(next(turns))),
    )  # fmt: skip
    assert together.count == alone.count == 300
    torch.testing.assert_close(together.features, alone.features)
    torch.testing.assert_close(together.gaussians, alone.gaussians)


def _any() -> FeatureSet:
    return FeatureSet(2, None, {"digits.features": (torch.zeros(64), torch.eye(64))})


def test_a_data_set_is_a_reference_at_the_size_of_what_is_trained_on(digits):
    from_name, from_data = (open_images(source) for source in ("digits", Digits("held-out", 16)))
    assert from_name.size() == from_data.size() == (16, 16)
    batch = next(from_name.batches([range(400)]))
    assert (batch.int() - digits[1].int()).abs().max() <= 1  # by way of [-1, 1] and back
    assert from_name.fingerprint == from_data.fingerprint != open_images(Digits("train", 16)).fingerprint


def test_measure_takes_batches(digits):
    reference = extract(iter([digits[1]]), Measure(["fd-digits"], _any()).extractors, ["digits.features"], None, True)
    values = [
        measure(batches, reference, ["fd-digits"])["fd-digits"]
        for batches in (iter(digits[0].split(70)), [digits[0].float() / 255], [digits[0][:, :1]])
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] == pytest.approx(values[2], rel=1e-5)


def test_a_judge_takes_batches_as_they_come(digits):
    images, labels = digits[0][:, :1].float() / 255, load_digits("train")[1][:300]
    judge = Judge(["fd-digits"], "digits")
    alive = []

    def batches():
        for batch in images.split(100):
            batch = batch.clone()
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            assert sum(reference() is not None for reference in alive) <= 1, "batches are held on to"

    assert judge(batches(), labels) == pytest.approx(judge(images, labels), rel=1e-6)
    both = Judge(["digits", "fd-digits"], "digits")
    assert both(iter(images.split(100)), labels) == both(images, labels)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((4, 3, 16, 16), torch.nan), "4 of 4 images hold NaN"),
        (torch.full((4, 3, 16, 16), 2.0), r"in \[0, 1\]"),
        (torch.zeros(4, 3, 16, 16), "all 4 images are of a single colour"),
        (torch.zeros(4, 2, 16, 16), "1 or 3"),
        (torch.zeros(1, 3, 16, 16), "at least two images, not 1"),
        (torch.rand(4, 3, 20, 20), "the samples are 20x20, the reference 16x16"),
    ],
)
def test_bad_images_are_refused(images, message):
    reference = _any()
    reference.size = (16, 16)
    with pytest.raises(UserError, match=message) as error:
        measure([images], reference, ["fd-digits"])
    assert "\n" not in str(error.value)


def test_what_is_odd_is_told(digits):
    images = digits[0][:40].clone()
    images[:3] = 0
    found = Measure(["fd-digits"], _any())([images])
    assert "3 of 40 images are of a single colour each" in found.warnings
    assert "the reference has 2 images, fewer than the samples: a bias of its own" in found.warnings
    assert any("40 samples are not more than the dimensions of digits.features (64)" in w for w in found.warnings)


def test_mistakes(evaluate, places, tmp_path):
    real = ["--reference", places / "real.npz", "--metrics"]
    assert "did you mean fid" in evaluate(places / "folder", *real, "fidd", fails=True)
    assert "give a reference" in evaluate(places / "folder", "--metrics", "fd-digits", fails=True)
    assert "to measure images, give a --reference" in evaluate(places / "folder", fails=True)
    assert "there is no folder, zip or tar" in evaluate("nowhere", *real, "fd-digits", fails=True)
    (tmp_path / "half.npz").write_bytes((places / "samples.npz").read_bytes()[:5000])
    assert "half.npz is truncated" in evaluate("half.npz", *real, "fd-digits", fails=True)
    np.savez(tmp_path / "floats.npz", np.full((3, 16, 16, 3), np.nan))
    assert "arr_0 is float64; images in an .npz are uint8" in evaluate("floats.npz", *real, "fd-digits", fails=True)
    np.savez(tmp_path / "flat.npz", np.zeros((3, 16), np.uint8))
    assert "arr_0 must be images" in evaluate("flat.npz", *real, "fd-digits", fails=True)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in evaluate("empty", *real, "fd-digits", fails=True)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "wrong.pth")
    wrong = evaluate(places / "folder", *real, "fid", "--inception-weights", "wrong.pth", fails=True)
    assert "wrong.pth (Inception weights) does not fit" in wrong
    of_networks = [places / "folder", *real, "fd-clip", "--feature-weights"]
    assert "name before = of --feature-weights: 'clp'; did you mean clip" in evaluate(*of_networks, "clp=x", fails=True)
    assert "NAME=FILE, such as clip=clip.safetensors" in evaluate(*of_networks, "clip", fails=True)


def test_a_reference_that_is_odd_is_told(evaluate, places, tmp_path):
    images = np.zeros((20, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "black.npz", images)
    options = [places / "samples.npz", "--metrics", "fd-digits", "--reference"]
    refused = evaluate(*options, "black.npz", fails=True)
    assert refused == "black.npz: all 20 images are of a single colour each; they are no reference"
    np.savez(tmp_path / "one.npz", images[:1])
    assert evaluate(*options, "one.npz", fails=True) == "one.npz: a set to measure takes at least two images, not 1"
    shutil.copytree(places / "folder", tmp_path / "folder")
    (tmp_path / "folder/notes.txt").write_text("not an image")
    Image.new("RGB", (16, 16)).save(tmp_path / "folder/black.png")
    for _ in range(2):  # extracted, and from the cache
        told = evaluate(*options, "folder")
        assert "note: folder: 1 (notes.txt) is not named as an image, and left out" in told
        assert "note: 1 images of the reference are of a single colour each" in told


def test_a_folder_with_other_files(evaluate, places, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i, file in enumerate(sorted((places / "folder").glob("*.png"))[:20]):
        (mixed / f"{i}.png").write_bytes(file.read_bytes())
    (mixed / "notes.txt").write_text("not an image")
    options = ["--reference", places / "real.npz", "--metrics", "fd-digits"]
    assert "1 (notes.txt) is not named as an image, and left out" in evaluate(mixed, *options)
    Image.new("RGB", (100, 60)).save(mixed / "grid.png")
    assert "grid.png is 100x60, the first image 16x16" in evaluate(mixed, *options, fails=True)
    (mixed / "grid.png").write_bytes(b"no image")
    assert "grid.png is not a whole image" in evaluate(mixed, *options, fails=True)


def test_unfinished_samples_are_told(evaluate, places, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/samples.json").write_text(json.dumps({"sample": {"num": 3}}))
    Image.new("RGB", (16, 16)).save(tmp_path / "out/000001.png")
    message = evaluate("out", "--reference", places / "real.npz", "--metrics", "fd-digits", fails=True)
    assert "out has 1 of its 3 images; run its `dic-repa sample` again" in message
    np.savez(tmp_path / "out/samples.npz", np.zeros((2, 16, 16, 3), np.uint8))  # of an earlier, smaller --num
    with pytest.raises(UserError, match="out has 1 of its 3 images"):
        open_images(tmp_path / "out")
    np.savez(tmp_path / "out/samples.npz", np.zeros((3, 16, 16, 3), np.uint8))
    assert open_images(tmp_path / "out").source == str(tmp_path / "out")  # where samples.json is


def test_sizes_are_compared_before_all_images_are_read(digits):
    images = open_images(Digits("held-out", 28))
    read = []
    measure = Measure(["fd-digits"], FeatureSet(2, (16, 16), _any().gaussians))
    with pytest.raises(UserError, match="the samples are 28x28, the reference 16x16"):
        measure(images, progress=read.append)
    assert not read


def test_a_record_that_cannot_be_written_loses_no_scores(evaluate, places, monkeypatch, capsys):
    def full(_path, _content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dic_repa.evaluation.runs.save_record", full)
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", f"{places}/samples.npz", "--reference", f"{places}/real.npz", "--metrics", "fd-digits"])
    shown = capsys.readouterr()
    assert "FD-digits" in shown.out
    assert "samples.metrics.json cannot be written (No space left on device); name another file" in shown.err


def test_inception_scores_are_measured_by_the_verb(evaluate, places, tmp_path):
    weights = write_inception(tmp_path / "weights.pth")
    np.savez(tmp_path / "few.npz", np.load(places / "samples.npz")["arr_0"][:4])
    output = evaluate("few.npz", "--metrics", "is", "--inception-weights", weights, "--feature-batch", "4")
    assert "its scores compare to no others" in output
    record = json.loads(Path("few.metrics.json").read_text())
    assert 1 <= record["metrics"]["is"] < 4
    assert record["reference"] is None
    assert metrics.create("is").better == "higher"


def test_prepared_and_arrow_data_sets_are_references(tmp_path, mistake):
    """The images as they are stored, without the mirrored ones."""
    write_tree(tmp_path / "tree", {"cat": 3, "dog": 4})
    with pytest.raises(SystemExit):
        main(["prepare", str(tmp_path / "tree"), str(tmp_path / "out"), "--size=24", "--autoencoder=none", "--flip"])
    prepared = open_images(tmp_path / "out")
    assert len(prepared) == 7
    expected = np.stack([np.asarray(center_crop(picture(seed), 24)) for seed in range(7)])
    stored = next(prepared.batches([range(7)])).permute(0, 2, 3, 1).numpy()
    assert (stored == expected).all()
    rows = datasets.Dataset.from_dict(
        {"image": [picture(seed) for seed in range(3)], "label": [0, 1, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}),
    )
    rows.save_to_disk(tmp_path / "arrow")
    arrow = next(open_images(tmp_path / "arrow", resize=24).batches([range(3)])).permute(0, 2, 3, 1).numpy()
    assert (arrow == expected[:3]).all()
    before = open_images(tmp_path / "arrow").fingerprint
    shutil.rmtree(tmp_path / "arrow")
    rows.map(lambda row: {"image": picture(9)}, load_from_cache_file=False).save_to_disk(tmp_path / "arrow")
    assert open_images(tmp_path / "arrow").fingerprint != before  # cached statistics of it are stale
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match=r"has several splits; name one of them, such as .*splits/"):
        open_images(tmp_path / "splits")
    assert len(open_images(tmp_path / "splits/train")) == 3


def test_samples_of_a_run_tell_their_classes(checkpoint, evaluate, tmp_path):
    """What is recognised is measured of a folder of samples too, by the labels beside them; not of other images."""
    said = evaluate(checkpoint, "--reference", "digits", "--metrics", "digits", "--num", 12)
    assert "recognised" in said
    (record,) = Path("samples").rglob("metrics.json")
    assert 0 <= json.loads(record.read_text())["metrics"]["recognised"] <= 1
    (record.parent / "samples.json").unlink()
    refused = evaluate(record.parent, "--reference", "digits", "--metrics", "recognised", fails=True)
    assert "do not tell which class each should show" in refused
    assert "--both samples runs and checkpoints" in evaluate(
        record.parent, "--reference", "digits", "--both", fails=True
    )
    assert "leave one of them out" in evaluate(checkpoint, "--both", "--random-classes", fails=True)
