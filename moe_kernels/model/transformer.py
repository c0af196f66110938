"""The reference mixture-of-experts transformer, in reading order: Block, prediction module, model, loss.

Legend: B batch, L tokens a sequence, M tokens with those in the cache, H hidden size, V vocabulary.
Source: DeepSeek-V3 report, arXiv 2412.19437, section 2. Parameter names are those of Hugging Face's `deepseek_v3`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..layer import MLP, MoE
from .attention import LatentAttention, LatentCache, RMSNorm
from .rope import rope_tables


class Block(nn.Module):
    """Attention, then a dense MLP (the leading layers) or a mixture of experts; each normed before, added after."""

    def __init__(self, config, layer_index):
        super().__init__()
        self.self_attn = LatentAttention(config, layer_index)
        if layer_index < config.num_dense_layers:
            self.mlp = MLP(config.hidden_size, config.dense_intermediate_size)
        else:
            self.mlp = _moe(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, rope, mask=None, cache=None):
        """[B, L, H] to [B, L, H]; `rope`, `mask` and `cache` as in `LatentAttention`."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), rope, mask, cache)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class PredictionBlock(Block):
    """A multi-token-prediction module: one more block, which looks one token further ahead than what it is given.

    hidden'_i = block(eh_proj([norm(embedding of token i + k); norm(hidden_i)])), then a norm before the shared head.
    Named as in DeepSeek-V3's checkpoints, where these modules are the layers after the last.
    """

    def __init__(self, config, layer_index):
        super().__init__(config, layer_index)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def predict(self, hidden_states, embeddings, rope):
        """Both [B, L, H], embeddings those of the tokens one place further; returns [B, L, H], normed."""
        joined = torch.cat((self.enorm(embeddings), self.hnorm(hidden_states)), dim=-1)
        return self.shared_head["norm"](self(self.eh_proj(joined), rope))


class Decoder(nn.Module):
    """Embedding, blocks, final norm: the child `model` of `MoETransformer`, as Hugging Face nests it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config, index) for index in range(config.num_layers)]
        blocks += [PredictionBlock(config, config.num_layers + index) for index in range(config.num_mtp_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, attention_mask=None, cache=None):
        """[B, L] ids to [B, L, H] hidden states after the final norm; arguments as in `MoETransformer`."""
        past = 0 if cache is None else cache.length
        rope = rope_tables(self.config, positions(input_ids, attention_mask, past))
        mask = causal_mask(input_ids.shape[1], attention_mask, past, input_ids.device)
        hidden_states = self.embed_tokens(input_ids)
        for block in self.layers[:self.config.num_layers]:
            hidden_states = block(hidden_states, rope, mask, cache)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.norm(hidden_states)


class Loss(NamedTuple):
    """`total` is what to differentiate; `next_token` is the plain cross entropy in nats, without the other terms."""

    total: torch.Tensor
    next_token: torch.Tensor


class MoETransformer(nn.Module):
    """The language model. Its state dict is that of `transformers.DeepseekV3ForCausalLM`, either way."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Matrices from N(0, initializer_range^2), biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, self.config.initializer_range)
            elif name.endswith("bias"):
                parameter.zero_()

    def forward(self, input_ids, attention_mask=None, cache=None, last_only=False):
        """Logits of the next token.

        Args:
            input_ids: [B, L] integers: the new tokens.
            attention_mask: [B, M] bool or integers, nonzero where there is a token, over the cached and the new ones;
                padding may stand left or right of a prompt. None: no padding.
            cache: `new_cache`'s, which this call extends, or None.
            last_only: only the last position's logits, [B, 1, V].
        Returns: [B, L, V] in the dtype of the weights.
        """
        hidden_states = self.model(input_ids, attention_mask, cache)
        return self.lm_head(hidden_states[:, -1:] if last_only else hidden_states)

    def loss(self, tokens):
        """Mean cross entropy of every next token; the prediction modules' loss is added where enabled, and the balance
        loss too, in training.

        Args: tokens: [B, L + 1] integers.
        Source: DeepSeek-V3 report, equations 17 to 25.
        """
        hidden_states = self.model(tokens[:, :-1])
        next_token = self._cross_entropy(hidden_states, tokens[:, 1:])
        total = next_token
        if self.config.num_mtp_layers:
            total = total + self.config.mtp_loss_weight * self._prediction_loss(hidden_states, tokens)
        if self.training and self.config.sequence_balance_alpha:
            total = total + sum(layer.sequence_balance_loss for layer in moe_layers(self))
        return Loss(total, next_token)

    def _prediction_loss(self, hidden_states, tokens):
        """Module k takes hidden_i and token i + k, and is asked for token i + k + 1; the mean over modules."""
        losses = []
        for ahead, block in enumerate(self.model.layers[self.config.num_layers:], start=1):
            embeddings = self.model.embed_tokens(tokens[:, ahead:-1])
            rope = rope_tables(self.config, positions(tokens[:, ahead:-1]))
            hidden_states = block.predict(hidden_states[:, :embeddings.shape[1]], embeddings, rope)
            losses.append(self._cross_entropy(hidden_states, tokens[:, ahead + 1:]))
        return torch.stack(losses).mean()

    def _cross_entropy(self, hidden_states, targets):
        logits = self.lm_head(hidden_states).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())

    def new_cache(self, batch_size, max_length, dtype=None):
        """An empty `LatentCache` on the model's device, in the dtype of its weights or another."""
        weight = self.lm_head.weight
        return LatentCache(self.config, batch_size, max_length, weight.device, dtype or weight.dtype)


def positions(input_ids, attention_mask=None, past=0):
    """[B or 1, L]: a token's place among its sequence's real tokens, so that padding shifts nobody."""
    length = input_ids.shape[1]
    if attention_mask is None:
        return torch.arange(past, past + length, device=input_ids.device).unsqueeze(0)
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, past:]


def causal_mask(length, attention_mask, past, device):
    """Which of the M = past + length slots each new token may look at: earlier ones that hold a token, and itself.

    A token always sees itself, so that a row of padding has something to normalise and gives no NaN.
    Returns: bool [B or 1, 1, L, M], or None where plain causal attention says the same.
    """
    if attention_mask is None and (past == 0 or length == 1):
        return None if past == 0 else torch.ones(1, 1, 1, past + 1, dtype=torch.bool, device=device)
    slots = torch.arange(past + length, device=device)
    queries = slots[past:, None]
    visible = slots <= queries
    if attention_mask is None:
        return visible[None, None]
    if attention_mask.shape[1] != past + length:
        raise ValueError(f"attention_mask must cover {past} cached and {length} new tokens, "
                         f"got shape {tuple(attention_mask.shape)}")
    return (visible & attention_mask.bool()[:, None, :] | (slots == queries))[:, None]


def moe_layers(model):
    """The MoE layers of a model in depth order."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def count_parameters(config):
    """(all parameters, those that work on one token): a token's share of the routed experts is K of E.

    Counted on a model without storage, so that it answers for any size.
    """
    with torch.device("meta"):
        model = MoETransformer(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(parameter.numel() for layer in moe_layers(model) for parameter in layer.experts.parameters())
    return total, total - routed + routed * config.top_k // config.num_experts


def _moe(config):
    return MoE(config.hidden_size, config.expert_intermediate_size, config.num_experts, config.top_k,
               num_shared_experts=config.num_shared_experts, score_fn=config.score_fn,
               num_expert_groups=config.num_expert_groups, topk_groups=config.topk_groups,
               renormalize=config.renormalize, routed_scaling_factor=config.routed_scaling_factor,
               swiglu_limit=config.swiglu_limit, sequence_balance_alpha=config.sequence_balance_alpha)
