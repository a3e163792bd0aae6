"""A run: a folder that holds how a network was trained, its weights, and the class slices found in it, as plain data.

    run.json      what was trained on which data, and how
    training/     checkpoint.safetensors and metrics.jsonl, written after every epoch
    rankings.json the class rankings that sub-task training was given after its first part
    subtasks/     checkpoint and metrics of its second part
    slices.json   class slices, how they were found, and what else was found with them

Opening a run builds the network that run.json names, so open only your own or those you trust.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Task
from ..errors import TorchsliceError
from ..files import atomic_write, digest_of, locked
from ..find import gates, subtasks
from ..find.gates import GatedModel
from ..graph.find import find_neurons
from ..graph.neurons import Neurons
from ..rankings import Ranking, widths
from ..slices import Slice, union
from ..training import Objective, Training, fit
from ..training.checkpoint import FILE as CHECKPOINT
from ..training.checkpoint import MODEL, read_checkpoint
from ..training.outcome import Row
from ..training.placement import choose_device
from ..training.ranks import is_first
from .recipe import Recipe
from .slicefile import FORMAT_VERSION, SliceFile, read_json

KIND = "torchslice run"
SHARE = 0.3  # of the network, that a class gets after sub-task training where nothing else is said
#: How the slices of a run are found first of all, by its method.
FIRST_BY = {"subtasks": "training", "gates": "gates", "standard": "contribution"}


@dataclass(frozen=True)
class Run:
    """A run on disk. `start` makes or continues one, `open` finds one."""

    folder: Path
    recipe: Recipe
    data_dir: str | None
    fingerprint: str

    # -- begin ----------------------------------------------------------------------------------------------------
    @classmethod
    def start(cls, folder: str | Path, recipe: Recipe, task: Task, *, data_dir: str | Path | None = None) -> Run:
        """Make a run in a new or empty folder, or return the one that is there if its recipe and data are the same.

        A recipe with more epochs continues a run that is finished.
        """
        folder = Path(folder)
        with _writing(folder):
            recipe = settled(folder, recipe)
            if (folder / "run.json").exists():
                before = cls.open(folder)
                if task.fingerprint != before.fingerprint:
                    raise TorchsliceError(
                        f"{folder} holds a run on other samples of {recipe.data}; choose another folder."
                    )
                run = replace(before, recipe=recipe)
                if recipe != before.recipe:
                    run._write(task)
                return run
            where = None if data_dir is None else str(Path(data_dir).expanduser().resolve())
            run = cls(folder, recipe, where, task.fingerprint)
            run._write(task)
            return run

    def _write(self, task: Task) -> None:
        if not is_first():
            return
        versions = {"torchslice": version("torchslice"), "torch": torch.__version__}
        content = {
            "format": KIND,
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe.to_plain(),
            "fingerprint": self.fingerprint,
            "data_dir": self.data_dir,
            "classes": list(task.classes),
            "preprocessing": task.preprocessing,
            "versions": {**versions, "python": platform.python_version()},
        }
        atomic_write(self.folder / "run.json", json.dumps(content, indent=1))

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Read run.json; a folder without one, a foreign and a damaged one are errors that say what to do."""
        folder = Path(folder)
        if not (folder / "run.json").is_file():
            raise TorchsliceError(f"{folder} holds no run; make one with: torchslice train MODEL DATA --out {folder}")
        content = read_json(folder / "run.json", "format", "recipe", "fingerprint")
        where = content.get("data_dir")
        if content["format"] != KIND or not isinstance(where, str | None):
            raise TorchsliceError(f"{folder / 'run.json'} is no run of this torchslice; train anew in another folder.")
        return cls(folder, Recipe.from_plain(content["recipe"]), where, content["fingerprint"])

    def load_task(self, data_dir: str | Path | None = None) -> Task:
        """Load the task the run was made for, from where it was or from `data_dir`; other data are an error."""
        task = self.recipe.load_task(data_dir or self.data_dir)
        if task.fingerprint != self.fingerprint:
            raise TorchsliceError(
                f"{self.recipe.data!r} holds other samples now than when {self.folder} was trained; name the folder "
                "with the same data: data_dir=."
            )
        return task

    # -- training -------------------------------------------------------------------------------------------------
    def train(self, task: Task, *, device: str = "auto", progress: bool = True) -> list[Row]:
        """Train to the last epoch, from where it stopped, and return one row per epoch, as `fit` does."""
        with _writing(self.folder):
            return self._train(task, replace(self.recipe.training, device=device, progress=progress))

    def _train(self, task: Task, training: Training) -> list[Row]:
        first = self.recipe.first_epochs
        standard = replace(training, epochs=first)
        try:
            network, objective = self._untrained(task)
            rows = fit(network, task, standard, objective=objective, folder=self.folder / "training")
            if self.recipe.method.method != "subtasks":
                return rows
            neurons = find_neurons(network, task.example, classes=task.classes)
            rankings = self._ranked(neurons, task, progress=training.progress)
            target = subtasks.objective(neurons, rankings, label_smoothing=training.label_smoothing)
            more = fit(
                network,
                task,
                replace(training, epochs=training.epochs - first),
                objective=target,
                folder=self.folder / "subtasks",
            )
            return rows + [{**row, "epoch": row["epoch"] + first} for row in more]
        except Exception:  # the user's own too, and too little memory
            if is_first() and not self._checkpoints[0].exists():  # nothing to go on with, so the folder is free again
                (self.folder / "run.json").unlink(missing_ok=True)
            raise

    def _untrained(self, task: Task) -> tuple[nn.Module, Objective | None]:
        """Return the network as training finds it, and what it minimises; None is the cross entropy."""
        model = self.recipe.make_model(task)
        if self.recipe.method.method != "gates":
            return model, None
        neurons = find_neurons(model, task.example, classes=task.classes)
        return gates.attach(neurons, seed=self.recipe.training.seed), self.recipe.method.objective

    @property
    def rows(self) -> list[Row]:
        """One row for every finished epoch, as `fit` returns them."""
        parts = [read_checkpoint(path, tensors=False)[0]["history"] for path in self._checkpoints if path.exists()]
        return [
            {**row, "epoch": row["epoch"] + n * self.recipe.first_epochs} for n, of in enumerate(parts) for row in of
        ]

    @property
    def epochs_done(self) -> int:
        """Number of finished epochs."""
        return len(self.rows)

    def network(self, task: Task, *, device: str = "auto") -> Neurons | GatedModel:
        """Return the neurons of the trained network, or the network with its gates, in eval mode.

        An unfinished run is an error.
        """
        self.check_finished()
        path, (model, _) = self._checkpoints[-1], self._untrained(task)
        saved = read_checkpoint(path)[1]
        weights = {name.removeprefix(MODEL): t for name, t in saved.items() if name.startswith(MODEL)}
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise TorchsliceError(f"{path} does not belong to the network of run.json; train anew.") from error
        model.to(choose_device(device)).eval()
        return model if isinstance(model, GatedModel) else find_neurons(model, task.example, classes=task.classes)

    def check_finished(self) -> None:
        """Raise for a run that is not trained to its end."""
        if (done := self.epochs_done) < self.recipe.training.epochs:
            raise TorchsliceError(
                f"{self.folder} is not trained to its end: {done} of {self.recipe.training.epochs} epochs. "
                "Go on with the command that began it: torchslice train ..."
            )

    @property
    def by(self) -> str:
        """What finds the slices of such a run first of all."""
        return FIRST_BY[self.recipe.method.method]

    @property
    def _checkpoints(self) -> list[Path]:
        """Where the states of training are, one file per part."""
        parts = ("training", "subtasks") if self.recipe.method.method == "subtasks" else ("training",)
        return [self.folder / part / CHECKPOINT for part in parts]

    # -- slices ---------------------------------------------------------------------------------------------------
    @property
    def _rankings(self) -> SliceFile:
        return SliceFile(self.folder / "rankings.json")

    @property
    def _found(self) -> SliceFile:
        return SliceFile(self.folder / "slices.json")

    def _ranked(self, neurons: Neurons, task: Task, *, progress: bool) -> dict[str, Ranking]:
        """Return the class rankings that sub-task training goes on with, found when its first part is done."""
        if self._rankings.path.is_file():
            return self._rankings.read(Ranking, _digest(self._checkpoints[0]), "train anew")
        found = subtasks.rank(neurons, task, seed=self.recipe.training.seed, progress=progress)
        if is_first():
            self._rankings.write(found, _digest(self._checkpoints[0]), {"by": "training"})
        return found

    def keep_slices(self, slices: Mapping[str, Slice], about: Mapping[str, Any]) -> None:
        """Keep the class slices that were found in the trained network; under torchrun, the first process does."""
        if is_first():
            with locked(self.folder, wait_seconds=60):
                self._found.write(slices, _digest(self._checkpoints[-1]), about)

    def rankings(self) -> dict[str, Ranking]:
        """Return the class rankings of sub-task training: sub-models of any classes and size are their prefixes."""
        if self.recipe.method.method != "subtasks":
            raise TorchsliceError(
                f"{self.folder} was trained with method {self.recipe.method.method!r}, without rankings; "
                f"find slices with: torchslice slice {self.folder} --by {self.by}"
            )
        self.check_finished()
        return self._rankings.read(Ranking, _digest(self._checkpoints[0]), "train anew")

    def slices(self) -> dict[str, Slice]:
        """Return the class slices that were found last; of sub-task training, first of all those of its rankings."""
        if self._found.path.is_file():
            return self._found.read(Slice, _digest(self._checkpoints[-1]), f"find the slices anew: {self._again}")
        if self.recipe.method.method == "subtasks" and self.epochs_done:
            return prefixes(self.rankings())
        raise TorchsliceError(f"{self.folder} has no slices yet; find them with: {self._again}")

    def critical(self) -> Slice:
        """Return the neurons that all classes together need, of the slices that were found last."""
        if self._found.path.is_file():
            return self._found.critical(_digest(self._checkpoints[-1]), f"find the slices anew: {self._again}")
        return union(self.slices().values())

    @property
    def _again(self) -> str:
        return f"torchslice slice {self.folder} --by {self.by}"


def prefixes(rankings: Mapping[str, Ranking], share: float = SHARE) -> dict[str, Slice]:
    """Return the slice of every class that has a share in (0, 1] of the network, see `rankings.widths`."""
    return {name: ranking.prefix(widths(ranking.layers, share)) for name, ranking in rankings.items()}


def settled(folder: str | Path, recipe: Recipe) -> Recipe:
    """Return the recipe of a run that starts in a folder, or goes on there; raise where it cannot.

    How many epochs of sub-task training are standard ones is settled for good when the run starts, so that more epochs
    go to its second part.
    """
    folder = Path(folder)
    if not (folder / "run.json").exists():
        # What a killed writer left begins with a dot; another process of torchrun may be writing run.json just now.
        if any(path.is_file() and not path.name.startswith((".", "run.json")) for path in (folder, *folder.rglob("*"))):
            raise TorchsliceError(f"{folder} exists and is no run of torchslice; choose a new or empty folder.")
        standard_epochs = recipe.first_epochs if recipe.method.method == "subtasks" else recipe.method.standard_epochs
        return replace(recipe, method=replace(recipe.method, standard_epochs=standard_epochs))
    run = Run.open(folder)
    before, now = _flat(run.recipe.to_plain()), _flat(json.loads(json.dumps(recipe.to_plain())))
    if now["method.standard_epochs"] is None and now["method.method"] == before["method.method"]:
        now["method.standard_epochs"] = before["method.standard_epochs"]
    changed = [name for name in now if before[name] != now[name]]
    if changed == ["training.epochs"] and run.epochs_done >= before["training.epochs"] < now["training.epochs"]:
        changed = []
    if changed:
        words = [f"{name.rpartition('.')[2]} was {before[name]!r}, now {now[name]!r}" for name in changed]
        hint = " A finished run can be continued with more epochs." if changed == ["training.epochs"] else ""
        raise TorchsliceError(
            f"{folder} holds another run: {'; '.join(words)}. "
            f"Repeat its settings to go on with it, or choose another folder.{hint}"
        )
    return replace(run.recipe, training=replace(run.recipe.training, epochs=recipe.training.epochs))


def _writing(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keep other writers out of a folder; of the processes of torchrun, the first one does that for all."""
    return locked(folder) if is_first() else contextlib.nullcontext()


def _digest(path: Path) -> str:
    """Return the SHA-256 over the weights in a checkpoint."""
    if not path.exists():
        raise TorchsliceError(f"{path} is missing; train to the end first: torchslice train ...")
    saved = read_checkpoint(path)[1]
    return digest_of({name.removeprefix(MODEL): of for name, of in saved.items() if name.startswith(MODEL)})


def _flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the entries of the parts of a recipe side by side, by dotted name."""
    found: dict[str, Any] = {}
    for name, value in plain.items():
        part = prefix == "" and name in ("method", "training")
        found |= _flat(value, f"{name}.") if part else {prefix + name: value}
    return found
