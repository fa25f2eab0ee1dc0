"""`dic-repa encoders`."""

from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.cli.groups import Group
from dic_repa.cli.options import Count
from dic_repa.errors import UserError
from dic_repa.runtime.progress import print_result

PICTURES = (".png", ".jpg", ".webp")


@click.group("encoders", cls=Group, invoke_without_command=True)
@click.option("--plugin", "plugins", metavar="MODULE", multiple=True, help="Import a module that registers encoders.")
@click.pass_context
def command(context: click.Context, plugins: tuple[str, ...]):
    """List the encoders: width of a token, patch size, tokens of a 256x256 image, parameters, weights.

    An encoder's name in a recipe is one of these, `timm:` and the name of a timm network, or `package.module:factory`.

    \b
    Examples:
      dic-repa encoders
      dic-repa encoders check dinov2-vit-b --image cat.jpg
      dic-repa encoders --plugin my_encoder check my-encoder
    """
    from dic_repa.encoders import list_encoders
    from dic_repa.registry import import_plugin

    for plugin in plugins:
        import_plugin(plugin)
    if context.invoked_subcommand is not None:
        return
    names = list_encoders()
    width = max(map(len, names))
    print_result(f"{'encoder':{width}}  width  patch  tokens  params (M)  {'licence':14}  weights")
    for name in names:
        print_result(f"{name:{width}}  {_row(name)}")


@command.command("check")
@click.argument("name", shell_complete=completion.encoders)
@click.option("--image", type=click.Path(path_type=Path), help="An image file.  [default: a digit of the package]")
@click.option("--size", type=Count(16, "size"), default=256, help="Of the centre crop, in pixels.")
@click.option("--weights", type=click.Path(path_type=Path), help="safetensors file or plain state dict.")
@click.option("--option", "options", metavar="KEY=VALUE", multiple=True, help="An option of the encoder; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="The picture.  [default: NAME.png]")
def check(name: str, image: Path | None, size: int, weights: Path | None, options: tuple[str, ...], out: Path | None):
    """Run the encoder NAME on an image and show its tokens: the first three principal components as colours.

    \b
    Examples:
      dic-repa encoders check digits-vit
      dic-repa encoders check dinov2-vit-b --weights dinov2_vitb14_pretrain.pth --image cat.jpg --size 512
      dic-repa encoders check mocov3-vit-b --option pretrained=false
    """
    from dic_repa.data import load_digits
    from dic_repa.data.images import center_crop, decode_image, to_tensor
    from dic_repa.encoders import check_tokens, create_encoder
    from dic_repa.encoders.picture import token_sheet
    from dic_repa.files.pictures import check_figure, save_picture, to_pil

    out = out or Path(f"{name.replace(':', '-').replace('/', '-')}.png")
    check_figure(out, PICTURES)
    digit = to_pil(load_digits("held-out")[0][0]).convert("RGB")
    picture = decode_image(image.read_bytes(), str(image)) if image else digit
    encoder = create_encoder(name, **parse_encoder_options(options, weights))
    pixels = to_tensor(center_crop(picture, size))[None]
    tokens = check_tokens(name, encoder, pixels)[0].float()
    rows, columns = encoder.token_grid((size, size))
    save_picture(token_sheet(pixels[0], tokens, (rows, columns)), out)
    norms = tokens.norm(dim=1)
    print_result(
        f"{name}: {size}x{size} pixels give {rows}x{columns} tokens of width {encoder.embed_dim}, "
        f"of norm {norms.mean():.3g} (standard deviation {norms.std(correction=0):.2g}); picture: {out}"
    )


def _row(name: str) -> str:
    from dic_repa.encoders import encoder_card

    if name.endswith(":"):
        return "any network of timm, such as timm:vit_base_patch16_224.augreg_in21k or timm:convnext_tiny.in12k"
    try:
        card = encoder_card(name)
    except UserError as error:
        return str(error)
    except Exception as error:  # somebody else's code: a broken plug-in must not hide the other encoders
        return f"cannot be built without options ({error})"
    patch = card.patch or "-"
    return f"{card.width:5}  {patch:>5}  {card.tokens:6}  {card.parameters:10.1f}  {card.licence:14}  {card.source}"


def parse_encoder_options(options: tuple[str, ...], weights: Path | None) -> dict:
    """The options of `create_encoder`, from KEY=VALUE texts and a weights file."""
    from dic_repa.recipe.files import parse_value

    parsed = {"weights": str(weights)} if weights else {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise UserError(f"--option takes key=value, such as layer=-2, not '{option}'")
        parsed[key] = parse_value(value, f"--option {key}")
    return parsed
