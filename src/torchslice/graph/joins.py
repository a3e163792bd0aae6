"""Functions that compute element by element, join tensors, or work along some axes of a tensor."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from .flow import Channels, Step
from .functions import ADDITIVE, CLAMPS, DIVISION, MIXERS, MULTIPLICATIVE, POOLS, RESIZERS, ZERO_GOES
from .ground import arg, from_right
from .moves import Moves
from .record import Call, Value


class Joins(Moves):
    """Rules of functions of one tensor's elements, and of several tensors."""

    def _elementwise(self, call: Call) -> None:
        x, rule = arg(call, 0, "input"), "keep" if _zero_stays(call) else "lose"
        source = self._known(x)
        others = [value for value in call.inputs if value is not x and value.dynamic]
        if others and call.name not in ("type_as", "to"):
            return self._unknown(call, "takes several tensors")
        if source is not None:
            self.channels[call.outputs[0]] = self._step(call, rule, [source], source.ids)

    def _join(self, call: Call, values: Sequence[Value], rule: str, out: Value) -> Channels | None:
        """Join tensors element by element; `rule` is "all", "any" or "lose"."""
        known = {value: channels for value in values if (channels := self._known(value)) is not None}
        widest = max((channels.ids.size for channels in known.values()), default=0)
        for value, channels in list(known.items()):
            others = {axis for other in known.values() if other is not channels for axis in other.axes}
            if not value.dynamic and not others <= {*channels.axes}:
                del known[value]  # a parameter that several channels share
            elif channels.ids.size == 1 < widest:
                self.flow.pin(channels.ids, f"{self._where(call)} spreads it over other channels")
                del known[value]
        for value in values:
            if value not in known:
                sized = {axis for axis in range(-len(value.shape), 0) if value.shape[axis] > 1}
                what = (
                    f"the parameter {value.parameter!r}" if value.parameter else "a value whose channels are not known"
                )
                for other, channels in list(known.items()):
                    left = self._fix(call, channels, sized, f"joined by {self._where(call)} with {what}")
                    if left is None:
                        del known[other]
                    else:
                        known[other] = left
        if not known:
            return None
        first = min(known.values(), key=lambda channels: channels.ids.size)
        for channels in known.values():
            self.flow.link(first.ids, channels.ids)
        rest = [value for value in values if value not in known]
        if rule == "all" and len(known) == 1 and rest and not any(value.dynamic for value in rest):
            self.channels[out] = self._shifted(call, first, out)
        else:
            rule = "lose" if rule == "all" and rest else rule
            self.channels[out] = self._step(call, rule, list(known.values()), first.ids)
        return self.channels[out]

    def _binary(self, call: Call) -> None:
        a, b = (call.args + tuple(call.kwargs[k] for k in ("other",) if k in call.kwargs))[:2]
        out = call.outputs[0]
        if call.name in DIVISION and self._known(b) is not None:
            return self._unknown(call, "divides by channels")
        if isinstance(a, Value) and isinstance(b, Value):
            self._join(call, (a, b), "all" if call.name in ADDITIVE else "any", out)
            return
        tensor, scalar = (a, b) if isinstance(a, Value) else (b, a)
        source = self._known(tensor)
        if type(scalar) is float:  # it may follow from a width
            self.doubtful.append(call)
        if source is not None:
            stays = call.name in MULTIPLICATIVE or call.name in DIVISION or scalar == 0
            self.channels[out] = (
                self._step(call, "keep", [source], source.ids) if stays else self._shifted(call, source, out)
            )

    def _addcmul(self, call: Call) -> None:
        x, one, other = (arg(call, place, name) for place, name in enumerate(("input", "tensor1", "tensor2")))
        product = Value(tuple(np.broadcast_shapes(one.shape, other.shape)), True)
        self._join(call, (one, other), "any", product)
        self._join(call, (x, product), "all", call.outputs[0])

    def _masked(self, call: Call) -> None:
        x, mask, value = (arg(call, place, name) for place, name in enumerate(("input", "mask", "value")))
        if isinstance(value, Value):
            return self._unknown(call, "takes several tensors")
        self._join(call, (x, mask), "any" if value == 0 else "lose", call.outputs[0])

    def _stack(self, call: Call) -> None:
        values, dim = list(arg(call, 0, "tensors")), arg(call, 1, "dim", 0)
        single = Value(values[0].shape, True)
        channels = self._join(call, values, "all", single)
        if channels is not None:
            self._rearranged(call, single, call.outputs[0], lambda ids: np.expand_dims(ids, dim))

    def _cat(self, call: Call) -> None:
        values = [value for value in arg(call, 0, "tensors") if np.prod(value.shape) > 0]
        dim = arg(call, 1, "dim", 0)
        if not isinstance(dim, int) or not values:
            return self._unknown(call)
        rank, out = len(values[0].shape), call.outputs[0]
        along = from_right(dim, rank)
        parts = [self._known(value) for value in values]
        if all(part is None for part in parts):
            return
        parts = [
            self._free(value) if part is None and value.parameter and rank == 1 else part
            for value, part in zip(values, parts, strict=True)
        ]
        if not any(part is not None and along in part.axes for part in parts):
            self._join(call, values, "all", out)
            return
        reason = f"joined by {self._where(call)} with a value whose channels are not known"
        others = {axis for part in parts if part is not None for axis in part.axes} - {along}
        found: list[Channels] = []
        for value, part in zip(values, parts, strict=True):
            if part is None:  # it has none along the other axes either
                ids = self._fresh(value.shape[along], reason).reshape(-1, *[1] * (-along - 1))
                part = Channels(ids)
                if any(value.shape[axis] > 1 for axis in others):
                    return self._unknown(call, "joins channels with a value that has none")
            found.append(part)
        padded = [part.ids.reshape((1,) * (rank - part.ids.ndim) + part.ids.shape) for part in found]
        shape = [*np.broadcast_shapes(*(ids.take([0], along).shape for ids in padded))]
        pieces, start = [], 0
        for value, ids in zip(values, padded, strict=True):
            shape[along] = value.shape[along]
            pieces.append(np.broadcast_to(np.arange(start, start + ids.size).reshape(ids.shape), shape))
            start += ids.size
        index = np.concatenate(pieces, along)
        ids = np.concatenate([part.ids.ravel() for part in found])[index]
        self.channels[out] = self._step(call, "keep", found, ids, index=index)

    def _mix(self, call: Call) -> None:
        """Softmax, layer norm and the like: what differs along their axes acts on each other."""
        x = arg(call, 0, "input")
        source = self._known(x)
        if source is None:
            return
        if call.name.endswith("_norm"):
            shape = arg(call, 1, "normalized_shape")
            axes = set(range(-len(shape), 0))
        else:
            dim = arg(call, 1, "p", 2) if call.name == "normalize" else arg(call, 1, "dim")
            dim = arg(call, 2, "dim", 1) if call.name == "normalize" else dim
            axes = {from_right(dim, len(x.shape))} if isinstance(dim, int) else {*source.axes}
        left = self._fix(call, source, axes, f"{self._where(call)} mixes the channels")
        if left is not None:
            rule = "keep" if MIXERS[call.name] else "lose"
            self.channels[call.outputs[0]] = self._step(call, rule, [left], left.ids)

    def _reduce(self, call: Call) -> None:
        x, out = arg(call, 0, "input"), call.outputs[0]
        source, rank = self._known(x), len(x.shape)
        if source is None:
            return
        dims = arg(call, 1, "dim")
        numbers = range(rank) if dims is None else dims if isinstance(dims, tuple | list) else (dims,)
        axes = {from_right(dim, rank) for dim in numbers}
        left = self._fix(call, source, axes, f"{self._where(call)} mixes the channels")
        if left is not None:
            single = Value(tuple(1 if axis in axes else x.shape[axis] for axis in range(-rank, 0)), True)
            self.channels[single] = left
            self._rearranged(call, single, out, lambda ids: ids if len(out.shape) == rank else ids.squeeze((*axes,)))

    def _contract(self, call: Call, a: Value, b: Value, out: Value) -> None:
        """Multiply a [..., M, K] and b [..., K, N]."""
        one, other = self._known(a), self._known(b)
        if one is None and other is None:
            return
        if min(len(a.shape), len(b.shape)) < 2:
            return self._unknown(call)
        if one is not None and other is not None and one.axes == (-1,) and other.axes == (-2,):
            # Channels of one head: a product is a sum over all of them.
            flipped = self._step(call, "keep", [other], other.ids.ravel(), index=np.arange(other.ids.size))
            self.flow.link(one.ids.ravel(), flipped.ids)
            both = self._step(call, "any", [one, flipped], one.ids.ravel())
            self.flow.steps.append(Step("sink", (both,), where=self._where(call)))
            return
        crossed = {-1, -2} if one and other and -2 in one.axes and -1 in other.axes else set()
        left = []
        for channels, axis, partner, factor in ((one, -1, other, b), (other, -2, one, a)):
            if channels is not None:
                fixed = {axis, *crossed}
                if partner is None:  # it keeps its size
                    fixed |= {axis for axis in range(-len(factor.shape), -2) if factor.shape[axis] > 1}
                channels = self._fix(call, channels, fixed, f"{self._where(call)} mixes the channels")
                left += [] if channels is None else [channels]
        if not left:
            return
        for channels in left[1:]:
            self.flow.link(left[0].ids, channels.ids)
            self.heads.append(left[0].ids)
        widest = max((channels.ids for channels in left), key=lambda ids: ids.size)
        shape = np.broadcast_shapes(*(channels.ids.shape for channels in left))
        self.channels[out] = self._step(call, "any", left, np.broadcast_to(widest, shape))

    def _attention(self, call: Call) -> None:
        q, k, v, mask = (arg(call, i, n) for i, n in enumerate(("query", "key", "value", "attn_mask")))
        if call.kwargs.get("enable_gqa"):
            k, v = (self._repeated(call, value, q.shape[-3]) for value in (k, v))
        if call.kwargs.get("scale") is None and (channels := self._known(q)) is not None and channels.axes == (-1,):
            self.flow.stays.append((channels.ids.ravel(), f"{self._where(call)} divides by the root of their number"))
        turned = self._permuted(call, k, [*range(len(k.shape) - 2), -1, -2])
        scores, weights = (Value((*q.shape[:-1], k.shape[-2]), True) for _ in range(2))
        self._contract(call, q, turned, scores)
        if isinstance(mask, Value):
            self._join(call, (scores, mask), "lose", weights)
        elif (channels := self.channels.get(scores)) is not None:
            self.channels[weights] = self._step(call, "lose", [channels], channels.ids)
        self._contract(call, weights, v, call.outputs[0])

    def _einsum(self, call: Call) -> None:
        """A product of two tensors as einsum writes it, such as "bhid,bhjd->bhij"."""
        written, *given = call.args
        found = re.fullmatch(r"(\w+),(\w+)->(\w+)", written.replace(" ", "")) if isinstance(written, str) else None
        if found is None or len(given) != 2 or not all(isinstance(value, Value) for value in given):
            return self._unknown(call)
        one, other, out = found.groups()
        shared = "".join(axis for axis in out if axis in one and axis in other)
        rows, columns = ("".join(axis for axis in out if axis not in without) for without in (other, one))
        summed = "".join(axis for axis in one if axis not in out)
        orders = (shared + rows + summed, one), (shared + summed + columns, other)
        plain = all(sorted(order) == sorted(axes) for order, axes in orders)
        if not plain or (len(rows), len(columns), len(summed)) != (1, 1, 1):
            return self._unknown(call)
        a, b = (
            self._permuted(call, value, [*map(axes.index, order)])
            for value, (order, axes) in zip(given, orders, strict=True)
        )
        product = Value((*a.shape[:-1], b.shape[-1]), True)
        self._contract(call, a, b, product)
        result = self._permuted(call, product, [*map((shared + rows + columns).index, out)])
        if result in self.channels:
            self.channels[call.outputs[0]] = self.channels[result]

    def _permuted(self, call: Call, value: Value, axes: Sequence[int]) -> Value:
        """Return a value with its axes in another order."""
        turned = Value(tuple(value.shape[axis] for axis in axes), value.dynamic)
        self._rearranged(call, value, turned, lambda ids: ids.transpose(axes))
        return turned

    def _repeated(self, call: Call, value: Value, heads: int) -> Value:
        """Return keys or values [..., h, N, d] as if each head was there several times."""
        repeated = Value((*value.shape[:-3], heads, *value.shape[-2:]), value.dynamic)
        if (channels := self._known(value)) is not None and -3 not in channels.axes:
            self._unknown(call, "takes heads apart")
        else:
            self._rearranged(call, value, repeated, lambda ids: ids.repeat(heads // value.shape[-3], -3))
        return repeated

    def _spatial(self, call: Call) -> None:
        source = self._known(arg(call, 0, "input"))
        if source is None:
            return
        rule = "keep"
        if call.name == "pad":
            covered = len(arg(call, 1, "pad")) // 2
            constant = arg(call, 2, "mode", "constant") == "constant"
            rule = "lose" if constant and arg(call, 3, "value", None) not in (None, 0, 0.0) else "keep"
        elif call.name in RESIZERS:
            covered = len(call.outputs[0].shape) - 2
        else:
            covered = POOLS[call.name]
        if any(-axis <= covered for axis in source.axes):
            return self._unknown(call, "works along the channels")
        self.channels[call.outputs[0]] = self._step(call, rule, [source], source.ids)


def _zero_stays(call: Call) -> bool:
    """Whether a function of the elements of a tensor leaves zero where it is."""
    if call.name == "pow":
        exponent = arg(call, 1, "exponent")
        return isinstance(exponent, int | float) and exponent > 0
    if call.name not in CLAMPS:
        return call.name not in ZERO_GOES
    low = arg(call, 1, "min_val", call.kwargs.get("min", -1.0 if call.name == "hardtanh" else None))
    high = arg(call, 2, "max_val", call.kwargs.get("max", 1.0 if call.name == "hardtanh" else None))
    numbers = all(bound is None or isinstance(bound, int | float) for bound in (low, high))
    return numbers and (low is None or low <= 0) and (high is None or high >= 0)
