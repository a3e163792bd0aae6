"""The torch functions torchslice knows, by their bare names. A function that is not listed pins what it reads."""

from __future__ import annotations


def _names(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split())


#: Element by element, f(0) = 0.
ZERO_STAYS = _names(
    "relu relu6 leaky_relu rrelu elu selu celu gelu silu mish hardswish tanh softsign tanhshrink hardshrink softshrink",
    "abs neg negative positive sin tan asin atan sinh asinh erf sqrt square sign sgn round floor ceil trunc nan_to_num",
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout",
    "contiguous clone detach alias to float half bfloat16 double type type_as cpu cuda requires_grad data",
)
#: Those of them, and of the clamps, that are activation functions.
ACTIVATIONS = _names(
    "relu relu6 leaky_relu rrelu elu selu celu gelu silu mish hardswish tanh softsign tanhshrink hardshrink softshrink",
    "hardtanh prelu",
)
#: Element by element, f(0) is something else.
ZERO_GOES = _names(
    "sigmoid hardsigmoid logsigmoid softplus exp exp2 cos cosh erfc expit rsqrt reciprocal log log2 log10",
)
#: Element by element, f(0) = 0 if the bounds say so.
CLAMPS = _names("hardtanh clamp clip")
ADDITIVE = _names("add sub subtract radd iadd isub rsub maximum minimum")
MULTIPLICATIVE = _names("mul multiply rmul imul")
DIVISION = _names("div divide true_divide truediv itruediv")
CONCATENATIONS = _names("cat concat concatenate")
#: Functions of the last 1, 2 or 3 axes, zero stays.
POOLS = {
    f"{kind}{axes}d": axes
    for axes in (1, 2, 3)
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
}
RESIZERS = _names("interpolate upsample")
#: Functions that only move elements about; what they do to channels is seen by running them on numbered channels.
MOVES = _names(
    "view reshape view_as reshape_as flatten unflatten permute transpose swapaxes swapdims t T mT movedim moveaxis",
    "unsqueeze squeeze expand expand_as getitem chunk split tensor_split unbind narrow select repeat tile roll flip",
    "repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle broadcast_to",
)
#: Moves that need real memory, and whose arguments are the sizes of their result.
SHAPED = _names("view reshape")
SIZED = SHAPED | _names("expand broadcast_to")
#: Functions of whole axes, zero stays.
REDUCTIONS = _names("mean sum amax amin")
#: Functions in which the places on some axes act on each other; whether zero stays.
MIXERS = {"softmax": False, "log_softmax": False, "layer_norm": False, "rms_norm": True, "normalize": True}
PRODUCTS = _names("matmul bmm mm rmatmul")
#: Layers, with the number of spatial axes where they have them.
CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
TRANSPOSED = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
NORMS = _names("batch_norm instance_norm")
#: Functions that keep shape and type, which PyTorch runs in slow Python where tensors have no values.
SLOW_WITHOUT_VALUES = NORMS | _names("layer_norm group_norm hardtanh hardsigmoid hardswish gelu")
#: Functions that turn a tensor into Python: what follows may depend on the data, so one run does not tell.
CASTS = _names("bool int float complex")  # also names of functions that return tensors
LEAVES_TORCH = _names("bool int float index complex item tolist numpy array is_nonzero equal allclose")
