"""Networks with everything that an attribute may hold."""

import enum
import functools
import weakref
from collections import OrderedDict

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Shade(str, enum.Enum):  # noqa: UP042  (as timm writes it)
    DARK = "dark"


def double(x: Tensor) -> Tensor:
    return 2 * x


class Odd(nn.Module):
    """All kinds of attributes; forward reads most of them."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.inner = nn.Linear(4, 4), nn.Linear(4, 4), self.Inner()
        self.number, self.text, self.nothing, self.yes = 10**30, "grün", None, True
        self.floats = [0.1, -0.0, float("inf"), float("-inf"), float("nan"), numpy.float64(0.3), numpy.int64(3)]
        self.nested = ([1, (2.5, None)], {"a": {3, 4}}, frozenset({(1, 2)}), range)
        self.by_number = {1: "one", (2, 3): [4], None: {}}
        self.ordered = OrderedDict(b=1, a=2)
        self.size, self.dtype, self.device = torch.Size([2, 3]), torch.bfloat16, torch.device("cuda:1")
        self.colours = (Colour.BLUE, Shade.DARK)
        self.norm, self.function, self.own_function = nn.BatchNorm2d, F.gelu, double
        self.builtins = [F.conv2d, F.logsigmoid, F.max_pool2d, torch.relu]
        self.make = functools.partial(nn.LayerNorm, 4, eps=1e-3)
        self.constant = torch.arange(4.0)
        self.constants = [self.constant, torch.ones(4, requires_grad=True), torch.tensor(2)]
        self.layers = {"again": self.first}
        self.reference = weakref.ref(self.first.weight)
        self.gone = weakref.ref(torch.ones(1))
        self.call = self.slowly
        self.__dict__["root"] = self

    def slowly(self, x: Tensor) -> Tensor:
        return self.second(self.layers["again"](x)) + self.constants[1] * self.constant

    def forward(self, x: Tensor) -> Tensor:
        assert self.reference() is self.first.weight and self.gone() is None and self.root is self
        x = self.function(self.make()(self.inner(self.call(x)))) + len(self.by_number[2, 3])
        return self.own_function(x) * self.constants[2]


class Shared(nn.Module):
    """Modules, parameters and buffers that are used in several places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.ReLU(), self.first, nn.Linear(4, 4), nn.Linear(4, 4))
        self.again = self.block
        self.block[2].weight = self.first.weight
        self.block[3].weight.data = self.first.weight.data  # another parameter in the same memory
        self.register_buffer("saved", torch.ones(4))
        self.register_buffer("unsaved", torch.full((4,), 2.0), persistent=False)
        self.register_buffer("alias", self.saved)
        self.register_buffer("absent", None)
        self.register_parameter("missing", None)
        self.skipped = nn.Identity()
        self.skipped = None  # type: ignore[assignment]
        self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.block(self.first(x))) * self.unsaved + self.alias


class Bare(nn.Module):
    """Whatever a test gives it."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name, value in attributes.items():
            self.__dict__[name] = value

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)
