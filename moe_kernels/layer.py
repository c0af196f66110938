"""The mixture-of-experts layer as torch.nn.Modules, with the parameter names of Hugging Face's DeepSeek classes.

T tokens, H hidden size, I expert width, E experts, K experts a token.

    hidden_states [..., H]
      1. gate:            TopKRouter or HashRouter    -> topk_weights [T, K], topk_ids [T, K]
      2. experts:         Experts, all in one call    -> the weighted sum of each token's experts [T, H]
      3. shared_experts:  MLP that sees every token   -> added
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import balance, checks, composite, ops
from .activation import activate, is_gated, pre_activation_width


def _uniform_by_fan_in(parameter):
    """nn.Linear's own initialisation, for each expert's matrix: uniform within 1 / sqrt(fan-in)."""
    limit = 1 / math.sqrt(parameter.shape[-1])
    nn.init.uniform_(parameter, -limit, limit)


class _Router(nn.Module):
    """What the routers share: the weight, and logits in fp32 whatever the layer's dtype and autocast."""

    def __init__(self, hidden_size, num_experts, top_k, score_fn, renormalize, routed_scaling_factor, device, dtype):
        super().__init__()
        checks.check_choice("score_fn", score_fn, checks.SCORE_FUNCTIONS)
        checks.check_integer("num_experts", num_experts, 1)
        checks.check_integer("top_k", top_k, 1, num_experts)
        checks.check_number("routed_scaling_factor", routed_scaling_factor)
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.score_fn, self.renormalize = score_fn, renormalize
        self.routed_scaling_factor = routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        _uniform_by_fan_in(self.weight)

    def router_logits(self, hidden_states):
        """[T, E] in fp32 (fp64 for an fp64 layer): routing is sensitive to rounding, so bf16 is widened first."""
        dtype = composite.accumulation_dtype(hidden_states.dtype)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.to(dtype), self.weight.to(dtype))

    def extra_repr(self):
        return (f"{self.hidden_size} -> {self.num_experts}, top_k={self.top_k}, score_fn={self.score_fn}, "
                f"renormalize={self.renormalize}, routed_scaling_factor={self.routed_scaling_factor}")


class TopKRouter(_Router):
    """Chooses the K best experts of each token; Hugging Face's DeepseekV3TopkRouter by its parameters.

    weight: parameter [E, H]. e_score_correction_bias: buffer [E], fp32 whatever the layer is cast to (its steps of
    0.001 vanish in bf16), moved by `balance.update_biases`; None with bias=False.
    """

    def __init__(self, hidden_size, num_experts, top_k, score_fn="sigmoid", num_expert_groups=1, topk_groups=1,
                 renormalize=True, routed_scaling_factor=1.0, bias=True, device=None, dtype=None):
        super().__init__(hidden_size, num_experts, top_k, score_fn, renormalize, routed_scaling_factor, device, dtype)
        checks.check_groups(num_experts, top_k, num_expert_groups, topk_groups)
        self.num_expert_groups, self.topk_groups = num_expert_groups, topk_groups
        zeros = torch.zeros(num_experts, device=device, dtype=torch.float32) if bias else None
        self.register_buffer("e_score_correction_bias", zeros)

    def _apply(self, fn, recurse=True):
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        cast = self.e_score_correction_bias
        if cast is not None and cast.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(cast.device)
        return self

    def forward(self, hidden_states):
        """[T, H] -> topk_weights [T, K] fp32, topk_ids [T, K] int32, router_logits [T, E] fp32."""
        router_logits = self.router_logits(hidden_states)
        topk_weights, topk_ids = ops.gate(
            router_logits, self.top_k, self.score_fn, self.e_score_correction_bias, self.num_expert_groups,
            self.topk_groups, self.renormalize, self.routed_scaling_factor)
        return topk_weights, topk_ids, router_logits


def hash_table(vocab_size, num_experts, top_k, seed=0):
    """[vocab, K] int64: K different experts for each token id, drawn at random from seed, the same on every machine."""
    generator = torch.Generator("cpu").manual_seed(seed)
    rows_at_once = max(1, 2**24 // num_experts)  # 64 MB of draws at a time
    parts = []
    for first in range(0, vocab_size, rows_at_once):
        count = min(rows_at_once, vocab_size - first)
        draws = torch.rand(count, num_experts, generator=generator, device="cpu")
        parts.append(draws.topk(top_k, dim=-1).indices)
    return torch.cat(parts)


class HashRouter(_Router):
    """Routes by the token's id through a fixed table; the logits only weigh. DeepSeek-V4's first layers.

    weight: parameter [E, H]. tid2eid: buffer [vocab, K] int64, K different experts for each token id, drawn from seed.
    """

    def __init__(self, hidden_size, num_experts, top_k, vocab_size, score_fn="sqrtsoftplus", renormalize=True,
                 routed_scaling_factor=1.0, seed=0, device=None, dtype=None):
        super().__init__(hidden_size, num_experts, top_k, score_fn, renormalize, routed_scaling_factor, device, dtype)
        checks.check_integer("vocab_size", vocab_size, 1)
        table = torch.empty(vocab_size, top_k, dtype=torch.int64, device=device)
        if table.device.type != "meta":
            table.copy_(hash_table(vocab_size, num_experts, top_k, seed))
        self.register_buffer("tid2eid", table)

    def forward(self, hidden_states, token_ids):
        """[T, H] and token ids of T elements -> topk_weights [T, K] fp32, topk_ids [T, K] int32, router_logits."""
        router_logits = self.router_logits(hidden_states)
        topk_ids = self.tid2eid[token_ids.reshape(-1)]
        topk_weights, topk_ids = ops.gate(router_logits, self.top_k, self.score_fn, renormalize=self.renormalize,
                                          routed_scaling_factor=self.routed_scaling_factor, topk_ids=topk_ids)
        return topk_weights, topk_ids, router_logits


class Experts(nn.Module):
    """The routed experts, in Hugging Face's layout.

    gate_up_proj: [E, 2I, H], the gate half first ([E, I, H] for an ungated activation). down_proj: [E, H, I].
    gate_up_proj_bias: [E, 2I] and down_proj_bias: [E, H] with bias=True, else None.
    grad_buffers: None; set to (gate_up_grad, down_grad), two fp32 tensors in the weights' shapes, the backward adds the
        weights' gradients to them and leaves `.grad` alone; see `fused_experts`. They neither move with the module nor
        stand in its state dict.
    """

    def __init__(self, num_experts, hidden_size, intermediate_size, activation="swiglu", swiglu_limit=None, bias=False,
                 device=None, dtype=None):
        super().__init__()
        checks.check_activation(activation, swiglu_limit)
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.activation, self.swiglu_limit, self.grad_buffers = activation, swiglu_limit, None
        width = pre_activation_width(intermediate_size, activation)

        def parameter(*shape):
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.gate_up_proj = parameter(width, hidden_size)
        self.down_proj = parameter(hidden_size, intermediate_size)
        self.register_parameter("gate_up_proj_bias", parameter(width) if bias else None)
        self.register_parameter("down_proj_bias", parameter(hidden_size) if bias else None)
        self.reset_parameters()

    def reset_parameters(self):
        """Weights uniform within 1 / sqrt(fan-in), as nn.Linear; biases 0."""
        _uniform_by_fan_in(self.gate_up_proj)
        _uniform_by_fan_in(self.down_proj)
        for bias in (self.gate_up_proj_bias, self.down_proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, hidden_states, topk_weights, topk_ids, return_plan=False):
        """[T, H], [T, K] fp32, [T, K] -> [T, H]; with return_plan also the `Plan`, which holds the loads."""
        output, plan = ops.fused_experts_and_plan(
            hidden_states, self.gate_up_proj, self.down_proj, topk_weights, topk_ids, self.activation,
            self.swiglu_limit, self.gate_up_proj_bias, self.down_proj_bias, self.grad_buffers)
        return (output, plan) if return_plan else output

    def extra_repr(self):
        limit = "" if self.swiglu_limit is None else f", swiglu_limit={self.swiglu_limit}"
        return (f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
                f"intermediate_size={self.intermediate_size}, activation={self.activation}{limit}")


class MLP(nn.Module):
    """A dense feed-forward network with the same activations: down_proj(act(gate_proj(x)) * up_proj(x)).

    gate_proj, up_proj: nn.Linear H -> I; down_proj: I -> H; no bias. An ungated activation has no gate_proj.
    """

    def __init__(self, hidden_size, intermediate_size, activation="swiglu", swiglu_limit=None, device=None, dtype=None):
        super().__init__()
        checks.check_activation(activation, swiglu_limit)
        self.activation, self.swiglu_limit = activation, swiglu_limit
        options = {"bias": False, "device": device, "dtype": dtype}
        if is_gated(activation):
            self.gate_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **options)

    def forward(self, hidden_states):
        """[..., H] -> [..., H]."""
        up = self.up_proj(hidden_states)
        if self.activation == "swiglu" and self.swiglu_limit is None:  # the usual one, without a concatenation
            return self.down_proj(F.silu(self.gate_proj(hidden_states)) * up)
        pre = torch.cat([self.gate_proj(hidden_states), up], dim=-1) if is_gated(self.activation) else up
        return self.down_proj(activate(pre, self.activation, self.swiglu_limit))


def _is_exporting():
    # while it compiles, torch 2.11 says that it exports
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


class MoE(nn.Module):
    """A mixture-of-experts layer: y = sum over the K chosen experts of weight * expert(x), + shared_experts(x).

    Children: gate (TopKRouter, or HashRouter where vocab_size is given), experts (Experts), shared_experts (MLP of
    width shared_intermediate_size, by default num_shared_experts * intermediate_size; None without shared experts).
    Names and shapes are those of Hugging Face's DeepseekV3MoE, so a state dict goes either way.

    After a forward in training mode:
        tokens_per_expert: [E] int64 buffer, not in the state dict; it adds up every forward until
            `balance.update_biases` or `balance.read_loads` reads it and sets it to 0. What activation checkpointing
            computes a second time is counted once.
        sequence_balance_loss: a scalar to add to the loss where sequence_balance_alpha is above 0, else None; not
            copied or pickled with the layer. Activation checkpointing must be the one of use_reentrant=False for it.
    """

    def __init__(self, hidden_size, intermediate_size, num_experts, top_k, num_shared_experts=0,
                 shared_intermediate_size=None, score_fn="sigmoid", num_expert_groups=1, topk_groups=1,
                 renormalize=True, routed_scaling_factor=1.0, bias=True, activation="swiglu", swiglu_limit=None,
                 expert_bias=False, sequence_balance_alpha=0.0, vocab_size=None, hash_seed=0, device=None, dtype=None):
        super().__init__()
        sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": num_experts}
        for name, size in sizes.items():
            checks.check_integer(name, size, 1)
        checks.check_integer("num_shared_experts", num_shared_experts, 0)
        factory = {"device": device, "dtype": dtype}
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.sequence_balance_alpha, self.sequence_balance_loss = sequence_balance_alpha, None
        if vocab_size is None:
            self.gate = TopKRouter(hidden_size, num_experts, top_k, score_fn, num_expert_groups, topk_groups,
                                   renormalize, routed_scaling_factor, bias, **factory)
        else:
            self.gate = HashRouter(hidden_size, num_experts, top_k, vocab_size, score_fn, renormalize,
                                   routed_scaling_factor, hash_seed, **factory)
        self.experts = Experts(num_experts, hidden_size, intermediate_size, activation, swiglu_limit, expert_bias,
                               **factory)
        shared_width = shared_intermediate_size or num_shared_experts * intermediate_size
        self.shared_experts = None
        if shared_width:
            self.shared_experts = MLP(hidden_size, shared_width, activation, swiglu_limit, **factory)
        counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    def forward(self, hidden_states, token_ids=None):
        """[..., H] -> [..., H]; token_ids: one a token, for hash routing alone."""
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states wants shape [..., H={self.hidden_size}], got {list(hidden_states.shape)}")
        flat = hidden_states.reshape(-1, self.hidden_size)
        topk_weights, topk_ids, router_logits = self._route(flat, token_ids)
        output, plan = self.experts(flat, topk_weights, topk_ids, return_plan=True)
        if self.training:
            self._observe(hidden_states.shape, router_logits, topk_ids, plan)
        output = output.reshape(hidden_states.shape)
        return output if self.shared_experts is None else output + self.shared_experts(hidden_states)

    def _route(self, flat, token_ids):
        if isinstance(self.gate, TopKRouter):
            return self.gate(flat)
        if token_ids is None or token_ids.numel() != flat.shape[0]:
            got = None if token_ids is None else token_ids.numel()
            raise ValueError(f"token_ids wants T={flat.shape[0]} ids for hash routing, got {got}")
        return self.gate(flat, token_ids)

    def _observe(self, shape, router_logits, topk_ids, plan):
        """Counts the loads, and computes the sequence-wise loss where it is asked for."""
        torch.ops.moe_kernels.count_loads(self.tokens_per_expert, plan.expert_offsets)
        if self.sequence_balance_alpha > 0 and not _is_exporting():  # a program has no such attribute
            scores = composite.scores_of(router_logits, self.gate.score_fn)
            sequences = (*shape[:-1],) if len(shape) > 1 else (1,)
            loss = balance.sequence_balance_loss(
                scores.reshape(*sequences, self.num_experts), topk_ids.reshape(*sequences, self.top_k), self.top_k,
                self.sequence_balance_alpha)
            if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
                self.sequence_balance_loss = loss
            elif loss.requires_grad and not self.sequence_balance_loss.requires_grad:
                raise RuntimeError("sequence_balance_loss got no gradient, because the forward ran under "
                                   "checkpoint(use_reentrant=True): use_reentrant=False keeps it")

    def __getstate__(self):
        return {**super().__getstate__(), "sequence_balance_loss": None}  # of a graph, which no copy has
