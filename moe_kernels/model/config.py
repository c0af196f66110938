"""Sizes of the reference transformer, its presets, and the way to and from Hugging Face's `deepseek_v3` config.

Legend: H hidden size, E routed experts, K experts a token, I width of one expert.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

from ..checks import check_fields, check_number


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3-like sparse transformer: multi-head latent attention, leading dense layers, then MoE layers.

    `num_layers` counts dense and MoE layers together, without the multi-token-prediction modules. Shared experts are
    one MLP of width `num_shared_experts * expert_intermediate_size`. `q_lora_rank=None` projects queries directly.
    `rope_scaling` is None or YaRN's options in Hugging Face's words (`factor`, `original_max_position_embeddings`,
    `beta_fast`, `beta_slow`, `mscale`, `mscale_all_dim`).
    Raises: TypeError on a field of another type, ValueError on sizes that cannot work together.
    """

    vocab_size: int = 256
    hidden_size: int = 128
    num_layers: int = 4
    num_dense_layers: int = 1
    dense_intermediate_size: int = 512
    num_heads: int = 4
    q_lora_rank: int | None = None
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    num_experts: int = 32
    top_k: int = 16
    expert_intermediate_size: int = 32
    num_shared_experts: int = 1
    score_fn: str = "sigmoid"
    num_expert_groups: int = 1
    topk_groups: int = 1
    renormalize: bool = True
    routed_scaling_factor: float = 1.0
    swiglu_limit: float | None = None
    sequence_balance_alpha: float = 0.0
    num_mtp_layers: int = 0
    mtp_loss_weight: float = 0.3
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rope_interleave: bool = True
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self):
        check_fields(self)
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "kv_lora_rank", "qk_nope_head_dim",
                 "qk_rope_head_dim", "v_head_dim", "num_experts", "top_k", "expert_intermediate_size",
                 "num_expert_groups", "topk_groups")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ValueError(f"num_dense_layers must be from 0 to num_layers={self.num_layers}, "
                             f"got {self.num_dense_layers}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts={self.num_experts}, got {self.top_k}")
        if self.num_experts % self.num_expert_groups:
            raise ValueError(f"num_experts={self.num_experts} must divide into num_expert_groups="
                             f"{self.num_expert_groups}")
        if self.rope_scaling is not None:
            _check_yarn(self.rope_scaling)

    @classmethod
    def preset(cls, name, **changes):
        """The preset of this name (see `PRESETS`), with `changes` to single fields. Raises: ValueError, names it."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
        return replace(PRESETS[name], **changes)

    @property
    def num_moe_layers(self):
        return self.num_layers - self.num_dense_layers

    @property
    def qk_head_dim(self):
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self):
        """Elements that the latent cache holds of a token in a layer: the compressed kv and the rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        """Back from `to_dict`. Raises: ValueError on a key that is no field."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown model option: {', '.join(unknown)}")
        return cls(**values)

    def to_hf(self):
        """A dict for `transformers.DeepseekV3Config(**d)`; what that has no word for is under "moe_kernels"."""
        config = {theirs: getattr(self, ours) for ours, theirs in _HF_NAMES.items()}
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling is not None:
            rope |= {"rope_type": "yarn"} | self.rope_scaling
        defaults = ModelConfig()
        extra = {name: getattr(self, name) for name in _OUR_OWN if getattr(self, name) != getattr(defaults, name)}
        config |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_act": "silu",
                   "num_key_value_heads": self.num_heads, "rope_parameters": rope}
        return config | ({"moe_kernels": extra} if extra else {})

    @classmethod
    def from_hf(cls, config):
        """From the dict of a `deepseek_v3` config (`DeepseekV3Config(...).to_dict()` or a config.json).

        Both spellings of RoPE are read: `rope_parameters`, and the older `rope_theta` with `rope_scaling`.
        Raises: ValueError on another model type, another activation, or another RoPE than default and yarn.
        """
        if config.get("model_type", "deepseek_v3") != "deepseek_v3":
            raise ValueError(f"model_type must be 'deepseek_v3', got {config['model_type']!r}")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act must be 'silu', got {config['hidden_act']!r}")
        values = {ours: config[theirs] for ours, theirs in _HF_NAMES.items() if theirs in config}
        for ours in ("num_expert_groups", "topk_groups"):
            values[ours] = values.get(ours) or 1
        if "scoring_func" in config:
            values["score_fn"] = config["scoring_func"]
        return cls(**values | _rope_from_hf(config) | config.get("moe_kernels", {}))


def _check_yarn(scaling):
    if scaling.get("rope_type", "yarn") != "yarn":
        raise ValueError(f"rope_scaling knows rope_type 'yarn', got {scaling['rope_type']!r}")
    check_number("rope_scaling['original_max_position_embeddings']", scaling.get("original_max_position_embeddings"))
    for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if scaling.get(name) is not None:
            check_number(f"rope_scaling[{name!r}]", scaling[name])


def _rope_from_hf(config):
    """The fields rope_theta and rope_scaling of either spelling. A scaling type of "default" is none."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    rope.pop("type", None)
    if kind not in ("default", "yarn"):
        raise ValueError(f"rope_type must be 'default' or 'yarn', got {kind!r}")
    return {"rope_theta": theta, "rope_scaling": rope if kind == "yarn" else None}


_HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "dense_intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "num_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "expert_intermediate_size": "moe_intermediate_size",
    "num_shared_experts": "n_shared_experts",
    "num_expert_groups": "n_group",
    "topk_groups": "topk_group",
    "renormalize": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
    "num_mtp_layers": "num_nextn_predict_layers",
    "tie_word_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
    "rope_interleave": "rope_interleave",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
}
_OUR_OWN = ("score_fn", "swiglu_limit", "sequence_balance_alpha", "mtp_loss_weight")

_DEEPSEEK = dict(vocab_size=129280, hidden_size=7168, num_layers=61, dense_intermediate_size=18432,
                 q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                 routed_scaling_factor=2.5)
_YARN = dict(factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0,
             mscale_all_dim=1.0)

PRESETS = {
    # The article's model: 1,026 B parameters, 32.5 B of them for a token, 16 of 768 experts.
    "deepseek-v4-1t": ModelConfig(**_DEEPSEEK, num_dense_layers=1, num_heads=64, num_experts=768, top_k=16,
                                  expert_intermediate_size=1024, num_shared_experts=2),
    # The released DeepSeek-V3: 671 B parameters, 37 B for a token. Its prediction module is left out.
    "deepseek-v3": ModelConfig(**_DEEPSEEK, num_dense_layers=3, num_heads=128, num_experts=256, top_k=8,
                               expert_intermediate_size=2048, num_shared_experts=1, num_expert_groups=8,
                               topk_groups=4, rope_scaling=_YARN, max_position_embeddings=163840),
    # Bytes in, bytes out: the demo's model, sized for two CPU cores.
    "tiny": ModelConfig(hidden_size=128, num_layers=3, num_dense_layers=1, dense_intermediate_size=384, num_heads=4,
                        num_experts=64, top_k=16, expert_intermediate_size=16, max_position_embeddings=1024,
                        initializer_range=0.05),
    # 143 M parameters: minutes on one GPU.
    "small": ModelConfig(hidden_size=512, num_layers=8, num_dense_layers=1, dense_intermediate_size=1536, num_heads=8,
                         q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
                         num_experts=128, top_k=16, expert_intermediate_size=96, routed_scaling_factor=2.5),
    # 2.4 B parameters: fp32 weight, gradient and AdamW's two moments are 16 bytes of each, which leaves half of 80 GB
    # to activations.
    "single-gpu": ModelConfig(hidden_size=1536, num_layers=16, num_dense_layers=1, dense_intermediate_size=6144,
                              num_heads=16, q_lora_rank=768, kv_lora_rank=256, qk_nope_head_dim=64,
                              qk_rope_head_dim=32, v_head_dim=64, num_experts=128, top_k=16,
                              expert_intermediate_size=256, num_shared_experts=2, routed_scaling_factor=2.5),
}
