"""A run: a folder that holds how a network was trained, its weights, and the class slices found in it, as plain data.

    run.json      what was trained on which data, and how
    training/     checkpoint.safetensors and metrics.jsonl, written after every epoch
    subtasks.json the class slices that modular training was given after its first part
    subtasks/     checkpoint and metrics of its second part
    slices.json   class slices, how they were found, and what else was found with them

Opening a run builds the network that run.json names, so open only your own or those you trust.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import data as data_sets
from . import models
from .data import Data
from .errors import TorchsliceError
from .files import atomic_write
from .modular import GatedModel, Report, SubTasks, attach_gates, class_slices, objective, report
from .semantic import Rule, SemanticSlices, contributions, slice_model, slices_from
from .slices import Slice
from .submodel import without_gates
from .training import Objective, choose_placement, cross_entropy, fit
from .training.checkpoint import FILE as CHECKPOINT

FORMAT_VERSION = 1
TRAINED = "subtasks.json"
METHODS = ("modular", "mwt", "standard")


@dataclass(frozen=True)
class Recipe:
    """All that decides what a training run computes.

    The built-in networks get the number of channels and classes of the data.

    Attributes:
        method: "modular" trains as "standard" does for the first `standard_epochs` (by default half of all), then
            chooses the class slices, and trains sub-tasks on them (`modular.SubTasks`) to the end; "mwt" trains with
            gates, as published (arXiv 2306.09376).
        train_limit: number of training images to use, None for all.
        retention, taper: modular; share and taper of the slices, see `semantic.Rule`.
        cohesion_weight, coupling_weight: mwt; see `modular.objective`.
    """

    model: str
    data: str
    method: str = "modular"
    model_arguments: dict[str, Any] = field(default_factory=dict)
    data_options: dict[str, Any] = field(default_factory=dict)
    train_limit: int | None = None
    standard_epochs: int | None = None
    retention: float = 0.15
    taper: float = 0.1
    cohesion_weight: float = 0.5
    coupling_weight: float = 1.5
    epochs: int = 30
    learning_rate: float = 0.05
    batch_size: int = 128
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise TorchsliceError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}.")
        if self.method == "modular" and not 1 <= self.first_epochs < self.epochs:
            raise TorchsliceError(
                "modular training has at least 1 standard epoch and at least 1 after it; "
                f"got standard_epochs {self.first_epochs} of {self.epochs} epochs."
            )
        if self.method == "modular":
            self.rule  # noqa: B018 - says what is wrong with it

    @property
    def rule(self) -> Rule:
        """How modular training chooses the class slices."""
        return Rule("taylor", "budget", share=self.retention, taper=self.taper)

    @property
    def first_epochs(self) -> int:
        """Number of epochs before sub-tasks are trained, all where they never are."""
        if self.method != "modular":
            return self.epochs
        return max(1, self.epochs // 2) if self.standard_epochs is None else self.standard_epochs

    def load_data(self, data_dir: str | Path | None = None) -> Data:
        """Load the data; `data_dir` is where the files of the named data sets are."""
        data = data_sets.load(self.data, data_dir, seed=self.seed, **self.data_options)
        return data if self.train_limit is None else data.limit(train=self.train_limit, seed=self.seed)

    def network(self, data: Data) -> nn.Module:
        """Build the untrained network, with gates if the method is mwt; the same one every time."""
        arguments = fitting(self.model, data.train.images.shape[1]) | self.model_arguments
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = models.create(self.model, **{"num_classes": len(data.classes), **arguments})
        return attach_gates(model, data.example, seed=self.seed) if self.method == "mwt" else model


def fitting(model: str, channels: int) -> dict[str, Any]:
    """Return the arguments that make a built-in network take images of so many channels."""
    return {"channels": channels} if model in models.names() else {}


def absolute(data: str) -> str:
    """Return the name of a data set with the path of a folder made absolute, so that it holds from everywhere."""
    kind, _, path = data.partition(":")
    return f"folder:{Path(path).expanduser().resolve()}" if kind == "folder" else data


@dataclass(frozen=True)
class Run:
    """A run on disk. `start` makes or continues one, `open` finds one."""

    folder: Path
    recipe: Recipe
    data_dir: str | None
    fingerprint: str

    # -- begin ------------------------------------------------------------------------------------------------------
    @classmethod
    def start(cls, folder: str | Path, recipe: Recipe, data: Data, *, data_dir: str | Path | None = None) -> Run:
        """Make a run in a new or empty folder, or return the one that is there if its recipe and data are the same."""
        folder = Path(folder)
        wanted = {"recipe": json.loads(json.dumps(asdict(recipe))), "fingerprint": data.fingerprint}
        if (folder / "run.json").exists():
            run = cls.open(folder)
            found = {"recipe": asdict(run.recipe), "fingerprint": run.fingerprint}
            if changed := _differences(found, wanted):
                raise TorchsliceError(
                    f"{folder} holds another run: {'; '.join(changed)}. "
                    "Repeat its settings to go on with it, or choose another folder."
                )
            return run
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise TorchsliceError(f"{folder} exists and is no run of torchslice; choose a new or empty folder.")
        where = None if data_dir is None else str(Path(data_dir).expanduser().resolve())
        content = {
            "format": "torchslice run",
            "format_version": FORMAT_VERSION,
            **wanted,
            "data_dir": where,
            "classes": list(data.classes),
            "preprocessing": data.preprocessing,
            "versions": {
                "torchslice": version("torchslice"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        atomic_write(folder / "run.json", json.dumps(content, indent=1))
        return cls(folder, recipe, where, data.fingerprint)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Read run.json; a folder without one, a foreign and a damaged one are errors that say what to do."""
        folder = Path(folder)
        if not (folder / "run.json").is_file():
            raise TorchsliceError(
                f"{folder} holds no run; make one with: torchslice train MODEL DATA --method modular --out {folder}"
            )
        content = _read(folder / "run.json", "format_version", "recipe", "fingerprint")
        recipe = content["recipe"]
        known = {entry.name for entry in fields(Recipe)}
        if content.get("format") != "torchslice run" or not isinstance(recipe, dict) or set(recipe) != known:
            raise TorchsliceError(f"{folder / 'run.json'} is no run of this torchslice; train anew in another folder.")
        return cls(folder, Recipe(**recipe), content.get("data_dir"), content["fingerprint"])

    def load_data(self, data_dir: str | Path | None = None) -> Data:
        """Load the data the run was made for, from where it was or from `data_dir`; other data are an error."""
        data = self.recipe.load_data(data_dir or self.data_dir)
        if data.fingerprint != self.fingerprint:
            raise TorchsliceError(
                f"{self.recipe.data!r} holds other images now than when {self.folder} was trained; name the folder "
                "with the same data: --data-dir."
            )
        return data

    # -- training ---------------------------------------------------------------------------------------------------
    def train(self, data: Data, *, device: str = "auto", progress: bool = True) -> list[dict[str, Any]]:
        """Train to the last epoch, from where it stopped, and return one row per epoch, as `fit` does."""
        recipe, first = self.recipe, self.recipe.first_epochs
        settings: dict[str, Any] = {
            "learning_rate": recipe.learning_rate,
            "batch_size": recipe.batch_size,
            "seed": recipe.seed,
            "device": device,
            "precision": recipe.precision,
            "progress": progress,
        }
        try:
            gates = objective(cohesion_weight=recipe.cohesion_weight, coupling_weight=recipe.coupling_weight)
            loss: Objective = gates if recipe.method == "mwt" else cross_entropy
            network = recipe.network(data)
            rows = fit(network, data, objective=loss, epochs=first, folder=self.folder / "training", **settings)
            if recipe.method != "modular":
                return rows
            slices = self._trained_slices(network, data, device=device, progress=progress)
            sub_tasks = SubTasks(network, slices, data.example.to(next(network.parameters()).device))
            settings |= {"classes_per_batch": sub_tasks.sizes, "epochs": recipe.epochs - first}
            more = fit(network, data, objective=sub_tasks, folder=self.folder / "subtasks", **settings)
            return rows + [{**row, "epoch": row["epoch"] + first} for row in more]
        except TorchsliceError:
            if not self._checkpoints[0].exists():  # nothing to go on with, so the folder is free again
                (self.folder / "run.json").unlink()
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
            raise

    @property
    def epochs_done(self) -> int:
        """Number of finished epochs."""
        return sum(len(_checkpoint(path, weights=False)[0]) for path in self._checkpoints)

    def network(self, data: Data, *, device: str = "auto") -> nn.Module:
        """Return the trained network, with its gates if it has any, in eval mode; an unfinished run is an error."""
        self._check_finished()
        network = self.recipe.network(data)
        path = self._checkpoints[-1]
        try:
            network.load_state_dict(_checkpoint(path)[1])
        except RuntimeError as error:
            raise TorchsliceError(f"{path} does not belong to the network of run.json; train anew.") from error
        return network.to(choose_placement(device).device).eval()

    def _check_finished(self) -> None:
        if (done := self.epochs_done) < self.recipe.epochs:
            raise TorchsliceError(
                f"{self.folder} is not trained to its end: {done} of {self.recipe.epochs} epochs. "
                "Go on with the command that began it: torchslice train ..."
            )

    def gated(self, data: Data, *, device: str = "auto") -> GatedModel:
        """Return the trained network of a modular run; a standard one has no gates, which is an error."""
        if self.recipe.method != "mwt":
            raise TorchsliceError(
                f"{self.folder} was trained with --method {self.recipe.method}, so it has no gates to find slices by; "
                f"find them with: torchslice slice {self.folder} --by {self.by}, or train with --method mwt."
            )
        network = self.network(data, device=device)
        assert isinstance(network, GatedModel)
        return network

    @property
    def by(self) -> str:
        """What finds the slices of such a run first of all."""
        return {"modular": "training", "mwt": "gates", "standard": "contribution"}[self.recipe.method]

    @property
    def _checkpoints(self) -> list[Path]:
        """Where the states of training are, one file per part."""
        parts = ("training", "subtasks") if self.recipe.method == "modular" else ("training",)
        return [self.folder / part / CHECKPOINT for part in parts]

    # -- slices -----------------------------------------------------------------------------------------------------
    def _trained_slices(self, network: nn.Module, data: Data, **running: Any) -> dict[str, Slice]:
        """Return the class slices that modular training goes on with, chosen when its first part is done."""
        path = self.folder / TRAINED
        if not path.is_file():
            rule = self.recipe.rule
            scores = contributions(network, data, metric=rule.metric, seed=self.recipe.seed, **running)
            found = slices_from(scores, rule)
            content = {"format_version": FORMAT_VERSION, "by": "training", **found.to_plain()}
            atomic_write(path, json.dumps({**content, "weights_sha256": _digest(self._checkpoints[0])}))
        return self._read_slices(path, "train anew")

    def find_slices(self, data: Data, *, threshold: float = 0.9, **running: Any) -> Report:
        """Find the class slices by the gates, keep them in slices.json, and return what they are worth."""
        gated = self.gated(data, device=running.get("device", "auto"))
        slices = class_slices(gated, data, frequency_threshold=threshold, **running)
        measured = report(gated, slices, data, **running)
        classes = {name: part.to_plain() for name, part in slices.items()}
        self._keep({"by": "gates", "threshold": threshold, "report": measured.to_plain(), "classes": classes})
        return measured

    def find_semantic_slices(
        self,
        data: Data,
        *,
        metric: str = "taylor",
        samples_per_class: int = 256,
        seed: int = 0,
        gates: str = "fold",
        device: str = "auto",
        progress: bool = True,
        **rule: Any,
    ) -> SemanticSlices:
        """Find slices by contribution, keep them in slices.json, and return them.

        A network with gates goes without them, see `without_gates`. `rule` is slicer, criterion, theta, share and
        positions, as in `semantic.slice_model`.
        """
        Rule(metric, **rule)  # says what is wrong with it before long work
        running: dict[str, Any] = {"device": device, "progress": progress}
        network = without_gates(self.network(data, device=device), data, gates=gates, **running)
        sampling: dict[str, Any] = {"samples_per_class": samples_per_class, "seed": seed}
        scores = contributions(network, data, metric=metric, **sampling, **running)
        found = slice_model(network, data, scores, **rule, **running)
        used = gates if self.recipe.method == "mwt" else None
        self._keep({"by": "contribution", "gates": used, **sampling, **found.to_plain()})
        return found

    def _keep(self, found: dict[str, Any]) -> None:
        content = {"format_version": FORMAT_VERSION, "weights_sha256": _digest(self._checkpoints[-1]), **found}
        atomic_write(self.folder / "slices.json", json.dumps(content))

    def find_trained_slices(self) -> SemanticSlices:
        """Keep the class slices of modular training in slices.json, and return them."""
        if self.recipe.method != "modular":
            raise TorchsliceError(
                f"{self.folder} was trained with --method {self.recipe.method}, without slices; "
                f"find them with: torchslice slice {self.folder} --by {self.by}, or train with --method modular."
            )
        self._check_finished()
        found = SemanticSlices.from_plain(_read(self.folder / TRAINED, "format_version", "classes"))
        self._keep({"by": "training", **found.to_plain()})
        return found

    def slices(self) -> dict[str, Slice]:
        """Return the class slices that were found last; of a modular run, first of all those it was trained with."""
        again = f"torchslice slice {self.folder} --by {self.by}"
        path = self.folder / "slices.json"
        if path.is_file():
            return self._read_slices(path, f"find the slices anew: {again}")
        if self.recipe.method == "modular" and self.epochs_done:
            return self._read_slices(self.folder / TRAINED, "train anew")
        raise TorchsliceError(f"{self.folder} has no slices yet; find them with: {again}")

    def _read_slices(self, path: Path, remedy: str) -> dict[str, Slice]:
        content = _read(path, "format_version", "classes", "weights_sha256")
        if content["weights_sha256"] != _digest(self._checkpoints[0 if path.name == TRAINED else -1]):
            raise TorchsliceError(f"{path} belongs to other weights; {remedy}")
        return {name: Slice.from_plain(plain) for name, plain in content["classes"].items()}


def _checkpoint(path: Path, *, weights: bool = True) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return the rows of the finished epochs and the weights after the last one."""
    if not path.exists():
        return [], {}
    try:
        with safe_open(path, "pt") as file:
            history = json.loads(file.metadata()["training"])["history"]
            names = [name for name in file.keys() if weights and name.startswith("model.")]  # noqa: SIM118
            return history, {name.removeprefix("model."): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise TorchsliceError(f"{path} is damaged ({error}); delete {path.parents[1]} and train anew.") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object in a file, which must have the given keys and a version that is known here."""
    try:
        content = json.loads(path.read_text())
        missing = [key for key in keys if key not in content]
        newer = int(content.get("format_version", 0)) > FORMAT_VERSION
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TorchsliceError(f"{path} is damaged ({error}); delete it and make it again.") from error
    if missing:
        raise TorchsliceError(f"{path} is not of torchslice, or damaged: it has no {missing[0]!r}.")
    if newer:
        raise TorchsliceError(f"{path} was written by a newer torchslice; install that one to read it.")
    return content


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return in words what differs between two runs."""
    changed = [
        f"{name} was {found['recipe'].get(name)!r}, now {value!r}"
        for name, value in wanted["recipe"].items()
        if found["recipe"].get(name) != value
    ]
    same = found["fingerprint"] == wanted["fingerprint"]
    return changed or ([] if same else ["its data held other images"])
