"""An output is written where nothing is, or over what is ours: every verb that has one, on every place that is not."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DATA
from PIL import Image
from small_runs import full_disk, small_run

from dic_repa.cli import main
from dic_repa.errors import UserError
from dic_repa.evaluation.report import write_report
from dic_repa.files.atomic import write_aside, write_whole
from dic_repa.files.outputs import MARKER, begin_folder, check_file, check_folder, foreign, list_output, remove_listed
from dic_repa.files.weights import save_tensors
from dic_repa.models import DiC
from dic_repa.recipe import load_recipe, to_yaml
from dic_repa.training import train
from dic_repa.training.posthoc import save_reconstruction

# What comes before and after the name of the output. Most of them name a run that is not there: the place is looked at
# before the work.
FOLDERS = {
    "train": (["train", "digits-baseline", "--out"], []),
    "train over": (["train", "digits-baseline", "--overwrite", "--out"], []),
    "sample": (["sample", "nowhere", "--out"], []),
    "sample over": (["sample", "nowhere", "--overwrite", "--out"], []),
    "sample npz": (["sample", "nowhere", "--format", "npz", "--overwrite", "--trajectory", "--out"], []),
    "ema": (["ema", "nowhere", "--sigma-rel", "0.1", "--out"], []),
    "convert": (["convert", DATA / "authors_dic_tiny.safetensors"], []),
    "convert over": (["convert", DATA / "authors_dic_tiny.safetensors"], ["--overwrite"]),
    "prepare": (["prepare", "nowhere"], []),
    "probe": (["probe", "nowhere", "--out"], []),
    "tune": (["tune", "nowhere", "--out"], []),
    "bench paper": (["bench", "paper", "--small", "--out"], []),
}
FILES = {
    "report": (["report", "nowhere", "--out"], ".html"),
    "convert": (["convert", DATA / "authors_dic_tiny.safetensors", "--overwrite"], ".pt"),
    "convert safetensors": (["convert", DATA / "authors_dic_tiny.safetensors", "--overwrite"], ".safetensors"),
    "record": (["evaluate", "nowhere", "--reference", "digits", "--out"], ".json"),
    "statistics": (["evaluate", "nowhere", "--reference", "digits", "--save-statistics"], ".safetensors"),
    "solvers": (["solvers", "compare", "nowhere", "--out"], ".png"),
    "encoders": (["encoders", "check", "digits-vit", "--out"], ".png"),
    "bench out": (["bench", "model", "DiC-S", "--out"], ".json"),
    "bench chart": (["bench", "train", "digits-baseline", "--chart"], ".png"),
}


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's whole path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("making devices is not permitted")


SPECIAL = {"FIFO": os.mkfifo, "socket": make_socket, "device": make_device}


def folder_with(path: Path, *names: str) -> Path:
    path.mkdir(parents=True)
    for name in names:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(to_yaml(load_recipe("digits-baseline")) if name == "recipe.yaml" else '{"sample": {}}')
    return path


PROOFS_OF_NOTHING = ("recipe.yaml", "config.json", "samples.json", "prepare.json", "tune.json", "000000.png", "data/x")


def contents(folder: Path) -> dict[str, object]:
    """All that is in `folder`: bytes of files, targets of links, sorts and numbers of devices and the like."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (
            path.readlink() if path.is_symlink()
            else path.read_bytes() if path.is_file()
            else (state.st_mode, state.st_rdev, state.st_ino)
        )  # fmt: skip
    return found


def refused(mistake: Callable, arguments: list, root: Path) -> str:
    before = contents(root)
    line = mistake(*arguments)
    assert contents(root) == before
    return line


@pytest.mark.parametrize("verb", FOLDERS)
def test_a_folder_is_written_nowhere_else(verb, mistake, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path / "home/me")
    folder_with(tmp_path / "home/me/project")
    monkeypatch.chdir(tmp_path / "home/me/project")
    before, after = FOLDERS[verb]

    def attempt(place) -> str:
        return refused(mistake, [*before, place, *after], tmp_path)

    for place in (".", tmp_path / "home/me/project", "..", "../.."):
        assert "the current folder" in attempt(place)
    for name in PROOFS_OF_NOTHING:
        assert "so it is not overwritten" in attempt(folder_with(tmp_path / f"with {name}".replace("/", " "), name))
    photos = folder_with(tmp_path / "photos", *PROOFS_OF_NOTHING, "cat")
    assert "so it is not overwritten" in attempt(photos)
    assert str(photos) in attempt(photos)
    (tmp_path / "link").symlink_to(photos)
    (tmp_path / "broken").symlink_to(tmp_path / "away")
    assert f"link is a link to {photos}" in attempt(tmp_path / "link")
    assert f"is a link to {tmp_path / 'away'}" in attempt(tmp_path / "broken")
    assert "is a file; name a folder" in attempt(photos / "cat")
    for sort, make in SPECIAL.items():
        make(tmp_path / sort)
        assert f"{sort} is a {sort}" in attempt(tmp_path / sort)
    kind = next(kind for kind in ("probe", "tune") if kind != verb)
    begin_folder(tmp_path / "other", kind)
    assert "so it is not overwritten (it is a folder of a" in attempt(tmp_path / "other")
    monkeypatch.chdir(photos)
    assert "around the home folder" in attempt(tmp_path / "home")


@pytest.mark.parametrize("verb", FILES)
def test_a_file_is_written_nowhere_else(verb, mistake, tmp_path):
    before, ending = FILES[verb]

    def attempt(place) -> str:
        return refused(mistake, [*before, place], tmp_path)

    photos = folder_with(tmp_path / "photos", f"mine{ending}")
    if not verb.startswith("convert"):  # which takes another name for a folder's
        for place in (".", "..", photos):
            assert "is a folder; name a file" in attempt(place)
    assert "not written by dic-repa" in attempt(photos / f"mine{ending}")
    (tmp_path / f"link{ending}").symlink_to(photos / f"mine{ending}")
    assert f"is a link to {photos / f'mine{ending}'}" in attempt(f"link{ending}")
    for sort, make in SPECIAL.items():
        make(tmp_path / f"{sort}{ending}")
        assert f"{sort}{ending} is a {sort}" in attempt(f"{sort}{ending}")


def test_the_root_is_no_output():
    """Asked of the check alone: no verb is tried on it, which would do its work if the check were wrong."""
    with pytest.raises(UserError, match="/ is around the current folder"):
        check_folder("/", "run")
    with pytest.raises(UserError, match="/ is a folder; name a file"):
        check_file("/")


def test_what_verbs_write_by_themselves_is_looked_at_too(mistake, tmp_path):
    """The names that they have by default, and the resuming of what is not a run."""
    photos = folder_with(tmp_path / "photos", "recipe.yaml", "report.html", "metrics.json", "probe/x", "tune/x")
    Image.new("RGB", (16, 16)).save(photos / "a.png")
    (tmp_path / "digits-vit.png").write_text("mine")
    for arguments in (
        ["train", "digits-baseline", "--resume", "--out", photos],
        ["report", photos],
        ["encoders", "check", "digits-vit"],
    ):
        refused(mistake, arguments, tmp_path)
    (photos / "recipe.yaml").unlink()
    assert "metrics.json is there" in refused(mistake, ["evaluate", photos, "--reference", "digits"], tmp_path)


def test_the_library_refuses_as_well(tmp_path):
    photos = folder_with(tmp_path / "photos", *PROOFS_OF_NOTHING, "page.html")
    os.mkfifo(tmp_path / "FIFO")
    run = small_run(tmp_path / "run", "train.steps=1")
    before = contents(photos)
    for attempt in (
        lambda: DiC(8, (1, 1, 1, 1, 1)).save_pretrained(photos),
        lambda: train(load_recipe("digits-baseline"), photos, overwrite=True),
        lambda: train(load_recipe("digits-baseline"), photos, resume=True),
        lambda: save_reconstruction(run, 0.1, photos),
        lambda: write_report([run.path], photos / "page.html"),
        lambda: write_report([run.path], tmp_path / "FIFO"),
    ):
        with pytest.raises(UserError):
            attempt()
    assert contents(photos) == before
    assert stat.S_ISFIFO((tmp_path / "FIFO").lstat().st_mode)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a run, `run`, of eight steps with snapshots."""
    folder = tmp_path_factory.mktemp("work")
    small_run(
        folder / "run", "train.power_ema=[0.1]", "train.snapshot_every=4", "train.sample_every=4", "sample.steps=1"
    )
    return folder


def call(*arguments, code: int = 0) -> None:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert exit.value.code == code


def test_overwriting_a_run_leaves_what_is_not_its_own(work, tmp_path, capsys):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", work / "run", run], check=True)
    call("report", run)
    call("ema", run, "--sigma-rel", "0.1")
    foreign_files = {
        "notes.txt",
        "checkpoints/mine.txt",
        "checkpoints/step_00000008/mine.txt",
        "data/a.csv",
        "samples/b.png",
    }
    for name in foreign_files:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("years of work")
    (run / "away").symlink_to(work)
    assert set(foreign(run)) == {*foreign_files, "away"}
    old = set(contents(run))
    small_run(run, "train.steps=2", overwrite=True)
    assert f"left 6 files that are not dic-repa's in {run}: away, checkpoints/mine.txt" in capsys.readouterr().err
    assert {(run / name).read_text() for name in foreign_files} == {"years of work"}
    assert set(foreign(run)) == {*foreign_files, "away"}
    gone = old - set(contents(run))
    assert {"report.html", "averages", "snapshots", "samples/step_00000004.png", "checkpoints/step_00000004"} <= gone
    assert (work / "run/recipe.yaml").exists()
    (run / "checkpoints/step_00000004").write_text("mine")
    with pytest.raises(UserError, match="step_00000004 is in the way of a new run"):
        small_run(run, "train.steps=2", overwrite=True)


def test_overwriting_samples_leaves_what_is_not_theirs(work, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["sample", work / "run", "--steps", "1", "--batch-size", "4", "--out", "out"]
    call(*arguments, "--num", "6")
    own = set(contents(Path("out")))
    assert foreign(Path("out")) == []
    mine = {"000006.png", "7.png", "0001.png", "1.png", "photo.png"}
    for name in mine:
        (Path("out") / name).write_text("a photo")
    call(*arguments, "--num", "7", code=2)
    assert "000006.png is in the way" in capsys.readouterr().err
    call(*arguments, "--num", "4", "--seed", "5", "--overwrite", "--format", "npz")
    assert "left 5 files that are not dic-repa's in out: 000006.png, 0001.png" in capsys.readouterr().err
    assert set(contents(Path("out"))) == {*mine, MARKER, "samples.json", "samples.npz", "grid.png"}
    assert {(Path("out") / name).read_text() for name in mine} == {"a photo"}
    assert {"000000.png", "000005.png"} <= own
    call(*arguments, "--num", "5", "--seed", "5")  # goes on with the images that went into the .npz
    assert set(foreign(Path("out"))) == mine


def test_what_was_written_is_written_over_and_nothing_beside_it(work, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures/cat").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / f"pictures/cat/{i}.png")
    verbs = (
        ["report", work / "run", "--out", "page.html"],
        ["ema", work / "run", "--sigma-rel", "0.1", "--out", "average"],
        ["convert", DATA / "authors_dic_tiny.safetensors", "model"],
        ["convert", DATA / "authors_dic_tiny.safetensors", "model.pt"],
        ["convert", DATA / "authors_dic_tiny.safetensors", "model.safetensors"],
        ["prepare", "pictures", "data", "--size", "16", "--autoencoder", "none"],
        ["encoders", "check", "digits-vit", "--out", "tokens.jpg"],
        ["encoders", "check", "digits-vit", "--out", "tokens.webp"],
        ["encoders", "check", "digits-vit", "--out", "tokens.png"],
    )
    for verb in verbs:
        call(*verb)
    for folder in ("average", "model"):
        (tmp_path / folder / "mine.txt").write_text("mine")
    for verb in verbs:
        call(*verb, *(["--overwrite"] if verb[0] == "convert" else []))
    assert capsys.readouterr().err.count("left 1 file that is not dic-repa's in ") == 2
    for folder in ("average", "model"):
        assert (tmp_path / folder / "mine.txt").read_text() == "mine"
        assert DiC.from_pretrained(folder)
    assert torch.load("model.pt", weights_only=True).keys() == {"made_by", "ema"}
    (tmp_path / "model/recipe.yaml").write_text("mine")
    call("convert", DATA / "authors_dic_tiny.safetensors", "model", "--recipe", "dic-s-ddpm", "--overwrite", code=2)
    assert "model/recipe.yaml is in the way" in capsys.readouterr().err
    assert DiC.from_pretrained("model")


def test_a_list_leads_nowhere_else(tmp_path):
    """A marker's names stay in the folder, and a link on the way to one is not followed."""
    begin_folder(tmp_path / "ours", "tune", ["../precious", "a/precious", str(tmp_path / "precious"), "folder", "gone"])
    for path in (tmp_path / "precious", tmp_path / "away/precious", tmp_path / "ours/folder/precious"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (tmp_path / "ours/a").symlink_to(tmp_path / "away")
    with (tmp_path / "ours" / MARKER).open("a") as file:
        file.write('\n"half a na')
    list_output(tmp_path / "ours/whole")
    (tmp_path / "ours/whole").write_text("")
    os.mkfifo(tmp_path / "ours/gone")
    remove_listed(tmp_path / "ours")
    assert {path.name for path in tmp_path.rglob("*")} == {"ours", "away", "precious", "a", "folder", "gone", MARKER}
    assert len([*tmp_path.rglob("precious")]) == 3


def test_what_comes_meanwhile_is_not_written_over(tmp_path):
    def write() -> None:
        with write_aside(tmp_path / "a.txt") as aside:
            aside.write_text("ours")
            (tmp_path / "a.txt").write_text("mine")

    with pytest.raises(UserError, match="not written by dic-repa"):
        write()
    assert contents(tmp_path) == {"a.txt": b"mine"}
    with pytest.raises(UserError):
        check_file(tmp_path / "a.txt")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_umask_decides_who_may_read(umask, mode, work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures/cat").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "pictures/cat/0.png")
    before = os.umask(umask)
    try:
        keys = ["train.steps=2", "train.sample_every=2", "sample.steps=1", "train.power_ema=[0.1]"]
        run = small_run(tmp_path / "run", *keys, "train.snapshot_every=2")
        call("ema", run.path, "--sigma-rel", "0.1")
        call("sample", run.path, "--num", "2", "--steps", "1", "--out", "out")
        call("convert", run.path, "model")
        call("convert", DATA / "authors_dic_tiny.safetensors", "model.pt")
        call("convert", DATA / "authors_dic_tiny.safetensors", "model.safetensors")
        call("report", run.path)
        call("prepare", "pictures", "data", "--size", "16", "--autoencoder", "none")
    finally:
        os.umask(before)
    files = {path for path in tmp_path.rglob("*") if path.is_file() and "pictures" not in path.parts}
    wrong = {
        str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in files if stat.S_IMODE(path.stat().st_mode) != mode
    }
    assert not wrong
    assert len(files) > 30
    folders = {
        stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_dir() and path.name != "pictures"
    }
    assert 0o777 & ~umask in folders


def test_a_run_of_an_older_version_is_gone_on_with(tmp_path):
    """It has no markers, but a checkpoint that is as its manifest says."""
    run = small_run(tmp_path / "run", "train.steps=4")
    for marker in run.path.rglob(MARKER):
        marker.unlink()
    small_run(run.path, "train.steps=8", resume=True)
    assert foreign(run.path) == []
    small_run(run.path, "train.steps=2", overwrite=True)
    assert [folder.name for folder in run.list_checkpoints()] == ["step_00000002"]


def test_a_marker_is_plain_json(tmp_path):
    begin_folder(tmp_path / "run", "run")
    write_whole(tmp_path / "run/inside/a.txt", "")
    lines = [json.loads(line) for line in (tmp_path / "run" / MARKER).read_text().splitlines()]
    assert lines == [{"made_by": "written-by-dic-repa", "format": 1, "kind": "run"}, "inside/a.txt"]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_tensors({"x": torch.zeros(1000)}, path),
        lambda path: path.write_text("x" * 4000),
        lambda path: Image.new("RGB", (900, 900)).save(path, "BMP"),
    ],
)
def test_full_disk_is_told_with_the_name_of_the_file(tmp_path, write):
    with (
        full_disk(),
        pytest.raises(OSError, match=r"wanted\.bin") as caught,
        write_aside(tmp_path / "wanted.bin") as aside,
    ):
        write(aside)
    assert caught.value.filename == str(tmp_path / "wanted.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", ".", "a\0b", "/etc", "../x", "./."])
def test_a_marker_lists_nothing_but_what_is_inside(name, tmp_path):
    folder = tmp_path / "ours"
    begin_folder(folder, "samples", ["mine.png"])
    (folder / "mine.png").write_text("")
    with (folder / MARKER).open("a") as file:
        file.write("\n" + json.dumps(name))
    remove_listed(folder)
    assert foreign(folder) == []
    assert not (folder / "mine.png").exists()
    assert folder.is_dir()
