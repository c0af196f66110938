"""Balance without an auxiliary loss, and the statistics that show it.

DeepSeek-V3 keeps its experts equally loaded by moving the bias that chooses, never the loss: after each optimiser step
an expert that had more than the mean number of tokens has its bias lowered by a fixed step, one that had fewer has it
raised. A small sequence-wise loss is there for the extremes inside one sequence.
"""

import math

import torch

SUM_EPSILON = 1e-20


def max_violation(tokens_per_expert):
    """MaxVio: how far the fullest expert is above the mean load, max / mean - 1; 0 is perfect balance.

    Args:
        tokens_per_expert: [..., E], any number type.
    Returns: [...] fp32; 0 where there are no tokens.
    Source: Wang et al., "Auxiliary-Loss-Free Load Balancing", arXiv 2408.15664, section 4.1.
    """
    load = tokens_per_expert.to(torch.float32)
    mean = load.mean(dim=-1)
    return torch.where(mean > 0, load.amax(dim=-1) / mean.clamp(min=1e-30) - 1, torch.zeros_like(mean))


def sequence_balance_loss(scores, topk_ids, top_k, alpha):
    """The sequence-wise balance loss: alpha * sum_e f_e * P_e, averaged over the sequences.

    f_e = E / (K L) * (times that the sequence's L tokens chose e), P_e = mean over its tokens of the normalised score.
    It is alpha where the load is even. The gradient goes through the scores alone.

    Args:
        scores: [..., L, E] fp32; unbiased scores, normalised here. topk_ids: [..., L, K]; ids outside [0, E) count not.
        top_k: K. alpha: weight of the loss; DeepSeek-V3 takes 1e-4.
    Returns: a scalar, fp32; 0 without tokens.
    Source: DeepSeek-V3 report, section 2.1.2, equations 17 to 20.
    """
    length, num_experts = scores.shape[-2:]
    num_sequences = math.prod(scores.shape[:-2])
    scores = scores.reshape(num_sequences, length, num_experts)
    ids = topk_ids.reshape(num_sequences, length * top_k).long()
    valid = (ids >= 0) & (ids < num_experts)
    chosen = torch.zeros(num_sequences, num_experts + 1, dtype=torch.int64, device=ids.device)
    chosen.scatter_add_(1, torch.where(valid, ids, num_experts), torch.ones_like(ids))
    tokens = max(length, 1)
    frequency = chosen[:, :num_experts].to(scores.dtype) * (num_experts / (top_k * tokens))
    share = (scores / (scores.sum(dim=-1, keepdim=True) + SUM_EPSILON)).sum(dim=1) / tokens
    return alpha * (frequency * share).sum() / max(num_sequences, 1)


def moe_layers(model):
    """(name, module) of every module that counts tokens_per_expert, in the model's order."""
    return [(name, module) for name, module in model.named_modules()
            if isinstance(getattr(module, "tokens_per_expert", None), torch.Tensor)]


def read_loads(model, group=None, reset=True):
    """The load of every MoE layer since the last reading: {name: tokens_per_expert [E] int64}.

    Summed over the ranks of group (the data-parallel ones; all ranks if None) where torch.distributed is initialised,
    in one all-reduce. Nothing is read on the host. reset: the counters start again at 0.
    """
    layers = moe_layers(model)
    if not layers:
        return {}
    loads = torch.cat([module.tokens_per_expert for _, module in layers])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(loads, group=group)
    if reset:
        for _, module in layers:
            module.tokens_per_expert.zero_()
    parts = loads.split([module.tokens_per_expert.shape[0] for _, module in layers])
    return {name: part for (name, _), part in zip(layers, parts)}


@torch.no_grad()
def update_biases(model, step=1e-3, group=None):
    """Moves the correction bias of every router by one step against each expert's load, and resets the counters.

    bias += step * sign(mean load - load). To be called after each optimiser step, on every rank. Layers whose router
    has no bias (hash routing) are read and reset, and stay as they are.

    Returns: the loads as `read_loads` gives them, for `LoadStatistics`.
    Source: DeepSeek-V3 report, section 2.1.2; step is its bias update speed, 0.001.
    """
    loads = read_loads(model, group)
    for name, module in moe_layers(model):
        bias = getattr(module.gate, "e_score_correction_bias", None)
        if bias is None:
            continue
        load = loads[name]
        below_mean = torch.sign(load.sum() - load.shape[0] * load)  # in integers: exact for any number of tokens
        bias.add_(below_mean.to(bias.dtype), alpha=step)
    return loads


class LoadStatistics:
    """The loads of every MoE layer over time, to read and to plot.

    >>> statistics = LoadStatistics()
    >>> statistics.record(step, update_biases(model))
    """

    def __init__(self):
        self.steps = []
        self._loads = {}

    def record(self, step, loads):
        """Adds the loads of one step, {layer name: tokens_per_expert [E]}, as `update_biases` returns them.

        Copies to the host, and so waits for a GPU: record when you log, not at every step."""
        self.steps.append(int(step))
        for name, load in loads.items():
            self._loads.setdefault(name, []).append(load.detach().to("cpu", torch.int64))

    @property
    def layers(self):
        """Names of the layers, in the model's order."""
        return list(self._loads)

    def tokens_per_expert(self, layer):
        """[steps, E] int64 of one layer."""
        return torch.stack(self._loads[layer])

    def shares(self, layer):
        """[steps, E] fp32: each expert's share of the layer's rows; 1/E everywhere is perfect balance."""
        loads = self.tokens_per_expert(layer).to(torch.float32)
        return loads / loads.sum(dim=-1, keepdim=True).clamp(min=1)

    def max_violations(self):
        """[steps, layers] fp32: MaxVio of every layer at every step."""
        if not self._loads:
            return torch.zeros(0, 0)
        return torch.stack([max_violation(self.tokens_per_expert(name)) for name in self._loads], dim=1)

    def state_dict(self):
        """The history as plain tensors and lists, for a checkpoint."""
        return {"steps": list(self.steps), "loads": {name: self.tokens_per_expert(name) for name in self._loads}}

    def load_state_dict(self, state):
        """Takes up the history of `state_dict`."""
        self.steps = list(state["steps"])
        self._loads = {name: list(loads.unbind(0)) for name, loads in state["loads"].items()}
