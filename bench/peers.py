"""The other implementations of the layer that are measured beside ours, each only where it is installed.

A peer is bound to a case's `Inputs` once, outside the timing, and is then a function of no arguments that returns the
layer's output; its graph reaches the leaves of those inputs, so that it trains.
"""

import importlib.util
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from .inputs import DTYPES
from .kernel_peers import bind_sonic_moe, bind_triton_kernels, bind_vllm

OURS = "moe_kernels"
HALVES = (DTYPES["bf16"], DTYPES["fp16"])
REFERENCE_PEER = "hf_grouped_mm"  # the one that README compares with


class Peer(NamedTuple):
    """bind(inputs) -> function; weights_like_hidden: it gets topk_weights in the dtype of hidden_states.

    capture: in which dtypes into a CUDA graph. trains: whether it has a backward.
    """

    name: str
    bind: Callable
    available: Callable = lambda: True
    capture: tuple = (torch.bfloat16,)  # torch's grouped product reads its offsets on the host in others
    weights_like_hidden: bool = True
    ids_dtype: torch.dtype = torch.int64
    trains: bool = True

    def inputs(self, inputs):
        """The inputs with the routing as this peer's own router gives it."""
        dtype = inputs.hidden_states.dtype if self.weights_like_hidden else torch.float32
        return inputs.with_routing_types(dtype, self.ids_dtype)


def bind_ours(inputs):
    """The layer of this package."""
    import moe_kernels

    hidden, gate_up, down, weights, ids = inputs[:5]
    return lambda: moe_kernels.fused_experts(hidden, gate_up, down, weights, ids)


def bind_torch_grouped_mm(inputs):
    """Sort by expert, gather, two `torch.nn.functional.grouped_mm`, weigh, put back in order, sum over the slots.

    The way Hugging Face transformers composes it, for machines without transformers.
    """
    hidden, gate_up, down, weights, ids = inputs[:5]
    num_tokens, top_k = ids.shape
    num_experts = gate_up.shape[0]

    def layer():
        order = torch.argsort(ids.reshape(-1))
        counts = torch.histc(ids.reshape(-1).to(torch.int32 if ids.is_cuda else torch.float32), num_experts, 0,
                             num_experts - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(hidden[order // top_k], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        rows = rows * weights.reshape(-1)[order, None]
        position = torch.empty_like(order)
        position[order] = torch.arange(order.numel(), device=order.device)
        return rows[position].view(num_tokens, top_k, -1).sum(1)

    return layer


def bind_torch_loop(inputs):
    """A loop over the experts; reads the routing on the host."""
    hidden, gate_up, down, weights, ids = inputs[:5]

    def layer():
        output = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for expert in range(gate_up.shape[0]):
            tokens, slots = torch.where(ids == expert)
            gate, up = F.linear(hidden[tokens], gate_up[expert]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, down[expert]) * weights[tokens, slots, None]
            output = output.index_add(0, tokens, rows.float())
        return output.to(hidden.dtype)

    return layer


def hugging_face_experts(num_experts, hidden_size, width, top_k, implementation):
    """transformers' Qwen3MoeExperts with one of its own experts implementations; its weights are on the meta device."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=hidden_size, moe_intermediate_size=width, num_experts=num_experts,
                            num_experts_per_tok=top_k)
    config._experts_implementation = implementation
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


def bind_hugging_face(implementation):
    """Hugging Face's experts around the same weights."""
    def bind(inputs):
        hidden, gate_up, down, weights, ids = inputs[:5]
        experts = hugging_face_experts(*down.shape, ids.shape[1], implementation)
        experts.gate_up_proj, experts.down_proj = gate_up, down
        return lambda: experts(hidden, ids, weights)

    return bind


def bind_hugging_face_compiled(inputs):
    """The same, traced by torch.compile; compiling takes about half a minute a case."""
    return torch.compile(bind_hugging_face("grouped_mm")(inputs), dynamic=False)


def _installed(*modules):
    return lambda: all(importlib.util.find_spec(module) is not None for module in modules)


def _installed_for_a_gpu(*modules):
    return lambda: torch.cuda.is_available() and _installed(*modules)()


PEERS = {peer.name: peer for peer in (
    Peer(REFERENCE_PEER, bind_hugging_face("grouped_mm"), _installed("transformers")),
    Peer("hf_grouped_mm_compiled", bind_hugging_face_compiled, _installed("transformers")),
    Peer("hf_eager", bind_hugging_face("eager"), _installed("transformers"), capture=()),
    Peer("torch_grouped_mm", bind_torch_grouped_mm, lambda: hasattr(F, "grouped_mm")),
    Peer("torch_loop", bind_torch_loop, capture=(), weights_like_hidden=False),
    Peer("sonic_moe", bind_sonic_moe(interleaved=False), _installed_for_a_gpu("sonicmoe"), HALVES, False, torch.int32),
    Peer("sonic_moe_interleaved", bind_sonic_moe(interleaved=True), _installed_for_a_gpu("sonicmoe"), HALVES, False,
         torch.int32, trains=False),
    Peer("triton_kernels", bind_triton_kernels, _installed_for_a_gpu("triton", "triton_kernels"), HALVES, False,
         torch.int16, trains=False),
    Peer("vllm", bind_vllm, _installed_for_a_gpu("vllm"), HALVES, False, torch.int32, trains=False),
)}


def select(names):
    """The peers to measure.

    Args:
        names: "auto" (Hugging Face's grouped_mm where transformers is installed, else torch's), "all", "none", or names
            joined by commas.
    Returns: list of Peer, without those that are not installed.
    Raises: ValueError on an unknown name; the message lists those that there are.
    """
    if names == "auto":
        chosen = [name for name in (REFERENCE_PEER, "torch_grouped_mm") if PEERS[name].available()][:1]
    elif names == "all":
        chosen = [name for name in PEERS if PEERS[name].available()]
    else:
        chosen = [] if names == "none" else names.split(",")
    unknown = [name for name in chosen if name not in PEERS]
    if unknown:
        raise ValueError(f"--peers wants auto, all, none or some of {', '.join(PEERS)}; got {', '.join(unknown)}")
    return [PEERS[name] for name in chosen if PEERS[name].available()]
