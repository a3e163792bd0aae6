"""How much of what a layer means its first neurons mean: linear CKA of every prefix with the whole layer, at once.

Shapes: n samples, N neurons of a layer, k neurons of a prefix.
"""

from __future__ import annotations

from torch import Tensor


def prefix_cka(gram: Tensor, order: Tensor) -> Tensor:
    """Return sim(k) = CKA(X_1..k, X), in [0, 1], of the first k = 1..N neurons of an order with all of them.

    Linear CKA (arXiv 1905.00414, section 3) needs the squared entries of the Gram matrix only, here G2 in the given
    order, and two cumulative sums give all prefixes:
    sim(k) = sum_{i<=k, j<=N} G2_ij / sqrt(sum_{i,j<=k} G2_ij * sum_{i,j} G2_ij).
    Neither the scale of the layer nor the mean of a neuron plays a part. Where no neuron of a prefix varies, its
    similarity is 0; that of the whole layer is always 1.

    Args:
        gram: X^T X of the centred activations X [n, N], float64 [N, N].
        order: of the neurons, int64 [N].

    Returns:
        float64 [N], on the device of `gram`.

    >>> prefix_cka(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    tensor([0.9701, 1.0000], dtype=torch.float64)
    """
    order = order.to(gram.device)
    squares = gram.double()[order][:, order]  # [N, N]
    squares = (squares / squares.diagonal().max().clamp(min=1e-300)) ** 2
    shared = squares.sum(1).cumsum(0)  # [N] over i <= k and all j
    own = (squares.diagonal() + 2 * squares.tril(-1).sum(1)).cumsum(0)  # [N] over i, j <= k
    similarity = (shared / (own * own[-1]).sqrt()).nan_to_num(nan=0.0).clamp(0, 1)
    similarity[-1] = 1.0
    return similarity
