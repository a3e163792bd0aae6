"""Find the neurons of a model by running it once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import TorchsliceError
from ..inputs import Inputs, Output, batch_size, run
from ..slices import Slice
from .flow import Channels, Flow
from .functions import NORMS
from .layers import Depthwise, Linear, Norm, PReLU
from .neurons import Layer, Neurons
from .plan import build, plan
from .record import Recording, Value, evaluating, record
from .rules import Rules


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

    def analyse(pins: list[tuple[Any, str]]) -> tuple[Neurons, list[tuple[str, Any]]]:
        found, written = _analyse(model, recording, pins)
        return Neurons(model=model, sample=example, classes=names, output=output, **found), written

    neurons, written = analyse([])
    wrong = [(ids, why) for where, ids in written if (why := _why_not_cut(neurons, where, ids))]
    if wrong:
        neurons, _ = analyse(wrong)
    if not neurons.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(neurons.pinned.items())[:3])
        raise TorchsliceError(
            f"no neuron of this model can be cut ({reasons or 'it has no convolution or linear layer'})."
        )
    return neurons


def _why_not_cut(neurons: Neurons, where: str, ids: Any) -> str | None:
    """Try to cut channels whose number the code at `where` may have written down.

    Returns the reason to pin them, or None if the cut network runs.
    """
    touched = set(neurons.wires[ids])
    masks = neurons.full().masks
    for name in neurons.layers:
        outs = neurons.wires[neurons.flow.ports[name].outs]
        chosen = np.isin(outs, list(touched)).nonzero()[0]
        masks[name][torch.from_numpy(chosen[: len(outs) - 1])] = False
    if all(mask.all() for mask in masks.values()):
        return None
    small, example = build(neurons.model, plan(neurons, Slice(masks))), neurons.example
    try:
        with evaluating(small):
            if run(small, example, neurons.output).shape == (batch_size(example), neurons.num_classes):
                return None
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        pass
    return f"{where} writes the width into the code"


def _analyse(
    model: nn.Module, recording: Recording, pins: list[tuple[Any, str]]
) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Return the fields of `Neurons` that follow from a recording, and where code may have written widths down."""
    rules = Rules(model, recording)
    flow = rules.flow
    for ids, reason in pins:
        flow.pin(ids, reason)
    for name, reason in rules.elsewhere.items():
        if name in flow.ports:
            for ids in (flow.ports[name].outs, flow.ports[name].ins):
                if ids is not None:
                    flow.pin(ids, reason)
    _pin_foreign_modules(rules, recording)
    assert recording.output is not None
    output = rules.channels.get(recording.output)
    if output is not None:
        flow.pin(output.ids, "its outputs are the logits")
    wires = flow.wires()
    head = _head(flow, wires, output)
    reasons = _settle(flow, wires)
    layers = {n: p for n, p in flow.ports.items() if p.makes_neurons and n not in reasons}
    writes = np.zeros((len(layers), int(wires.max(initial=0)) + 1), dtype=bool)  # [layers, wires]
    for row, port in zip(writes, layers.values(), strict=True):
        row[wires[port.outs]] = True
    names = np.array(list(layers), dtype=object)
    writers = {n: tuple(names[writes[:, wires[port.outs]].any(1)]) for n, port in flow.ports.items()}
    followers = {
        n: writers[n]
        for n, port in flow.ports.items()
        if isinstance(port, Depthwise) and writers[n] and n not in rules.elsewhere
    }
    norms = _following_norms(rules, recording)
    found = {}
    for name, port in layers.items():
        kind = "linear" if type(port) is Linear else "conv"
        alone = [
            n
            for n, sources in followers.items()
            if sources == (name,) and np.array_equal(wires[flow.ports[n].outs], wires[port.outs])
        ]
        found[name] = Layer(
            name=name,
            kind=kind,
            count=len(port.outs),
            axis=-1 if kind == "linear" else 1,
            mask_after=norms.get(name, name),
            followers=tuple(norms.get(n, n) for n in alone),
            coupled=tuple(n for n in writers[name] if n != name),
        )
    pinned = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            continue
        weights = [p for p in module._parameters.values() if p is not None and p.dim() >= 2]
        computed = nn.utils.parametrize.is_parametrized(module)
        if (weights or computed) and name not in found and name not in followers:
            unused = "not used in the forward pass" if name not in flow.ports else "reads channels that cannot be cut"
            pinned[name] = reasons.get(name) or rules.elsewhere.get(name) or unused
    fields = {"layers": found, "followers": followers, "pinned": pinned, "head": head, "flow": flow, "wires": wires}
    return {**fields, "num_classes": recording.output.shape[1]}, rules.written_widths


def _pin_foreign_modules(rules: Rules, recording: Recording) -> None:
    """Pin layers whose module returns more than the layer's own result: holding it would hold that as well."""
    everything = {
        name: np.ones(len(port.outs), dtype=bool)
        for name, port in rules.flow.ports.items()
        if not isinstance(port, PReLU)
    }
    zeros = rules.flow.zeros(everything)
    for name, port in rules.flow.ports.items():
        for value in recording.module_outputs.get(name, []):
            channels = rules.channels.get(value)
            same = channels is not None and np.array_equal(channels.ids, port.outs)
            if channels is None or not same or (zeros.held.get(name, zeros.at[channels]) != zeros.at[channels]).any():
                rules.flow.pin(port.outs, f"its class {type(rules.modules[name]).__name__} does more than its layer")
                break


def _settle(flow: Flow, wires: Any) -> dict[str, str]:
    """Decide which layers can be sliced; return the reason for each that cannot.

    Assume that all layers are held entirely; wires that some sink still reads as non-zero can never go, so their
    layers are not held after all; repeat until nothing changes.
    """
    pinned: dict[int, str] = {}
    for ids, reason in flow.pins:
        for wire in wires[ids].tolist():
            pinned.setdefault(wire, reason)
    makers = {name: port for name, port in flow.ports.items() if port.makes_neurons}
    reasons: dict[str, str] = {}
    useful, lost = _survival(flow)
    used = np.zeros(int(wires.max()) + 1 if len(wires) else 0, dtype=bool)
    for step in flow.steps:
        if step.rule == "sink":
            used[wires[step.inputs[0].ids]] = True
    for name, port in makers.items():
        found = [pinned[wire] for wire in wires[port.outs].tolist() if wire in pinned]
        if found:
            reasons[name] = found[0]
        elif name not in useful:
            reasons[name] = lost.get(name, "its output is not used")
        elif not used[wires[port.outs]].all():
            reasons[name] = "some of its outputs are not used"
        elif len(port.outs) == 1:
            reasons[name] = "it has a single neuron"
    while True:
        held = {name: np.ones(len(port.outs), dtype=bool) for name, port in makers.items() if name not in reasons}
        needed = np.zeros_like(used)
        needed[wires[flow.zeros(held).needed]] = True
        stuck = [name for name in held if needed[wires[makers[name].outs]].any()]
        if not stuck:
            return reasons
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


def _survival(flow: Flow) -> tuple[set[str], dict[str, str]]:
    """Return the layers whose zeros arrive somewhere, and where the zeros of the others are lost."""
    alive: dict[Channels, frozenset[str]] = {}
    useful: set[str] = set()
    lost: dict[str, str] = {}
    for step in flow.steps:
        layers = frozenset().union(*(alive.get(c, frozenset()) for c in step.inputs))
        if step.rule in ("sink", "any"):
            useful |= layers
        if step.rule == "lose":
            for name in layers:
                lost.setdefault(name, f"{step.where} turns zero into something else")
        if step.output is not None:
            alive[step.output] = (
                frozenset({step.layer}) if step.rule == "make" else frozenset() if step.rule == "lose" else layers
            )
    return useful, lost


def _head(flow: Flow, wires: Any, output: Channels | None) -> tuple[str, ...]:
    """Return the layers whose rows are the class scores, if rows can be taken away without touching anything else."""
    if output is None:
        return ()
    scores = wires[output.ids]
    read = {int(w) for step in flow.steps if step.rule == "sink" for w in wires[step.inputs[0].ids]}
    if len(set(scores)) < len(scores) or read & set(map(int, scores)):
        return ()
    return tuple(
        name
        for name, port in flow.ports.items()
        if not isinstance(port, Norm) and np.isin(wires[port.outs], scores).all()
    )


def _following_norms(rules: Rules, recording: Recording) -> dict[str, str]:
    """Map each layer to the norm that is its only reader and reads nothing else, where there is one."""
    makers: dict[Value, str] = {}
    readers: dict[str, set[str]] = {}
    read_by_norm: dict[str, set[str]] = {}
    for call in recording.calls:
        is_norm = call.name in NORMS and call.module in rules.flow.ports
        for value in call.inputs:
            if value in makers:
                readers.setdefault(makers[value], set()).add(call.module if is_norm else "")
            if is_norm and value.dynamic:
                read_by_norm.setdefault(call.module, set()).add(makers.get(value, ""))
        if call.module in rules.flow.ports and call.name not in NORMS:
            makers |= {value: call.module for value in call.outputs}
    norms = {layer: next(iter(found)) for layer, found in readers.items() if len(found) == 1 and "" not in found}
    return {layer: norm for layer, norm in norms.items() if read_by_norm[norm] == {layer}}
