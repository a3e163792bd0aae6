"""Signs that the gates of a model have failed, in words.

Shapes: N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

SHARED = 0.01  # mean share of samples that leave a layer's common mask, below which the layer counts as collapsed


@dataclass(frozen=True)
class Health:
    """Layers and gates that do not tell samples apart.

    `collapsed` are layers in which all samples share one mask, `dead_layers` those in which no gate is ever on, and
    `dead_gates` counts the gates that are never on in the other layers. `layers` is the number of gated layers.
    """

    layers: int
    collapsed: tuple[str, ...]
    dead_layers: tuple[str, ...]
    dead_gates: dict[str, int]

    @property
    def warnings(self) -> list[str]:
        """One sentence for each thing that is wrong, with what to do; dead gates alone are nothing wrong."""
        words = []
        if self.dead_layers:
            words.append(
                f"Dead: no gate is ever on in {_some(self.dead_layers)}; class slices keep them whole. "
                "Train anew with a lower learning rate or coupling_weight."
            )
        if len(self.collapsed) + len(self.dead_layers) == self.layers:
            words.append(
                "Collapsed: all samples share one mask in every layer, so all classes have the same slice. "
                "Train longer, or with a lower cohesion_weight or a higher coupling_weight."
            )
        elif self.collapsed:
            words.append(
                f"Collapsed: all samples share one mask in {_some(self.collapsed)}, "
                f"{len(self.collapsed)} of {self.layers} gated layers; classes share their slices there."
            )
        return words


def health_of(frequency: Mapping[str, Tensor]) -> Health:
    """Judge gates by how often they are on over all samples, {layer: [N], in [0, 1]}.

    >>> health_of({"conv2": torch.tensor([1.0, 0.0]), "conv3": torch.tensor([0.5, 0.0])}).collapsed
    ('conv2',)
    """
    dead = tuple(name for name, rates in frequency.items() if not rates.any())
    alive = {name: rates for name, rates in frequency.items() if name not in dead}
    collapsed = tuple(name for name, rates in alive.items() if rates.minimum(1 - rates).mean() < SHARED)
    never = {name: int((rates == 0).sum()) for name, rates in alive.items()}
    return Health(len(frequency), collapsed, dead, {name: count for name, count in never.items() if count})


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
