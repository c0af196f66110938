// Tokens copied into expert order.
//
//   rows[row_of_slot[t, k]] = hidden_states[t]; rows[r] = 0 where sorted_rows[r] is -1
//
// hidden_states [T, H], rows [S, H] in bf16 or fp16, moved as 16-byte vectors. A warp owns 1024 adjacent columns of one
// token, has four loads a lane in flight and writes them to the token's K rows; of the rows numbered as its slots it
// clears those that no slot has. Bound by memory: T*H elements read once, S*H written. (Row by row the K reads of a
// token lie far apart, and find it in L2 only where all tokens fit there.)
//
// Deterministic: copies. Source: the gather of every MoE layer that keeps its rows sorted by expert.

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/rows.cuh"
#include "params.h"

namespace moe {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr int kWarps = 8;                     // of a block
constexpr int kLoads = 4;                     // in flight a lane
constexpr int kColumns = kLoads * kWarpSize;  // of a warp, in vectors of 8

__device__ __forceinline__ void store_columns(uint4* row, int first, int vectors, const uint4 (&loaded)[kLoads]) {
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int column = first + i * kWarpSize;
    if (column < vectors) row[column] = loaded[i];
  }
}

__global__ void __launch_bounds__(kWarps* kWarpSize) permute_kernel(const PermuteParams params, int chunks) {
  wait_for_previous_kernels();
  allow_next_kernel();
  const int lane = threadIdx.x % kWarpSize;
  const auto [token, chunk] = row_chunk_of_warp<kWarps>(blockIdx.x, threadIdx.x / kWarpSize, chunks);
  if (token >= params.num_tokens) return;
  const int vectors = params.hidden_size / kVectorSize;
  const int first = chunk * kColumns + lane;
  const auto* source = static_cast<const uint4*>(params.hidden_states) + token * vectors;
  auto* rows = static_cast<uint4*>(params.rows);
  uint4 loaded[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int column = first + i * kWarpSize;
    loaded[i] = column < vectors ? source[column] : make_uint4(0, 0, 0, 0);
  }
  for (int base = 0; base < params.top_k; base += kWarpSize) {
    const int64_t slot = token * params.top_k + base + lane;
    const bool inside = base + lane < params.top_k;
    const int my_row = inside ? params.row_of_slot[slot] : -1;
    const bool unowned = inside && params.sorted_rows[slot] < 0;
    const int end = min(params.top_k - base, kWarpSize);
    for (int k = 0; k < end; ++k) {
      const int64_t row = __shfl_sync(kAllLanes, my_row, k);
      if (row >= 0) store_columns(rows + row * vectors, first, vectors, loaded);
    }
    for (unsigned rest = __ballot_sync(kAllLanes, unowned); rest != 0; rest &= rest - 1) {
      const int64_t row = token * params.top_k + base + __ffs(rest) - 1;
      store_columns(rows + row * vectors, first, vectors, {});
    }
  }
}

}  // namespace

void launch_permute(const PermuteParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.hidden_size == 0) return;
  const int vectors = params.hidden_size / kVectorSize;
  const int chunks = (vectors + kColumns - 1) / kColumns;
  const auto blocks = static_cast<unsigned>((params.num_tokens * chunks + kWarps - 1) / kWarps);
  launch_overlapped("permute", permute_kernel, blocks, kWarps * kWarpSize, 0, stream, params, chunks);
}

}  // namespace moe
