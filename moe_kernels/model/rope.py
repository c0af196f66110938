"""Rotary position embedding (RoPE), plain or stretched by YaRN, in DeepSeek's two layouts.

Sources: RoFormer, arXiv 2104.09864; YaRN, arXiv 2309.00071, with DeepSeek's mscale.
"""

import math

import torch


def rope_tables(config, position_ids):
    """The cosines and sines that `apply_rope` takes.

    Angles are made in fp32 from Python numbers at each call: a buffer would be rounded by `model.bfloat16()`, which
    spoils every position past a few hundred.
    Args:
        position_ids: [B, L] integers.
    Returns: cos, sin, both [B, L, rope/2] fp32, YaRN's attention factor multiplied in.
    """
    frequencies, factor = _frequencies(config, position_ids.device)
    angles = position_ids[..., None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x, cos, sin, interleave):
    """Rotates pairs of x's last dimension by their position's angle.

    Args:
        x: [B, heads, L, rope].
        cos, sin: [B, L, rope/2].
        interleave: the pairs lie side by side (x0, x1), (x2, x3), ... (DeepSeek); else in halves (Llama).
    Returns: [B, heads, L, rope] in x's dtype, always in halves: scores are sums over pairs, so only queries and keys
    have to agree on the order.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attention_scale(config):
    """The factor of the scores: 1/sqrt(head dim), times YaRN's mscale squared."""
    scale = config.qk_head_dim ** -0.5
    scaling = config.rope_scaling
    if scaling and scaling.get("mscale_all_dim"):
        scale *= _mscale(_stretch(config), scaling["mscale_all_dim"]) ** 2
    return scale


def _frequencies(config, device):
    """[rope/2] fp32 inverse frequencies and the factor of cos and sin."""
    dim, scaling = config.qk_rope_head_dim, config.rope_scaling
    wavelengths = config.rope_theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if scaling is None:
        return 1.0 / wavelengths, 1.0
    factor = _stretch(config)
    low, high = _ramp_ends(config)
    ramp = torch.arange(dim // 2, device=device, dtype=torch.float32)
    stretched = ((ramp - low) / (high - low)).clamp(0, 1)
    frequencies = stretched / (factor * wavelengths) + (1 - stretched) / wavelengths
    return frequencies, _attention_factor(scaling, factor)


def _stretch(config):
    return config.rope_scaling.get("factor") or (
        config.max_position_embeddings / config.rope_scaling["original_max_position_embeddings"])


def _ramp_ends(config):
    """The pairs between which YaRN goes from unchanged to stretched: those that turn beta_fast and beta_slow times."""
    dim, scaling = config.qk_rope_head_dim, config.rope_scaling
    length = scaling["original_max_position_embeddings"]

    def pair_that_turns(times):
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high if high != low else low + 0.001


def _attention_factor(scaling, factor):
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return _mscale(factor, scaling["mscale"]) / _mscale(factor, scaling["mscale_all_dim"])
    return _mscale(factor, 1)


def _mscale(factor, weight):
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
