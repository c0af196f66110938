"""Kernels of others: SonicMoE's, OpenAI's triton_kernels, vLLM's fused MoE. For `peers.py`.

What a peer wants laid out otherwise is copied when it is bound, outside the timing; it sorts the routing inside.
"""

import torch


def interleave(gate_up):
    """A copy of [E, 2I, H] in which gate's and up's rows take turns."""
    num_experts, rows, hidden_size = gate_up.shape
    return gate_up.detach().view(num_experts, 2, rows // 2, hidden_size).transpose(1, 2).reshape(gate_up.shape)


def bind_sonic_moe(interleaved):
    """SonicMoE behind its router, with our order of gate and up (its concat_layout), or interleaved: with its own.

    Its gradients of interleaved weights would have to be copied into our order, so that those only run forward.
    """
    def bind(inputs):
        from sonicmoe.enums import ActivationType
        from sonicmoe.functional import TC_topk_router_metadata_triton, _DownProjection, _UpProjection

        hidden, gate_up, down, weights, ids = inputs[:5]
        gate_up = interleave(gate_up) if interleaved else gate_up
        (num_tokens, top_k), num_experts = ids.shape, down.shape[0]
        slots, swiglu = num_tokens * top_k, ActivationType.SWIGLU

        def layer():
            counts, starts, tokens, order, places = (
                torch.empty(size, dtype=torch.int32, device=hidden.device)
                for size in (num_experts, num_experts + 1, slots, slots, slots))
            TC_topk_router_metadata_triton(ids, num_experts, counts, starts, tokens, order, places)
            routing = (tokens, order, places, None, False, swiglu)  # None, False: every token has top_k experts
            rows, before_activation = _UpProjection.apply(
                hidden, gate_up.permute(1, 2, 0), None, starts, slots, top_k, *routing, not torch.is_grad_enabled(),
                not interleaved)
            return _DownProjection.apply(rows, before_activation, down.permute(1, 2, 0), None, weights, starts,
                                         num_tokens, top_k, *routing)

        return layer

    return bind


def bind_triton_kernels(inputs):
    """OpenAI's triton_kernels, of the version that goes with triton 3.6."""
    from .triton_kernels_peer import bind

    return bind(inputs)


def bind_vllm(inputs):
    """vLLM's Triton kernels, with its tuned tile sizes where it has some for the shape and the card."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    hidden, gate_up, down, weights, ids = inputs[:5]
    return lambda: fused_experts(hidden, gate_up, down, weights, ids)
