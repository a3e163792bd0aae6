"""The command line: `torchslice COMMAND`.

Exit codes: 0 success, 2 bad input (one line on standard error), 130 Ctrl-C. Results go to standard output, all else to
standard error.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import TorchsliceError
from .common import complain, say

UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy that typer carries
#: name -> first line of its help, so that help and completion need not import what the commands do (torch)
COMMANDS = {
    "demo": "Show the whole story on the built-in digits: train, slice, cut sub-models out, save and load one.",
    "neurons": "Show which neurons of a model can be cut, which hang together, and what is pinned and why.",
    "train": "Train a network so that it can be cut, or the usual way; the same command goes on where it stopped.",
    "slice": "Find the slice of every class in a trained network.",
    "groups": "Show what a network shares: sets of classes, with the neurons of all layers that serve just them.",
    "extract": "Cut the sub-model of some classes out of a trained network and save it as one file.",
    "restructure": "Compress a network: keep its critical neurons, then remove more and retrain, step by step.",
    "readapt": "Adapt a network to new samples of its classes by training its critical neurons only.",
    "extend": "Teach a network new classes by its non-critical neurons; those it knows are answered as before.",
    "replace": "Let parts of other networks answer for classes that a network is weak at; its other logits stay.",
    "compose": "Make one classifier of parts with different classes: of any parents, architectures and data sets.",
    "remove": "Remove classes from a network: their logits, and the neurons that only they need.",
    "update": "Learn one class anew from new samples, through its slice; all other logits stay as they are.",
    "export": "Write a network as a program for ONNX Runtime or torch.export, compared on validation samples first.",
    "store": "Keep artefacts in a folder, find them by class, accuracy and size, share them on the Hub.",
    "report": "Write one page about a network: what can be cut, what classes share, what a part of any of them costs.",
    "plot": "Draw one figure about a network into a file.",
    "evaluate": "Say what a network is worth on the test samples of its classes: accuracy, size, latency.",
}
SETTINGS = {"help_option_names": ["--help", "-h"]}


class Commands(TyperGroup):
    """The commands, each imported when it is run; Ctrl-C ends them with a line that says what was kept."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that was asked for."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _load(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        """Run it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            say("torchslice:", *getattr(interrupt, "__notes__", ["Interrupted; nothing half-written was left."]))
            raise typer.Exit(130) from None


def _load(name: str) -> Any:
    from .options import with_options

    module = importlib.import_module(f".{name}", __name__)
    if hasattr(module, "app"):  # commands of its own
        return typer.main.get_command(module.app)
    function = getattr(module, name)
    alone = typer.Typer(add_completion=False, context_settings=SETTINGS, pretty_exceptions_enable=False)
    alone.command(name)(with_options(function))
    return typer.main.get_command(alone)


app = typer.Typer(cls=Commands, pretty_exceptions_enable=False, context_settings=SETTINGS)
for _name, _line in COMMANDS.items():
    app.command(_name, help=_line)(lambda: None)


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
    """Run the command line on `arguments` (default: those of the process) and return its exit code.

    A process that is connected with others under torchrun ends here: when Python ends it, torch's threads may abort it.
    """
    code = _run(arguments)
    if "WORLD_SIZE" in os.environ and importlib.import_module("torchslice.training.ranks").is_connected():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = app(
            sys.argv[1:] if arguments is None else list(arguments), prog_name="torchslice", standalone_mode=False
        )
    except UsageError as error:
        where = error.ctx.command_path if error.ctx else "torchslice"
        message = " ".join(error.format_message().split()).removesuffix(".")
        say(f"{where}: {message}{'' if message.endswith('?') else '.'} See: {where} --help")
        return 2
    except TorchsliceError as error:
        complain(error)
        return 2
    return code if isinstance(code, int) else 0
