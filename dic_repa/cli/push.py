"""`dic-repa push`."""

from __future__ import annotations

from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.cli.convert import DTYPES
from dic_repa.cli.options import PATH
from dic_repa.runtime.progress import print_result


@click.command("push")
@click.argument("run", type=PATH, shell_complete=completion.runs)
@click.argument("repository", metavar="REPO")
@click.option("--dry-run", is_flag=True, help="Upload nothing; write the repository into hub/NAME and say so.")
@click.option("--folder", type=PATH, help="The same, into this folder.")
@click.option("--overwrite", is_flag=True, help="Replace the folder that such a command has written.")
@click.option("--license", help="Of the weights, by the hub's short name: apache-2.0, mit, cc-by-4.0, ...")
@click.option("--private", is_flag=True, help="Only you see the repository, if it is new.")
@click.option("--weights", help="ema, raw, or a further average such as ema-0.999.  [default: as the recipe samples]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", help="Of the weights.")
@click.option("--message", help="Of the commit.")
@click.option("--revision", metavar="BRANCH", help="Another branch than main; made if it is not there.")
def command(
    run: Path, repository: str, dry_run: bool, folder: Path | None, overwrite: bool, license: str | None, private: bool,
    weights: str | None, dtype: str, message: str | None, revision: str | None,
):  # fmt: skip
    """Upload RUN (a run, a checkpoint, or a folder of `convert`) to the Hugging Face hub as REPO, OWNER/NAME.

    RUN may also be a folder of `dic-repa export --format diffusers`, which is uploaded as it is, its card completed.

    The repository gets the weights as safetensors, config.json, the recipe, data.json, the run's scores of these
    weights, a grid of samples, and README.md, a model card made of all that. No optimizer state, no environment.json,
    and no path of this machine goes out.

    \b
    Examples:
      dic-repa push runs/digits-urepa someone/digits --license apache-2.0 --dry-run     look at hub/digits first
      hf auth login                                                                    or set HF_TOKEN
      dic-repa push runs/digits-urepa someone/digits --license apache-2.0
      dic-repa push runs/mine someone/mine --dtype bf16 --private --revision half
    """
    from dic_repa.files.hub import check_repository, check_token  # before torch is imported

    check_repository(repository, license, revision)
    if dry_run and not folder:
        folder = Path("hub") / repository.partition("/")[2]
    if not folder:
        check_token()

    import torch

    from dic_repa.publish import push

    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = push(
        run,
        repository,
        private=private,
        license=license,
        message=message,
        revision=revision,
        dtype=DTYPES[dtype],
        folder=folder,
        overwrite=overwrite,
        weights=weights,
        device=device,
    )
    if not folder:
        print_result(f"uploaded: {where}")
        return
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    size, names = sum(file.stat().st_size for file in files), [str(file.relative_to(folder)) for file in files]
    print_result(f"{folder}: {', '.join(names)}, {size / 1e6:.4g} MB; nothing was uploaded")
