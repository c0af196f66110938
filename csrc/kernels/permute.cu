// Tokens copied into expert order.
//
//   rows[r] = hidden_states[sorted_rows[r] / K]; 0 where sorted_rows[r] is -1
//
// hidden_states [T, H], rows [S, H] in bf16 or fp16, moved as 16-byte vectors. A warp owns 1024 adjacent columns of one
// row and has four loads a lane in flight. Bound by memory: S*H elements written, T*H read (a token's K copies find it
// in L2).
//
// Deterministic: copies. Source: the gather of every MoE layer that keeps its rows sorted by expert.

#include "common/error.h"
#include "common/rows.cuh"
#include "params.h"

namespace moe {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarps = 8;                     // of a block
constexpr int kLoads = 4;                     // in flight a lane
constexpr int kColumns = kLoads * kWarpSize;  // of a warp, in vectors of 8

__global__ void __launch_bounds__(kWarps * kWarpSize) permute_kernel(const PermuteParams params, int chunks) {
  const int lane = threadIdx.x % kWarpSize;
  const auto [row, chunk] = row_chunk_of_warp<kWarps>(blockIdx.x, threadIdx.x / kWarpSize, chunks);
  if (row >= params.num_rows) return;
  const int vectors = params.hidden_size / kVectorSize;
  const int first = chunk * kColumns + lane;
  const int slot = params.sorted_rows[row];
  const int64_t token = slot / params.top_k;
  const auto* source = static_cast<const uint4*>(params.hidden_states) + token * vectors;
  auto* target = static_cast<uint4*>(params.rows) + row * vectors;
  uint4 loaded[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int column = first + i * kWarpSize;
    loaded[i] = make_uint4(0, 0, 0, 0);
    if (slot >= 0 && column < vectors) loaded[i] = source[column];
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int column = first + i * kWarpSize;
    if (column < vectors) target[column] = loaded[i];
  }
}

}  // namespace

void launch_permute(const PermuteParams& params, cudaStream_t stream) {
  if (params.num_rows == 0 || params.hidden_size == 0) return;
  const int vectors = params.hidden_size / kVectorSize;
  const int chunks = (vectors + kColumns - 1) / kColumns;
  const auto blocks = static_cast<unsigned>((params.num_rows * chunks + kWarps - 1) / kWarps);
  permute_kernel<<<blocks, kWarps * kWarpSize, 0, stream>>>(params, chunks);
  check_launch("permute");
}

}  // namespace moe
