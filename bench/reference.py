"""The layer in fp64 for a few tokens and one expert, so that a kernel that is fast and wrong is noticed."""

import torch
import torch.nn.functional as F

from . import inputs as inputs_module

SAMPLED_TOKENS = 8
# Measured peers lie at 0.003 to 0.005 in bf16: three roundings of 2^-9. Gradients pass through two more.
TOLERANCE = {torch.bfloat16: (0.01, 0.02), torch.float16: (0.002, 0.004), torch.float32: (1e-5, 1e-4)}


class WrongResult(Exception):
    """An implementation's result is further from the reference than its dtype explains."""


def relative_error(result, reference):
    """The largest, over the first dimension, of |result - reference| / |reference| (Euclidean)."""
    difference = (result.double() - reference).flatten(1).norm(dim=1)
    error = (difference / reference.flatten(1).norm(dim=1).clamp_min(1e-30)).max().item()
    return error if error == error else float("inf")


def sampled_tokens(num_tokens):
    """The first, the last, and some between."""
    return sorted({index * (num_tokens - 1) // (SAMPLED_TOKENS - 1) for index in range(SAMPLED_TOKENS)})


def _expert(hidden, gate_up, down):
    gate, up = F.linear(hidden, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def reference_tokens(inputs, tokens):
    """Output and input gradient of these tokens: [n, H] and [n, H] fp64, of leaves in any dtype."""
    hidden = inputs.hidden_states.detach()[tokens].double().requires_grad_()
    weights = inputs.topk_weights.detach()[tokens].double()
    slots = [[] for _ in tokens]
    for position, ids in enumerate(inputs.topk_ids[tokens].tolist()):
        for slot, expert in enumerate(ids):
            gate_up, down = inputs.gate_up_proj[expert].detach().double(), inputs.down_proj[expert].detach().double()
            row = _expert(hidden[position], gate_up, down) * weights[position, slot]
            # one row at a time, so that two experts are never held in fp64
            gradient, = torch.autograd.grad(row, hidden, inputs.grad_output[tokens[position]].double())
            slots[position].append((row.detach(), gradient[position]))
    return tuple(torch.stack([sum(pair[part] for pair in row) for row in slots]) for part in (0, 1))


def reference_expert(inputs, expert):
    """The weight gradients of one expert: [2I, H] and [H, I] fp64."""
    tokens, slots = torch.where(inputs.topk_ids == expert)
    gate_up, down = (weight[expert].detach().double().requires_grad_()
                     for weight in (inputs.gate_up_proj, inputs.down_proj))
    rows = _expert(inputs.hidden_states.detach()[tokens].double(), gate_up, down)
    rows = rows * inputs.topk_weights.detach()[tokens, slots, None].double()
    return torch.autograd.grad(rows, (gate_up, down), inputs.grad_output[tokens].double())


def _check(name, result, reference, tolerance):
    error = relative_error(result, reference)
    if not error <= tolerance:
        raise WrongResult(f"{name} is off by {error:.2g} relative to fp64; {tolerance} is allowed")
    return error


def check_layer(inputs, bind, train=False):
    """Compares one call of a layer with the reference.

    Args:
        inputs: of a case. bind: of a Peer. train: whether the gradients are compared too.
    Returns: the largest relative error of the sampled tokens (train: and of their gradients, and of one expert's).
    Raises: WrongResult.
    """
    tokens = sampled_tokens(inputs.hidden_states.shape[0])
    forward_tolerance, gradient_tolerance = TOLERANCE[inputs.hidden_states.dtype]
    output, gradient = reference_tokens(inputs, tokens)
    if not train:
        result = inputs_module.forward_call(bind(inputs))()
        return _check("the output", result[tokens], output, forward_tolerance)
    expert = int(inputs.topk_ids[0, 0])
    references = (gradient, *reference_expert(inputs, expert))
    leaves = inputs.training()
    hidden, gate_up, down, _ = inputs_module.train_call([bind(leaves)], [leaves])()
    results = (hidden[tokens], gate_up[expert], down[expert])
    names = ("the gradient of hidden_states", "the gradient of gate_up_proj", "the gradient of down_proj")
    # a weight gradient is one matrix, not a row a token
    results = (results[0], *(result[None] for result in results[1:]))
    references = (references[0], *(reference[None] for reference in references[1:]))
    return max(_check(*compared, gradient_tolerance) for compared in zip(names, results, references))
