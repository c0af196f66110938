"""Activations of the experts and their derivatives, in plain torch operations.

A gated activation takes [n, 2I], the gate half first or gate and up interleaved, and gives act(gate) * up, [n, I];
swiglu_oai gives act(gate) * (up + 1). An ungated activation keeps the width.
Everything is computed in the dtype that comes in: callers that store bf16 or fp16 widen to fp32 first.
"""

import math

import torch
import torch.nn.functional as F

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai")
UNGATED = ("silu", "gelu", "relu", "relu2")
ACTIVATIONS = GATED + UNGATED
CLAMPED = ("swiglu", "swiglu_oai")  # those with a limit
SWIGLU_OAI_ALPHA = 1.702  # gpt-oss's


def is_gated(activation):
    """Whether the first projection of this activation has two halves, gate and up."""
    return activation in GATED


def pre_activation_width(intermediate_size, activation):
    """Columns of the first projection: 2I for a gated activation, I for an ungated one."""
    return 2 * intermediate_size if is_gated(activation) else intermediate_size


def _silu_derivative(x):
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_derivative(x):
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


def _gelu_tanh_derivative(x):
    a, b = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(a * (x + b * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * a * (1 + 3 * b * x * x)


def _step(x):
    return (x > 0).to(x.dtype)


# name: (function of one value, its derivative); a gated activation applies it to the gate half
_SCALAR = {
    "swiglu": (F.silu, _silu_derivative),
    "geglu": (F.gelu, _gelu_derivative),
    "geglu_tanh": (lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_derivative),
    "reglu": (F.relu, _step),
    "silu": (F.silu, _silu_derivative),
    "gelu": (F.gelu, _gelu_derivative),
    "relu": (F.relu, _step),
    "relu2": (lambda x: F.relu(x).square(), lambda x: 2 * F.relu(x)),
}


def _functions(activation, swiglu_alpha):
    """(the function of one value, its derivative)."""
    if activation != "swiglu_oai":
        return _SCALAR[activation]

    def derivative(x):
        s = torch.sigmoid(swiglu_alpha * x)
        return s * (1 + swiglu_alpha * x * (1 - s))

    return lambda x: x * torch.sigmoid(swiglu_alpha * x), derivative


def _gate_and_up(pre, is_concatenated):
    return pre.chunk(2, dim=-1) if is_concatenated else (pre[..., ::2], pre[..., 1::2])


def activate(pre, activation, swiglu_limit=None, swiglu_alpha=SWIGLU_OAI_ALPHA, is_concatenated=True):
    """Activation of pre-activations.

    swiglu: silu(gate) * up; swiglu_oai: gate * sigmoid(swiglu_alpha * gate) * (up + 1). With a limit L the gate is
    clamped above at L and up to [-L, L] first.

    Args:
        pre: [n, W] fp32 or fp64; W = 2I gated, I ungated.
        is_concatenated: the gate half first; else gate and up take turns, column by column.
    Returns: [n, I] in the dtype of pre.
    Source: the limit, DeepSeek-V4; swiglu_oai, gpt-oss.
    """
    function, _ = _functions(activation, swiglu_alpha)
    if not is_gated(activation):
        return function(pre)
    gate, up = _gate_and_up(pre, is_concatenated)
    if swiglu_limit is not None:
        gate, up = gate.clamp(max=swiglu_limit), up.clamp(-swiglu_limit, swiglu_limit)
    return function(gate) * (up + 1 if activation == "swiglu_oai" else up)


def activate_backward(grad, pre, activation, swiglu_limit=None, swiglu_alpha=SWIGLU_OAI_ALPHA, is_concatenated=True):
    """Gradient of `activate` for its input, [n, W]; grad: [n, I]. A clamp passes a gradient inside and at its limit."""
    function, derivative = _functions(activation, swiglu_alpha)
    if not is_gated(activation):
        return grad * derivative(pre)
    gate, up = _gate_and_up(pre, is_concatenated)
    gate_passes = up_passes = 1
    if swiglu_limit is not None:
        gate_passes, up_passes = gate <= swiglu_limit, up.abs() <= swiglu_limit
        gate, up = gate.clamp(max=swiglu_limit), up.clamp(-swiglu_limit, swiglu_limit)
    factor = up + 1 if activation == "swiglu_oai" else up
    grad_gate = grad * factor * derivative(gate) * gate_passes
    grad_up = grad * function(gate) * up_passes
    return torch.cat([grad_gate, grad_up], dim=-1) if is_concatenated else torch.stack(
        [grad_gate, grad_up], dim=-1).flatten(-2)
