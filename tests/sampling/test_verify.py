"""`dic-repa verify`: what is damaged is named, with what to do about it, and what is whole is called so."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from pictures import write_tree
from small_runs import small_run

from dic_repa.alignment.cache import feature_cache
from dic_repa.cli import main
from dic_repa.data import Digits
from dic_repa.encoders import create_encoder
from dic_repa.sampling.convert import convert
from dic_repa.training.posthoc import save_reconstruction


class FewDigits(Digits):
    def __len__(self):
        return 70


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with snapshots, an average and a converted model of it, samples, a prepared data set and a cache."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("DIC_REPA_CACHE", str(folder / "caches"))
        patch.chdir(folder)
        options = ["train.power_ema=[0.05]", "train.snapshot_every=4", "sample.steps=2", "sample.num=4"]
        run = small_run(folder / "run", *options)
        save_reconstruction(run, 0.1, run.path / "averages/wide")
        convert(run.path, folder / "small")
        write_tree(folder / "tree", {"cat": 2, "dog": 5})
        for line in (
            "prepare tree prepared --size 16 --autoencoder none --shard-size 3",
            "sample run --out samples --format both",
        ):
            with pytest.raises(SystemExit) as exit:
                main(line.split())
            assert exit.value.code == 0
        feature_cache("digits-vit", {}, create_encoder("digits-vit"), FewDigits())
    shutil.rmtree(folder / "tree")
    return folder


@pytest.fixture
def verify(made, tmp_path, monkeypatch, capsys):
    """Damage a copy of what was made, and verify a part of it: the exit code, and the findings by their names."""
    shutil.copytree(made, tmp_path / "made", symlinks=True)
    monkeypatch.chdir(tmp_path / "made")

    def run(path) -> tuple[int, dict[str, dict]]:
        before = {file: os.stat(file).st_mtime_ns for file in Path().rglob("*") if file.is_file()}
        with pytest.raises(SystemExit) as exit:
            main(["verify", str(path), "--json"])
        assert before == {file: os.stat(file).st_mtime_ns for file in Path().rglob("*") if file.is_file()}
        return exit.value.code, {entry["path"]: entry for entry in json.loads(capsys.readouterr().out)}

    return run


def test_what_is_whole(verify):
    code, found = verify(".")
    assert code == 0
    (cache,) = Path("caches").glob("*.npy")
    assert {str(cache), "run", "run/recipe.yaml", "run/metrics.jsonl", "run/checkpoints/step_00000008"} <= found.keys()
    assert {"run/averages/wide", "run/snapshots/step_00000004-sigma_rel-0.05.safetensors", "small"} <= found.keys()
    assert {"samples", "samples/samples.npz", "prepared/data-00001-of-00003.arrow"} <= found.keys()
    assert not any(entry["damage"] or entry["note"] for entry in found.values())
    for path in ("run/checkpoints/step_00000004", "run/checkpoints/step_00000004/ema"):
        assert verify(path)[0] == 0


def flip(file: str, place: float = 0.5) -> None:
    content = bytearray(Path(file).read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 1
    Path(file).write_bytes(content)


@pytest.mark.parametrize(
    ("target", "file", "damage", "mend"),
    [
        ("run", "run/checkpoints/step_00000008/optimizer.pt", "another SHA-256", "train --resume run` goes on from"),
        ("run", "run/checkpoints/step_00000004/optimizer.pt", "another SHA-256", "nothing here can make it again"),
        ("run", "run/snapshots/step_00000004-sigma_rel-0.05.safetensors", "its tensors have changed", "restore it, or"),
        ("run", "run/averages/wide/model.safetensors", "another SHA-256", "convert the checkpoint again"),
        ("run/checkpoints/step_00000008", "run/checkpoints/step_00000008/state.json", "another SHA", "take another"),
        ("run/checkpoints/step_00000008/ema", "run/checkpoints/step_00000008/ema/data.json", "SHA-256", "restore it"),
        ("small", "small/config.json", "config.json has another SHA-256", "convert the checkpoint again"),
        ("samples", "samples/000002.png", "", "the same `dic-repa sample` makes it again"),
        ("samples", "samples/samples.npz", "another checksum", "remove it"),
        ("prepared", "prepared/data-00001-of-00003.arrow", "of its row", "run the same `dic-repa prepare` again"),
        ("caches", "CACHE", "the tokens of 1 of ", "the next run makes it anew"),
    ],
)
def test_a_bit_that_flips(verify, target, file, damage, mend):
    if file == "CACHE":
        (file,) = map(str, Path("caches").glob("*.npy"))
    if file.endswith(".arrow"):
        content = Path(file).read_bytes()
        flip(file, (content.index(b"RIFF") + 40) / len(content))  # in the first image
    else:
        flip(file)
    code, found = verify(target)
    assert code == 1
    ((path, entry),) = [(path, entry) for path, entry in found.items() if entry["damage"]]
    assert file == path or file.startswith(f"{path}/")
    assert damage in entry["damage"]
    assert mend in entry["mend"]


@pytest.mark.parametrize(
    ("target", "file", "content", "damage"),
    [
        ("run", "run/metrics.jsonl", b'{"step": 1}\n[]\n{"step": 3}\n\xff\n', "line 2 and 1 other lines are not"),
        ("run", "run/recipe.yaml", b"train: [", ""),
        ("run", "run/environment.json", b"[[" * 5000, "is damaged ("),
        ("samples", "samples/samples.json", b"[]", ""),
        ("samples", "samples/samples.json", b'{"labels": [1], "sample": {"num": 2}}', "1 labels for 2 samples"),
        ("prepared", "prepared/state.json", b"[]", ""),
        ("prepared", "prepared/data-00001-of-00003.arrow", b"", "is missing or damaged"),
        ("caches", "caches/x.npy", b"\x93NUMPY", ""),
    ],
)
def test_other_content(verify, target, file, content, damage):
    Path(file).write_bytes(content)
    code, found = verify(target)
    assert code == 1
    ((path, entry),) = [(path, entry) for path, entry in found.items() if entry["damage"]]
    assert path == file or "prepare.json" in path
    assert damage in entry["damage"]
    assert entry["mend"]


def test_notes_of_what_cannot_be_known(verify):
    """Of an earlier version, or left by a command that was killed; none of it is damage."""
    os.unlink("run/run.json")
    os.unlink("small/manifest.json")
    Path("run/checkpoints/.writing-step_00000012").mkdir()
    (cache,) = Path("caches").glob("*.npy")
    os.truncate(cache, cache.stat().st_size - 4 * len(np.load(cache, mmap_mode="r")))
    os.unlink("samples/samples.npz")
    os.unlink("samples/000003.png")
    code, found = verify(".")
    notes = {path: entry["note"] for path, entry in found.items() if entry["note"]}
    assert code == 0
    assert {path: note.split(",")[0] for path, note in notes.items()} == {
        "run": "without an id",
        "run/checkpoints/.writing-step_00000012": "left by a command that was killed; the next one removes it",
        "small": "it has no manifest.json",
        str(cache): "without checksums",
        "samples": "1 of 4 images are yet to be drawn",
    }


def test_as_a_user_reads_it(verify, capsys):
    flip("run/checkpoints/step_00000008/ema/model.safetensors")
    with pytest.raises(SystemExit) as exit:
        main(["verify", "run"])
    lines = capsys.readouterr().out.splitlines()
    assert exit.value.code == 1
    assert lines[0] == "whole    run"
    start = lines.index("damaged  run/checkpoints/step_00000008")
    assert lines[start + 1] == "         ema/model.safetensors has another SHA-256"
    assert lines[start + 2].startswith("         to mend: `dic-repa train --resume run` goes on from step_00000004")
    assert lines[-1] == f"1 of {len(lines) - 3} are damaged"


def test_nothing_to_verify(mistake, tmp_path):
    (tmp_path / "photos").mkdir()
    assert "there is nothing in photos that dic-repa can verify; name a run," in mistake("verify", "photos")
    assert "there is nothing at nowhere to verify" in mistake("verify", "nowhere")
