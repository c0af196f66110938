"""Random weights, tokens and routing of a case, and the layer as each pass calls it.

Everything is drawn from a generator of its own: a CUDA graph capture that failed can leave torch's default generator
unusable, and the same seed gives every run the same routing.
"""

from typing import NamedTuple

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Inputs(NamedTuple):
    """What a layer is called with. The weights are torch.nn.Parameters, so that a module can hold them as they are.

    hidden_states, grad_output: [T, H]. gate_up_proj: [E, 2I, H]. down_proj: [E, H, I]. topk_weights, topk_ids: [T, K].
    """

    hidden_states: torch.Tensor
    gate_up_proj: torch.nn.Parameter
    down_proj: torch.nn.Parameter
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    grad_output: torch.Tensor

    @property
    def leaves(self):
        """The four tensors that get gradients."""
        return self.hidden_states, self.gate_up_proj, self.down_proj, self.topk_weights

    def training(self):
        """The same storage as leaves of a graph."""
        weights = (torch.nn.Parameter(weight.data) for weight in (self.gate_up_proj, self.down_proj))
        return Inputs(self.hidden_states.detach().requires_grad_(), *weights,
                      self.topk_weights.detach().requires_grad_(), self.topk_ids, self.grad_output)

    def with_routing_types(self, weights_dtype, ids_dtype):
        """With topk_weights and topk_ids as another implementation's router gives them."""
        needs_grad = self.topk_weights.requires_grad
        weights = self.topk_weights.detach().to(weights_dtype).requires_grad_(needs_grad)
        return self._replace(topk_weights=weights, topk_ids=self.topk_ids.to(ids_dtype))


def make_generator(device, seed=0):
    """A generator on the device, independent of torch's default one."""
    return torch.Generator(device=device).manual_seed(seed)


def normal(shape, std, dtype, device, generator):
    """Drawn in place, so that 22 GB of weights need no second copy."""
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)


def make_weights(shape, dtype, device):
    """gate_up_proj [E, 2I, H] and down_proj [E, H, I], scaled so that pre-activations and outputs are of size 1."""
    generator = make_generator(device)
    hidden, width, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    gate_up = normal((experts, 2 * width, hidden), hidden ** -0.5, dtype, device, generator)
    down = normal((experts, hidden, width), width ** -0.5, dtype, device, generator)
    return (torch.nn.Parameter(gate_up, requires_grad=False), torch.nn.Parameter(down, requires_grad=False))


def make_routing(num_tokens, num_experts, top_k, device, routing="uniform"):
    """topk_weights [T, K] fp32 that sum to 1 for a token, and topk_ids [T, K] int32, distinct for a token.

    "uniform": every expert is as likely. "zipf": expert e with a probability proportional to 1 / (e + 1), drawn without
    replacement (Gumbel top-k). "same": all tokens choose the first K experts, each in an order of its own.
    """
    generator = make_generator(device, seed=1)
    uniform = torch.rand((num_tokens, num_experts), device=device, generator=generator).clamp_(1e-9, 1 - 1e-6)
    if routing == "zipf":
        log_probability = -torch.log(torch.arange(1, num_experts + 1, device=device, dtype=torch.float32))
        uniform = log_probability - torch.log(-torch.log(uniform))
    elif routing == "same":
        uniform[:, top_k:] = -1.0
    topk_ids = uniform.topk(top_k, dim=-1).indices.to(torch.int32)
    topk_weights = torch.rand((num_tokens, top_k), device=device, generator=generator) + 0.1
    return topk_weights / topk_weights.sum(-1, keepdim=True), topk_ids


def make_inputs(shape, num_tokens, weights, routing="uniform"):
    """The inputs of one case, with the weights that all cases of the shape share."""
    dtype, device = weights[0].dtype, weights[0].device
    generator = make_generator(device, seed=2)
    hidden, grad = (normal((num_tokens, shape.hidden_size), 1.0, dtype, device, generator) for _ in range(2))
    return Inputs(hidden, *weights, *make_routing(num_tokens, shape.num_experts, shape.top_k, device, routing), grad)


def forward_call(layer):
    """A function that runs the layer without a graph; `layer` takes no arguments."""
    def call():
        with torch.no_grad():
            return layer()
    return call


def train_call(layers, inputs):
    """A function that runs forward and backward of layers side by side, and returns the gradients of all leaves.

    inputs: of each layer; four leaves each, whose gradients follow one another.
    """
    leaves = [leaf for of_layer in inputs for leaf in of_layer.leaves]
    grads = [of_layer.grad_output for of_layer in inputs]
    return lambda: torch.autograd.grad([layer() for layer in layers], leaves, grads)


def layer_call(bind, inputs, train, layers=1):
    """The layer that bind(inputs) gives, as a pass calls it: a forward, or forward and backward with all gradients.

    layers: so many in one backward, each with leaves of its own.
    """
    if not train:
        return forward_call(bind(inputs))
    copies = [inputs.training() for _ in range(layers)]
    return train_call([bind(copy) for copy in copies], copies)
