"""The cases that the tests of every stage share: shapes, routings, inputs, and how close a result must be.

Inputs are of size 1 (weights scaled by 1/sqrt(fan-in)), so that a wrong activation or a lost clamp shows. Everything is
drawn on the CPU from a fixed seed and then moved, so that every device sees the same numbers.
"""

from dataclasses import dataclass

import torch

from moe_kernels import ops
from moe_kernels.activation import ACTIVATIONS, pre_activation_width

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One problem size. routing: uniform, idle, one_expert, edges, skewed, sentinels, none or nothing_valid."""

    name: str
    num_tokens: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    routing: str = "uniform"


CASES = [
    Case("no_tokens", 0, 4, 2, 64, 32),
    Case("one_token", 1, 8, 2, 64, 32),
    Case("one_expert_exists", 9, 1, 1, 64, 32),
    Case("idle_expert", 33, 6, 2, 64, 48, "idle"),
    Case("all_on_one_expert", 150, 5, 1, 64, 32, "one_expert"),
    Case("all_experts", 17, 4, 4, 64, 32),
    Case("sixteen_a_token", 24, 32, 16, 64, 16),
    Case("rows_127_128_129", 384, 3, 1, 72, 40, "edges"),
    Case("odd_multiples_of_8", 50, 4, 3, 136, 56),
    Case("wider_than_a_tile", 70, 2, 2, 264, 136),
    Case("smallest", 21, 3, 2, 8, 8),
    Case("sentinels", 60, 4, 4, 64, 32, "sentinels"),
    Case("nothing_valid", 5, 4, 2, 64, 32, "nothing_valid"),
]
SMALL = [case for case in CASES if case.name in ("no_tokens", "sixteen_a_token", "odd_multiples_of_8", "sentinels")]


def case_id(case):
    """The name pytest shows."""
    return case.name


def backends(dtypes):
    """(device, dtype) pairs to run on: the CPU's dtypes, and on a GPU what kernels and composite store."""
    pairs = [("cpu", dtype) for dtype in dtypes]
    if torch.cuda.is_available():
        pairs += [("cuda", dtype) for dtype in (*HALVES, torch.float32)]
    return pairs


BACKENDS = backends((torch.float32, torch.bfloat16))
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
LAYOUTS = {"rows": (False, True), "transposed": (True, True), "interleaved": (True, False)}  # of the weights
ACTIVATION_OPTIONS = [(name, None) for name in ACTIVATIONS] + [("swiglu", "limit"), ("swiglu_oai", "limit")]


def backend_id(value):
    """cpu, bfloat16, swiglu: short parts of a test's name."""
    return str(value).removeprefix("torch.")


def operator_options(activation, limit=None, alpha=1.702, layout="rows"):
    """The activation and the layout as the operators take them."""
    return (activation, limit, alpha, *LAYOUTS[layout])


def layout_options(layout):
    """The layout as fused_experts takes it."""
    return dict(zip(("is_transposed", "is_concatenated"), LAYOUTS[layout]))


def swiglu_limit(option, dtype):
    """A limit half-way between two values of dtype, so that rounding a pre-activation does not move it across."""
    return None if option is None else 1 + torch.finfo(dtype).eps / 2


def tolerance(dtype):
    """Relative error allowed: for bf16 and fp16 a few roundings of eps/2 in storage, else the products' own error."""
    eps = torch.finfo(dtype).eps
    return eps if dtype in HALVES else 16 * eps


def relative_error(out, ref):
    """||out - ref|| / ||ref|| in fp64; where ref is zero, out must be."""
    out, ref = out.detach().to("cpu", torch.float64), ref.detach().to("cpu", torch.float64)
    assert out.shape == ref.shape, f"shape {list(out.shape)}, wanted {list(ref.shape)}"
    norm = ref.norm().item()
    error = (out - ref).norm().item()
    return error / norm if norm > 0 else (0.0 if error == 0 else float("inf"))


def assert_close(out, ref, dtype, what="output"):
    """Within the tolerance of dtype as a whole; and, more loosely, in every element, so that one wrong one shows."""
    error, allowed = relative_error(out, ref), tolerance(dtype)
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"
    ref = ref.detach().to("cpu", torch.float64)
    if ref.numel() == 0:
        return
    rms = ref.square().mean().sqrt()
    excess = (out.detach().to("cpu", torch.float64) - ref).abs() - allowed * (16 * rms + 2 * ref.abs())
    worst = excess.argmax().item()
    assert excess.flatten()[worst] <= 0, (
        f"{what}: element {worst} is {out.flatten()[worst].item()}, wanted {ref.flatten()[worst].item()}")


def assert_same_bits(first, second, what="output"):
    """Equal bit for bit, NaN included; tensors or sequences of them."""
    if isinstance(first, torch.Tensor):
        assert first.shape == second.shape and first.dtype == second.dtype
        same = torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (first, second)))
        assert same, f"{what}: two runs differ"
        return
    assert len(first) == len(second)
    for i, (a, b) in enumerate(zip(first, second)):
        if a is not None:
            assert_same_bits(a, b, f"{what}[{i}]")


# inputs --------------------------------------------------------------------------------------------------------------


def make_ids(case, generator):
    """[T, K] int32 on the CPU; K different experts a token, and the case's routing."""
    shape = (case.num_tokens, case.num_experts)
    draws = torch.rand(shape, generator=generator)
    if case.routing == "one_expert":
        return torch.full((case.num_tokens, case.top_k), case.num_experts - 2, dtype=torch.int32)
    if case.routing == "edges":  # experts with 127, 128 and 129 tokens, mixed
        ids = torch.repeat_interleave(torch.arange(3), torch.tensor([127, 128, 129]))
        return ids[torch.randperm(384, generator=generator)].unsqueeze(-1).to(torch.int32)
    if case.routing == "idle":
        draws[:, 3] = -1.0
    if case.routing == "skewed":  # an expert with half of all tokens
        draws[::2, case.num_experts // 3] = 1.0
    ids = draws.argsort(dim=-1, descending=True)[:, : case.top_k].to(torch.int32)
    if case.routing == "sentinels":
        outside = torch.tensor([-1, case.num_experts, case.num_experts + 5, 2**31 - 1, -(2**31)], dtype=torch.int64)
        other = outside[torch.randint(5, ids.shape, generator=generator)].to(torch.int32)
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, other, ids)
        ids[0] = -1
    if case.routing == "nothing_valid":
        ids = torch.full_like(ids, case.num_experts)
    return ids.contiguous()


class Inputs:
    """The tensors of a case on one device in one dtype; reproducible from the seed.

    hidden_states [T, H], gate_up_proj [E, W, H], down_proj [E, H, I], gate_up_bias [E, W], down_bias [E, H],
    topk_weights [T, K] fp32, topk_ids [T, K] int32, grad_output [T, H].
    A sentinel's routing weight is NaN: whatever it is, it must not be used.
    """

    FLOATS = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights", "gate_up_bias", "down_bias")

    def __init__(self, case, device="cpu", dtype=torch.float32, activation="swiglu", seed=0):
        self.case, self.device, self.dtype, self.activation = case, device, dtype, activation
        generator = torch.Generator().manual_seed(seed)
        width = pre_activation_width(case.intermediate_size, activation)
        tokens, experts, hidden = case.num_tokens, case.num_experts, case.hidden_size

        def normal(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)

        self.hidden_states = normal(tokens, hidden)
        self.gate_up_proj = normal(experts, width, hidden, scale=hidden**-0.5)
        self.down_proj = normal(experts, hidden, case.intermediate_size, scale=case.intermediate_size**-0.5)
        self.gate_up_bias, self.down_bias = normal(experts, width), normal(experts, hidden)
        self.grad_output = normal(tokens, hidden)
        ids = make_ids(case, generator)
        weights = torch.rand(ids.shape, generator=generator) + 0.1
        weights[(ids < 0) | (ids >= experts)] = float("nan")
        weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.topk_ids, self.topk_weights = ids.to(device), weights.to(device, weights_dtype)

    @property
    def ops(self):
        """The operators that serve these inputs."""
        return ops._namespace(self.hidden_states)

    def plan(self):
        """expert_offsets, sorted_rows, row_of_slot."""
        return ops.make_plan(self.topk_ids, self.case.num_experts)

    def require_grad(self):
        """Makes leaves of all six floating inputs and returns them in the order of FLOATS."""
        return [getattr(self, name).requires_grad_() for name in self.FLOATS]

    def to_layout(self, layout):
        """The same experts in a layout of LAYOUTS."""
        self.gate_up_proj, self.down_proj, self.gate_up_bias = in_layout(
            layout, self.gate_up_proj, self.down_proj, self.gate_up_bias)
        return self


def in_layout(layout, gate_up_proj, down_proj, gate_up_bias):
    """The three tensors, laid out as rows, in a layout of LAYOUTS."""
    if layout == "rows":
        return gate_up_proj, down_proj, gate_up_bias
    gate_up_proj, down_proj = gate_up_proj.transpose(1, 2).contiguous(), down_proj.transpose(1, 2).contiguous()
    if layout == "interleaved":
        gate_up_proj, gate_up_bias = interleaved(gate_up_proj), interleaved(gate_up_bias)
    return gate_up_proj, down_proj, gate_up_bias


def interleaved(x):
    """The last dimension's halves, column by column in turn."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)
