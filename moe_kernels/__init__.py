"""Mixture-of-experts layers on hand-written CUDA kernels, and the same in torch operations where there is no GPU.

    topk_weights, topk_ids = gate(router_logits, top_k)
    output = fused_experts(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids)
    layer = MoE(hidden_size, intermediate_size, num_experts, top_k)
    hf.register(), replace_moe_layers(model)                                  for models of Hugging Face transformers
"""

from . import hf
from .hf import replace_moe_layers, restore_moe_layers
from .layer import MLP, Experts, HashRouter, MoE, TopKRouter
from .ops import Plan, build_info, fused_experts, gate, grouped_mm, make_plan, permute, unpermute

__version__ = "0.1.0"
__all__ = ["MLP", "Experts", "HashRouter", "MoE", "Plan", "TopKRouter", "build_info", "fused_experts", "gate",
           "grouped_mm", "hf", "make_plan", "permute", "replace_moe_layers", "restore_moe_layers", "unpermute",
           "__version__"]
