"""Argument checks of the public functions. Each raises ValueError or TypeError that names the argument, what it wants
and what it got, before anything is launched."""

import typing

import torch

from .activation import ACTIVATIONS, CLAMPED, is_gated

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
MAX_ROWS = 2**31 - 1  # rows are numbered in int32


def _names(dtypes):
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _has_shape(x, shape):
    sizes = x.shape
    if len(sizes) != len(shape):
        return False
    for got, (_, size) in zip(sizes, shape):
        if size is not None and got != size:
            return False
    return True


def check_tensor(name, x, shape, dtypes, device=None):
    """A tensor with this many dimensions and, where shape has no None, these sizes; of one of dtypes, on device.

    shape: a tuple of (letter, size or None) pairs, such as (("T", None), ("H", 64)).
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} wants a tensor, got {type(x).__name__}")
    if not _has_shape(x, shape):
        wanted = "[" + ", ".join(letter if size is None else f"{letter}={size}" for letter, size in shape) + "]"
        raise ValueError(f"{name} wants shape {wanted}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} wants dtype {_names(dtypes)}, got {_names([x.dtype])}")
    if device is not None:
        if x.device != device:
            raise ValueError(f"{name} wants device {device}, got {x.device}")
    elif x.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} wants device cpu or cuda, got {x.device}")


def check_integer(name, value, lowest, highest=None):
    """An integer in [lowest, highest]."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} wants an integer, got {type(value).__name__}")
    if value < lowest or (highest is not None and value > highest):
        limit = f"at least {lowest}" if highest is None else f"{lowest} to {highest}"
        raise ValueError(f"{name} wants {limit}, got {value}")


def check_multiple_of_8(name, size):
    """The kernels move 16 bytes at a time, eight bf16 or fp16 elements."""
    if size % 8 != 0:
        raise ValueError(f"{name} wants a multiple of 8 for the CUDA kernels, got {size}")


def check_choice(name, value, choices):
    """One of a list of names."""
    if value not in choices:
        raise ValueError(f"{name} wants one of {', '.join(choices)}, got {value!r}")


def check_num_rows(num_tokens, top_k):
    """T*K fits in int32. Not asked while a graph is traced, which it would tie to sizes: the operators ask again."""
    if not torch.compiler.is_compiling() and num_tokens * top_k > MAX_ROWS:
        raise ValueError(f"topk_ids wants T*K below 2^31 rows, got {num_tokens} * {top_k}")


def check_number(name, value):
    """An int or a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} wants a number, got {type(value).__name__}")


def _check_positive(name, value):
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} wants a number above 0, got {value}")


def check_fields(options):
    """Every field of a dataclass is of its annotated type; an int is also a float, a bool is neither of them."""
    for name, kind in typing.get_type_hints(type(options)).items():
        value = getattr(options, name)
        fits = isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))
        if not fits or (isinstance(value, bool) and kind is not bool):
            wanted = kind.__name__ if isinstance(kind, type) else kind
            raise TypeError(f"{name} wants {wanted}, got {type(value).__name__}")


def check_activation(activation, swiglu_limit, swiglu_alpha=None):
    """A known activation; a positive limit, with swiglu and swiglu_oai alone; a positive alpha, with the latter."""
    check_choice("activation", activation, ACTIVATIONS)
    if swiglu_limit is not None:
        if activation not in CLAMPED:
            raise ValueError(f"swiglu_limit wants activation 'swiglu' or 'swiglu_oai', got {activation!r}")
        _check_positive("swiglu_limit", swiglu_limit)
    if swiglu_alpha is not None:
        if activation != "swiglu_oai":
            raise ValueError(f"swiglu_alpha wants activation 'swiglu_oai', got {activation!r}")
        _check_positive("swiglu_alpha", swiglu_alpha)


def check_layout(activation, is_transposed, is_concatenated):
    """A layout of the weights that is served: the default, or transposed, with gate and up interleaved or not."""
    if is_transposed and activation not in CLAMPED:
        raise ValueError(f"is_transposed wants activation 'swiglu' or 'swiglu_oai', got {activation!r}")
    if not is_concatenated and not is_transposed:
        raise ValueError("is_concatenated wants True where is_transposed is False, got False")


def check_groups(num_experts, top_k, num_expert_groups, topk_groups):
    """Groups divide the experts, and those that are kept hold at least top_k of them."""
    check_integer("num_expert_groups", num_expert_groups, 1, num_experts)
    if num_experts % num_expert_groups != 0:
        raise ValueError(f"num_expert_groups wants a divisor of {num_experts} experts, got {num_expert_groups}")
    check_integer("topk_groups", topk_groups, 1, num_expert_groups)
    available = topk_groups * (num_experts // num_expert_groups)
    if top_k > available:
        raise ValueError(f"topk_groups wants groups that hold top_k={top_k} experts, got {topk_groups} of {available}")


def check_topk(topk_weights, topk_ids, num_tokens, dtype, device):
    """Routing of T tokens: weights fp32 (fp64 with fp64 rows) and ids, both [T, K]. Weights may be None."""
    check_tensor("topk_ids", topk_ids, (("T", num_tokens), ("K", None)), INDEX_DTYPES, device)
    check_integer("the last size of topk_ids", topk_ids.shape[1], 1)
    check_num_rows(*topk_ids.shape)
    if topk_weights is not None:
        dtypes = (torch.float32, torch.float64) if dtype == torch.float64 else (torch.float32,)
        check_tensor("topk_weights", topk_weights, (("T", num_tokens), ("K", topk_ids.shape[1])), dtypes, device)


def check_experts(hidden_states, gate_up_proj, down_proj, gate_up_bias, down_bias, activation, is_transposed):
    """Shapes, dtypes and devices of the experts' tensors; hidden_states says what the others must be."""
    check_tensor("hidden_states", hidden_states, (("T", None), ("H", None)), FLOAT_DTYPES)
    dtype, device, hidden_size = (hidden_states.dtype,), hidden_states.device, hidden_states.shape[1]
    halves = 2 if is_gated(activation) else 1
    width = "2I" if halves == 2 else "I"
    inner, outer = ("H", hidden_size), (width, None)
    shape = (("E", None), *((inner, outer) if is_transposed else (outer, inner)))
    check_tensor("gate_up_proj", gate_up_proj, shape, dtype, device)
    num_experts, columns = gate_up_proj.shape[0], gate_up_proj.shape[2 if is_transposed else 1]
    check_integer("the first size of gate_up_proj", num_experts, 1)
    if columns % halves != 0:
        raise ValueError(f"gate_up_proj wants two halves for activation {activation!r}, got {columns} "
                         f"{'columns' if is_transposed else 'rows'} an expert")
    inner, outer = ("I", columns // halves), ("H", hidden_size)
    shape = (("E", num_experts), *((inner, outer) if is_transposed else (outer, inner)))
    check_tensor("down_proj", down_proj, shape, dtype, device)
    if gate_up_bias is not None:
        check_tensor("gate_up_bias", gate_up_bias, (("E", num_experts), (width, columns)), dtype, device)
    if down_bias is not None:
        check_tensor("down_bias", down_bias, (("E", num_experts), ("H", hidden_size)), dtype, device)


def experts_fit(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, gate_up_bias, down_bias, activation,
                is_transposed):
    """Whether `check_experts` and `check_topk` would pass, asked in 2 microseconds instead of 6.

    False may also mean an argument that is only unusual: then those two decide, and say what is wrong.
    """
    try:
        (num_tokens, hidden_size), num_experts, ids_shape = hidden_states.shape, gate_up_proj.shape[0], topk_ids.shape
        dtype, device, (ids_tokens, top_k) = hidden_states.dtype, hidden_states.device, ids_shape
        if is_transposed:
            width, intermediate_size = gate_up_proj.shape[2], down_proj.shape[1]
            shapes = (num_experts, hidden_size, width), (num_experts, intermediate_size, hidden_size)
        else:
            width, intermediate_size = gate_up_proj.shape[1], down_proj.shape[2]
            shapes = (num_experts, width, hidden_size), (num_experts, hidden_size, intermediate_size)
        return (
            dtype in FLOAT_DTYPES and (hidden_states.is_cuda or hidden_states.is_cpu)
            and num_experts > 0 and width == (2 * intermediate_size if is_gated(activation) else intermediate_size)
            and gate_up_proj.shape == shapes[0] and down_proj.shape == shapes[1]
            and ids_tokens == num_tokens and top_k > 0 and num_tokens * top_k <= MAX_ROWS
            and topk_ids.dtype in INDEX_DTYPES and topk_weights.shape == ids_shape
            and topk_weights.dtype is torch.float32
            and gate_up_proj.dtype is dtype and down_proj.dtype is dtype
            and gate_up_proj.device == device and down_proj.device == device
            and topk_weights.device == device and topk_ids.device == device
            and (gate_up_bias is None or (gate_up_bias.shape == (num_experts, width) and gate_up_bias.dtype is dtype
                                          and gate_up_bias.device == device))
            and (down_bias is None or (down_bias.shape == (num_experts, hidden_size) and down_bias.dtype is dtype
                                       and down_bias.device == device)))
    except (AttributeError, IndexError, TypeError, ValueError):
        return False


def check_grad_buffers(grad_buffers, gate_up_proj, down_proj, is_transposed=False):
    """A pair of buffers for the weight gradients, each None or fp32 (fp64 with fp64 weights) in its weight's shape."""
    if not isinstance(grad_buffers, (tuple, list)) or len(grad_buffers) != 2:
        got = f"{len(grad_buffers)} of them" if isinstance(grad_buffers, (tuple, list)) else type(grad_buffers).__name__
        raise TypeError(f"grad_buffers wants a pair (gate_up_grad, down_grad), got {got}")
    letters = (("E", "H", "2I"), ("E", "I", "H")) if is_transposed else (("E", "2I", "H"), ("E", "H", "I"))
    for i, (buffer, weight) in enumerate(zip(grad_buffers, (gate_up_proj, down_proj))):
        if buffer is None:
            continue
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        name, shape = f"grad_buffers[{i}]", tuple(zip(letters[i], weight.shape))
        check_tensor(name, buffer, shape, (dtype,), weight.device)
        if not buffer.is_contiguous():
            raise ValueError(f"{name} wants contiguous memory, got strides {list(buffer.stride())}")
        if buffer.requires_grad:
            raise ValueError(f"{name} wants a tensor without requires_grad, got one with it")
        if buffer.is_cuda and not torch.compiler.is_compiling() and buffer.data_ptr() % 16:
            raise ValueError(f"{name} wants memory that begins at a multiple of 16 bytes, got {buffer.data_ptr():#x}")
