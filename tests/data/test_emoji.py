"""The emoji of the package: the pictures, what is held out of them, their copies, and the script that makes them."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from importlib import resources

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pictures import as_file, write_tree
from PIL import Image
from small_runs import ALIGNED, metrics, small_recipe

from dic_repa.data import Emoji
from dic_repa.data.emoji import EMBEDDED, may_mirror, picture_key
from dic_repa.data.make_emoji import main
from dic_repa.data.sources import ImageFolder
from dic_repa.errors import UserError
from dic_repa.recipe import DataSection
from dic_repa.recipe.build import data_traits
from dic_repa.training import train as train_recipe

# SHA-256 of 32x32x3 pixels and the group, from a file that was made with other code from the same packages.
FIXTURE = {
    "1f44b-1f3fb": ("9f95b540eaffb54e", "People & Body"),
    "1f980": ("cc0a3208ce8c467a", "Animals & Nature"),
    "1f1eb-1f1f7": ("8b79e55782b0fcf4", "Flags"),
    "1f34e": ("822d28eef0478cf9", "Food & Drink"),
    "1f4bb": ("a9a83212c8c125bf", "Objects"),
    "26bd": ("6caed38f7a70945b", "Activities"),
    "1f600": ("3571aa2b9b935480", "Smileys & Emotion"),
    "267b-fe0f": ("906102a332583faf", "Symbols"),
    "1f680": ("4ac3d2e3194062a2", "Travel & Places"),
    "0035-fe0f-20e3": ("3d673eea4f314e5d", "Symbols"),  # its original is not square
}


@pytest.fixture(scope="module")
def train():
    return Emoji()


@pytest.fixture(scope="module")
def held_out():
    return Emoji("held-out")


def test_the_pictures_are_those_of_the_packages(train, held_out):
    assert len(train) + len(held_out) == 3374
    for name, (digest, group) in FIXTURE.items():
        data = train if name in train.names else held_out
        sample = data[data.names.index(name)]
        assert sample["image"].shape == (3, 32, 32)
        pixels = sample["image"].permute(1, 2, 0).contiguous().numpy().tobytes()
        assert hashlib.sha256(pixels).hexdigest()[:16] == digest
        assert data.class_names[sample["label"]] == group


def test_no_variant_of_a_training_picture_is_held_out(train, held_out):
    assert 0.09 < len(held_out) / 3374 < 0.16
    assert {*train.labels} == {*held_out.labels} == {*range(9)}
    assert not {image.numpy().tobytes() for image in train.images} & {i.numpy().tobytes() for i in held_out.images}
    assert not {*map(picture_key, train.names)} & {*map(picture_key, held_out.names)}


@pytest.mark.parametrize(
    "variants",
    [
        "1f44b 1f44b-1f3fb 1f44b-1f3ff",  # tones
        "1f6b6 1f6b6-1f3fc-200d-2640-fe0f-200d-27a1-fe0f",  # gender and direction
        "1f9d1 1f468-1f3fd-200d-1f9b0 1f471-1f3fb-200d-2642-fe0f",  # hair
        "1f9d1-200d-1f680 1f468-200d-1f680 1f469-1f3fe-200d-1f680",
        "1f46d 1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3fc",
        "1f46a 1f468-200d-1f467 1f469-200d-1f469-200d-1f467-200d-1f466",
        "1f431 1f63a",  # the same picture
    ],
)
def test_variants_have_one_key(variants):
    assert len({*map(picture_key, variants.split())}) == 1


def test_other_pictures_have_other_keys():
    others = "2640-fe0f 2642-fe0f 27a1-fe0f 1f9d1 1f466 1f9d1-200d-1f680 1f9d1-200d-1f692 1f1eb-1f1f7 1f1eb-1f1ee 1f436"
    assert len({*map(picture_key, others.split())}) == len(others.split())


def test_the_order_has_nothing_to_do_with_the_groups(train):
    """Any stretch of 300 samples has the groups about as often as all have."""
    shares = np.bincount(train.labels, minlength=9) / len(train)
    for start in range(0, 2700, 300):
        part = np.bincount(train.labels[start : start + 300], minlength=9) / 300
        assert np.abs(part - shares).max() < 0.1


def moved(image, down, across):
    """The picture moved on a canvas that its border's colour fills, by numpy."""
    height, width = image.shape[-2:]
    canvas = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="edge")
    return canvas[:, 2 - down : 2 - down + height, 2 - across : 2 - across + width]


def test_copies_follow_the_pictures(train):
    data = Emoji(flip=True, shift=2)
    mirrored = [place for place, image in enumerate(train.images) if place in {*data.copies.mirrored}]
    once = len(train) + len(mirrored)
    assert len(data) == 25 * once
    for index in (0, 7, len(train) - 1):
        torch.testing.assert_close(data[index], train[index], rtol=0, atol=0)
    seen = set()
    for move in range(25):
        plain, flipped = (data[move * once + place]["image"].numpy() for place in (5, len(train)))
        [place] = [
            (down, across)
            for down in range(-2, 3)
            for across in range(-2, 3)
            if np.array_equal(plain, moved(train.images[5].numpy(), down, across))
        ]
        seen.add(place)
        mirror = train.images[mirrored[0]].numpy()[:, :, ::-1]
        np.testing.assert_array_equal(flipped, moved(mirror, *place))
    assert len(seen) == 25
    assert data[once * 24 + len(train)]["label"] == train.labels[mirrored[0]]
    with pytest.raises(IndexError):
        data[len(data)]


def test_what_would_be_wrong_is_not_mirrored(train):
    data = Emoji(flip=True)
    names = {train.names[place] for place in data.copies.mirrored}
    assert {"1f980", "1f600", "1f44b-1f3fb", "1f680"} <= names
    # A flag, a sign, a clock, a digit, a map and banknotes.
    assert not {"1f1eb-1f1f7", "0035-fe0f-20e3", "1f551", "1f947", "1f5fa-fe0f", "1f4b5"} & names
    assert may_mirror("1f34e", "Food & Drink")


def test_images_have_moved_copies_too(tmp_path):
    write_tree(tmp_path / "tree", {"cat": 2, "dog": 1}, (32, 32))
    plain, data = (ImageFolder(tmp_path / "tree", 32, flip=True, shift=shift) for shift in (0, 1))
    assert (len(plain), len(data)) == (6, 54)
    for index in range(6):
        torch.testing.assert_close(data[index], plain[index], rtol=0, atol=0)
    copies = {data[4 + 6 * move]["image"].numpy().tobytes() for move in range(9)}
    picture = plain[4]["image"].numpy()
    assert copies == {moved(picture, down, across).tobytes() for down in (-1, 0, 1) for across in (-1, 0, 1)}


def test_each_augmentation_has_its_own_cache():
    kinds = [{}, {"flip": True}, {"shift": 1}, {"flip": True, "shift": 1}, {"split": "held-out"}]
    assert len({Emoji(**kind).fingerprint for kind in kinds}) == 5


def test_without_classes():
    data = Emoji("held-out", unlabelled=True)
    assert data.num_classes == 0
    assert {int(data[index]["label"]) for index in range(len(data))} == {0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "test"}, "unknown split 'test'"),
        ({"size": 64}, "emoji of the package have 32 px.*make_emoji.*data.path"),
        ({"shift": 9}, "shift is 9; pictures of 32 px are moved by 0 to 8 pixels"),
        ({"shift": -1}, "shift is -1"),
        ({"path": "nowhere.zip"}, "no file nowhere.zip; make it with .*make_emoji"),
    ],
)
def test_mistakes(options, said):
    with pytest.raises(UserError, match=said):
        Emoji(**options)


@pytest.mark.parametrize("part", ["end", "index", "pictures", "another zip"])
def test_a_damaged_file(part, tmp_path):
    file, data = tmp_path / "emoji.zip", bytearray(resources.files("dic_repa.data").joinpath(EMBEDDED).read_bytes())
    if part == "another zip":
        data = bytearray(resources.files("dic_repa.data").joinpath("assets/mnist_10k.npz").read_bytes())
    elif part == "end":
        del data[-1000:]
    else:
        data[200 if part == "index" else len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="is damaged or no file of emoji"):
        Emoji(path=file)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"size": 8},
        {"size": "big"},
        {"groups": ["Flags"]},
        {"groups": {}},
        {"groups": {"Flags": ["1f600", "1f601", "1f602"]}},
        {"groups": {"Flags": [1, 2]}},
        {"groups": {"Flags": ["1f600", "\ud800"]}},
    ],
)
def test_an_index_that_does_not_fit(change, tmp_path):
    index = {"size": 16, "groups": {"Flags": ["1f600", "1f603"]}}
    with zipfile.ZipFile(tmp_path / "emoji.zip", "w") as archive:
        archive.writestr("pictures.webp", as_file(Image.new("RGB", (32, 16)), "WEBP", lossless=True))
        archive.writestr("index.json", json.dumps(index | change))
    with pytest.raises(UserError, match="is damaged or no file of emoji"):
        Emoji(path=tmp_path / "emoji.zip", size=16)


def test_what_is_assumed_of_a_file_that_is_not_here():
    traits, missing = data_traits(DataSection(name="emoji", size=64, path="nowhere.zip"))
    assert (traits.channels, traits.condition.count, traits.image_size) == (3, 9, 64)
    assert "nowhere.zip" in missing
    with pytest.raises(UserError, match="have 32 px"):  # not assumed to be latents: it is here, and does not fit
        data_traits(DataSection(name="emoji", size=64))


NAMES = ["1f600", "1f603", "1f44b-1f3fb", "1f980", "1f982", "1f34e", "2764-fe0f", "1f9ff"]


def original(seed, name):
    """Coarse noise with an alpha channel; one is not square."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").resize((64, 72 if name == "1f980" else 64), Image.Resampling.BICUBIC)


@pytest.fixture
def packages(tmp_path):
    """Folders as npm unpacks them, and archives as it packs them."""
    pictures, table = tmp_path / "pictures" / "assets", tmp_path / "groups"
    pictures.mkdir(parents=True)
    table.mkdir()
    for seed, name in enumerate([*NAMES, "1f3fb"]):
        data = as_file(original(seed, name), "WEBP", lossless=True, exact=True)
        (pictures / f"{name}.webp").write_bytes(data)
    entry = {"unified": "", "non_qualified": None, "category": "Smileys & Emotion"}
    rows = [entry | {"unified": name.upper()} for name in NAMES if "-" not in name]
    rows[2] |= {"category": "Animals & Nature"}
    wave = {"unified": "1F44B-1F3FB", "non_qualified": None}
    rows.append(entry | {"unified": "1F44B", "category": "People & Body", "skin_variations": {"1F3FB": wave}})
    rows.append(entry | {"unified": "2764-FE0F", "non_qualified": "2764"})
    rows.append(entry | {"unified": "1F3FB", "category": "Component"})
    (table / "emoji.json").write_text(json.dumps(rows))
    for folder in (pictures.parent, table):
        with tarfile.open(f"{folder}.tgz", "w:gz") as archive:
            archive.add(folder, "package")
    return tmp_path


def make(packages, *names, size=16, out="emoji.zip"):
    arguments = ["--size", str(size), "--out", str(packages / out), *(str(packages / name) for name in names)]
    return CliRunner().invoke(main, arguments)


def test_the_script_makes_a_file_of_any_size(packages):
    result = make(packages, "groups.tgz", "pictures.tgz")
    assert result.exit_code == 0, result.output
    assert "8 emoji of 16 px" in result.output
    assert "1 without a group" in result.output
    data = {}
    for split in ("train", "held-out"):
        part = Emoji(split, 16, packages / "emoji.zip")
        data |= {name: part[place] | {"names": part.class_names} for place, name in enumerate(part.names)}
    assert sorted(data) == sorted(NAMES)
    for seed, name in enumerate(NAMES):
        picture = original(seed, name)
        alpha = np.asarray(picture)[..., 3:] / 255
        flat = np.full((72 if name == "1f980" else 64,) * 2 + (3,), 255.0)
        across = (flat.shape[1] - 64) // 2
        flat[:, across : across + 64] = alpha * np.asarray(picture)[..., :3] + (1 - alpha) * 255
        small = Image.fromarray(np.rint(flat).astype(np.uint8)).resize((16, 16), Image.Resampling.LANCZOS)
        found = data[name]["image"].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - np.asarray(small)).max() <= 2  # Pillow's alpha_composite rounds in another way
    groups = {name: sample["names"][sample["label"]] for name, sample in data.items()}
    assert groups["1f980"] == "Animals & Nature"
    assert groups["1f44b-1f3fb"] == "People & Body"
    assert groups["1f600"] == groups["2764-fe0f"] == "Smileys & Emotion"


def test_folders_and_archives_give_the_same_file(packages):
    make(packages, "groups.tgz", "pictures.tgz", out="a.zip")
    make(packages, "pictures", "groups", out="b.zip")
    assert (packages / "a.zip").read_bytes() == (packages / "b.zip").read_bytes()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("pictures.tgz", "pictures"), "there is no emoji.json"),
        (("groups.tgz", "groups"), "there are no pictures with a group"),
        (("groups", "empty"), "empty has neither assets/"),
        (("groups", "cut.tgz"), "cut.tgz is no whole .tgz"),
        (("groups", "text.tgz"), "text.tgz is no whole .tgz"),
        (("pictures", "other"), "emoji.json is not emoji-datasource's"),
        (("broken", "groups"), "1f600.webp is not a whole image"),
    ],
)
def test_wrong_packages(packages, names, said):
    (packages / "empty").mkdir()
    (packages / "cut.tgz").write_bytes((packages / "pictures.tgz").read_bytes()[:-300])
    (packages / "text.tgz").write_text("no archive")
    for folder, name, text in (("other", "emoji.json", '{"a": 1}'), ("broken", "assets/1f600.webp", "RIFF")):
        (packages / folder / name).parent.mkdir(parents=True)
        (packages / folder / name).write_text(text)
    result = make(packages, *names)
    assert result.exit_code == 2
    assert said in result.output.splitlines()[-1]
    assert "Traceback" not in result.output
    assert not (packages / "emoji.zip").exists()


def test_an_archive_that_unpacks_to_far_more_is_refused(packages, monkeypatch):
    with tarfile.open(packages / "bomb.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("package/assets/1f600.webp")
        member.size = 3_000_000
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    monkeypatch.setenv("DIC_REPA_LIMITS", "file-bytes=1M")
    assert "over the limit" in make(packages, "groups", "bomb.tgz").output


def test_nothing_of_others_is_written_over(packages):
    (packages / "emoji.zip").write_text("mine")
    assert "not written by dic-repa" in make(packages, "groups", "pictures").output
    assert (packages / "emoji.zip").read_text() == "mine"


def test_tokens_of_copies_are_cached_and_a_run_goes_on(packages, monkeypatch):
    """The losses are those of a run with the encoder, and of one that was not cut off."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("DIC_REPA_CACHE", str(packages / "features"))
    make(packages, "groups.tgz", "pictures.tgz")
    keys = ["data.name=emoji", f"data.path={packages}/emoji.zip", "data.size=16", "data.options={flip: true, shift: 1}"]
    keys += ["train.steps=4", "train.checkpoint_every=2", "alignments.0.encoder=efficientnet-lite0"]
    keys += ["alignments.0.encoder_options={input_size: 64}"]

    def run(name, *more, resume=False):
        return metrics(train_recipe(small_recipe(*keys, *more, base=ALIGNED), packages / name, resume))

    live, cached = run("live"), run("cached", "alignments.0.cache=true")
    shutil.copytree(packages / "cached", packages / "cut off")
    shutil.rmtree(packages / "cut off/checkpoints/step_00000004")
    again = run("cut off", "alignments.0.cache=true", resume=True)
    assert (packages / "cut off/checkpoints/step_00000004").is_dir()
    for term in ("loss", "alignment.0.token"):
        assert [line[term] for line in cached] == pytest.approx([line[term] for line in live], abs=1e-4)
        assert [line[term] for line in again] == [line[term] for line in cached]
