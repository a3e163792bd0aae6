"""What can be found and cut in the networks of timm, torchvision and transformers: one small member of every family.

Each network is looked at in a process of its own, which has a limited time of a processor: one that hangs costs a row.
Weights are random; what starts as a constant (biases, norms, scales) is randomised, and so are the statistics of norms.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import multiprocessing
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import torchslice as ts
from torchslice import TorchsliceError
from torchslice.errors import first_line
from torchslice.imports import import_optional, import_timm, import_torchvision
from torchslice.inputs import Inputs, call_model, logits_of, map_tensors

from .experiment import Benchmark, Part, Scale, finished_or_run
from .speed import STATUS, memory_mib
from .tables import Run, head, markdown

LIBRARIES = ("timm", "torchvision", "transformers")
ARCHITECTURES = ["albert", "bert", "distilbert", "electra", "gpt2", "llama", "modernbert", "qwen2", "roberta", "vit"]
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
SMALL |= {"num_labels": 10, "pad_token_id": 0}
PATIENCE = 20  # times its limit may pass by the clock, where other work runs beside
EXACT = 1e-5  # largest difference, as a share of the largest logit


# -- which networks -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Member:
    """A network of a library; `data` is the library, `model` the name in it."""

    data: str
    model: str
    family: str

    def load(self, data_dir: Any, seed: int) -> Any:
        """Return what stands for the data of other benchmarks."""
        return SimpleNamespace(fingerprint="random")


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark."""

    largest: int = 0  # parameters of a family's smallest member; above 0, all families up to this size take part
    seconds: int = 60  # of a processor that finding and cutting may take, and so may torch-pruning
    repeats: int = 3  # turns beside torch-pruning


def families(library: str, largest: int) -> dict[str, Any]:
    """Return the member with fewest parameters of every family (a module of the library), up to a size."""
    sizes: dict[str, dict[str, int]] = {}  # by family and name
    if library == "timm":
        timm = import_timm()
        for family in timm.list_modules():
            for name in timm.list_models(module=family, exclude_filters="test_*"):  # which are toys
                with torch.device("meta"):
                    sizes.setdefault(family, {})[name] = size(timm.create_model(name))
    elif library == "torchvision":
        models = import_torchvision().models
        for name in models.list_models(module=models):
            family = models.get_model_builder(name).__module__.rpartition(".")[2]
            sizes.setdefault(family, {})[name] = models.get_model_weights(name).DEFAULT.meta["num_params"]
    else:
        sizes = {name: {name: 0} for name in ARCHITECTURES}
    smallest = [(family, min(of, key=lambda name: of[name])) for family, of in sizes.items()]
    members = [Member(library, name, family) for family, name in smallest if sizes[family][name] <= largest]
    return {"members": [asdict(member) for member in members]}


def size(model: nn.Module) -> int:
    """Count the parameters of a network."""
    return sum(parameter.numel() for parameter in model.parameters())


def make(library: str, name: str) -> tuple[nn.Module, list[Inputs]]:
    """Return a network in eval mode, with nothing left constant, and two batches that it takes."""
    torch.manual_seed(0)
    batches: list[Inputs]
    if library == "transformers":
        import_torchvision()
        transformers = import_optional("transformers", extra="text")
        configuration = transformers.AutoConfig.for_model(name, **SMALL)
        images = name == "vit"
        kind = "AutoModelForImageClassification" if images else "AutoModelForSequenceClassification"
        model = getattr(transformers, kind).from_config(configuration)
        batches = [{"pixel_values": torch.randn(2, 3, 224, 224)} if images else text(kept) for kept in (9, 5)]
    else:
        model = ts.models.create(f"{library}:{name}", num_classes=1000)
        side = 299 if name == "inception_v3" else 224
        shape = vars(model)["pretrained_cfg"]["input_size"] if library == "timm" else (3, side, side)
        batches = [torch.randn(2, *shape) for _ in range(2)]
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if (isinstance(tensor, nn.Parameter) or "running_" in name) and bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(torch.empty_like(tensor).uniform_(-0.5, 0.5))
    return model.eval(), batches


def text(kept: int) -> dict[str, Tensor]:
    """Return a batch of two texts of 16 tokens, of which the second has padding behind its first tokens."""
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, kept:] = 0
    return {"input_ids": torch.randint(3, 1000, (2, 16)) * mask, "attention_mask": mask}


# -- what is measured ---------------------------------------------------------------------------------------------
@contextlib.contextmanager
def measured(row: dict[str, Any], what: str) -> Iterator[None]:
    """Add to a row the processor's seconds of a block, and its peak memory above what there was, in MiB."""
    with contextlib.suppress(OSError):
        STATUS.with_name("clear_refs").write_text("5")  # the peak starts anew
    before, _ = memory_mib(torch.device("cpu"))
    started = time.process_time()
    yield
    row[f"{what}_seconds"] = time.process_time() - started
    row[f"{what}_mib"] = memory_mib(torch.device("cpu"))[1] - before


@torch.no_grad()
def logits(model: nn.Module, batch: Inputs) -> Tensor:
    """Run a network on a batch."""
    return logits_of(call_model(model, batch))


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of logits as a share of the largest one."""
    return float((one - other).abs().max() / other.abs().max())


def ours(model: nn.Module, example: Inputs, unseen: Inputs) -> Iterator[dict[str, Any]]:
    """Find the neurons, cut a random half, and compare with the masked network; yield the row as it grows."""
    whole = logits(model, example)
    row: dict[str, Any] = {"outcome": "out of time", "parameters": size(model)}
    row["model_mib"] = sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
    yield row
    try:
        with measured(row, "find"):
            neurons = ts.find_neurons(model, example)
        layers = [model.get_submodule(name) for name in neurons.layers]
        row["sliceable"] = sum(p.numel() for layer in layers for p in layer.parameters(recurse=False)) / size(model)
        yield row
        half = neurons.random(0.5)
        with measured(row, "extract"):
            small = ts.extract(neurons, half)
    except TorchsliceError as error:
        yield row | {"outcome": "refused", "reason": str(error)}
        return
    except Exception as error:  # a crash is a result
        yield row | {"outcome": "crash", "reason": f"{type(error).__name__}: {first_line(error)}"}
        return
    expected = logits(ts.masked(neurons, half), unseen)
    row["difference"] = difference(logits(small, unseen), expected)
    row["effect"] = difference(expected, logits(model, unseen))
    row["outcome"] = "exact" if row["difference"] <= EXACT else in_float64(model, example, unseen, half)
    row["half"] = size(small) / size(model)
    assert torch.equal(logits(model, example), whole), "the model was changed"
    yield row


def in_float64(model: nn.Module, example: Inputs, unseen: Inputs, half: ts.Slice) -> str:
    """Say whether a difference is more than the rounding of float32, which some random networks amplify."""
    deep = copy.deepcopy(model).double()
    example, unseen = (
        map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, inputs)
        for inputs in (example, unseen)
    )
    neurons = ts.find_neurons(deep, example)
    away = difference(logits(ts.extract(neurons, half), unseen), logits(ts.masked(neurons, half), unseen))
    return "exact in float64" if away <= 1e-12 else "inexact"


def prune(model: nn.Module, example: Inputs) -> tuple[nn.Module, dict[str, Tensor]]:
    """Let torch-pruning remove a random half of all but the logits from a copy.

    Returns the copy, and which outputs of which layers went, bool [n].
    """
    tp = import_optional("torch_pruning", extra="dev")
    other = copy.deepcopy(model)
    names = {module: name for name, module in other.named_modules()}
    wide = logits(other, example).shape[1]
    last = [module for module in names if wide in (getattr(module, key, 0) for key in ("out_features", "out_channels"))]
    removed: dict[str, Tensor] = {}
    with warnings.catch_warnings(action="ignore"):
        pruner = tp.pruner.BasePruner(
            other, example, tp.importance.RandomImportance(), pruning_ratio=0.5, ignored_layers=last[-1:]
        )
        for group in pruner.step(interactive=True):
            places: dict[str, set[int]] = {}  # among the outputs that are left
            for dependency, rows in group:
                layer = dependency.target.module
                if layer in names and "out" in dependency.handler.__name__:
                    places.setdefault(names[layer], set()).update(rows)
                    width = pruner.DG.get_out_channels(layer)
                    removed.setdefault(names[layer], torch.zeros(width, dtype=torch.bool))
            group.prune()
            for name, gone in places.items():
                removed[name][(~removed[name]).nonzero().flatten()[sorted(gone)]] = True
    return other.eval(), removed


def theirs(model: nn.Module, example: Inputs, unseen: Inputs, repeats: int) -> Iterator[dict[str, Any]]:
    """Let torch-pruning cut a half, compare with the network whose removed outputs are zero, take turns with ours."""
    yield {"tp_outcome": "out of time"}
    zeroed = copy.deepcopy(model)
    try:
        small, removed = prune(model, example)
        with torch.no_grad():
            for name, gone in removed.items():
                for tensor in zeroed.get_submodule(name).parameters(recurse=False):
                    if len(gone) in tensor.shape:
                        tensor.index_fill_(tensor.shape.index(len(gone)), gone.nonzero().flatten(), 0)
        away = difference(logits(small, unseen), logits(zeroed, unseen))
    except Exception as error:  # a crash is a result
        yield {"tp_outcome": "fails", "tp_reason": f"{type(error).__name__}: {first_line(error)}"}
        return
    row: dict[str, Any] = {"tp_outcome": "exact" if away <= EXACT else "differs", "tp_difference": away}
    row["tp_half"] = size(small) / size(model)
    yield row

    def cut() -> None:
        neurons = ts.find_neurons(model, example)
        ts.extract(neurons, neurons.random(0.5))

    with contextlib.suppress(TorchsliceError):
        pairs = [(seconds(cut), seconds(partial(prune, model, example))) for _ in range(repeats)]
        row["tp_ratio"] = statistics.median(mine / other for mine, other in pairs)
        row["tp_seconds"] = statistics.median(other for _, other in pairs)
        yield row


def seconds(run: Callable[[], Any]) -> float:
    """Return the processor's seconds of a call, which does not pay for what others left to be collected."""
    gc.collect()
    started = time.process_time()
    run()
    return time.process_time() - started


def report(rows: Connection, library: str, name: str, side: str, limit: int, repeats: int) -> None:
    """Send the rows of one side for one network, within so many seconds of the processor from its first run on."""
    import resource

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, (example, unseen) = make(library, name)
    logits(model, example)  # what is prepared once is no part of the figures
    end = math.ceil(time.process_time()) + limit
    resource.setrlimit(resource.RLIMIT_CPU, (end, end + 5))
    for row in ours(model, example, unseen) if side == "ours" else theirs(model, example, unseen, repeats):
        rows.send(row)


@dataclass(frozen=True)
class Measuring(Part):
    """One network, beside torch-pruning."""

    def result(self) -> dict[str, Any]:
        return {"family": self.network.family} | self.side("ours") | self.side("theirs")

    def side(self, side: str) -> dict[str, Any]:
        """Return the last row that a process of its own sends before its time is over."""
        import_timm()  # once for all
        fork, settings = multiprocessing.get_context("fork"), self.settings
        receiver, sender = fork.Pipe(duplex=False)
        arguments = (sender, self.network.data, self.network.model, side, settings.seconds, settings.repeats)
        process = fork.Process(target=report, args=arguments)
        process.start()
        sender.close()
        rows: list[dict[str, Any]] = []
        with contextlib.suppress(EOFError):  # the process has ended
            while receiver.poll(PATIENCE * settings.seconds):
                rows.append(receiver.recv())
        process.kill()
        process.join()
        if not rows:
            raise TorchsliceError(f"{self.network.model} cannot be made or run; see above.")
        self.note(f"{side}: " + ", ".join(f"{key} {value}" for key, value in rows[-1].items()))
        return rows[-1]


class Conformance(Benchmark):
    """A benchmark whose networks are looked up first, and kept beside its parts."""

    def runs(self, settings: Any, path: Path, **where: Any) -> list[dict[str, Any]]:
        if not settings.largest:
            return super().runs(settings, path, **where)
        members = []
        for library in LIBRARIES:
            place, about = path.with_name(f"{path.name}-{library}.json"), {"largest": settings.largest}
            found = finished_or_run(place, about, partial(families, library, settings.largest))
            members += [Member(**row) for row in found["members"]]
        return super().runs(replace(settings, networks=(*members, *settings.networks)), path, **where)


# -- the page -----------------------------------------------------------------------------------------------------
def write_page(result: dict[str, Any], path: Path) -> str:
    """Write the answer, a table for every library, and why networks were refused."""
    runs = result["runs"]
    blocks = ["# What can be found and cut", answer(runs), head(result), HOW]
    for library in LIBRARIES:
        if rows := [cells(run) for run in runs if run["data"] == library]:
            blocks += [f"## {library}", markdown(HEADINGS, rows)]
    reasons = [f"- {run['model']}: {run['reason']}" for run in runs if run.get("reason")]
    return "\n\n".join(blocks + (["## Reasons", "\n".join(reasons)] if reasons else [])) + "\n"


def answer(runs: list[Run]) -> str:
    """Say in a paragraph what came out."""
    count, tp_count = (Counter(run[key] for run in runs) for key in ("outcome", "tp_outcome"))
    exact = [run for run in runs if run["outcome"] == "exact"]
    worst = max((run["difference"] for run in exact), default=0)
    shares = [run["sliceable"] for run in exact]
    ratios = [run["tp_ratio"] for run in runs if run.get("tp_ratio")]
    return (
        f"Of {len(runs)} networks {len(exact)} are cut exactly (worst {worst:.0e} of the largest logit), "
        f"{count['exact in float64']} in float64 only (rounding), {count['refused']} are refused with a reason, "
        f"{count['out of time']} need more than a minute, {count['inexact']} differ and {count['crash']} crash. "
        "At least nine tenths of the parameters lie in layers "
        f"that can be cut in {sum(share >= 0.9 for share in shares)} of them, less than half in "
        f"{sum(share < 0.5 for share in shares)}. With torch-pruning {tp_count['exact']} are exact, "
        f"{tp_count['differs']} differ, {tp_count['fails']} fail and {tp_count['out of time']} need more than a "
        f"minute. Of the {len(ratios)} that both can cut, ours is no slower on {sum(ratio <= 1 for ratio in ratios)}."
    )


def cells(run: Run) -> list[str]:
    """Return a run as the cells of its row."""

    def show(key: str, form: str, factor: float = 1) -> str:
        return "-" if run.get(key) is None else form.format(factor * run[key])

    name = run["model"] if run["family"] in run["model"] else f"{run['model']} ({run['family']})"
    outcome = show("difference", "exact, {:.0e}") if run["outcome"] == "exact" else run["outcome"]
    both = [f"{show(f'find_{key}', form)} / {show(f'extract_{key}', form)}" for key, form in UNITS]
    beside = [run["tp_outcome"], show("tp_half", "{:.0f}", 100), show("tp_ratio", "{:.2f}")]
    size_ = show("parameters", "{:.1f}", 1e-6)
    return [name, size_, outcome, show("sliceable", "{:.0f}", 100), show("half", "{:.0f}", 100), *both, *beside]


ROOT = Path(__file__).resolve().parents[1]
UNITS = (("seconds", "{:.2f}"), ("mib", "{:.0f}"))
HEADINGS = ["network", "million parameters", "random half", "% sliceable", "% left", "seconds", "MiB"]
HEADINGS += ["torch-pruning", "% left", "ours / its seconds"]
HOW = (
    "The smallest member of every family. *Exact*: on a batch that `extract` did not see, the cut network gives the "
    f"logits of the masked one, up to {EXACT:.0e} of the largest (float32, statistics and affine parameters "
    "randomised); the largest difference stands behind it. *Sliceable*: parameters in layers whose neurons can be cut. "
    "*Left*: parameters of the network with a random half of its neurons. *Seconds* of one thread, and *MiB* of memory "
    "at the peak above the model, for find / extract, a batch of two. *torch-pruning* removes a random half, and is "
    "exact where its network gives the logits of the model with the removed outputs at zero. The last column is the "
    "median ratio of turns in one process."
)
FEW = [
    ("torchvision", "squeezenet1_1", "squeezenet"),
    ("timm", "repghostnet_050", "repghost"),
    ("transformers", "bert", "bert"),
]
SETTINGS = {
    "smoke": Settings(tuple(Member(*names) for names in FEW), seeds=1, repeats=1),
    "cpu": Settings((Member("timm", "vit_large_patch16_224", "300 million"),), seeds=1, repeats=1, largest=60_000_000),
}
SETTINGS["paper"] = replace(SETTINGS["cpu"], repeats=3)
BENCHMARK = Conformance("conformance", SETTINGS, Measuring, write_page)
