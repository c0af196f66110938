"""The reference transformer: parity with Hugging Face's deepseek_v3, the latent cache, the presets' sizes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from moe_kernels.model import PRESETS, Block, ModelConfig, MoETransformer, count_parameters, moe_layers
from moe_kernels.model.rope import rope_tables

BASE = ModelConfig(vocab_size=80, hidden_size=64, num_layers=3, num_dense_layers=1, dense_intermediate_size=96,
                   num_heads=4, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
                   v_head_dim=24, num_experts=16, top_k=4, expert_intermediate_size=24, num_shared_experts=2,
                   routed_scaling_factor=2.5, max_position_embeddings=256)
YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0, "beta_slow": 1.0, "mscale": 0.7,
        "mscale_all_dim": 1.3}
VARIANTS = {
    "q_lora": {},
    "no_q_lora": {"q_lora_rank": None},
    "groups": {"num_expert_groups": 4, "topk_groups": 2},
    "all_moe": {"num_dense_layers": 0, "renormalize": False, "num_shared_experts": 1},
    "two_dense": {"num_dense_layers": 2, "q_lora_rank": None, "num_expert_groups": 2, "topk_groups": 1},
    "rope_in_halves": {"rope_interleave": False},
    "yarn": {"rope_scaling": YARN},
    "other_constants": {"rms_norm_eps": 0.1, "rope_theta": 50.0, "routed_scaling_factor": 0.5},
    "tied_with_bias": {"tie_word_embeddings": True, "attention_bias": True},
}


def config_of(variant, **changes):
    return ModelConfig.from_dict(BASE.to_dict() | VARIANTS[variant] | changes)


def randomize(model, seed=0):
    """Weights that make every part matter: matrices by fan-in, norms around 1, biases and routing biases not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                tensor.copy_(0.1 * noise)
            else:
                tensor.copy_(noise * (1.0 if "embed" in name else 1.5 / math.sqrt(tensor.shape[-1])))
    return model.eval()


def tokens_of(config, batch, length, seed=1):
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def hf_model(config):
    transformers = pytest.importorskip("transformers")
    hf_config = transformers.DeepseekV3Config(**config.to_hf())
    hf_config._attn_implementation = "eager"
    return transformers.DeepseekV3ForCausalLM(hf_config).float()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_state_dict_of_hugging_face(variant):
    config = config_of(variant)
    theirs, ours = randomize(hf_model(config)), MoETransformer(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids = tokens_of(config, 2, 48)
    with torch.no_grad():
        want = theirs(ids, use_cache=False).logits
        assert want.std() > 0.3, "weights too small to show an error"
        assert relative(ours(ids), want) < 1e-4
        back = hf_model(config).eval()
        back.load_state_dict(randomize(ours, seed=7).state_dict(), strict=True)
        assert relative(ours(ids), back(ids, use_cache=False).logits) < 1e-4
        assert relative(ours(ids), want) > 0.1, "the second set of weights must give other logits"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_agrees_with_hugging_face(side):
    config = config_of("groups")
    theirs, ours = randomize(hf_model(config)), MoETransformer(config).eval()
    ours.load_state_dict(theirs.state_dict())
    ids, mask = tokens_of(config, 2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, slice(0, 7) if side == "left" else slice(13, 20)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want = theirs(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        got = ours(ids, attention_mask=mask)
    assert got.isfinite().all()
    assert relative(got[mask.bool()], want[mask.bool()]) < 1e-4


def test_prediction_module_agrees_with_hugging_face():
    pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpLayer"):
        pytest.skip("this transformers has no prediction modules")
    config = config_of("q_lora", num_mtp_layers=1)
    ours = randomize(MoETransformer(config))
    hf_config = hf_model(config).config
    theirs = layers.MtpLayer(hf_config, modeling.DeepseekV3DecoderLayer, modeling.DeepseekV3RMSNorm,
                             config.num_layers).eval()
    own = {"enorm.", "hnorm.", "eh_proj."}
    renamed = {}
    for name, tensor in ours.model.layers[-1].state_dict().items():
        name = name.replace("shared_head.norm", "post_norm")
        renamed[name if any(map(name.startswith, own | {"post_norm"})) else f"mtp_block.{name}"] = tensor
    theirs.load_state_dict(renamed, strict=True)
    hidden, embeds = torch.randn(2, 2, 12, 64, generator=torch.Generator().manual_seed(3))
    rope = rope_tables(config, torch.arange(12)[None])
    doubled = tuple(torch.cat((table, table), dim=-1) for table in rope)
    causal = torch.full((12, 12), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        want = theirs(embeds, hidden, doubled, causal, None, None)
        assert relative(ours.model.layers[-1].predict(hidden, embeds, rope), want) < 1e-4


def test_config_goes_to_hugging_face_and_back():
    transformers = pytest.importorskip("transformers")
    for config in [*PRESETS.values(), *map(config_of, VARIANTS), config_of("q_lora", score_fn="softmax",
                                                                          swiglu_limit=7.0, num_mtp_layers=1)]:
        assert ModelConfig.from_hf(config.to_hf()) == config
        again = transformers.DeepseekV3Config(**config.to_hf()).to_dict()
        assert ModelConfig.from_hf(again).to_dict() | {"rope_scaling": None} == \
            config.to_dict() | {"rope_scaling": None}
    released = {"model_type": "deepseek_v3", "rope_theta": 10000, "scoring_func": "sigmoid", "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}}
    config = ModelConfig.from_hf(transformers.DeepseekV3Config(num_mtp_layers=0).to_dict() | {"rope_parameters": None}
                                 | released | {"max_position_embeddings": 163840})
    assert config == PRESETS["deepseek-v3"]


@pytest.mark.parametrize("change", [{"model_type": "llama"}, {"hidden_act": "gelu"},
                                    {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None}])
def test_foreign_hugging_face_config_is_refused(change):
    with pytest.raises(ValueError, match="must be"):
        ModelConfig.from_hf(BASE.to_hf() | change)


@pytest.mark.parametrize("change", [{"top_k": 17}, {"num_experts": 10, "num_expert_groups": 4}, {"hidden_size": 0},
                                    {"qk_rope_head_dim": 7}, {"num_dense_layers": 4}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ModelConfig.from_dict(BASE.to_dict() | change)


@pytest.mark.parametrize("change, message", [
    ({"hidden_size": "64"}, "hidden_size wants int, got str"), ({"top_k": True}, "top_k wants int, got bool"),
    ({"q_lora_rank": 1.5}, r"q_lora_rank wants int \| None, got float"), ({"renormalize": 1}, "renormalize wants bool"),
    ({"rope_scaling": {"factor": 2}}, r"rope_scaling\['original_max_position_embeddings'\] wants a number, got None"),
    ({"rope_scaling": {"factor": "x", "original_max_position_embeddings": 8}}, r"rope_scaling\['factor'\] wants a")])
def test_fields_of_another_type_are_refused(change, message):
    assert ModelConfig.from_dict(BASE.to_dict() | {"rope_theta": 10000}).rope_theta == 10000  # an int is a float too
    with pytest.raises(TypeError, match=message):
        ModelConfig.from_dict(BASE.to_dict() | change)


def test_presets_have_the_parameters_they_claim():
    total, active = count_parameters(PRESETS["deepseek-v4-1t"])
    assert abs(total / 1.026e12 - 1) < 1e-3 and abs(active / 32.5e9 - 1) < 2e-3
    total, active = count_parameters(PRESETS["deepseek-v3"])
    assert abs(total / 671.0e9 - 1) < 1e-3 and abs(active / 37.5e9 - 1) < 3e-3
    total, _ = count_parameters(PRESETS["single-gpu"])
    assert 1e9 < total < 3e9 and total * 16 < 60e9, "weights, gradients and moments must leave room on 80 GB"
    assert PRESETS["tiny"].top_k == PRESETS["single-gpu"].top_k == 16


def test_counting_agrees_with_a_model_that_exists():
    model = MoETransformer(BASE)
    total, active = count_parameters(BASE)
    assert total == sum(parameter.numel() for parameter in model.parameters())
    assert total - active == 2 * (16 - 4) * 3 * 24 * 64  # layers, idle experts, matrices of I x H


@pytest.mark.parametrize("variant", ["q_lora", "no_q_lora", "yarn"])
@pytest.mark.parametrize("chunks", [(12, 1, 1, 1, 1), (5, 7, 1, 3)])
def test_cached_logits_are_the_uncached(variant, chunks):
    config = config_of(variant)
    model, ids = randomize(MoETransformer(config)).double(), tokens_of(config, 2, 16)
    cache, parts, done = model.new_cache(2, 16), [], 0
    with torch.no_grad():
        want = model(ids)
        for length in chunks:
            parts.append(model(ids[:, done:done + length], cache=cache))
            done += length
    assert relative(torch.cat(parts, dim=1), want) < 1e-6  # RoPE's tables are fp32


@pytest.mark.parametrize("side", ["left", "right"])
def test_cache_with_padding_gives_each_prompt_its_own_logits(side):
    model = randomize(MoETransformer(BASE)).double()
    prompts = [tokens_of(BASE, 1, length, seed=length) for length in (9, 4)]
    next_ids = tokens_of(BASE, 2, 3, seed=5)
    rows, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        place = slice(9 - prompt.shape[1], 9) if side == "left" else slice(0, prompt.shape[1])
        rows[row, place], mask[row, place] = prompt[0], True
    cache, steps = model.new_cache(2, 12), []
    with torch.no_grad():
        model(rows, mask, cache)
        for step in range(3):
            mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.bool)), dim=1)
            steps.append(model(next_ids[:, step:step + 1], mask, cache))
        for row, prompt in enumerate(prompts):
            want = model(torch.cat((prompt, next_ids[row:row + 1]), dim=1))[:, -3:]
            assert relative(torch.cat(steps, dim=1)[row:row + 1], want) < 1e-6


def test_cache_holds_latents_and_refuses_to_overflow():
    cache = MoETransformer(BASE).new_cache(2, 5)
    assert [tuple(layer.shape) for layer in cache.layers] == [(2, 5, 32 + 8)] * 3
    model = MoETransformer(BASE).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="holds 5 tokens, 6"):
        model(tokens_of(BASE, 2, 6), cache=cache)


def test_nothing_looks_ahead():
    model, ids = randomize(MoETransformer(BASE)).double(), tokens_of(BASE, 1, 16)
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % BASE.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-12)
    assert (before[:, 10:] - after[:, 10:]).abs().amax(dim=-1).min() > 1e-3


def test_loss_is_the_cross_entropy_of_the_next_token():
    model, tokens = randomize(MoETransformer(BASE)), tokens_of(BASE, 3, 17)
    with torch.no_grad():
        log_probabilities = F.log_softmax(model(tokens[:, :-1]), dim=-1)
        want = -log_probabilities.gather(-1, tokens[:, 1:, None]).mean()
        loss = model.loss(tokens)
    torch.testing.assert_close(loss.next_token, want)
    assert loss.total is loss.next_token


def test_prediction_loss_looks_one_token_further():
    config = config_of("q_lora", num_mtp_layers=2, mtp_loss_weight=0.5)
    model, tokens = randomize(MoETransformer(config)), tokens_of(config, 2, 14)
    rope_of = lambda length: rope_tables(config, torch.arange(length)[None])  # noqa: E731
    with torch.no_grad():
        loss = model.loss(tokens)
        hidden, losses = model.model(tokens[:, :13]), []
        for ahead, block in ((1, model.model.layers[3]), (2, model.model.layers[4])):
            length = 13 - ahead
            embeddings = model.model.embed_tokens(tokens[:, ahead:ahead + length])
            hidden = block.predict(hidden[:, :length], embeddings, rope_of(length))
            targets = tokens[:, ahead + 1:ahead + 1 + length]
            losses.append(F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten()))
    torch.testing.assert_close(loss.total, loss.next_token + 0.5 * sum(losses) / 2)


def test_balance_loss_is_added():
    config = config_of("q_lora", sequence_balance_alpha=0.01)
    model, tokens = randomize(MoETransformer(config)).train(), tokens_of(config, 2, 17)
    loss = model.loss(tokens)
    extra = sum(layer.sequence_balance_loss for layer in moe_layers(model))
    torch.testing.assert_close(loss.total, loss.next_token + extra)
    assert extra.item() >= 2 * 0.01 * 0.9  # alpha a layer is the least that even loads give
    for evaluated in (model.eval(), randomize(MoETransformer(config)).eval()):
        loss = evaluated.loss(tokens)
        assert torch.equal(loss.total, loss.next_token)


@pytest.mark.parametrize("variant", ["q_lora", "no_q_lora", "tied_with_bias"])
def test_every_parameter_learns(variant):
    config = config_of(variant, num_mtp_layers=1)
    model = randomize(MoETransformer(config)).train()
    model.loss(tokens_of(config, 8, 33)).total.backward()
    silent = [name for name, parameter in model.named_parameters()
              if parameter.grad is None or not parameter.grad.abs().sum() > 0]
    assert silent == []


def test_tied_head_is_the_embedding():
    model = MoETransformer(config_of("tied_with_bias"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert count_parameters(model.config)[0] == sum(parameter.numel() for parameter in model.parameters())


def test_bf16_stays_near_fp32():
    model, ids = randomize(MoETransformer(config_of("no_q_lora", num_layers=1, num_dense_layers=1))), \
        tokens_of(BASE, 1, 200)
    with torch.no_grad():
        assert relative(copy.deepcopy(model).bfloat16()(ids).float(), model(ids)) < 0.05


@pytest.mark.parametrize("layer_index", [0, 1], ids=["dense", "moe"])
def test_block_compiles_without_a_graph_break(layer_index):
    torch.manual_seed(0)
    block = Block(BASE, layer_index)
    hidden, rope = torch.randn(2, 12, 64), rope_tables(BASE, torch.arange(12)[None])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    want, got = block(hidden, rope), compiled(hidden, rope)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert block.self_attn.kv_b_proj.weight.grad.abs().sum() > 0
