"""What the stages must compute, in naive fp64 loops on the CPU.

Written from the formulas, apart from moe_kernels: nothing of the package is imported here. Gradients come from torch's
autograd through these loops. T tokens, H hidden size, I expert width, E experts, K experts a token, S = T*K rows.
"""

import math

import torch

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai")


def to64(x):
    """A tensor as a detached fp64 copy on the CPU; None stays None."""
    return None if x is None else x.detach().to("cpu", torch.float64, copy=True)


# gate ----------------------------------------------------------------------------------------------------------------


def scores(logits, score_fn):
    """Scores of one token, a list of E floats."""
    if score_fn == "softmax":
        exps = [math.exp(x - max(logits)) for x in logits]
        return [x / sum(exps) for x in exps]
    if score_fn == "sigmoid":
        return [1 / (1 + math.exp(-x)) if x > -700 else 0.0 for x in logits]
    return [math.sqrt(max(x, 0) + math.log1p(math.exp(-abs(x)))) for x in logits]


def allowed_experts(choice, has_bias, num_groups, topk_groups):
    """The experts of the best groups."""
    size = len(choice) // num_groups
    groups = [choice[g * size : (g + 1) * size] for g in range(num_groups)]
    best = [sum(sorted(group, reverse=True)[: 2 if has_bias else 1]) for group in groups]
    kept = sorted(range(num_groups), key=lambda g: (-best[g], g))[:topk_groups]
    return [e for e in range(len(choice)) if e // size in kept]


def gate_of_token(logits, top_k, score_fn, bias=None, num_groups=1, topk_groups=1, renormalize=True, scale=1.0,
                  ids=None):
    """(weights, ids, choice values of all experts) of one token; logits and bias are lists of floats."""
    score = scores(logits, score_fn)
    choice = [s + b for s, b in zip(score, bias)] if bias is not None else score
    if ids is None:
        candidates = allowed_experts(choice, bias is not None, num_groups, topk_groups)
        ids = sorted(candidates, key=lambda e: (-choice[e], e))[:top_k]
    weights = [score[e] if 0 <= e < len(score) else 0.0 for e in ids]
    if renormalize:
        total = sum(weights) + 1e-20
        weights = [w / total for w in weights]
    return [w * scale for w in weights], ids, choice


# plan ----------------------------------------------------------------------------------------------------------------


def plan(topk_ids, num_experts):
    """(expert_offsets, sorted_rows, row_of_slot) as lists, of ids [T][K]."""
    slots = [e for token in topk_ids for e in token]
    top_k = len(topk_ids[0]) if topk_ids else 0
    offsets, order = [0], []
    for expert in range(num_experts):
        order += [s for s, e in enumerate(slots) if e == expert]
        offsets.append(len(order))
    row_of = {slot: row for row, slot in enumerate(order)}
    row_of_slot = [[row_of.get(t * top_k + k, -1) for k in range(top_k)] for t in range(len(topk_ids))]
    return offsets, order + [-1] * (len(slots) - len(order)), row_of_slot


# experts -------------------------------------------------------------------------------------------------------------


def activation(pre, name, limit=None, alpha=1.702):
    """Rows of I from rows of 2I (gated, the gate half first) or I."""
    gate, up = (pre[..., : pre.shape[-1] // 2], pre[..., pre.shape[-1] // 2 :]) if name in GATED else (pre, 1.0)
    if limit is not None:
        gate, up = torch.minimum(gate, torch.tensor(limit, dtype=gate.dtype)), up.clamp(-limit, limit)
    if name == "swiglu_oai":
        return gate / (1 + torch.exp(-alpha * gate)) * (up + 1)
    if name in ("swiglu", "silu"):
        return gate / (1 + torch.exp(-gate)) * up
    if name in ("geglu", "gelu"):
        return gate * 0.5 * torch.erfc(-gate / 2**0.5) * up
    if name == "geglu_tanh":
        return gate * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    positive = torch.where(gate > 0, gate, 0.0)
    return positive**2 if name == "relu2" else positive * up


def slots_of_experts(topk_ids, num_experts):
    """For each expert its (tokens, slots), two lists in the order of the plan."""
    found = [([], []) for _ in range(num_experts)]
    for t, token in enumerate(topk_ids.tolist()):
        for k, expert in enumerate(token):
            if 0 <= expert < num_experts:
                found[expert][0].append(t)
                found[expert][1].append(k)
    return found


def experts(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, name="swiglu", limit=None,
            gate_up_bias=None, down_bias=None):
    """The weighted sum of each token's experts, [T, H]; all tensors fp64."""
    out = torch.zeros(hidden_states.shape[0], hidden_states.shape[1], dtype=torch.float64)
    first, second = gate_up_proj.unbind(0), down_proj.unbind(0)
    for expert, (tokens, slots) in enumerate(slots_of_experts(topk_ids, gate_up_proj.shape[0])):
        if not tokens:
            continue
        pre = hidden_states[tokens] @ first[expert].T
        pre = pre if gate_up_bias is None else pre + gate_up_bias[expert]
        rows = activation(pre, name, limit) @ second[expert].T
        rows = rows if down_bias is None else rows + down_bias[expert]
        out = out.index_add(0, torch.tensor(tokens), topk_weights[tokens, slots].unsqueeze(-1) * rows)
    return out


def grouped_mm(a, b, offsets, bias=None, transpose_b=True):
    """Row by row: c[r] = b[e] a[r] (or its transpose), [S, n]; zero behind the last offset."""
    num_experts = b.shape[0]
    parts = []
    for expert in range(num_experts):
        rows = a[offsets[expert] : offsets[expert + 1]]
        product = rows @ (b[expert].T if transpose_b else b[expert])
        parts.append(product if bias is None else product + bias[expert])
    columns = b.shape[1] if transpose_b else b.shape[2]
    parts.append(torch.zeros(a.shape[0] - offsets[-1], columns, dtype=a.dtype))
    return torch.cat(parts)


def gather(x, sorted_rows, top_k):
    """x[sorted_rows // K], zero for -1; sorted_rows a list."""
    rows = [x[s // top_k] if s >= 0 else torch.zeros(x.shape[1], dtype=x.dtype) for s in sorted_rows]
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1])


def combine(rows, topk_weights, row_of_slot):
    """out[t] = sum_k w[t, k] * rows[row_of_slot[t][k]], [T, H]."""
    out = []
    for t, slots in enumerate(row_of_slot):
        total = torch.zeros(rows.shape[1], dtype=torch.float64)
        for k, row in enumerate(slots):
            if row >= 0:
                total = total + (1.0 if topk_weights is None else topk_weights[t, k]) * rows[row]
        out.append(total)
    return torch.stack(out) if out else rows.new_zeros(0, rows.shape[1])
