"""The command `python -m benchmarks`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from torchslice import TorchsliceError
from torchslice.registry import unknown

from .experiment import SCALES

NAMES = (
    "recipe",
    "reuse",
    "slicing",
    "semantic",
    "readings",
    "tied",
    "speed",
    "restructure",
    "readapt",
    "extend",
    "replace",
    "remove",
    "text",
    "vit",
    "upkeep",
    "conformance",
    "scale",
)
ATTACKS = ("fuzz", "kills", "threads", "ranks", "long")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are those of torchslice."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise TorchsliceError(f"{message}. See: {self.prog} --help")


def parser() -> Parser:
    """Return the options of the command."""
    made = Parser(prog="python -m benchmarks", description="Measure torchslice beside its baselines.")
    made.add_argument("name", metavar="NAME", nargs="?", help="which benchmark; without it they are listed")
    scales = "smoke: seconds, to see that it runs; cpu: two cores; paper: needs a GPU"
    made.add_argument("--scale", choices=SCALES, default="cpu", help=scales)
    made.add_argument("--data-dir", type=Path, help="folder with the files of the data sets")
    made.add_argument("--out", type=Path, default=Path("results"), help="folder for pages, results and finished parts")
    made.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    made.add_argument("--count", type=int, help="of attacks: how many files, kills, calls (1000) or processes (4)")
    made.add_argument("--page-only", action="store_true", help="make page and picture from the result in --out")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command on `arguments` (default: those of the process) and return its exit code."""
    everything = (*NAMES, *ATTACKS)
    try:
        options = vars(parser().parse_args(arguments))
        name, scale, count = options.pop("name"), options.pop("scale"), options.pop("count")
        if name not in (None, *everything):
            raise unknown("benchmark", name, everything)
        modules = {
            known: importlib.import_module(f".{known}", __package__) for known in everything if name in (None, known)
        }
        if name is None:
            for known, module in modules.items():
                print(f"{known:<12} {(module.__doc__ or '').partition(chr(10))[0]}")
            return 0
        if name in ATTACKS:
            if count is not None and count < 1:
                raise TorchsliceError(f"--count must be at least 1, got {count}.")
            counted = {} if count is None else {"count": count}
            text, wrong = modules[name].run(**counted, seed=options["seed"])
            print("\n".join([text, *wrong]))
            return 1 if wrong else 0
        modules[name].BENCHMARK(scale, **options)
    except TorchsliceError as error:
        print("benchmarks:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted; the same command goes on after the last finished part.", file=sys.stderr)
        return 130
    print((options["out"] / f"{name}-{scale}.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
