// Each token's sum of its experts' rows, and the backward of it.
//
//   combine           output[t] = sum over k, ascending, of topk_weights[t, k] * rows[row_of_slot[t, k]]
//   combine_backward  grad_rows[row_of_slot[t, k]] = topk_weights[t, k] * grad_output[t]
//                     grad_topk_weights[t, k] = dot(grad_output[t], rows[row_of_slot[t, k]])
//
// rows, grad_rows [S, H], output, grad_output [T, H]: bf16 or fp16; weights and their gradient [T, K] fp32. A slot
// whose row is -1 is not read, contributes nothing and gets a zero; a row without a slot gets a zero gradient. Sums are
// fp32, rounded once.
//
// combine: a warp owns kVectors * 256 adjacent columns of one token and has kRows of its K rows in flight at once.
// combine_backward: a warp owns one slot, all its columns, and the row of the same number if that has no slot, to zero.
// Both are bound by memory: every row is read once, (K + 1) * T * H elements for combine, and written once in the
// backward, where the K slots of a token find grad_output[t] in the caches.
//
// Deterministic: a sum over k is one lane's, k ascending; a dot product is a tree over columns that depends on H only.
// Source: DeepSeek-V3 report, section 2.1.2, and its derivative.

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/rows.cuh"
#include "params.h"

namespace moe {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr int kWarps = 8;  // of a block

// kRows * kVectors 16-byte loads are in flight in a lane.
template <int kRows_, int kVectors_>
struct CombineConfig {
  static constexpr int kRows = kRows_;
  static constexpr int kVectors = kVectors_;
  static constexpr int kColumns = kVectors * kWarpSize;  // of a warp, in vectors of 8
  static_assert(kWarpSize % kRows == 0, "a group of rows ends with a group of 32 slots");
};

// ------------------------------------------------------------------------------------------------------------- combine

// sums += weights[k] * the columns of row k, for the slots k0 .. k0 + kRows; lane k holds slot k's row and weight. A
// slot without a row has the weight 0 and adds a vector of zeros. A lane past the last column reads the last one again,
// so that nothing but the row decides what is read.
template <typename T, typename Config>
__device__ __forceinline__ void add_rows(const CombineParams& params, int k0, int my_row, float my_weight, int vectors,
                                         int first, float (&sums)[Config::kVectors][kVectorSize]) {
  const auto* rows = static_cast<const uint4*>(params.rows);
  uint4 loaded[Config::kRows][Config::kVectors];
#pragma unroll
  for (int i = 0; i < Config::kRows; ++i) {
    const int row = __shfl_sync(kAllLanes, my_row, k0 + i);
#pragma unroll
    for (int v = 0; v < Config::kVectors; ++v) {
      const int column = min(first + v * kWarpSize, vectors - 1);
      loaded[i][v] = make_uint4(0, 0, 0, 0);
      if (row >= 0) loaded[i][v] = __ldcs(rows + static_cast<int64_t>(row) * vectors + column);
    }
  }
#pragma unroll
  for (int i = 0; i < Config::kRows; ++i) {
    const float weight = __shfl_sync(kAllLanes, my_weight, k0 + i);
#pragma unroll
    for (int v = 0; v < Config::kVectors; ++v) {
      float values[kVectorSize];
      unpack8<T>(loaded[i][v], values);
#pragma unroll
      for (int j = 0; j < kVectorSize; ++j) sums[v][j] = fmaf(weight, values[j], sums[v][j]);
    }
  }
}

template <typename T, typename Config>
__global__ void __launch_bounds__(kWarps* kWarpSize, 4) combine_kernel(const CombineParams params, int chunks) {
  wait_for_previous_kernels();
  allow_next_kernel();
  const int lane = threadIdx.x % kWarpSize;
  const auto [token, chunk] = row_chunk_of_warp<kWarps>(blockIdx.x, threadIdx.x / kWarpSize, chunks);
  if (token >= params.num_tokens) return;
  const int vectors = params.hidden_size / kVectorSize;
  const int first = chunk * Config::kColumns + lane;
  float sums[Config::kVectors][kVectorSize] = {};
  for (int base = 0; base < params.top_k; base += kWarpSize) {
    const int64_t slot = token * params.top_k + base + lane;
    const int my_row = base + lane < params.top_k ? params.row_of_slot[slot] : -1;
    float my_weight = my_row >= 0 ? 1.0f : 0.0f;
    if (my_row >= 0 && params.topk_weights != nullptr) my_weight = params.topk_weights[slot];
    const int end = min(params.top_k - base, kWarpSize);
    for (int k0 = 0; k0 < end; k0 += Config::kRows) {
      add_rows<T, Config>(params, k0, my_row, my_weight, vectors, first, sums);
    }
  }
#pragma unroll
  for (int v = 0; v < Config::kVectors; ++v) {
    const int column = first + v * kWarpSize;
    if (column < vectors) static_cast<uint4*>(params.output)[token * vectors + column] = pack8<T>(sums[v]);
  }
}

template <typename T, typename Config>
void launch_combine_as(const CombineParams& params, cudaStream_t stream) {
  const int vectors = params.hidden_size / kVectorSize;
  const int chunks = (vectors + Config::kColumns - 1) / Config::kColumns;
  const auto blocks = static_cast<unsigned>((params.num_tokens * chunks + kWarps - 1) / kWarps);
  launch_overlapped("combine", combine_kernel<T, Config>, blocks, kWarps * kWarpSize, 0, stream, params, chunks);
}

// ---------------------------------------------------------------------------------------------------- combine_backward

constexpr int kBackwardLoads = 4;  // vectors of the row and of the gradient in flight, each

__device__ __forceinline__ float sum_in_warp(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

__device__ __forceinline__ void zero_row(uint4* row, int vectors, int lane) {
  for (int column = lane; column < vectors; column += kWarpSize) row[column] = make_uint4(0, 0, 0, 0);
}

// grad_row = weight * grad; gives this lane's part of dot(grad, row).
template <typename T>
__device__ __forceinline__ float backward_row(const uint4* grad, const uint4* row, uint4* grad_row, float weight,
                                              int vectors, int lane) {
  float dot = 0.0f;
  for (int base = lane; base < vectors; base += kBackwardLoads * kWarpSize) {
    uint4 loaded_grad[kBackwardLoads], loaded_row[kBackwardLoads];
#pragma unroll
    for (int i = 0; i < kBackwardLoads; ++i) {
      const int column = base + i * kWarpSize;
      loaded_grad[i] = loaded_row[i] = make_uint4(0, 0, 0, 0);
      if (column < vectors) {
        loaded_grad[i] = grad[column];
        loaded_row[i] = __ldcs(row + column);
      }
    }
#pragma unroll
    for (int i = 0; i < kBackwardLoads; ++i) {
      const int column = base + i * kWarpSize;
      float grads[kVectorSize], values[kVectorSize], scaled[kVectorSize];
      unpack8<T>(loaded_grad[i], grads);
      unpack8<T>(loaded_row[i], values);
#pragma unroll
      for (int j = 0; j < kVectorSize; ++j) {
        dot = fmaf(grads[j], values[j], dot);
        scaled[j] = weight * grads[j];
      }
      if (column < vectors) grad_row[column] = pack8<T>(scaled);
    }
  }
  return dot;
}

template <typename T>
__global__ void __launch_bounds__(kWarps* kWarpSize) combine_backward_kernel(const CombineBackwardParams params) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (slot >= params.num_tokens * params.top_k) return;
  const int vectors = params.hidden_size / kVectorSize;
  auto* grad_rows = static_cast<uint4*>(params.grad_rows);
  if (params.sorted_rows[slot] < 0) zero_row(grad_rows + slot * vectors, vectors, lane);
  const int64_t row = params.row_of_slot[slot];
  float dot = 0.0f;
  if (row >= 0) {
    const int64_t token = static_cast<unsigned>(slot) / params.top_k;  // S is below 2^31
    const auto* grad = static_cast<const uint4*>(params.grad_output) + token * vectors;
    const auto* values = static_cast<const uint4*>(params.rows) + row * vectors;
    dot = backward_row<T>(grad, values, grad_rows + row * vectors, params.topk_weights[slot], vectors, lane);
  }
  dot = sum_in_warp(dot);
  if (lane == 0) params.grad_topk_weights[slot] = dot;
}

}  // namespace

// Eight rows in flight a lane; fewer rows a token leave room for a second column each.
void launch_combine(const CombineParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.hidden_size == 0) return;
  dispatch_half(params.dtype, "combine", [&](auto type) {
    using T = decltype(type);
    if (params.top_k <= 2) return launch_combine_as<T, CombineConfig<2, 2>>(params, stream);
    if (params.top_k <= 4) return launch_combine_as<T, CombineConfig<4, 1>>(params, stream);
    launch_combine_as<T, CombineConfig<8, 1>>(params, stream);
  });
}

void launch_combine_backward(const CombineBackwardParams& params, cudaStream_t stream) {
  const int64_t num_slots = params.num_tokens * params.top_k;
  if (num_slots == 0) return;
  dispatch_half(params.dtype, "combine_backward", [&](auto type) {
    using T = decltype(type);
    const auto blocks = static_cast<unsigned>((num_slots + kWarps - 1) / kWarps);
    combine_backward_kernel<T><<<blocks, kWarps * kWarpSize, 0, stream>>>(params);
    check_launch("combine_backward");
  });
}

}  // namespace moe
