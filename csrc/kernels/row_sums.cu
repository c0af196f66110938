// Sums over rows that the backward needs beside its products.
//
//   bias_grad     out[e] = sum over the rows r of expert e of w_r * grad(r)    [E, N]
//                 grad(r) = grad[r], or grad[sorted_rows[r] / K] with sorted_rows
//                 w_r = topk_weights[sorted_rows[r]], or 1
//   routing_grad  grad_topk_weights[t, k] = sum over p of partials[row_of_slot[t, k], p]    [T, K]
//                 + dot(grad_output[t], down_bias[e]) with a bias, e the expert of the row
//                 0 for a slot without a row
//
// grad, grad_output, down_bias, out: bf16 or fp16; weights, partials and their sums fp32.
//
// bias_grad: a block owns 64 columns of one expert: 8 lanes across them, so that a row is one 128-byte line, and 32 row
// groups. Group g sums the rows first + g, first + g + 32, ... ascending, then one thread a column sums the 32 groups
// ascending: an order that depends on nothing but the number of rows. Bound by memory: S*N elements read once.
// routing_grad: 4 lanes a slot, which add every 4th partial sum, or every 4th four of them, ascending, and then their
// sums in a shuffle tree. With a bias one warp a slot, and a shuffle tree over the columns too.
//
// Deterministic: no atomics, every order is fixed. Source: derivative of the biased products of down_proj and up_proj.

#include "common/error.h"
#include "common/rows.cuh"
#include "params.h"

namespace moe {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr int kThreads = 256;

// ----------------------------------------------------------------------------------------------------------- bias_grad

constexpr int kLanes = 8;                       // across the columns of a block
constexpr int kColumns = kLanes * kVectorSize;  // of a block
constexpr int kGroups = kThreads / kLanes;      // of rows
constexpr int kLoads = 4;                       // rows in flight a lane

// The slots of kLoads rows of a group, row r0 + i * kGroups; -1 past the last. Without sorted_rows the row itself.
__device__ __forceinline__ void load_slots(const BiasGradParams& params, int64_t r0, int64_t end,
                                           int64_t (&slots)[kLoads]) {
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t row = r0 + i * kGroups;
    slots[i] = -1;
    if (row < end) slots[i] = params.sorted_rows != nullptr ? params.sorted_rows[row] : row;
  }
}

// sums += w_r * grad(r) over the group's rows r, ascending, for the 8 columns that start at `column`.
template <typename T>
__device__ __forceinline__ void sum_group(const BiasGradParams& params, int64_t begin, int64_t end, int column,
                                          float (&sums)[kVectorSize]) {
  const auto* grad = static_cast<const T*>(params.grad);
  for (int64_t r0 = begin; r0 < end; r0 += kLoads * kGroups) {
    int64_t slots[kLoads];
    load_slots(params, r0, end, slots);
    uint4 loaded[kLoads];
    float weights[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      loaded[i] = make_uint4(0, 0, 0, 0);
      weights[i] = 0.0f;
      if (slots[i] < 0) continue;
      const int64_t source = params.sorted_rows != nullptr ? static_cast<int>(slots[i]) / params.top_k : slots[i];
      loaded[i] = *reinterpret_cast<const uint4*>(grad + source * params.width + column);
      weights[i] = params.topk_weights != nullptr ? params.topk_weights[slots[i]] : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      float values[kVectorSize];
      unpack8<T>(loaded[i], values);
#pragma unroll
      for (int j = 0; j < kVectorSize; ++j) sums[j] = fmaf(weights[i], values[j], sums[j]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) bias_grad_kernel(const BiasGradParams params, int chunks) {
  __shared__ __align__(16) float partials[kGroups][kColumns];
  const int expert = blockIdx.x / chunks;
  const int first_column = (blockIdx.x - expert * chunks) * kColumns;
  const int group = threadIdx.x / kLanes, offset = threadIdx.x % kLanes * kVectorSize;
  const int64_t begin = params.expert_offsets[expert], end = params.expert_offsets[expert + 1];
  float sums[kVectorSize] = {};
  if (first_column + offset < params.width) sum_group<T>(params, begin + group, end, first_column + offset, sums);
  auto* mine = reinterpret_cast<float4*>(&partials[group][offset]);
  mine[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
  mine[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
  __syncthreads();
  const int column = first_column + threadIdx.x;
  if (threadIdx.x >= kColumns || column >= params.width) return;
  float total = 0.0f;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) total += partials[g][threadIdx.x];
  auto* output = static_cast<T*>(params.output) + static_cast<int64_t>(expert) * params.width;
  output[column] = Pair<T>::from_float(total, 0.0f).x;
}

// -------------------------------------------------------------------------------------------------------- routing_grad

constexpr int kSumLanes = 4;  // a slot: 64 bytes at a time
constexpr int kSumSlots = 2;  // a lane: loads of both are in flight

// Called by all lanes of a warp; every kSumLanes of them get the sums of their rows, 0 where a row is negative.
template <int kSlots>
__device__ __forceinline__ void sum_partials(const RoutingGradParams& params, const int (&rows)[kSlots],
                                             float (&sums)[kSlots]) {
  const int lane = threadIdx.x % kSumLanes, count = params.num_partials;
  auto add = [&](int p, auto read) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (rows[s] >= 0) sums[s] += read(params.partials + static_cast<int64_t>(rows[s]) * count + p);
    }
  };
#pragma unroll
  for (int s = 0; s < kSlots; ++s) sums[s] = 0.0f;
  if (count % 4 == 0) {
#pragma unroll 2
    for (int p = lane * 4; p < count; p += kSumLanes * 4) {
      add(p, [](const float* from) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        return (four.x + four.y) + (four.z + four.w);
      });
    }
  } else {
#pragma unroll 2
    for (int p = lane; p < count; p += kSumLanes) add(p, [](const float* from) { return *from; });
  }
#pragma unroll
  for (int s = 0; s < kSlots; ++s)
#pragma unroll
    for (int offset = kSumLanes / 2; offset > 0; offset /= 2) {
      sums[s] += __shfl_xor_sync(kAllLanes, sums[s], offset);
    }
}

__global__ void __launch_bounds__(kThreads) routing_grad_kernel(const RoutingGradParams params) {
  constexpr int kApart = kThreads / kSumLanes;  // from a lane's slot to its next
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kApart * kSumSlots + threadIdx.x / kSumLanes;
  const int64_t num_slots = params.num_tokens * params.top_k;
  int rows[kSumSlots];
#pragma unroll
  for (int s = 0; s < kSumSlots; ++s) {
    const int64_t slot = first + s * kApart;
    rows[s] = slot < num_slots ? params.row_of_slot[slot] : -1;
  }
  float sums[kSumSlots];
  sum_partials(params, rows, sums);
#pragma unroll
  for (int s = 0; s < kSumSlots; ++s) {
    const int64_t slot = first + s * kApart;
    if (slot < num_slots && threadIdx.x % kSumLanes == 0) params.grad_topk_weights[slot] = sums[s];
  }
}

// The expert that owns the row: the last one that begins at or before it and is not empty.
__device__ __forceinline__ int expert_of_row(const int32_t* expert_offsets, int num_experts, int row) {
  int low = 0, high = num_experts;  // expert_offsets[low] <= row < expert_offsets[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (expert_offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename T>
__device__ __forceinline__ float dot_in_warp(const T* left, const T* right, int size, int lane) {
  float dot = 0.0f;
#pragma unroll 4
  for (int column = lane * kVectorSize; column < size; column += kWarpSize * kVectorSize) {
    float a[kVectorSize], b[kVectorSize];
    unpack8<T>(*reinterpret_cast<const uint4*>(left + column), a);
    unpack8<T>(*reinterpret_cast<const uint4*>(right + column), b);
#pragma unroll
    for (int j = 0; j < kVectorSize; ++j) dot = fmaf(a[j], b[j], dot);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) dot += __shfl_xor_sync(kAllLanes, dot, offset);
  return dot;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) biased_routing_grad_kernel(const RoutingGradParams params) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (slot >= params.num_tokens * params.top_k) return;
  const int row = params.row_of_slot[slot];
  float sums[1];
  sum_partials(params, {row}, sums);
  float sum = sums[0];
  if (row >= 0) {
    const int64_t expert = expert_of_row(params.expert_offsets, params.num_experts, row);
    const int64_t token = static_cast<unsigned>(slot) / params.top_k;  // S is below 2^31
    const auto* grad = static_cast<const T*>(params.grad_output) + token * params.hidden_size;
    const auto* bias = static_cast<const T*>(params.down_bias) + expert * params.hidden_size;
    sum += dot_in_warp(grad, bias, params.hidden_size, lane);
  }
  if (lane == 0) params.grad_topk_weights[slot] = sum;
}

}  // namespace

void launch_bias_grad(const BiasGradParams& params, cudaStream_t stream) {
  if (params.num_experts == 0 || params.width == 0) return;
  dispatch_half(params.dtype, "bias_grad", [&](auto type) {
    using T = decltype(type);
    const int chunks = (params.width + kColumns - 1) / kColumns;
    const auto blocks = static_cast<unsigned>(params.num_experts) * static_cast<unsigned>(chunks);
    bias_grad_kernel<T><<<blocks, kThreads, 0, stream>>>(params, chunks);
    check_launch("bias_grad");
  });
}

void launch_routing_grad(const RoutingGradParams& params, cudaStream_t stream) {
  const int64_t num_slots = params.num_tokens * params.top_k;
  if (num_slots == 0) return;
  const int slots_of_block = params.down_bias != nullptr ? kThreads / kWarpSize : kThreads / kSumLanes * kSumSlots;
  const auto blocks = static_cast<unsigned>((num_slots + slots_of_block - 1) / slots_of_block);
  if (params.down_bias == nullptr) {
    routing_grad_kernel<<<blocks, kThreads, 0, stream>>>(params);
  } else {
    dispatch_half(params.dtype, "routing_grad", [&](auto type) {
      using T = decltype(type);
      biased_routing_grad_kernel<T><<<blocks, kThreads, 0, stream>>>(params);
    });
  }
  check_launch("routing_grad");
}

}  // namespace moe
