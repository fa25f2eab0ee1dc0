"""`dic-repa bench poster`."""

import json
from pathlib import Path

import click

from dic_repa.cli.options import DEVICE, PATH, ROUNDS, Between, Count, Several
from dic_repa.errors import UserError
from dic_repa.files.atomic import write_whole
from dic_repa.files.outputs import MARK, begin_folder, check_folder
from dic_repa.runtime.progress import print_result

_OF_POSTER = Several(click.Choice(["torch-default", "bf16", "tf32", "fp32"]))
_SYSTEMS = Several(
    click.Choice(
        "DiT-XL/2 U-ViT-XL/2 PixArt-alpha-XL/2 DiffiT-XL/2 DiT-LLaMA-XL/2 SongUNet DiCo-XL FCDM-XL DiC-XL DiC-H".split()
    )
)


@click.command("poster")
@click.option("--out", type=PATH, default="bench-poster", help="Folder for results.")
@click.option("--small", is_flag=True, help="Each system at a quarter of its width: minutes on a CPU.")
@DEVICE
@click.option("--only", type=_SYSTEMS, help="Which systems.  [default: all ten]")
@click.option("--size", type=Several(click.Choice(["256", "512"])), default="256,512", help="Of the images, in pixels.")
@click.option("--batch", type=Count(1, "batch"), help="Images at once.  [default: 64 on a GPU, 2 on a CPU]")
@click.option(
    "--precision", type=_OF_POSTER, help="One or several.  [default: torch-default,bf16 on a GPU, fp32 on a CPU]"
)
@click.option(
    "--compile",
    "modes",
    type=Several(click.Choice(["off", "blocks", "default"])),
    default="off,blocks",
    help="One or several; blocks: one by one.",
)
@click.option("--budget", type=Between(0, 1e6), default=0, help="Seconds, after which no system is begun; 0: no limit.")
@ROUNDS
@click.option("--seconds", type=Between(0, 3600), default=0.3, help="Length of each measurement, about.")
def poster(out: Path, small: bool, device: str | None, only, size, batch, precision, modes, budget, rounds, seconds):
    """The throughput table of DiC's poster (CVPR 2025) on this device, the poster's own numbers beside it.

    DiT, U-ViT, PixArt-alpha, DiffiT, DiT-LLaMA, SongUNet, DiCo, FCDM, DiC-XL and DiC-H with random weights: each takes
    turns with DiT-XL/2, to which its ratio is, since all do not fit into one GPU. A system that cannot be measured has
    a row that says why. torch-default is float32 as torch has it by itself: TF32 in convolutions, not in matrix
    products; the poster does not say its device and precision. The folder gets poster.json, after each system, and the
    chart poster.png.

    \b
    Examples:
      dic-repa bench poster                                  on a GPU of 80 GB
      dic-repa bench poster --only DiT-XL/2,DiC-XL --size 256 --precision torch-default,tf32,bf16
      dic-repa bench poster --small                          on a CPU
    """
    check_folder(out, "measurements")

    from dic_repa.bench.budget import Budget
    from dic_repa.bench.device import find_device
    from dic_repa.bench.poster import COLUMNS, SYSTEMS, bench_poster, save_poster_chart
    from dic_repa.bench.timing import Settings, table

    found = find_device(device)
    on_cpu = found.type != "cuda"
    if on_cpu and not small:
        raise UserError("models of full size need a GPU; take --small, which runs on a CPU")
    kinds = precision or (["fp32"] if on_cpu else ["torch-default", "bf16"])
    settings = Settings(found, kinds, modes, [batch or (2 if on_cpu else 64)], (), rounds, seconds)
    result: dict = {}
    for result in bench_poster(settings, [int(px) for px in size], only or tuple(SYSTEMS), small, Budget(budget)):
        if not check_folder(out, "measurements"):
            begin_folder(out, "measurements")
        write_whole(out / "poster.json", json.dumps({"made_by": MARK, **result}, indent=2) + "\n")
    here = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    title = f"forward pass, batch {settings.batches[0]}" + (", each at a quarter of its width" if small else "")
    save_poster_chart(result, out / "poster.png", f"{title}\n{here}\nposter: {result['source']}")
    print_result("\n".join([here, title, table(result["rows"], COLUMNS)]))
    print_result(f"saved: {out}")
