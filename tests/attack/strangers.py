"""A stranger's checkpoint with each known way to run code, under all verbs that read it.

The code writes a canary file. With `--trust-code`, which a user gives who knows the stranger, it may run.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random

from .good import SAMPLE
from .judge import CANARY, Case

EVIL = f"""
from pathlib import Path
Path({CANARY!r}).write_text("code ran")
from dic_repa.models import DiC
def make(*arguments, **options):
    return DiC(*arguments, **options)
def encoder(*arguments, **options):
    raise SystemExit(0)
"""


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (exec, (f"open({CANARY!r}, 'w').write('pickled')",))


def recipes(folder: Path) -> list[Path]:
    return [
        *folder.rglob("converted/recipe.yaml"),
        *folder.rglob("run/recipe.yaml"),
        *folder.rglob("run/checkpoints/*/ema/recipe.yaml"),
    ]


def keys(change: Callable[[dict], None], beside: str = "evil.py") -> Callable[[Path], None]:
    """Change every recipe of the stranger, and put the module into the current folder and beside the weights."""

    def place(folder: Path) -> None:
        import yaml

        for file in recipes(folder):
            recipe = yaml.safe_load(file.read_text())
            change(recipe)
            file.write_text(yaml.safe_dump(recipe))
            (file.parent / beside).write_text(EVIL)
            (file.parent / "evil.yaml").write_text("plugins: [evil]\n")
        (folder / beside).write_text(EVIL)
        (folder / "evil.yaml").write_text("plugins: [evil]\n")
        (folder / "evil.pt").write_bytes(pickle.dumps({"model": Evil()}))
        rehash(folder)

    return place


def config(**changes: object) -> Callable[[Path], None]:
    """Change every config.json and data.json of the stranger."""

    def place(folder: Path) -> None:
        (folder / "evil.py").write_text(EVIL)
        for file in [*folder.rglob("config.json"), *folder.rglob("data.json")]:
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))
            (file.parent / "evil.py").write_text(EVIL)
        rehash(folder)

    return place


def rehash(folder: Path) -> None:
    """Make the manifests right again, as a stranger would."""
    import hashlib

    for manifest in folder.rglob("manifest.json"):
        content = json.loads(manifest.read_text())
        for name, entry in content.get("files", {}).items():
            data = (manifest.parent / name).read_bytes()
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(content))


def put(*path: object, value: object) -> Callable[[dict], None]:
    def change(recipe: dict) -> None:
        held = recipe
        for key in path[:-1]:
            held = held[key]
        held[path[-1]] = value

    return change


def aligned(**more: object) -> Callable[[dict], None]:
    return put("alignments", value=[{"encoder": "digits-vit", "tap": "mid.0"} | more])


# What the recipe beside the weights names: changes that import or call code.
WAYS = {
    "plugins": put("plugins", value=["evil"]),
    "plugins, dotted": put("plugins", value=["evil.x"]),
    "plugins of the standard library": put("plugins", value=["antigravity", "evil"]),
    "model": put("model", "name", value="evil:make"),
    "model os:system": put("model", "name", value="os:system"),
    "data": put("data", "name", value="evil:make"),
    "objective": put("objective", "name", value="evil:make"),
    "objective option": put("objective", "options", value={"path": "evil:make"}),
    "optimizer": put("optimizer", "name", value="evil:make"),
    "schedule": put("schedule", "name", value="evil:make"),
    "encoder": aligned(encoder="evil:encoder"),
    "encoder os:system": aligned(encoder="os:system", encoder_options={"command": f"touch {CANARY}"}),
    "head": aligned(head="evil:make"),
    "loss": aligned(loss={"name": "evil:make"}),
    "target": aligned(target="evil:make"),
    "time weight": aligned(time_weight="evil:make"),
    "solver": put("sample", "solver", value="evil:make"),
    "grid": put("sample", "grid", value={"name": "evil:make"}),
    "guidance": put("sample", "guidance", value={"kind": "evil:make", "scale": 2}),
    "guidance schedule": put("sample", "guidance", value={"schedule": "evil:make", "scale": 2}),
    "weak": put("sample", "guidance", value={"weak": "converted", "scale": 2}),
    "autoencoder": put("data", "autoencoder", value="evil"),
    "metric": put("evaluate", value={"metric": "evil:make"}),
    "base": put("base", value="evil.yaml"),
    "folders": put("folders", value=["."]),
    "another spelling": put("plugins", value=["ｅｖｉｌ"]),
    "encoder's weights": aligned(encoder="dinov2-vit-s14", encoder_options={"weights": "evil.pt"}),
    "encoder's arguments": aligned(
        encoder="timm:local-dir:.", encoder_options={"model_args": {"block_fn": "evil:make"}}
    ),
    "tracker": put("train", "trackers", value=["evil:make"]),
}
RUN = [
    "sample run --out out " + SAMPLE,
    "train --resume run --set train.steps=10",
    "convert run out",
    "probe run --encoder digits-vit --num 20 --times 0.5 --out out",
    "tune run --metric recognised --scales 1 --num 8 --confirm 0 --steps 1 --batch-size 4 --out out",
    "evaluate run --reference samples --metrics fd-digits " + SAMPLE,
    "ema run --sigma-rel 0.08 --out out",
    "report run --out out.html",
    "runs .",
    "sample converted --out out " + SAMPLE,
    "convert converted out",
    "push run someone/run --folder out",
]


def yaml_tags(folder: Path) -> None:
    for file in recipes(folder):
        file.write_text(f"x: !!python/object/apply:os.system ['touch {CANARY}']\n" + file.read_text())
    rehash(folder)


def shadow(*names: str) -> Callable[[Path], None]:
    """Modules in the current folder and beside the weights with names that this package, or a library, imports."""

    def place(folder: Path) -> None:
        for name in names:
            for where in [folder, *(file.parent for file in recipes(folder))]:
                (where / f"{name}.py").write_text(EVIL)
        rehash(folder)

    return place


def pickled(folder: Path) -> None:
    """Weights, features and images that are pickles."""
    import numpy as np
    import torch

    array = np.array([Evil()], dtype=object)
    for name in ("evil.npz", "evil.npy"):
        file = io.BytesIO()
        np.savez(file, arr_0=array, mu=array, sigma=array) if name.endswith("z") else np.save(
            file, array, allow_pickle=True
        )
        (folder / name).write_bytes(file.getvalue())
    for name in ("evil.pt", "evil.bin", "evil.pth", "evil.ckpt", "evil.safetensors"):
        (folder / name).write_bytes(pickle.dumps({"model": Evil()}))
    torch.save({"model": Evil()}, folder / "evil-zip.pt")
    for optimizer in folder.rglob("optimizer.pt"):
        torch.save(Evil(), optimizer)
    for weights in folder.rglob("converted/model.safetensors"):
        weights.write_bytes(pickle.dumps(Evil()))
        weights.with_name("pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    rehash(folder)


PICKLES = [
    "convert evil.pt out",
    "convert evil-zip.pt out",
    "convert evil.bin out",
    "convert evil.safetensors out",
    "evaluate evil.npz --reference samples --metrics fd-digits",
    "evaluate samples --reference evil.npz --metrics fd-digits",
    "evaluate samples --reference samples --metrics fid --inception-weights evil.pt",
    "evaluate samples --reference samples --metrics fid --inception-weights evil-zip.pt",
    "evaluate samples --reference samples --metrics fd-dinov2 --dinov2-weights evil.pt",
    "evaluate evil.npz --reference evil.npz --metrics fid",
    "encoders check dinov2-vit-s14 --image samples/000000.png --weights evil.pth --out out.png",
    "sample run --conditions evil.npy --out out",
    "train --resume run --set train.steps=10",
    "sample converted --out out",
    "convert converted out",
    "train tiny.yaml --out out --set data.name=repa --set data.path=.",
    "train tiny.yaml --out out --set data.name=dit --set data.path=.",
]
TRUSTED = [line for line in RUN if line.split()[0] in ("sample", "convert", "tune", "probe", "train", "push")]
CASES: list[tuple[str, Callable[[Path], None], str]] = [
    *((f"{name}: {line}", keys(change), line) for name, change in WAYS.items() for line in RUN),
    *((f"a tag: {line}", yaml_tags, line) for line in RUN),
    *(
        (f"shadows: {line}", shadow("timm", "yaml", "random", "encoders", "models", "sitecustomize"), line)
        for line in RUN
    ),
    *((f"a pickle: {line}", pickled, line) for line in PICKLES),
    *((f"a config: {line}", config(model="evil:make"), line) for line in RUN),
    *((f"an option of a config: {line}", config(block="evil:make", autoencoder="evil:make"), line) for line in RUN),
    *((f"trusted: {line} --trust-code", keys(WAYS["plugins"]), f"{line} --trust-code") for line in TRUSTED),
    *((f"trusted model: {line} --trust-code", keys(WAYS["model"]), f"{line} --trust-code") for line in TRUSTED[:1]),
]
COUNT = len(CASES)


def case(index: int, chance: Random) -> Case:
    """Each of `CASES` once."""
    name, place, line = CASES[index]
    must = "trust" if "trusted" in name else "answer"
    owns = ("out", "out.html", "run", "samples")
    return Case(name, [line.split()], place, ("run", "converted", "samples"), must, owns=owns)
