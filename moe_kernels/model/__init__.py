"""The reference transformer: `MoETransformer(ModelConfig.preset("tiny"))`."""

from .attention import LatentAttention, LatentCache, RMSNorm
from .config import PRESETS, ModelConfig
from .transformer import MLP, Block, MoETransformer, count_parameters, moe_layers

__all__ = ["Block", "LatentAttention", "LatentCache", "MLP", "MoETransformer", "ModelConfig", "PRESETS", "RMSNorm",
           "count_parameters", "moe_layers"]
