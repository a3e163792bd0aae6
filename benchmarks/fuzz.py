"""Hostile files: mutated artefacts, runs, stores, slices, weights are refused in one line, or load as what they say.

Half of the files are damaged (bits, bytes, lengths), half are forged: other plain data and tensors under a hash that
fits. A process of its own reads them as the commands do. It may take twice the memory of an honest file, and has
modules beside it that tell when they are imported. What may happen is a TorchsliceError of one line, or that the file
loads: unchanged if it was damaged and has a hash, as its record says if it was forged.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import multiprocessing
import random
import re
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from torch import Tensor

import torchslice as ts
from torchslice import TorchsliceError, data, maintain, models
from torchslice.artefact import Store, hub, read_record
from torchslice.artefact.blueprint import describe
from torchslice.files import digest_of
from torchslice.graph.neurons import Neurons
from torchslice.runs import Run
from torchslice.runs.recipe import Method, Recipe
from torchslice.runs.slicefile import SliceFile, digest_of_model
from torchslice.tables import table

LEAST_MIB = 64  # of memory that any file may take, for what Python and torch keep anyway
SECONDS = 30  # that any file may take
EACH = 5_000  # files of one process: safetensors (0.8.0) keeps 64 bytes of every tensor that it ever read
TRAINING = ts.Training(epochs=2, batch_size=64, precision="fp32", device="cpu", progress=False)
#: A module that is imported, or called, only if a file made somebody do it; then there is a file `ran` beside it.
CANARY = """
import pathlib

def make(*arguments, **options):
    pathlib.Path(__file__).with_name("ran").touch()

make()
"""
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 3, 10**6, 10**11, 10**400, 0.5, float("nan"), float("inf"), "", "x", "\0", "weight", [], [[]]),
    *({}, {"x": 1}, "torch.nn.modules.linear:Linear", "canary:make", "os:system", "builtins:eval", "torch:load"),
)
KINDS = ("tuple", "name", "module", "tensor", "partial", "enum", "float", "size", "dtype", "method", "weakref")


# -- mutations ----------------------------------------------------------------------------------------------------
def places(tree: Any) -> list[tuple[Any, Any]]:
    """List every (container, key) of a tree of dictionaries and lists."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [place for key in keys for place in [(tree, key), *places(tree[key])]]


def mutate(tree: Any, rng: random.Random) -> None:
    """Change plain data in one place: a value, a key, a type, or two places that are swapped."""
    if not (found := places(tree)):
        return
    (container, key), (other, other_key) = rng.choice(found), rng.choice(found)
    kind = rng.randrange(6)
    if kind == 0:
        container[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 1:
        del container[key]
    elif kind == 2:
        container[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(container[key])
    elif kind == 3:
        container[key] = {rng.choice(KINDS): container[key]}
    elif kind == 4 and isinstance(container, dict):
        container[rng.choice(("forward", "training", "__class__", "a.b", "weight", "dtype", ""))] = container.pop(key)
    elif isinstance(container[key], str):
        text = container[key]
        container[key] = rng.choice((text + "x", text[1:], text.upper(), text.replace(":", "."), f"{text}.__init__"))
    else:
        container[key] = [container[key]]


def mutated(tree: Any, rng: random.Random) -> Any:
    """Return plain data that was changed in one to five places."""
    changed = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        mutate(changed, rng)
    return changed


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with a flipped bit, or a part that was overwritten, cut off, lost, doubled or zeroed."""
    start = rng.choice((rng.randrange(len(content)), rng.randrange(min(len(content), 400))))
    length = rng.choice((1, 2, 8, 64, 4096))
    before, part, after = content[:start], content[start : start + length], content[start + length :]
    kind = rng.randrange(6)
    if kind == 0:
        part = bytes([part[0] ^ 1 << rng.randrange(8)]) + part[1:]
    elif kind == 1:
        part = rng.randbytes(len(part))
    elif kind == 2:
        part, after = b"", b""
    elif kind == 3:
        part = b""
    elif kind == 4:
        part += part
    else:
        part = bytes(len(part))
    return before + part + after


def forged_tensors(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """Return tensors of which one, one time in four, is absent, renamed, new, or has another form."""
    changed, name = dict(tensors), rng.choice([*tensors])
    kind = rng.randrange(20)
    if kind == 0:
        del changed[name]
    elif kind == 1:
        changed[rng.choice((name + "x", "", ".slice.x", "weight"))] = changed.pop(name)
    elif kind == 2:
        changed["extra"] = torch.zeros(2)
    elif kind == 3:
        changed[name] = changed[name].reshape(-1)[: rng.randrange(3)].clone()
    elif kind == 4:
        changed[name] = changed[name].to(rng.choice((torch.float64, torch.int8, torch.bool)))
    return changed


def plain(tree: Any) -> Any:
    """Return a record without the names of tensors, and with sets in one order."""
    if isinstance(tree, list):
        return [plain(item) for item in tree]
    if not isinstance(tree, dict):
        return {"float": repr(tree)} if isinstance(tree, float) and not math.isfinite(tree) else tree
    if len(tree) == 1 and (kind := next(iter(tree))) in ("tensor", "weakref", "set", "frozenset"):
        return {kind: sorted(map(json.dumps, map(plain, tree[kind]))) if "set" in kind else None}
    return {key: sorted(item) if key in ("parameters", "buffers") else plain(item) for key, item in tree.items()}


def meaning(record: dict[str, Any]) -> list[str]:
    """Return what a record says of its network, whatever its tensors are called."""
    parts = [record["modules"], *record["tensors"].values()]
    return sorted(json.dumps(plain(part), sort_keys=True) for part in parts)


# -- what is attacked ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Target:
    """A file, how it is forged, and how it is read.

    `forge` returns the bytes of a forged file; `use` reads the file as the commands do, raises AssertionError where it
    is not what it says, and returns what must stay the same in a damaged file that is `hashed`.
    """

    name: str
    path: Path
    forge: Callable[[random.Random], bytes]
    use: Callable[[], Any]
    hashed: bool = False


def contents(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def of_artefact(path: Path, neurons: Neurons | None = None) -> Target:
    """A saved network; `neurons` are those of one that was extended."""
    record, (_, tensors) = read_record(path), contents(path)

    def forge(rng: random.Random) -> bytes:
        changed, own = mutated(record, rng), forged_tensors(tensors, rng)
        entries = {key: value for key, value in changed.items() if key != "sha256"}
        changed["sha256"] = digest_of(own, json.dumps(entries, sort_keys=True))
        return to_bytes(own, {"torchslice": json.dumps(changed)})

    def use() -> Any:
        found = ts.load(path)
        said = read_record(path)
        assert meaning(describe(found.model)[0]) == meaning(said), "another network than the record says"
        if neurons is not None and found.extension is not None:
            str(maintain.Extended.of(neurons, found.extension))
        return said["sha256"], digest_of_model(found.model)

    return Target(f"artefact {path.stem}", path, forge, use, hashed=True)


def of_run(run: Run, name: str) -> Target:
    """A file of a run."""
    path = run.folder / name

    def use() -> Any:
        opened = Run.open(run.folder)
        neurons: Any = opened.network(opened.load_task(), device="cpu")
        for slice_ in opened.slices().values():
            neurons.check(slice_)
        for ranking in opened.rankings().values():
            neurons.check(ranking.prefix(ranking.layers))
        return digest_of_model(neurons.model), opened

    if path.suffix == ".json":
        text = json.loads(path.read_text())
        return Target(f"run {name}", path, lambda rng: json.dumps(mutated(text, rng)).encode(), use)
    metadata, tensors = contents(path)

    def forge(rng: random.Random) -> bytes:
        training, own = json.dumps(mutated(json.loads(metadata["training"]), rng)), forged_tensors(tensors, rng)
        return to_bytes(own, {"training": training, "sha256": digest_of(own, training)})

    return Target(f"run {name}", path, forge, use, hashed=True)


def of_store(folder: Path, artefact: Path) -> Target:
    """An artefact in a store."""
    store, name = Store(folder), artefact.stem
    store.add(artefact)
    inside = of_artefact(store.path(name))

    def use() -> Any:
        seen = [*store.entries(), *store.search(classes=["3"], min_accuracy=0.1, max_parameters=10**6)]
        cells = [entry.row for entry in seen]
        assert all(len(row) == 5 and "\n" not in "".join(row) for row in cells), "a row that is no line"
        (verified,) = store.verify()
        if verified.problem:
            raise TorchsliceError(verified.problem)
        return hub.card(read_record(store.path(name)), name), inside.use()

    return replace(inside, name="store artefact", use=use)


def targets(folder: Path) -> Iterator[Target]:
    """Make honest files and yield them as targets."""
    recipe = Recipe("convnet", "digits", Method(), TRAINING, {"width": 0.125}, train_limit=200)
    task = recipe.load_task()
    run = Run.start(folder / "run", recipe, task)
    run.train(task, device="cpu", progress=False)
    neurons: Any = run.network(task, device="cpu")
    run.keep_slices({name: neurons.random(0.5, seed=i) for i, name in enumerate(task.classes)}, {})
    pair = ts.reuse(neurons, task, run.slices(), classes=["3", "8"], tune=False)
    ts.save(pair, folder / "pair.safetensors")
    known = ts.find_neurons(pair.model, task.example, classes=pair.classes)
    one = replace(TRAINING, epochs=1)
    more = ts.extend(known, task.restrict(["0", "1"]), known.random(0.5), known=task, replay=0.1, training=one)
    ts.save(more, folder / "extended.safetensors")
    ts.save(models.create("mobilenet", 3, width=0.05), folder / "mobilenet.safetensors", classes=["a", "b", "c"])
    yield from (of_artefact(folder / f"{name}.safetensors") for name in ("pair", "mobilenet"))
    yield of_artefact(folder / "extended.safetensors", more.neurons)
    yield of_store(folder / "store", folder / "pair.safetensors")
    checkpoints = (f"{part}/checkpoint.safetensors" for part in ("training", "subtasks"))
    yield from (of_run(run, name) for name in ("run.json", "rankings.json", "slices.json", *checkpoints))

    weights, found = digest_of_model(neurons.model), folder / "slices.json"
    SliceFile(found).write(run.slices(), weights, {"by": "contribution", "critical": neurons.full().to_plain()})
    text, again = json.loads(found.read_text()), "find them anew"
    read = lambda: (SliceFile(found).read(ts.Slice, weights, again), SliceFile(found).critical(weights, again))  # noqa: E731
    yield Target("slices", found, lambda rng: json.dumps(mutated(text, rng)).encode(), read)
    state, model = neurons.model.state_dict(), copy.deepcopy(neurons.model)
    torch.save(state, folder / "weights.pt")
    save_file(state, folder / "weights.safetensors")
    for path, forge in ((folder / "weights.pt", forged_pickle), (folder / "weights.safetensors", forged_weights)):
        use = partial(models.load_weights, model, path)
        yield Target(path.name, path, partial(forge, state), use)


class Hostile:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        import canary  # type: ignore[import-not-found]

        return canary.make, ("x",)


def forged_weights(state: dict[str, Tensor], rng: random.Random) -> bytes:
    """Return a safetensors file of other tensors."""
    return to_bytes(forged_tensors(state, rng), {"format": "pt"})


def forged_pickle(state: dict[str, Tensor], rng: random.Random) -> bytes:
    """Return a file of torch.save with other tensors, or something else among them."""
    changed: dict[str, Any] = forged_tensors(state, rng)
    if rng.random() < 0.5:
        changed[rng.choice([*changed])] = rng.choice((Hostile(), *VALUES))
    file = io.BytesIO()
    torch.save(rng.choice((changed, {"state_dict": changed}, [changed])), file)
    return file.getvalue()


# -- the attack ---------------------------------------------------------------------------------------------------
class TooLong(BaseException):
    """A file took too long."""


def verdict(target: Target, kind: str, honest: Any) -> str:
    """Read a changed file and return "refused", "loaded", or what is wrong."""
    signal.alarm(SECONDS)
    try:
        found = target.use()
    except TorchsliceError as error:
        causes: list[BaseException | None] = [error]
        while causes[-1] is not None:
            causes.append(causes[-1].__cause__)
        if any(isinstance(one, MemoryError) or "llocate memory" in str(one) for one in causes):
            return f"too much memory: {error}"
        return "refused"
    except (Exception, TooLong) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return "changed in silence" if kind == "damaged" and target.hashed and found != honest else "loaded"


def too_long(*_: object) -> None:
    """Say that a file takes too long."""
    raise TooLong(f"after {SECONDS} seconds")


def memory_mib(key: str) -> float:
    """Return a line of what the system says of the memory of this process."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def attack(folder: str, seed: int, first: int, count: int, results: Connection) -> None:
    """Be the process that reads the files: send (number, what, verdict) for each."""
    torch.set_num_threads(1)
    ran, sys.dont_write_bytecode = Path(folder) / "ran", True
    ran.with_name("canary.py").write_text(CANARY)
    sys.path.insert(0, folder)
    task, load = data.load("digits", seed=0), data.load

    def remembered(name: str, where: Any = None, **options: Any) -> data.Task:
        return task if (name, where, options) == ("digits", None, {"seed": 0}) else load(name, where, **options)

    data.load = remembered  # type: ignore[assignment]
    found = list(targets(Path(folder)))
    honest = [(target.path.read_bytes(), target.use()) for target in found]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_mib("VmRSS")
    for target in found:
        target.use()
    most = memory_mib("VmData") + max(LEAST_MIB, 2 * (memory_mib("VmHWM") - before))
    resource.setrlimit(resource.RLIMIT_DATA, (int(most * 2**20),) * 2)
    signal.signal(signal.SIGALRM, too_long)
    for number in range(first, count):
        rng = random.Random(f"{seed}/{number}")
        which, kind = rng.randrange(len(found)), rng.choice(("damaged", "forged"))
        target, (content, value) = found[which], honest[which]
        results.send((number, f"{target.name}, {kind}", None))
        target.path.write_bytes(damaged(content, rng) if kind == "damaged" else target.forge(rng))
        ran.unlink(missing_ok=True)
        sys.modules.pop("canary", None)  # which a forger may have imported
        outcome = verdict(target, kind, value)
        if ran.exists() and target.path.name != "run.json":  # which names the code of a network; open only your own
            outcome = "code of the file's choice ran"
        results.send((number, f"{target.name}, {kind}", outcome))
        target.path.write_bytes(content)


def run(*, count: int = 1000, seed: int = 0) -> tuple[str, list[str]]:
    """Attack with so many files; return a table of what happened, and what went wrong."""
    context = multiprocessing.get_context("spawn")
    seen: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    first = 0
    while first < count:
        with tempfile.TemporaryDirectory() as folder:
            receiver, sender = context.Pipe(duplex=False)
            until = min(count, first + EACH)
            child = context.Process(target=attack, args=(folder, seed, first, until, sender))
            child.start()
            sender.close()
            last, what, outcome = first - 1, "", ""
            with contextlib.suppress(EOFError):
                while receiver.poll(600 if last < first else 4 * SECONDS):
                    last, what, outcome = receiver.recv()
                    if outcome is not None:
                        fine = outcome in ("refused", "loaded")
                        seen[what, outcome if fine else "WRONG"] += 1
                        wrong += [] if fine else [f"{what}, number {last}: {outcome}"]
            child.kill()
            child.join()
            receiver.close()
            if last < first:
                raise TorchsliceError(
                    f"the process that reads the files ended before the first one ({child.exitcode})."
                )
            if outcome is None:
                seen[what, "WRONG"] += 1
                wrong.append(f"{what}, number {last}: the process ended or hung (exit code {child.exitcode})")
            first = last + 1
    outcomes = ("refused", "loaded", "WRONG")
    names = sorted({what for what, _ in seen})
    rows = [(what, *(str(seen[what, outcome]) for outcome in outcomes)) for what in names]
    rows.append(("all", *(str(sum(seen[what, outcome] for what in names)) for outcome in outcomes)))
    return table(("files", *outcomes), rows), wrong
