"""plan: literal tables, and the naive loop on the shared cases."""

import oracle
import pytest
import torch
from cases import CASES, DEVICES, case_id, make_ids

import moe_kernels as mk

TABLES = {
    "two_experts": (2, [[0, 1], [1, 0], [1, 0]], [0, 3, 6], [0, 3, 5, 1, 2, 4], [[0, 3], [4, 1], [5, 2]]),
    "idle_expert": (4, [[3], [0], [3]], [0, 1, 1, 1, 3], [1, 0, 2], [[1], [0], [2]]),
    "sentinels": (2, [[1, -1], [2, 0], [-7, 1]], [0, 1, 3], [3, 0, 5, -1, -1, -1], [[1, -1], [-1, 0], [-1, 2]]),
    "nothing_valid": (2, [[2, 5]], [0, 0, 0], [-1, -1], [[-1, -1]]),
    "same_expert_twice": (3, [[1, 1], [1, 0]], [0, 1, 4, 4], [3, 0, 1, 2], [[1, 2], [3, 0]]),
}


def check(plan, offsets, sorted_rows, row_of_slot):
    assert all(x.dtype == torch.int32 for x in plan)
    assert plan.expert_offsets.tolist() == offsets
    assert plan.sorted_rows.tolist() == sorted_rows
    assert plan.row_of_slot.tolist() == row_of_slot


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", TABLES)
def test_table(name, dtype, device):
    num_experts, ids, *expected = TABLES[name]
    plan = mk.make_plan(torch.tensor(ids, dtype=dtype, device=device), num_experts)
    check(plan, *expected)
    assert (plan.num_experts, plan.top_k) == (num_experts, len(ids[0]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_case(case, device, run_twice):
    ids = make_ids(case, torch.Generator().manual_seed(1))
    plan = mk.Plan(*run_twice(lambda: mk.make_plan(ids.to(device), case.num_experts)))
    assert plan.row_of_slot.shape == (case.num_tokens, case.top_k)
    check(plan, *oracle.plan(ids.tolist(), case.num_experts))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens, num_experts, top_k",
                         [(3000, 768, 16), (5000, 8, 2), (2049, 1, 1), (700, 3000, 4), (128, 128, 8), (20_000, 96, 8),
                          (100_000, 5, 7), (400_000, 20, 3)])
def test_large(num_tokens, num_experts, top_k, device, run_twice):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(-1, num_experts + 1, (num_tokens, top_k), generator=generator)
    plan = mk.Plan(*run_twice(lambda: mk.make_plan(ids.to(device), num_experts)))
    flat = ids.flatten()
    valid = (flat >= 0) & (flat < num_experts)
    slots = torch.arange(flat.numel())[valid]
    order = slots[flat[valid].argsort(stable=True)]
    assert plan.expert_offsets.cpu().diff().equal(torch.bincount(flat[valid], minlength=num_experts).int())
    assert plan.sorted_rows.cpu()[: len(order)].equal(order.int())
    assert (plan.sorted_rows[len(order) :] == -1).all()
    row_of_slot = plan.row_of_slot.cpu().flatten()
    assert (row_of_slot[~valid] == -1).all()
    assert row_of_slot[order].equal(torch.arange(len(order), dtype=torch.int32))


@pytest.mark.parametrize("device", DEVICES)
def test_id_beyond_int32_is_a_sentinel(device):
    ids = torch.tensor([[2**32, 1], [-(2**32) + 1, 2**31]], device=device)
    check(mk.make_plan(ids, 2), [0, 0, 1], [1, -1, -1, -1], [[-1, 0], [-1, -1]])
