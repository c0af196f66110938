"""The backend "moe_kernels" of transformers' experts interface, which its MoE models call in place of their own loop.

An experts module of transformers says how its weights lie (has_gate, has_bias, is_transposed, is_concatenated,
has_post_expert_norm) and holds its activation as `act_fn` and `_apply_gate`. `plan_of` decides how it is served:

    fused      one call of `fused_experts`: an activation that the kernels know, and weights [E, 2I, H] and [E, H, I];
               with silu and gpt-oss's activation also [E, H, 2I] and [E, I, H], with the latter
               gate and up also in turn
    unfused    make_plan -> permute -> grouped_mm -> the module's own activation -> grouped_mm -> unpermute

An activation is known by its code, never by its name alone: a module's `_apply_gate` must have the bytecode of one of
the forms below. Weights are used as they lie in either case, without a copy.
"""

import dis
import functools
import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import checks, ops
from ..activation import CLAMPED

NAME = "moe_kernels"
MINIMUM = "5.7"  # of transformers: the first whose models take backends that were registered


def is_experts(module):
    """Whether a module is an experts module of transformers' interface."""
    return isinstance(module, nn.Module) and all(hasattr(module, name) for name in ("is_transposed", "has_bias"))


def _norm_follows(module):
    return getattr(module, "has_post_expert_norm", False)  # older interfaces do not say it


# ------------------------------------------------------------------------------------- known forms of _apply_gate


def _plain(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


def _widened(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return (self.act_fn(gate.float()) * up.float()).to(gate.dtype)


def _clamped(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    return self.act_fn(gate) * up


def _clamped_silu(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(min=None, max=self.swiglu_limit)
    up = up.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
    return F.silu(gate) * up


def _oai(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(min=None, max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    glu = gate * torch.sigmoid(gate * self.alpha)
    gated_output = (up + 1) * glu
    return gated_output


def _oai_interleaved(self, gate_up):
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate = gate.clamp(min=None, max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    glu = gate * torch.sigmoid(gate * self.alpha)
    gated_output = (up + 1) * glu
    return gated_output


class Form(NamedTuple):
    """activation: None where it is act_fn's; limit, alpha: the attributes that hold them, or None."""

    activation: str | None = None
    limit: str | None = None
    alpha: str | None = None
    is_concatenated: bool = True


FORMS = {_plain: Form(), _widened: Form(), _clamped: Form(limit="limit"),
         _clamped_silu: Form("swiglu", "swiglu_limit"), _oai: Form("swiglu_oai", "limit", "alpha"),
         _oai_interleaved: Form("swiglu_oai", "limit", "alpha", is_concatenated=False)}


def _instructions(function):
    """What the bytecode does: names and constants by value, local variables by place, globals by what they are."""
    steps = []
    for step in dis.get_instructions(function):
        value = step.argval
        if "FAST" in step.opname:
            value = step.arg
        elif step.opname == "LOAD_GLOBAL":
            value = (step.argval, function.__globals__.get(step.argval))
        elif step.opname == "KW_NAMES":  # of which dis of Python 3.11 tells no value
            value = function.__code__.co_consts[step.arg]
        steps.append((step.opname, value))
    return steps


@functools.cache
def _form_of_function(function):
    if not inspect.isfunction(function) or function.__closure__:
        return None
    code = _instructions(function)
    return next((form for form in FORMS if _instructions(form) == code), None)


@torch.compiler.assume_constant_result
def _form_of(module_class):
    """The value in FORMS of the class's `_apply_gate`, or None for one that is not known."""
    return FORMS.get(_form_of_function(module_class._apply_gate))


# classes of torch.nn and transformers.activations; exactly these compute the function, a subclass may not
_CLASSES = {"SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh",
            "PytorchGELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh", "ReLU": "relu",
            "ReLUSquaredActivation": "relu2"}
_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
_UNGATED = {"silu": "silu", "gelu": "gelu", "relu": "relu", "relu2": "relu2"}


@functools.cache
def _names_of_classes():
    from transformers import activations

    found = {getattr(module, name, None): scalar for module in (nn, activations) for name, scalar in _CLASSES.items()}
    return {key: scalar for key, scalar in found.items() if key is not None}


@torch.compiler.assume_constant_result
def _name_of_class(activation_class):
    return _names_of_classes().get(activation_class)


def _is_changed(act_fn):
    """Whether somebody has put another forward, or hooks, on this one object."""
    return "forward" in act_fn.__dict__ or bool(act_fn._forward_hooks) or bool(act_fn._forward_pre_hooks)


def _scalar_name(act_fn):
    """silu, gelu, gelu_tanh, relu, relu2, or None for what is none of them."""
    if isinstance(act_fn, nn.Module):
        if _is_changed(act_fn):
            return None
        if type(act_fn) is nn.GELU:
            return "gelu_tanh" if act_fn.approximate == "tanh" else "gelu"
        return _name_of_class(type(act_fn))
    for function, name in _FUNCTIONS.items():
        if act_fn is function:
            return name
    return None


# ------------------------------------------------------------------------------------------------- how it is served


def _called(act_fn):
    return type(act_fn).__name__ if isinstance(act_fn, nn.Module) else getattr(act_fn, "__name__", str(act_fn))


def _activation_of(module):
    """({"activation", "swiglu_limit", "swiglu_alpha"} as `fused_experts` takes them, None), or (None, why not)."""
    if not module.has_gate:
        name = _UNGATED.get(_scalar_name(module.act_fn))
        return ({"activation": name}, None) if name else (None, f"activation {_called(module.act_fn)}")
    form = None if "_apply_gate" in module.__dict__ else _form_of(type(module))
    if form is None or form.is_concatenated != module.is_concatenated:
        return None, "an _apply_gate of its own"
    name = form.activation or _GATED.get(_scalar_name(module.act_fn))
    if name is None:
        return None, f"activation {_called(module.act_fn)}"
    options = {"activation": name}
    for option, attribute in (("limit", form.limit), ("alpha", form.alpha)):
        if attribute is None:
            continue
        value = getattr(module, attribute)
        if name not in CLAMPED or not isinstance(value, (int, float)) or not value > 0:
            return None, f"{'a limit' if option == 'limit' else 'an alpha'} of {value} on {name}"
        options[f"swiglu_{option}"] = float(value)
    return options, None


def plan_of(module):
    """How an experts module of transformers is served.

    Returns: ("fused", the options of `fused_experts` for it) or ("unfused", the reasons in words).
    """
    options, unknown = _activation_of(module)
    reasons = [unknown] if unknown else []
    if module.is_transposed:
        if not unknown and options["activation"] not in CLAMPED:
            reasons.append(f"transposed weights with {options['activation']}")
        options = {**(options or {}), "is_transposed": True}
    if module.has_gate and not module.is_concatenated:
        if not module.is_transposed:
            reasons.append("interleaved gate and up in rows")
        options = {**(options or {}), "is_concatenated": False}
    if _norm_follows(module):
        reasons.append("a norm after each expert")
    return ("unfused", ", ".join(reasons)) if reasons else ("fused", options)


def describe(options):
    """The options of `plan_of` in words: "swiglu_oai, limit 7, alpha 1.702, transposed, interleaved"."""
    words = [options["activation"]]
    words += [f"{name} {options[f'swiglu_{name}']:g}" for name in ("limit", "alpha") if f"swiglu_{name}" in options]
    words += ["transposed"] * options.get("is_transposed", False)
    words += ["interleaved"] * (not options.get("is_concatenated", True))
    return ", ".join(words)


# ---------------------------------------------------------------------------------------------------- the forward


def _local(tensor):
    """The part of a DTensor that is on this rank; what is no DTensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def weights_of(module):
    """(gate_up_proj or up_proj, down_proj, their biases or None, None) of an experts module."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    biases = (_local(getattr(module, f"{up}_bias")), _local(module.down_proj_bias)) if module.has_bias else (None, None)
    return _local(getattr(module, up)), _local(module.down_proj), *biases


def experts_forward(module, hidden_states, top_k_index, top_k_weights):
    """The forward of an experts module, as transformers' interface calls it.

    Args:
        module: an experts module with the attributes of `use_experts_implementation`.
        hidden_states: [T, H]; cast to the dtype of the weights.
        top_k_index: [T, K] int32 or int64; an id outside [0, E), a sentinel of expert parallelism, contributes nothing.
        top_k_weights: [T, K] of any floating dtype; multiplied in fp32.
    Returns: [T, H] in the dtype of hidden_states.
    Raises: TypeError on weights of another dtype, such as fp8; ValueError, TypeError of `fused_experts` or `grouped_mm`
        on what they do not take.
    """
    up, down, up_bias, down_bias = weights_of(module)
    if up.dtype not in checks.FLOAT_DTYPES:
        got = str(up.dtype).removeprefix("torch.")
        raise TypeError(f"{type(module).__name__} with experts_implementation '{NAME}' wants weights of dtype float32, "
                        f"float64, bfloat16 or float16, got {got}: 'eager' may take them")
    x = hidden_states.to(up.dtype)
    weights = top_k_weights if x.dtype == top_k_weights.dtype == torch.float64 else top_k_weights.float()
    route, detail = plan_of(module)
    if route == "fused":
        output = ops.fused_experts(x, up, down, weights, top_k_index, gate_up_bias=up_bias, down_bias=down_bias,
                                   **detail)
        return output.to(hidden_states.dtype)
    (x,) = ops._autocast(x)  # before its rows are copied
    plan = ops.make_plan(top_k_index, up.shape[0])
    transpose_b = not module.is_transposed
    rows = ops.grouped_mm(ops.permute(x, plan), up, plan.expert_offsets, up_bias, transpose_b)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = ops.grouped_mm(rows, down, plan.expert_offsets, down_bias, transpose_b)
    if _norm_follows(module):
        rows = module.post_expert_norm(rows)
    return ops.unpermute(rows, plan, weights).to(hidden_states.dtype)


# ------------------------------------------------------------------------------------------------------ registration


def experts_interface():
    """transformers' ALL_EXPERTS_FUNCTIONS; ImportError in one line where it is missing or too old."""
    wanted = f"moe_kernels.hf wants transformers {MINIMUM} or newer"
    install = f"pip install -U 'transformers>={MINIMUM}'"
    try:
        import transformers
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError) or error.name != "transformers":
            raise ImportError(f"{wanted}, and importing it fails: {' '.join(str(error).split())}") from error
        raise ImportError(f"{wanted}, which is not installed: {install}") from error
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

        is_new = "is_concatenated" in inspect.signature(use_experts_implementation).parameters
    except ImportError:
        is_new = False
    if not is_new:
        raise ImportError(f"{wanted}, got {transformers.__version__}, whose models take no other experts: {install}")
    return ALL_EXPERTS_FUNCTIONS


def register():
    """Adds the backend "moe_kernels" to transformers.

    After it `from_pretrained(..., experts_implementation="moe_kernels")` and
    `model.set_experts_implementation("moe_kernels")` work for every model with `use_experts_implementation`.

    Raises: ImportError where transformers is missing or too old.
    """
    experts_interface().register(NAME, experts_forward)
