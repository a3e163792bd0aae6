"""Cut a network on trial, without values, and see where its code does not go with the cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from ..inputs import leaves, map_tensors
from ..slices import Slice
from .functions import MOVES
from .layers import Ids, along, staying
from .neurons import Neurons
from .plan import Plan, build, plan
from .record import Call, Recording, Value, run_recorded
from .rules import Rules
from .views import view_of


def try_cut(neurons: Neurons, rules: Rules, recording: Recording, blamed: set[Any]) -> list[tuple[Ids, str]]:
    """Return the channels that must be pinned because code writes down how many there are, with the reason.

    Two parts of all neurons are cut, and the runs of the smaller networks compared call by call with what they must
    do. A place that is to blame is put into `blamed`, so that the search comes to an end; the same place in other
    modules of the same class is to blame as well.
    """
    free = {int(wire) for name in neurons.layers for wire in neurons.wires_of(name)}
    free -= {int(wire) for ids, _ in neurons.flow.stays for wire in neurons.wires[ids]}
    doubtful = {
        call
        for call in rules.doubtful
        if (channels := rules.channels.get(call.inputs[0])) is None
        or free.intersection(neurons.wires[channels.ids].ravel().tolist())
    }
    if not doubtful:
        return []
    culprit = None
    for part in (_part(neurons, first) for first in (False, True)):
        what = plan(neurons, part)
        for device in ("meta",) if recording.dry else ("meta", None):  # only what fails with values too is to blame
            run = _run(neurons, what, recording, device)
            if (culprit := _culprit(run, neurons, rules, recording, what, doubtful)) is None:
                break
        if culprit is not None:
            break
    else:
        return []
    places = dict(_places(recording, rules))
    place = places[culprit]
    same = {name for name, module in rules.modules.items() if type(module) is place[0]} or {culprit.module}
    # If what the call reads is not what is to blame: all that its module reads, then all that is read below that.
    suspects: dict[Any, list[Call]] = {
        place: [call for call in recording.calls if places[call] == place],
        (place[0], "module"): [call for call in recording.calls if call.module in same],
        (place[0], "below"): [call for call in recording.calls if same.intersection(_above(call.module))],
    }
    where = f"{culprit.name} in {culprit.module!r}" if culprit.module else culprit.name
    for blame, calls in suspects.items():
        read = [value for call in calls for value in (*call.inputs, *call.outputs) if value in rules.channels]
        if read and blame not in blamed:
            blamed.add(blame)
            return [(rules.channels[value].ids.ravel(), f"{where} writes the width into the code") for value in read]
    return []


def _part(neurons: Neurons, first: bool) -> Slice:
    """Return a slice of some neurons of every layer; coupled neurons are chosen together.

    These are the `first` half, which no code mistakes that divides a layer by a fraction of its width, or two fifths in
    no regular pattern, which none mistakes that divides it by a number.
    """
    kept: dict[int, bool] = {}
    masks = {}
    for name in neurons.layers:
        wires = neurons.wires_of(name).tolist()
        new = [wire for wire in dict.fromkeys(wires) if wire not in kept]
        kept |= {wire: 2 * i < len(new) if first else i % 5 in (0, 3) for i, wire in enumerate(new)}
        masks[name] = torch.tensor([kept[wire] for wire in wires])
        masks[name][0] |= not masks[name].any()
    return Slice(masks)


def _run(neurons: Neurons, what: Plan, recording: Recording, device: str | None) -> Recording:
    """Record the run of the network that a plan describes."""
    layers = {name: replace(layer, held=np.zeros_like(layer.held)) for name, layer in what.layers.items()}
    small = build(view_of(neurons.model, device), replace(what, layers=layers))
    example = neurons.example if device is None else map_tensors(lambda tensor: tensor.to(device), neurons.example)
    return run_recorded(small, example, neurons.output, replay=recording.reads)


def _culprit(
    run: Recording, neurons: Neurons, rules: Rules, recording: Recording, what: Plan, doubtful: set[Call]
) -> Call | None:
    """Return the first call of the whole network that the cut network does not make as it must."""

    def stays(value: Value) -> Any:
        channels = rules.channels.get(value)
        return None if channels is None else what.stays[neurons.wires[channels.ids]]

    def must_be(value: Value) -> tuple[int, ...]:
        kept, shape = stays(value), list(value.shape)
        for axis in range(-len(shape), 0) if kept is not None else ():
            places = staying(kept, axis)
            shape[axis] = shape[axis] if places is None else int(places.sum())
        return tuple(shape)

    call = None
    for call, again in zip_longest(recording.calls, run.calls):
        if call is None or again is None or (call.name, call.module) != (again.name, again.module):
            return call or recording.calls[-1]
        if [must_be(value) for value in call.outputs] != [value.shape for value in again.outputs]:
            return call
        if [*_floats(call)] != [*_floats(again)]:
            return call
        if call in doubtful and call.name in MOVES:
            value = call.inputs[0]
            numbers = rules.numbered(value, rules.channels[value])
            whole = rules.run_numbered(call, call, value, numbers)
            small = rules.run_numbered(call, again, value, along(numbers, stays(value)))
            if whole is None or small is None:
                return call
            for out, one, other in zip(call.outputs, whole, small, strict=True):
                if not torch.equal(along(one, stays(out)), other):
                    return call
    return call if run.failure is not None else None


def _floats(call: Call) -> Iterator[float]:
    """Yield the fractions that code gives a function, such as the root of a width."""
    yield from (leaf for leaf in leaves((call.args, call.kwargs)) if type(leaf) is float)


def _above(module: str) -> Iterator[str]:
    """Yield the names of a module and of those that it lies in."""
    while module:
        yield module
        module = module.rpartition(".")[0]
    yield ""


def _places(recording: Recording, rules: Rules) -> Iterator[tuple[Call, tuple[Any, ...]]]:
    """Yield every call with its place in the code: class of the module, name, and how many there were before."""
    seen: Counter[tuple[str, str]] = Counter()
    for call in recording.calls:
        kind: Any = type(rules.modules.get(call.module)) if call.module else None
        yield call, (kind, call.name, seen[call.module, call.name])
        seen[call.module, call.name] += 1
