"""The command line: `torchslice COMMAND`. Commands import torch when they run, so that help is quick.

Exit codes: 0 success, 2 bad input (one line on standard error), 130 Ctrl-C. Results go to standard output, all else to
standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import TorchsliceError
from . import bench, demo, evaluate, extend, extract, neurons, readapt, restructure, slice, train
from .common import say

UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy that typer carries


class Commands(TyperGroup):
    """The commands; Ctrl-C ends them with a line that says what was kept."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            say("torchslice:", *getattr(interrupt, "__notes__", ["Interrupted; nothing half-written was left."]))
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command("demo")(demo.demo)
app.command("neurons")(neurons.neurons)
app.command("train")(train.train)
app.command("slice")(slice.slice)
app.command("extract")(extract.extract)
app.command("restructure")(restructure.restructure)
app.command("readapt")(readapt.readapt)
app.command("extend")(extend.extend)
app.command("evaluate")(evaluate.evaluate)
app.command("bench")(bench.bench)


@app.callback(invoke_without_command=True)
def torchslice(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Find, cut out and reuse the parts of a neural network that serve the classes you need.

    Start with:  torchslice demo
    """
    if version:
        from importlib.metadata import version as version_of

        print(f"torchslice {version_of('torchslice')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (default: those of the process) and return its exit code."""
    try:
        code = app(
            sys.argv[1:] if arguments is None else list(arguments), prog_name="torchslice", standalone_mode=False
        )
    except UsageError as error:
        where = error.ctx.command_path if error.ctx else "torchslice"
        say(f"{where}: {' '.join(error.format_message().split()).rstrip('.')}. See: {where} --help")
        return 2
    except TorchsliceError as error:
        say("torchslice:", " ".join(str(error).split()))
        return 2
    return code if isinstance(code, int) else 0
