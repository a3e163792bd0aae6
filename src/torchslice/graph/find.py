"""Find the neurons of a model by running it once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from torch import nn

from ..errors import TorchsliceError
from ..inputs import Inputs, Output
from .flow import Channels, Flow
from .functions import NORMS
from .layers import Depthwise, Free, Norm, PReLU, Shift
from .neurons import Layer, Neurons
from .record import Recording, Value, record
from .rules import Rules
from .trial import try_cut


def find_neurons(
    model: nn.Module, example: Inputs, *, classes: Sequence[str] | None = None, output: Output = None
) -> Neurons:
    """Find the neurons of any model by running it once on an example batch.

    The model is not changed. The neurons are tied to it and to the example, and every other verb takes them first.

    Args:
        example: a tensor [B, ...], or a tuple or dictionary of tensors, as the model takes them: `model(*tuple)`,
            `model(**dictionary)`.
        classes: names of the logits, in their order.
        output: picks the logits [B, C] from what the model returns, and does nothing else to them; needed where that is
            neither a tensor nor an object with `logits`.

    Raises TorchsliceError for wrapped models, models that branch on values, outputs that are not [B, C], and models in
    which nothing can be cut.

    >>> neurons = find_neurons(model, task.example, classes=task.classes)
    >>> neurons.layers["features.0.0"].count
    8
    """
    recording = record(model, example, output)
    names = None if classes is None else tuple(classes)
    options: dict[str, Any] = {"model": model, "sample": example, "classes": names, "output": output}
    options["assumptions"] = tuple(recording.assumptions)
    fixed: list[tuple[Any, str]] = []  # by code that writes widths down
    blamed: set[Any] = set()
    while True:
        rules = Rules(model, recording)
        neurons = Neurons(**options, **_analyse(rules, recording, fixed))
        found = try_cut(neurons, rules, recording, blamed)
        if not found:
            break
        fixed += found
    if not neurons.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(neurons.pinned.items())[:3])
        raise TorchsliceError(
            f"no neuron of this model can be cut ({reasons or 'it has no convolution or linear layer'})."
        )
    return neurons


def check_assumptions(neurons: Neurons, inputs: Inputs) -> None:
    """Raise unless other inputs lead the model to the same neurons.

    A model may read values of its input into Python and do something else for others. Where these inputs break an
    assumption, the neurons are found again with them and compared.

    >>> check_assumptions(neurons, task.example)
    """
    recording = record(neurons.model, inputs, neurons.output)
    if tuple(recording.assumptions) == neurons.assumptions:
        return
    other = find_neurons(neurons.model, inputs, output=neurons.output)
    same_rows = {name: rows.tolist() for name, rows in other.rows.items()} == {
        name: rows.tolist() for name, rows in neurons.rows.items()
    }
    if (other.layers, other.followers) != (neurons.layers, neurons.followers) or not same_rows:
        pairs = zip_longest(recording.assumptions, neurons.assumptions)
        broken = next(now for now, before in pairs if now != before) or "it reads fewer values"
        raise TorchsliceError(
            f"with these inputs the model does something else ({broken}), and other neurons can be cut. Find them with "
            "an example that is like all inputs, such as one with padding."
        )


def _analyse(rules: Rules, recording: Recording, fixed: list[tuple[Any, str]]) -> dict[str, Any]:
    """Return the fields of `Neurons` that follow from a recording; `fixed` channels can never be cut."""
    flow = rules.flow
    for name, reason in rules.elsewhere.items():
        if name in flow.ports and not isinstance(flow.ports[name], Shift):  # which has none for single channels
            for ids in (flow.ports[name].outs, flow.ports[name].ins):
                if ids is not None:
                    flow.pin(ids, reason)
    _pin_foreign_modules(rules, recording)
    assert recording.output is not None
    output = rules.channels.get(recording.output)
    if output is not None:
        flow.pin(output.ids, "its outputs are the logits")
    wires = _block_wires(rules)
    owned = np.unique(
        np.concatenate([wires[p.outs] for p in flow.ports.values() if not isinstance(p, Free)] or [wires])
    )
    for port in flow.ports.values():
        if isinstance(port, Free):
            flow.pin(port.outs[~np.isin(wires[port.outs], owned)], "it belongs to no neuron")
    heads = np.unique(np.concatenate([wires[ids].ravel() for ids in rules.heads])) if rules.heads else wires[:0]
    for ids, reason in fixed:  # a head can be held at zero all the same
        of_heads = np.isin(wires[ids], heads)
        flow.stays.append((ids[of_heads], reason))
        flow.pin(ids[~of_heads], reason)
    stays = {int(wire): reason for ids, reason in reversed(flow.stays) for wire in wires[ids]}
    head = _head(flow, wires, output)
    rows, followers, reasons = _settle(flow, wires)
    layers = {name: flow.ports[name] for name in rows}
    writes = np.zeros((len(layers), int(wires.max(initial=0)) + 1), dtype=bool)  # [layers, wires]
    for row, port in zip(writes, layers.values(), strict=True):
        row[wires[port.outs]] = True
    names = np.array(list(layers), dtype=object)
    writers = {
        n: tuple(names[writes[:, wires[port.outs]].any(1)]) for n, port in flow.ports.items() if port.outs.ndim == 1
    }
    follow = {
        n: writers[n]
        for n, port in flow.ports.items()
        if (n in followers or isinstance(port, Depthwise)) and writers[n] and n not in rules.elsewhere
    }
    norms = _following_norms(rules, recording)
    found = {}
    for name, port in layers.items():
        alone = [
            n
            for n, sources in follow.items()
            if isinstance(flow.ports[n], Depthwise)
            and sources == (name,)
            and np.array_equal(wires[flow.ports[n].outs], wires[port.outs])
        ]
        own = wires[port.outs]
        kind = "heads" if np.isin(own, heads).any() else "linear" if port.axis == -1 else "conv"
        found[name] = Layer(
            name=name,
            kind=kind,
            count=int(rows[name].max()) + 1,
            axis=port.axis,
            mask_after=norms.get(name, name),
            followers=tuple(norms.get(n, n) for n in alone),
            coupled=tuple(n for n in writers[name] if n != name),
            stays=next((stays[wire] for wire in own.tolist() if wire in stays), ""),
        )
    pinned = {}
    free = {id(rules.parameters[name]) for name in flow.ports if name in rules.parameters}
    for name, module in rules.modules.items():
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            continue
        weights = [p for p in module._parameters.values() if p is not None and p.dim() >= 2 and id(p) not in free]
        computed = nn.utils.parametrize.is_parametrized(module)
        if (weights or computed) and name not in found and name not in follow:
            unused = "not used in the forward pass" if name not in flow.ports else "reads channels that cannot be cut"
            pinned[name] = reasons.get(name) or rules.elsewhere.get(name) or unused
    fields = {"layers": found, "rows": rows, "followers": follow, "pinned": pinned, "head": head, "flow": flow}
    return {**fields, "wires": wires, "num_classes": recording.output.shape[1]}


def _block_wires(rules: Rules) -> Any:
    """Return the wire of every channel, linked so that what can go of a tensor goes by whole places of one axis."""
    while True:
        wires, linked = rules.flow.wires(), False
        for channels in rules.channels.values():
            if len(channels.axes) > 1:
                linked |= _link_block(rules.flow, wires[channels.ids], channels)
        if not linked:
            return wires


def _link_block(flow: Flow, wires: Any, channels: Channels) -> bool:
    """Link all but one axis of a tensor, the one along which most of it stays apart; whether that was needed."""
    firsts = {axis: wires.take([0], axis) for axis in channels.axes}
    if sum(bool((wires != first).any()) for first in firsts.values()) <= 1:
        return False
    apart = {axis: len(np.unique(wires.swapaxes(axis, 0).reshape(wires.shape[axis], -1).min(1))) for axis in firsts}
    kept = max(apart, key=lambda axis: apart[axis])
    first = channels.ids[tuple(slice(None) if axis == kept else slice(0, 1) for axis in range(-wires.ndim, 0))]
    flow.link(first, channels.ids)
    return True


def _pin_foreign_modules(rules: Rules, recording: Recording) -> None:
    """Pin layers whose module returns more than the layer's own result: holding it would hold that as well."""
    layers = {name: port for name, port in rules.flow.ports.items() if not isinstance(port, PReLU | Free)}
    zeros = rules.flow.zeros({name: np.ones(len(port.outs), dtype=bool) for name, port in layers.items()})
    for name, port in layers.items():
        for value in recording.module_outputs.get(name, []):
            channels = rules.channels.get(value)
            same = channels is not None and np.array_equal(channels.ids.ravel(), port.outs)
            if channels is None or not same or (zeros.held[name] != zeros.at[channels].ravel()).any():
                rules.flow.pin(port.outs, f"its class {type(rules.modules[name]).__name__} does more than its layer")
                break


def _settle(flow: Flow, wires: Any) -> tuple[dict[str, Any], set[str], dict[str, str]]:
    """Decide which layers can be sliced: the neuron of each of their rows, which others follow, and why not the rest.

    A neuron is made of the rows that can only go together and whose zeros arrive somewhere. Assume that all neurons are
    held; wires that some sink still reads as non-zero can never go, so their layers are not held after all; repeat
    until nothing changes.
    """
    makers = {name: port for name, port in flow.ports.items() if port.makes_neurons}
    used = np.zeros(int(wires.max(initial=-1)) + 1, dtype=bool)
    for step in flow.steps:
        if step.rule == "sink":
            used[wires[step.inputs[0].ids]] = True
    for port in makers.values():
        if len(np.unique(used[wires[port.outs]])) > 1:  # code takes a part, and says which by number
            flow.pin(port.outs, "some of its outputs are not used")
    pinned: dict[int, str] = {}
    for ids, reason in flow.pins:
        for wire in wires[ids].tolist():
            pinned.setdefault(wire, reason)
    reasons: dict[str, str] = {}
    fixed: set[str] = set()  # those with a wire that is pinned or unused
    useful, lost = flow.useful()
    for name, port in makers.items():
        own = wires[port.outs]
        found = [pinned[wire] for wire in own.tolist() if wire in pinned]
        if found:
            reasons[name] = found[0]
            fixed.add(name)
        elif not used[own].any() or not np.isin(own, own[useful[name]]).all():
            reasons[name] = lost.get(name, "its output is not used")
        elif (own == own[0]).all():
            reasons[name] = "it has a single neuron"
        if not used[own].any():
            fixed.add(name)
    while True:
        held = {name: useful[name] for name in makers if name not in reasons}
        needed = np.zeros_like(used)
        needed[wires[flow.zeros(held | flow.free(held)).needed]] = True
        stuck = [name for name in held if needed[wires[makers[name].outs]].any()]
        if not stuck:
            break
        for name in stuck:
            partners = [
                other for other in reasons if np.isin(wires[makers[other].outs], wires[makers[name].outs]).any()
            ]
            why = (
                f"joined with {partners[0]!r}, which is pinned"
                if partners
                else "joined with a value that cannot be held at zero"
            )
            reasons[name] = lost.get(name, why)
    followers = {name for name in reasons if name not in fixed and not needed[wires[makers[name].outs]].any()}
    return {name: _neurons(wires[makers[name].outs], useful[name]) for name in held}, followers, reasons


def _neurons(wires: Any, useful: Any) -> Any:
    """Return which neuron each row of a layer belongs to, in the order of the rows, int [outputs]; -1 for none."""
    _, first, neuron = np.unique(wires[useful], return_index=True, return_inverse=True)
    rows = np.full(len(wires), -1)
    rows[useful] = first.argsort().argsort()[neuron]
    return rows


def _head(flow: Flow, wires: Any, output: Channels | None) -> tuple[str, ...]:
    """Return the layers whose rows are the class scores, if rows can be taken away without touching anything else."""
    if output is None:
        return ()
    scores = wires[output.ids.ravel()]
    read = {int(w) for step in flow.steps if step.rule == "sink" for w in wires[step.inputs[0].ids.ravel()]}
    if len(set(scores)) < len(scores) or read & set(map(int, scores)):
        return ()
    return tuple(
        name
        for name, port in flow.ports.items()
        if not isinstance(port, Norm | Free) and np.array_equal(wires[port.outs], scores)
    )


def _following_norms(rules: Rules, recording: Recording) -> dict[str, str]:
    """Map each layer to the norm that is its only reader and reads nothing else, where there is one."""
    makers: dict[Value, str] = {}
    readers: dict[str, set[str]] = {}
    read_by_norm: dict[str, set[str]] = {}
    for call in recording.calls:
        is_norm = call.name in (*NORMS, "group_norm") and call.module in rules.flow.ports
        for value in call.inputs:
            if value in makers:
                readers.setdefault(makers[value], set()).add(call.module if is_norm else "")
            if is_norm and value.dynamic:
                read_by_norm.setdefault(call.module, set()).add(makers.get(value, ""))
        if call.module in rules.flow.ports and not is_norm:
            makers |= {value: call.module for value in call.outputs}
    norms = {layer: next(iter(found)) for layer, found in readers.items() if len(found) == 1 and "" not in found}
    return {layer: norm for layer, norm in norms.items() if read_by_norm[norm] == {layer}}
