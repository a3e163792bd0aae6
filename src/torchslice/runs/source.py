"""Whatever a command can start from: a run, a saved network, or any network with a file of weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .. import data
from ..artefact import load
from ..data import Task
from ..errors import TorchsliceError
from ..find.gates import GatedModel
from ..find.semantic import ReachTheta, class_slices
from ..graph.find import find_neurons
from ..graph.neurons import Neurons
from ..models import is_trained, load_weights
from ..rankings import Ranking
from ..slices import Slice
from ..submodel import without_gates
from ..training.placement import choose_device
from .recipe import check_name, is_own, make_model, prepared
from .run import Run
from .slicefile import SliceFile, digest_of_model


@dataclass(frozen=True)
class Source:
    """A trained network and the task of its classes.

    Attributes:
        name: what the user called it.
        network: the neurons of the network, or a network with gates.
        task: samples of its classes, in its order, prepared as it was trained.
        given: all samples of the data set that was named, which may have further classes.
        data: the words that name that data set on the command line, with its options.
        own: whether the network has classes of the user's own.
        slice_file: class slices that were found before, if a file of them was named.
        run: the run, if it is one.
        extension: of a network that was extended and saved, else None.
        metrics: figures that were saved with it.
    """

    name: str
    network: Neurons | GatedModel
    task: Task
    given: Task
    data: Sequence[str]
    own: bool
    slice_file: SliceFile | None = None
    run: Run | None = None
    extension: dict[str, Any] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The network as it was trained."""
        return self.network.model if isinstance(self.network, Neurons) else self.network

    def neurons(self, *, gates: str = "fold") -> Neurons:
        """Return the neurons of the network without its gates, if it has any."""
        return without_gates(self.network, self.task, gates=gates)

    def slices(self, *, seed: int = 0) -> Mapping[str, Slice]:
        """Return its class slices: from a file, those of the run, else found now, by contribution."""
        if self.slice_file is not None:
            again = f"find them anew: torchslice slice {self.name} ..."
            return self.slice_file.read(Slice, digest_of_model(self.model), again)
        if self.run is not None:
            return self.run.slices()
        return class_slices(self.neurons(), self.task, strategy=ReachTheta(), seed=seed)

    def critical(self, *, seed: int = 0) -> Slice:
        """Return the neurons that all its classes together need, by the same slices."""
        if self.slice_file is not None:
            again = f"find them anew: torchslice slice {self.name} ..."
            return self.slice_file.critical(digest_of_model(self.model), again)
        if self.run is not None:
            return self.run.critical()
        return class_slices(self.neurons(), self.task, strategy=ReachTheta(), seed=seed).critical

    def rankings(self) -> dict[str, Ranking] | None:
        """Return the class rankings of sub-task training; None for everything that was trained in another way."""
        return self.run.rankings() if self.run is not None and self.run.by == "training" else None


@dataclass(frozen=True)
class Opening:
    """How a source and data sets are opened.

    Attributes:
        weights: Of a MODEL: file with its state_dict, .safetensors or .pt.
        slices: File of class slices, made by torchslice slice --out (default: those of the run).
        model_argument: Argument of the MODEL, NAME=VALUE, such as width=0.5; repeatable.
        data_option: Option of the data, NAME=VALUE, such as image_size=64; repeatable.
        data_dir: Folder with the files of named data sets (default: $TORCHSLICE_DATA).
        allow_import: Permit a saved network whose classes are in modules of your own.
    """

    weights: Path | None = None
    slices: Path | None = None
    model_argument: list[str] | None = None
    data_option: list[str] | None = None
    data_dir: Path | None = None
    allow_import: bool = False

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Arguments of the model."""
        return pairs(self.model_argument, taken=("spec",))

    @property
    def data_options(self) -> dict[str, Any]:
        """Options of the data."""
        return pairs(self.data_option, taken=("name", "data_dir", "seed"))

    def load(self, name: str, *, seed: int) -> Task:
        """Load a data set."""
        return data.load(name, self.data_dir, seed=seed, **self.data_options)

    def words(self, name: str) -> list[str]:
        """Return the words that name a data set on the command line."""
        return data_words(name, self.data_options, self.data_dir)

    def again(self, source: Source) -> list[str]:
        """Return the words that open a source once more on the command line."""
        if source.run is not None:
            return data_words(source.name, {}, self.data_dir)
        words = [source.name, *source.data]
        words += [] if self.weights is None else ["--weights", str(self.weights)]
        words += [word for text in self.model_argument or () for word in ("--model-argument", text)]
        words += ["--allow-import"] if self.allow_import else []
        return words

    def open(self, name: str, data_name: str | None, *, seed: int, device: str, new: str | None = None) -> Source:
        """Open a run (a folder), a saved network (a file) or a network by name with its weights.

        Args:
            data_name: the data set; needed but for a run, which knows its own.
            new: a further data set, for which the options of the data are too.
        """
        path, place, arguments = Path(name), choose_device(device), self.model_arguments
        slice_file = None if self.slices is None else SliceFile(self.slices)
        for file in (self.weights, self.slices):
            if file is not None and not file.is_file():
                raise TorchsliceError(f"there is no file {file}.")
        if path.exists() and (self.weights is not None or arguments):
            raise TorchsliceError(f"{name} has its own weights; weights= and model_argument= are for a MODEL by name.")
        if path.is_dir():
            run = Run.open(path)
            if data_name is not None or (new is None and self.data_option):
                raise TorchsliceError(f"{name} is a run, which knows its data: DATA and data_option= play no part.")
            run.check_finished()
            task, recipe = run.load_task(self.data_dir), run.recipe
            words = data_words(recipe.data, recipe.data_options, self.data_dir or run.data_dir)
            network = run.network(task, device=device)
            return Source(name, network, task, task, words, is_own(recipe.model), slice_file, run)
        if not path.is_file():
            if ":" not in name and (path.suffix or len(path.parts) > 1):
                raise TorchsliceError(f"there is no file or folder {name}; name a run, a saved network, or a MODEL.")
            if data_name is not None:
                check_name(name)
        if data_name is None:
            raise TorchsliceError(f"{name} is no folder of a run, which knows its data; name DATA too: {name} DATA.")
        if path.is_file():
            saved, given = load(path, allow_import=self.allow_import), self.load(data_name, seed=seed)
            task, model, own = given.like(saved.preprocessing), saved.model, self.allow_import
            if saved.classes is not None:
                task = task.restrict(saved.classes)
            about: dict[str, Any] = {"extension": saved.extension, "metrics": saved.metrics or {}}
        else:
            own, about = is_own(name), {}
            untrained = TorchsliceError(f"{name} comes untrained; name the file of its weights: weights=FILE.")
            if self.weights is None and not own and not name.startswith("hf:"):
                raise untrained
            given = task = prepared(name, self.load(data_name, seed=seed))
            if self.weights is None and not own and not is_trained(name, len(task.classes)):
                raise untrained
            model = make_model(name, given, arguments, seed=seed)
            if self.weights is not None:
                load_weights(model, self.weights)
        network = find_neurons(model.to(place).eval(), task.example, classes=task.classes)
        return Source(name, network, task, given, self.words(data_name), own, slice_file, **about)


def pairs(texts: Sequence[str] | None, taken: Sequence[str] = ()) -> dict[str, Any]:
    """Read NAME=VALUE texts; values are JSON or True, False or None where they can be, else text.

    Names that are `taken` are refused.

    >>> pairs(["width=0.5", "mode=fast", "flip=False"])
    {'width': 0.5, 'mode': 'fast', 'flip': False}
    """
    found: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise TorchsliceError(f"{text!r} is not of the form NAME=VALUE, such as width=0.5.")
        if name in taken:
            raise TorchsliceError(f"{name!r} cannot be set in this way; leave it out.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return found


def data_words(data: str, options: Mapping[str, Any], data_dir: str | Path | None) -> list[str]:
    """Return the words that name a data set on the command line.

    >>> data_words("cifar10", {"workers": 2}, "data")
    ['cifar10', '--data-option', 'workers=2', '--data-dir', 'data']
    """
    plain = {name: text for name, text in options.items() if pairs([f"{name}={text}"]) == {name: text}}
    texts = [f"{name}={plain.get(name, json.dumps(value))}" for name, value in options.items()]
    words = [data, *(word for text in texts for word in ("--data-option", text))]
    return words if data_dir is None else [*words, "--data-dir", str(data_dir)]
