"""Balance without an auxiliary loss: the update, the loss, the statistics, and that it works."""

import pytest
import torch
from cases import DEVICES
from torch import nn

import moe_kernels as mk
from moe_kernels import balance


def test_max_violation():
    loads = torch.tensor([[5, 5, 5, 5], [8, 4, 4, 0], [0, 0, 0, 0], [0, 0, 0, 12]])
    assert balance.max_violation(loads).tolist() == [0.0, 1.0, 0.0, 3.0]
    assert balance.max_violation(loads[1]).item() == 1.0


def two_layers(device="cpu"):
    torch.manual_seed(0)
    return nn.ModuleDict({"a": mk.MoE(16, 8, 4, 2, device=device), "dense": nn.Linear(16, 16, device=device),
                          "b": mk.MoE(16, 8, 8, 3, device=device),
                          "hash": mk.MoE(16, 8, 4, 2, vocab_size=10, device=device)})


@pytest.mark.parametrize("device", DEVICES)
def test_update_moves_each_bias_one_step_against_its_load_and_resets(device):
    model = two_layers(device)
    model["a"].tokens_per_expert += torch.tensor([10, 2, 6, 6], device=device)
    model["b"].tokens_per_expert += torch.tensor([0, 0, 0, 0, 8, 0, 0, 0], device=device)
    model["hash"].tokens_per_expert += 1
    loads = balance.update_biases(model, step=0.5)
    assert list(loads) == ["a", "b", "hash"]
    assert loads["a"].tolist() == [10, 2, 6, 6] and loads["hash"].tolist() == [1, 1, 1, 1]
    assert model["a"].gate.e_score_correction_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert model["b"].gate.e_score_correction_bias.tolist() == [0.5] * 4 + [-0.5] + [0.5] * 3
    assert all(not model[name].tokens_per_expert.any() for name in loads)
    balance.update_biases(model, step=0.5)  # nothing was seen since: nothing moves
    assert model["a"].gate.e_score_correction_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert not model["a"].gate.e_score_correction_bias.requires_grad


def test_read_loads_may_leave_the_counters():
    model = two_layers()
    model["a"].tokens_per_expert += 3
    assert balance.read_loads(model, reset=False)["a"].tolist() == [3] * 4
    assert model["a"].tokens_per_expert.tolist() == [3] * 4
    assert balance.read_loads(model)["a"].tolist() == [3] * 4
    assert model["a"].tokens_per_expert.tolist() == [0] * 4
    assert balance.read_loads(nn.Linear(2, 2)) == {} and balance.update_biases(nn.Linear(2, 2)) == {}


def test_the_mean_load_is_exact_for_large_loads():
    """16777217 is no fp32: equal loads must not move a bias, whatever their size."""
    model = two_layers()
    model["a"].tokens_per_expert += 16_777_217
    balance.update_biases(model)
    assert not model["a"].gate.e_score_correction_bias.any()
    model["a"].tokens_per_expert += torch.tensor([2**40, 2**40, 2**40 + 1, 2**40 - 1])
    balance.update_biases(model, step=1.0)
    assert model["a"].gate.e_score_correction_bias.tolist() == [0.0, 0.0, -1.0, 1.0]


@pytest.mark.parametrize("device", DEVICES)
def test_a_skewed_router_becomes_balanced(device):
    torch.manual_seed(0)
    layer = mk.MoE(16, 8, 16, 4, device=device)
    with torch.no_grad():
        layer.gate.weight[:4] += 0.4  # four favourites among positive inputs
    violations = []
    for _ in range(250):
        layer(torch.rand(1024, 16, device=device))
        violations.append(balance.max_violation(balance.update_biases(layer, step=0.003)[""]).item())
    assert violations[0] > 1.5
    assert sum(violations[-10:]) / 10 < violations[0] / 5


def test_sequence_balance_loss_is_alpha_when_even_and_counts_by_hand():
    even = torch.full((2, 8, 4), 0.25)
    ids = torch.tensor([[0, 1], [2, 3]]).repeat(2, 4, 1)
    torch.testing.assert_close(balance.sequence_balance_loss(even, ids, 2, 0.1), torch.tensor(0.1))
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 5, 6, generator=generator, dtype=torch.float64)
    ids = torch.randint(-1, 7, (3, 5, 2), generator=generator)
    total = 0.0
    for sequence in range(3):
        for expert in range(6):
            frequency = 6 / (2 * 5) * (ids[sequence] == expert).sum().item()
            share = sum((s[expert] / s.sum()).item() for s in scores[sequence]) / 5
            total += frequency * share / 3
    assert balance.sequence_balance_loss(scores, ids, 2, 1.0).item() == pytest.approx(total)


def test_sequence_balance_loss_of_the_layer_is_by_sequence_and_trains_the_router():
    torch.manual_seed(0)
    layer = mk.MoE(16, 8, 4, 2, sequence_balance_alpha=0.5)
    x = torch.randn(3, 7, 16)
    layer(x)
    whole = layer.sequence_balance_loss
    parts = []
    for sequence in x:
        layer(sequence)
        parts.append(layer.sequence_balance_loss)
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    (grad,) = torch.autograd.grad(whole, layer.gate.weight)
    assert grad.any()
    assert mk.MoE(16, 8, 4, 2).sequence_balance_loss is None


def test_load_statistics():
    statistics = balance.LoadStatistics()
    assert statistics.layers == [] and statistics.max_violations().shape == (0, 0)
    statistics.record(10, {"a": torch.tensor([1, 3]), "b": torch.tensor([2, 2])})
    statistics.record(20, {"a": torch.tensor([4, 4]), "b": torch.tensor([0, 4])})
    assert statistics.steps == [10, 20] and statistics.layers == ["a", "b"]
    assert statistics.tokens_per_expert("a").tolist() == [[1, 3], [4, 4]]
    assert statistics.shares("a").tolist() == [[0.25, 0.75], [0.5, 0.5]]
    assert statistics.max_violations().tolist() == [[0.5, 0.0], [0.0, 1.0]]
    copy = balance.LoadStatistics()
    copy.load_state_dict(statistics.state_dict())
    copy.record(30, {"a": torch.tensor([1, 1]), "b": torch.tensor([1, 1])})
    assert copy.steps == [10, 20, 30] and copy.max_violations()[:2].equal(statistics.max_violations())


def _rank(rank, path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = two_layers()
    model["a"].tokens_per_expert += torch.tensor([[9, 0, 1, 2], [0, 5, 3, 4]][rank])
    loads = balance.update_biases(model, step=1.0)
    assert loads["a"].tolist() == [9, 5, 4, 6]
    assert model["a"].gate.e_score_correction_bias.tolist() == [-1.0, 1.0, 1.0, 0.0]
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_loads_are_summed_over_the_group(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(tmp_path / "store",), nprocs=2)
