"""The command line. Each verb is a module of this package, imported when it is called, so that help is instant."""

import itertools
import sys
import time
from importlib import import_module

import click

from dic_repa import __version__
from dic_repa.cli.groups import Group
from dic_repa.errors import (
    MOST_CHARACTERS,
    UserError,
    full_memory,
    is_main_process,
    lost_process,
    printable,
    prints_errors,
)
from dic_repa.runtime import watchdog
from dic_repa.runtime.progress import print_result
from dic_repa.runtime.threads import watch  # noqa: F401 - it measures from now on what other processes do

VERBS = {
    "train": "Train a recipe; sample and judge at the end.",
    "sample": "Sample images from a run or a checkpoint.",
    "evaluate": "Measure samples: of runs, a checkpoint, a folder, or anybody's .npz.",
    "demo": "A local web page to sample from runs and checkpoints.",
    "report": "One HTML page about one run or several: curves, samples, metrics, recipes.",
    "probe": "Compare every stage of a denoiser with an encoder, over noise levels.",
    "nearest": "Are samples copies of training pictures? The nearest ones, and the share.",
    "tune": "Find the guidance scale and interval for the best score.",
    "prepare": "Crop and encode a folder, zip, tar or Hugging Face data set of images.",
    "bench": "Measure speed: of denoisers, training steps, samplers and the data.",
    "runs": "List the runs: recipe, steps, scores, speed, state.",
    "verify": "Find what is damaged in a run, a data set, samples or a cache.",
    "ema": "Make an average of a run's weights of any width, after the run.",
    "info": "Parameters and MACs of a model or a recipe.",
    "encoders": "List the encoders, or run one on an image and show its tokens.",
    "autoencoders": "List the autoencoders, or see what comes back of images, in numbers and as a picture.",
    "solvers": "List the solvers, or compare their quality against their cost on a run.",
    "parts": "List what a recipe can choose: the kinds of part, or the parts of one kind.",
    "convert": "The authors' checkpoints to ours and back; training checkpoints to small ones.",
    "push": "Upload a run to the Hugging Face hub, with a model card; or only write what would be.",
    "export": "For other runtimes: torch.export, ONNX, or a pipeline of diffusers.",
    "recipes": "List the recipes, show one, or compare two.",
    "env": "Versions, devices and settings, as a bug report needs them.",
}

FLAGS = ("--quiet", "--verbose", "--debug", "--trust-code")


class LazyGroup(Group):
    """Finds a verb's module only when it is called; the summaries above serve the overview."""

    def list_commands(self, _context):
        return list(VERBS)

    def get_command(self, _context, name):
        return import_module(f"dic_repa.cli.{name}").command if name in VERBS else None

    def format_commands(self, _context, formatter):
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}


@click.group(cls=LazyGroup, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="dic-repa")
@click.option("--quiet", is_flag=True, help="Only results, warnings and errors: no header, bars or notes.")
@click.option("--verbose", is_flag=True, help="More details, and what the libraries log.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--trust-code", is_flag=True, help="Run the code that a run, a checkpoint or prepared data names.")
@click.option("--limit", metavar="NAME=VALUE", multiple=True, help="Raise a limit that an error has named; repeatable.")
@click.pass_context
def cli(context: click.Context, quiet: bool, verbose: bool, debug: bool, trust_code: bool, limit: tuple[str, ...]):
    """Train DiC with U-REPA, sample from it, and measure the samples.

    These options may stand anywhere on the line.

    \b
    Examples:
      dic-repa train digits-urepa                   minutes on a laptop: train, sample, judge
      dic-repa sample runs/digits-urepa --recipe digits-cfg
      dic-repa evaluate runs/digits-urepa runs/digits-baseline
      dic-repa report runs/digits-urepa runs/digits-baseline --open
      dic-repa recipes show digits-urepa
      dic-repa info DiC-XL
    """
    from dic_repa.limits import lift_limits
    from dic_repa.runtime.progress import set_verbosity
    from dic_repa.trust import trusting_code

    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose exclude each other")
    set_verbosity("quiet" if quiet else "verbose" if verbose else "normal")
    lift_limits(limit)
    context.with_resource(trusting_code(trust_code))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, with 2 after a mistake that the user can correct, with 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    watchdog.trace = debug = "--debug" in arguments
    try:
        _refuse_empty(arguments)
        sys.exit(cli.main(_options_first(arguments), prog_name="dic-repa", standalone_mode=False) or 0)
    except (KeyboardInterrupt, click.Abort) as error:
        cause = error.__cause__ if isinstance(error, click.Abort) else error  # click wraps it
        if is_main_process():
            print_result(str(cause or "") or "interrupted; nothing was written", sys.stderr)
        sys.exit(130)
    except Exception as error:
        # A group without a verb; click has this error since 8.2.
        if isinstance(error, click.UsageError) and type(error).__name__ == "NoArgsIsHelpError":
            print_result(error.format_message())
            sys.exit(0)
        line = _message(error)
        if debug or (prints_errors() and not line):
            raise
        if prints_errors():
            print_result(printable(f"error: {line}".replace("\n", " "), MOST_CHARACTERS), sys.stderr)
        else:
            time.sleep(1)  # a launcher stops all processes once one ends; the line must be printed before
        sys.exit(2 if line else 1)


def _refuse_empty(arguments: list[str]) -> None:
    """An empty word is a variable of the shell that is not set: as a path it would be the current folder."""
    for before, word in zip(["", *arguments], arguments):
        option, equals, value = word.partition("=")
        if not word.strip():
            raise click.UsageError(f"the value behind {before} is empty" if before else "an argument is empty")
        if option.startswith("--") and equals and not value.strip():
            raise click.UsageError(f"the value of {option} is empty")


def _options_first(arguments: list[str]) -> list[str]:
    """The arguments with the options of all verbs before the verb, wherever they stand: one adds them to the end of a
    command that has failed.
    """
    first: list[str] = []
    others: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--limit":
            first += [word, *itertools.islice(words, 1)]
        else:
            (first if word in FLAGS or word.startswith("--limit=") else others).append(word)
    return first + others


def _message(error: Exception) -> str:
    """The line for an error that is no fault of this package; "" for any other."""
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, UserError | click.ClickException | OSError):
        return str(error) or type(error).__name__
    if memory := full_memory(error):
        return f"{memory}; take a smaller batch: --batch-size, or train.micro_batch"
    return lost_process(error)
