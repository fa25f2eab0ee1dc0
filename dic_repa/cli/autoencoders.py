"""`dic-repa autoencoders`."""

import json
from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.cli.groups import Group
from dic_repa.cli.options import PATH, Count, Several, json_option
from dic_repa.errors import UserError, when_interrupted
from dic_repa.runtime.progress import print_result, say
from dic_repa.runtime.table import format_rows
from dic_repa.runtime.threads import choose_threads

PICTURES = (".png", ".jpg", ".webp")
SIZES = (256, 512)  # pixels of images whose latents the list shows


@click.group("autoencoders", cls=Group, invoke_without_command=True)
@click.option("--plugin", "plugins", metavar="MODULE", multiple=True, help="Import a module that registers some.")
@click.pass_context
def command(context: click.Context, plugins: tuple[str, ...]):
    """List the autoencoders: channels, factor of reduction, latents of 256 and 512 px, parameters, licence, source.

    An autoencoder's name in a recipe or in `dic-repa prepare` is one of these, a hub id or folder of diffusers' files
    (or diffusers:CLASS: and then one), a file in LDM's layout, or `package.module:factory`. What comes back of an image
    limits all that is trained on its latents: `check` shows it.

    \b
    Examples:
      dic-repa autoencoders
      dic-repa autoencoders check stabilityai/sd-vae-ft-ema --images photos
      dic-repa autoencoders --plugin my_autoencoder check my-autoencoder
    """
    from dic_repa.data.autoencoders import list_autoencoders
    from dic_repa.registry import import_plugin

    for plugin in plugins:
        import_plugin(plugin)
    if context.invoked_subcommand is None:
        heads = ["autoencoder", "channels", "factor", *(f"{size} px" for size in SIZES), "params (M)", "licence"]
        _print([[*heads, "source"], *map(_row, list_autoencoders())])


@command.command("check")
@click.argument("name", shell_complete=completion.autoencoders)
@click.option(
    "--images", help="Folder, zip, tar, .npz, hub id, or name: digits:train.  [default: emoji of the package]"
)
@click.option("--size", type=Count(16, "size"), default=256, help="Of the centre crop, in pixels.")
@click.option("--num", type=Count(1, "images"), help="Images at most, evenly over all.  [default: all; 64 emoji]")
@click.option("--sample", is_flag=True, help="Decode latents drawn from the posterior, not its mean.")
@click.option(
    "--metrics", type=Several(str), help="Of `dic-repa evaluate`.  [default: fid, or without its weights fd-lite2]"
)
@click.option("--inception-weights", type=PATH, help="For fid: a file of torch-fidelity's format.")
@click.option("--lpips-weights", type=PATH, help="For LPIPS: torchvision's file of VGG16.")
@click.option("--batch-size", type=Count(1, "batch"), default=8, help="Images in the autoencoder at once.")
@click.option("--out", type=PATH, help="The picture.  [default: NAME.png]")
@json_option(" of the numbers, unrounded")
def check(name: str, images: str | None, size: int, num: int | None, out: Path | None, as_json: bool, **options):
    """Encode and decode images with the autoencoder NAME, and compare what comes back with them.

    The picture has some images, below each what comes back, and below that the difference. The numbers are PSNR, SSIM
    (Wang et al. 2004: Gaussian window of 11 px with deviation 1.5, K1 0.01, K2 0.03, on RGB), LPIPS (0.1, VGG16) where
    VGG16's weights are at hand, and rFID, which is FID between the images and what comes back; without Inception's
    weights it is FD-lite2, by a network of this package. What comes back is rounded to 8 bits first. The normalised
    latents should have a mean near 0 and a deviation near 1; far from these, the scaling factor is wrong.

    \b
    Examples:
      dic-repa autoencoders check stabilityai/sd-vae-ft-ema --images imagenet/val --num 1000
      dic-repa autoencoders check weights/my-vae --images photos.zip --size 512 --sample
      dic-repa autoencoders check none --size 32 --json
    """
    from dic_repa.evaluation.reconstruction import check_autoencoder
    from dic_repa.files.pictures import check_figure, save_picture
    from dic_repa.runtime.processes import start_processes

    out = out or Path(f"{name.strip('/').replace(':', '-').replace('/', '-')}.png")
    check_figure(out, PICTURES)
    choose_threads()
    processes = start_processes()
    if processes.is_main_process:
        with when_interrupted(lambda: "interrupted; nothing was written"):
            found = check_autoencoder(name, images, size, num, device=processes.device, **options)
            save_picture(found.picture(), out)
        print_result(json.dumps(found.to_dict(), indent=2) if as_json else str(found))
        for note in found.notes:
            say(f"note: {note}")
        if not as_json:
            print_result(f"picture: {out}")
    processes.end_training()


def _row(name: str) -> list:
    from dic_repa.data.autoencoders import autoencoder_card, autoencoders

    if name.endswith(":"):
        return [name, autoencoders.describe(name)]
    try:
        card = autoencoder_card(name)
    except UserError as error:
        return [name, str(error)]
    except Exception as error:  # somebody else's code: a broken plug-in must not hide the other autoencoders
        return [name, f"cannot be built without options ({error})"]
    latents = (_latent(card.channels, card.downsample, size) for size in SIZES)
    return [name, card.channels, card.downsample, *latents, f"{card.parameters:.1f}", card.licence, card.source]


def _latent(channels: int, factor: int, size: int) -> str:
    side = size // factor
    return "-" if size % factor else f"{channels}x{side}x{side}"


def _print(rows: list[list]) -> None:
    """The rows in columns; one of only two cells, a name and a text, is as long as it is."""
    whole = [row for row in rows if len(row) > 2]
    lines = iter(format_rows([[str(cell) for cell in row] for row in whole], left=(0, 6, 7)).splitlines())
    width = max(len(row[0]) for row in rows)
    for row in rows:
        print_result(next(lines) if len(row) > 2 else f"{row[0]:{width}}  {row[1]}")
