"""`dic-repa convert`."""

from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.errors import UserError
from dic_repa.files.outputs import AUTHORS_FILES, check_file, check_folder
from dic_repa.runtime.progress import print_result

DTYPES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path), shell_complete=completion.runs)
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", help="Of the weights.")
@click.option(
    "--weights",
    default="ema",
    help="Which weights of a training checkpoint: ema, another average such as ema-0.999, or raw (not averaged).",
)
@click.option(
    "--recipe",
    help="The recipe that the authors' weights were trained by, such as dic-xl-ddpm; `dic-repa sample` needs it.",
)
@click.option("--family", help="The model of an authors' checkpoint, if its file does not tell: DiT, SiT or REPA.")
@click.option("--lora-only", is_flag=True, help="Only the adapters of a run with train.lora, as peft reads them.")
@click.option("--overwrite", is_flag=True, help="Replace what convert has written at TARGET.")
def command(
    source: Path, target: Path, dtype: str, weights: str, recipe: str | None, family: str | None, lora_only: bool,
    overwrite: bool,
):  # fmt: skip
    """Convert the checkpoint SOURCE into TARGET.

    SOURCE is a run, one of its checkpoints, a folder or hub id that `save_pretrained` made, or a file of the authors'
    public code (DiC, DiCo and FCDM; to read also DiT, SiT, REPA, VisionLLaMA and U-ViT). TARGET is a file in its
    authors' layout if it ends in .pt, .pth or .safetensors, otherwise a folder to sample from, which `load_denoiser`
    loads. The adapters of a run with train.lora are merged into its weights.

    An autoencoder too: its file in LDM's layout (VA-VAE, REPA-E's) becomes a folder of diffusers, and back.

    \b
    Examples:
      dic-repa convert runs/digits-urepa small --dtype fp16            a run's averaged weights, in half the space
      dic-repa convert DiC-XL.pt dic-xl --recipe dic-xl-ddpm           the authors' file, ready to sample from
      dic-repa convert runs/mine DiC-mine.pt                           for the authors' code
      dic-repa convert runs/lora adapters --lora-only                  adapter_config.json and adapter_model.safetensors
      dic-repa convert e2e-vavae-400k.pt e2e-vavae                     an autoencoder, for diffusers
    """
    if target.suffix[1:].isalpha() and target.suffix not in AUTHORS_FILES and not target.is_dir():
        known = f"{', '.join(AUTHORS_FILES)} are files"
        raise UserError(f"{target}: convert writes no {target.suffix} files; {known}, and a folder has no ending")
    if lora_only and (target.suffix in AUTHORS_FILES or recipe or family or dtype != "float32" or weights != "ema"):
        raise click.UsageError("--lora-only writes a folder of the adapters as they are, and takes --overwrite alone")
    if target.suffix in AUTHORS_FILES:
        check_file(target)
    there = target.exists() if target.suffix in AUTHORS_FILES else check_folder(target, "model")
    if there and not overwrite:
        raise UserError(f"{target} exists; pass --overwrite to replace it")

    from dic_repa.sampling.convert import convert, convert_adapters, convert_autoencoder, is_autoencoder

    if lora_only:
        count = convert_adapters(source, target)
        print_result(f"{target}: adapters of {count / 1e6:.4g} M parameters in float32, not averaged")
        return
    if is_autoencoder(source):
        if weights != "ema" or family or recipe:
            raise click.UsageError(f"{source} is an autoencoder, for which convert takes --dtype and --overwrite alone")
        model = convert_autoencoder(source, target, DTYPES[dtype])
    else:
        model = convert(source, target, DTYPES[dtype], weights, family, recipe)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(file.stat().st_size for file in ([target] if target.is_file() else target.iterdir()))
    print_result(
        f"{target}: {type(model).__name__} with {parameters / 1e6:.4g} M parameters in {dtype}, {size / 1e6:.4g} MB"
    )
