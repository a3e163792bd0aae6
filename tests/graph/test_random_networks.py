"""Networks nobody designed: random sequences of blocks, random slices, in double precision."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchslice.cut.extract import extract, masked, retention
from torchslice.graph.find import find_neurons
from torchslice.slices import Slice

WIDTH = 12  # of the stream between the blocks


class Conv(nn.Module):
    def __init__(self, norm: bool = True, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, **options)
        self.norm = nn.BatchNorm2d(WIDTH) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Residual(Conv):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + super().forward(x))


class PreActivation(Conv):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


class Dense(Conv):
    def __init__(self) -> None:
        super().__init__()
        self.after, self.back = nn.BatchNorm2d(2 * WIDTH), nn.Conv2d(2 * WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(F.gelu(self.after(torch.cat([super().forward(x), x], 1))))


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(WIDTH, 5, 1), nn.Conv2d(5, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = (nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x)) * self.b(x))


class Twice(nn.Module):
    """One convolution and one norm, both used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.relu_(self.norm(self.conv(x)))))


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


BLOCKS = [
    Conv,
    lambda: Conv(norm=False),
    lambda: Conv(groups=WIDTH),
    lambda: Conv(groups=3),
    lambda: Conv(norm=False, groups=4, bias=False),
    Residual,
    PreActivation,
    Dense,
    Squeeze,
    Gate,
    Twice,
    lambda: nn.PReLU(WIDTH),
    lambda: nn.GroupNorm(3, WIDTH),
    lambda: Function(torch.sigmoid),
    lambda: Function(lambda x: x + 0.5),
    lambda: Function(lambda x: F.relu(x, inplace=True)),
    lambda: Function(lambda x: x.permute(0, 2, 3, 1).contiguous().relu().movedim(-1, 1)),
    lambda: Function(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    lambda: Function(lambda x: x * x.mean(1, keepdim=True)),
    lambda: Function(lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1) - x / 2),
]


def network(choices: list[int], flat: bool, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    body = [BLOCKS[choice]() for choice in choices]
    head = (
        [nn.Flatten(), nn.Linear(16 * WIDTH, 4)]
        if flat
        else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 4)]
    )
    model = (
        nn.Sequential(nn.Conv2d(2, WIDTH, 3, padding=1), *body, nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU(), *head)
        .double()
        .eval()
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
    return model


@settings(max_examples=200)
@given(
    choices=st.lists(st.integers(0, len(BLOCKS) - 1), min_size=1, max_size=5),
    flat=st.booleans(),
    seed=st.integers(0, 99),
    fraction=st.sampled_from([0.1, 0.3, 0.6, 0.9]),
)
def test_masked_equals_extracted_whatever_the_network(choices: list[int], flat: bool, seed: int, fraction) -> None:
    model = network(choices, flat, seed)
    example, other = torch.randn(2, 2, 4, 4).double(), torch.randn(3, 2, 4, 4).double()
    neurons = find_neurons(model, example)  # the last convolution is always free
    masks = {name: torch.rand(layer.count) < fraction for name, layer in neurons.layers.items()}
    for mask in masks.values():
        mask[int(torch.randint(len(mask), ()))] = True
    slice_ = Slice(masks)
    small = extract(neurons, slice_)
    with torch.no_grad():
        expected = masked(neurons, slice_)(other)
        difference = (small(other) - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert difference <= 1e-10
    kept = retention(neurons, slice_).built_param
    assert round(kept * sum(p.numel() for p in model.parameters())) == sum(p.numel() for p in small.parameters())
