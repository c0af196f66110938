"""Multi-head latent attention with a cache of latents.

Legend: B batch, L new tokens, M tokens in the cache after this call, H hidden size, h heads, r kv_lora_rank.
Source: DeepSeek-V2, arXiv 2405.04434, section 2.1. Parameter names are those of Hugging Face's `deepseek_v3`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .rope import apply_rope, attention_scale


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; the mean in fp32 for narrower types."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class LatentCache:
    """What a decoding step needs of the tokens before it: one [B, M, r + rope] tensor a layer.

    A token's entry is its normalised latent (r) and its rotated key (rope), shared by all heads: at DeepSeek-V3's
    sizes 576 elements against the 40,960 of expanded keys and values. Slots are filled in the order tokens come,
    padding included; which of them hold a token is the attention mask's to say.
    """

    def __init__(self, config, batch_size, max_length, device=None, dtype=None):
        shape = (batch_size, max_length, config.cache_width)
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.max_length = max_length
        self.length = 0

    def append(self, layer, entries):
        """Stores entries [B, L, r + rope] after what is there; returns all [B, M, r + rope] of that layer.

        `length` moves on once all layers have theirs (`advance`). Raises: ValueError when the cache is full.
        """
        end = self.length + entries.shape[1]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {end} were given")
        self.layers[layer][:, self.length:end] = entries
        return self.layers[layer][:, :end]

    def advance(self, num_tokens):
        self.length += num_tokens


class LatentAttention(nn.Module):
    """Causal multi-head latent attention with decoupled RoPE.

    Queries come from the hidden state, through a bottleneck of q_lora_rank where there is one. Keys and values of all
    heads come from one latent of r elements; a separate key of `qk_rope_head_dim`, shared by the heads, carries the
    position. A single cached token takes the *absorbed* path: kv_b_proj moves from the keys to the query and the
    output, so that the M cached latents are read as they are and never expanded.
    """

    def __init__(self, config, layer_index=0):
        super().__init__()
        self.config, self.layer_index = config, layer_index
        hidden, heads, bias = config.hidden_size, config.num_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.cache_width, bias=bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim),
                                   bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=bias)
        self.scale = attention_scale(config)

    def forward(self, hidden_states, rope, mask=None, cache=None):
        """
        Args:
            hidden_states: [B, L, H].
            rope: cos, sin of `rope_tables` for these tokens.
            mask: bool [B or 1, 1, L, M], True where a query may look; None: plain causal.
            cache: LatentCache or None.
        Returns: [B, L, H].
        """
        batch, length, _ = hidden_states.shape
        q_nope, q_rope = self._queries(hidden_states, rope)
        entries = self._latents(hidden_states, rope)
        absorbed = cache is not None and length == 1
        if cache is not None:
            entries = cache.append(self.layer_index, entries.to(cache.layers[0].dtype)).to(entries.dtype)
        attend = self._attend_latents if absorbed else self._attend_expanded
        out = attend(q_nope, q_rope, entries, mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))

    def _queries(self, hidden_states, rope):
        """[B, h, L, nope] and [B, h, L, rope], the latter rotated."""
        config = self.config
        if config.q_lora_rank is None:
            q = self.q_proj(hidden_states)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        q = q.unflatten(-1, (config.num_heads, config.qk_head_dim)).transpose(1, 2)
        q_nope, q_rope = q.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        return q_nope, apply_rope(q_rope, *rope, config.rope_interleave)

    def _latents(self, hidden_states, rope):
        """The cache's entries of these tokens, [B, L, r + rope]."""
        config = self.config
        latent, key = self.kv_a_proj_with_mqa(hidden_states).split(
            (config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        key = apply_rope(key.unsqueeze(1), *rope, config.rope_interleave).squeeze(1)
        return torch.cat((self.kv_a_layernorm(latent), key), dim=-1)

    def _attend_expanded(self, q_nope, q_rope, entries, mask):
        """Keys and values of every head are made from the latents. [B, h, L, v]"""
        config = self.config
        latent, key = entries.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        kv = self.kv_b_proj(latent).unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
        k_nope, values = kv.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        keys = torch.cat((k_nope, key.unsqueeze(1).expand(-1, config.num_heads, -1, -1)), dim=-1)
        queries = torch.cat((q_nope, q_rope), dim=-1)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None,
                                              scale=self.scale)

    def _attend_latents(self, q_nope, q_rope, entries, mask):
        """q . (W_k c) = (W_k^T q) . c, and W_v comes after the weighted sum of latents. [B, h, 1, v]"""
        config = self.config
        weight = self.kv_b_proj.weight.unflatten(0, (config.num_heads, -1))
        w_key, w_value = weight.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        queries = torch.cat((q_nope @ w_key, q_rope), dim=-1)
        keys = entries.unsqueeze(1).expand(-1, config.num_heads, -1, -1)
        latents = F.scaled_dot_product_attention(queries, keys, keys[..., :config.kv_lora_rank], attn_mask=mask,
                                                 scale=self.scale)
        return latents @ w_value.transpose(1, 2)
