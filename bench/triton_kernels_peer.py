"""The layer by OpenAI's triton_kernels: gather, product and activation in one kernel, product and scatter in another.

Its own SwiGLU has up + 1 in the place of up, so that the activation is written here; it is compiled into its kernel
just as its own would be. It makes the routing's metadata from bits, which its top-k kernel would write beside the ids.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, GatherIndx, RoutingData, ScatterIndx, matmul_ogs
from triton_kernels.tensor import BIT, Bitmatrix, SparseMatrix, make_ragged_tensor_metadata

from .kernel_peers import interleave

TOKENS = 128  # of a block of _pack


@triton.jit(repr=lambda _: "_silu_and_mul")
def _silu_and_mul(accumulator):
    gate, up = tl.split(tl.reshape(accumulator, (accumulator.shape[0], accumulator.shape[1] // 2, 2)))
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def _pack(ids, bits, num_tokens, word_stride, SLOTS: tl.constexpr, TOKENS: tl.constexpr):
    """Bit e % 32 of bits[e // 32, token] is whether the token chose expert e; an id of -1 is an empty slot."""
    token, word = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    expert = tl.load(ids + token[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :], mask=(token < num_tokens)[:, None],
                     other=-1).to(tl.int32)
    bit = tl.where((expert >= 0) & (expert // 32 == word), 1 << (expert & 31), 0)
    tl.store(bits + word * word_stride + token, tl.sum(bit, 1).to(tl.uint32, bitcast=True), mask=token < num_tokens)


def make_routing(ids, weights, num_experts):
    """triton_kernels' RoutingData, GatherIndx and ScatterIndx of ids [T, K] and weights [T, K], K a power of two."""
    (num_tokens, slots), device = ids.shape, ids.device
    words = triton.cdiv(num_experts, 32)
    bits = torch.empty((words, triton.cdiv(num_tokens, 32) * 32), dtype=torch.uint32, device=device)
    _pack[(triton.cdiv(num_tokens, TOKENS), words)](ids, bits, num_tokens, bits.stride(0), SLOTS=slots, TOKENS=TOKENS)
    mask = Bitmatrix(bits.T[:num_tokens], dtype=BIT, shape=[num_tokens, num_experts], shape_max=[num_tokens, None])
    metadata = SparseMatrix(indx=ids, vals=weights, mask=mask).mask_metadata
    places, order = metadata.row_sorted_indx, metadata.col_sorted_indx
    ragged = make_ragged_tensor_metadata(metadata.col_sum, order.shape[0])
    routing = RoutingData(weights.reshape(-1)[order], ragged.slice_sizes, num_experts, slots, ragged)
    return routing, GatherIndx(order, places), ScatterIndx(places, order)


def bind(inputs):
    """The layer on these inputs; copied for it: gate_up_proj, so that gate and up take turns, and K to a power of 2."""
    hidden, gate_up, down, weights, ids = inputs[:5]
    num_experts, empty = down.shape[0], triton.next_power_of_2(ids.shape[1]) - ids.shape[1]
    ids, weights = F.pad(ids, (0, empty), value=-1), F.pad(weights, (0, empty))
    gate_up, down = interleave(gate_up).mT, down.detach().mT
    activation = FusedActivation(FnSpecs("silu_and_mul", _silu_and_mul, (), reduction_n=2), ())

    def layer():
        routing, gather, scatter = make_routing(ids, weights, num_experts)
        rows = matmul_ogs(hidden, gate_up, None, routing, gather_indx=gather, fused_activation=activation)
        return matmul_ogs(rows, down, None, routing, scatter_indx=scatter, gammas=routing.gate_scal)

    return layer
