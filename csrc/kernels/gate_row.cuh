// One token's row of router logits in the registers of one warp, and its scores. Shared by the gate and its backward.
//
//   softmax       score = exp(x - max) / sum exp(x - max)
//   sigmoid       score = 1 / (1 + exp(-x))
//   sqrtsoftplus  score = sqrt(log(1 + exp(x)))
//
// All in fp32, with the accurate expf and log1pf. Lane l holds the experts kVector * (l + 32 * c) + j of chunk c, so
// that a warp reads 512 adjacent bytes of fp32 logits with one instruction.
#pragma once

#include <cfloat>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/ptx.cuh"
#include "params.h"

namespace moe {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr int kGateWarps = 4;  // tokens of a block: few, so that 128 tokens still reach 32 SMs
constexpr int kMaxTopK = 32;   // a lane a choice
constexpr float kRenormalizeEpsilon = 1e-20f;

// Which expert a lane's value belongs to, for kValues values a lane (up to 32 * kValues experts).
template <int kValues_>
struct RowLayout {
  static constexpr int kValues = kValues_;
  static constexpr int kVector = kValues < 4 ? kValues : 4;
  static constexpr int kChunks = kValues / kVector;
  static constexpr int kExperts = kWarpSize * kValues;
  static_assert(kValues % kVector == 0 && kValues <= 32, "whole vectors, and one mask bit a value");

  static __device__ __forceinline__ int expert(int lane, int i) {
    const unsigned value = i;  // unsigned, so that the divisions are shifts
    return kVector * (lane + kWarpSize * (value / kVector)) + value % kVector;
  }
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) LogitVector {
  T values[kVector];
};

template <typename T, typename Layout>
__device__ __forceinline__ void load_whole_row(const T* __restrict__ row, int lane, float (&x)[Layout::kValues]) {
  using Vector = LogitVector<T, Layout::kVector>;
  Vector loaded[Layout::kChunks];
#pragma unroll
  for (int c = 0; c < Layout::kChunks; ++c) {
    loaded[c] = *reinterpret_cast<const Vector*>(row + Layout::expert(lane, c * Layout::kVector));
  }
#pragma unroll
  for (int i = 0; i < Layout::kValues; ++i) x[i] = to_float(loaded[i / Layout::kVector].values[i % Layout::kVector]);
}

// x = row[expert(lane, i)], `padding` past the last expert. An aligned row of E % kVector == 0 numbers is read as
// vectors, one of Layout::kExperts numbers without any choice to make.
template <typename T, typename Layout>
__device__ __forceinline__ void load_row(const T* __restrict__ row, int num_experts, int lane, float padding,
                                         float (&x)[Layout::kValues]) {
  using Vector = LogitVector<T, Layout::kVector>;
  const bool aligned = num_experts % Layout::kVector == 0 && reinterpret_cast<uintptr_t>(row) % alignof(Vector) == 0;
  if (aligned && num_experts == Layout::kExperts) {
    load_whole_row<T, Layout>(row, lane, x);
  } else if (aligned) {
    Vector loaded[Layout::kChunks];
#pragma unroll
    for (int c = 0; c < Layout::kChunks; ++c) {
      const int first = Layout::expert(lane, c * Layout::kVector);
      if (first < num_experts) loaded[c] = *reinterpret_cast<const Vector*>(row + first);
    }
#pragma unroll
    for (int i = 0; i < Layout::kValues; ++i) {
      const bool inside = Layout::expert(lane, i - i % Layout::kVector) < num_experts;
      x[i] = inside ? to_float(loaded[i / Layout::kVector].values[i % Layout::kVector]) : padding;
    }
  } else {
#pragma unroll
    for (int i = 0; i < Layout::kValues; ++i) {
      const int expert = Layout::expert(lane, i);
      x[i] = expert < num_experts ? to_float(row[expert]) : padding;
    }
  }
}

template <typename T, typename Layout>
__device__ __forceinline__ void load_logits_of(const void* logits, int64_t token, int num_experts, int lane,
                                               float (&x)[Layout::kValues]) {
  // -inf adds nothing to a softmax
  load_row<T, Layout>(static_cast<const T*>(logits) + token * num_experts, num_experts, lane, -INFINITY, x);
}

template <typename Layout>
__device__ __forceinline__ void load_logits(const void* logits, DType dtype, int64_t token, int num_experts, int lane,
                                            float (&x)[Layout::kValues]) {
  switch (dtype) {
    case DType::kFloat32:
      return load_logits_of<float, Layout>(logits, token, num_experts, lane, x);
    case DType::kBFloat16:
      return load_logits_of<__nv_bfloat16, Layout>(logits, token, num_experts, lane, x);
    case DType::kFloat16:
      return load_logits_of<__half, Layout>(logits, token, num_experts, lane, x);
  }
}

__device__ __forceinline__ float load_logit(const void* logits, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(logits)[index];
    case DType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(logits)[index]);
    case DType::kFloat16:
      return to_float(static_cast<const __half*>(logits)[index]);
  }
  return 0.0f;
}

// What a softmax needs to know of its whole row.
struct RowStatistics {
  float max = 0.0f;
  float inverse_sum = 1.0f;
};

template <ScoreFn kScoreFn>
__device__ __forceinline__ float score_of(float x, const RowStatistics& row) {
  if constexpr (kScoreFn == ScoreFn::kSoftmax) {
    return expf(x - row.max) * row.inverse_sum;
  } else if constexpr (kScoreFn == ScoreFn::kSigmoid) {
    return reciprocal_approx(1.0f + expf(-x));
  } else {
    return sqrt_approx(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));  // no overflow for large x, no cancellation for small
  }
}

__device__ __forceinline__ float score_of(float x, ScoreFn score_fn, const RowStatistics& row) {
  switch (score_fn) {
    case ScoreFn::kSoftmax:
      return score_of<ScoreFn::kSoftmax>(x, row);
    case ScoreFn::kSigmoid:
      return score_of<ScoreFn::kSigmoid>(x, row);
    case ScoreFn::kSqrtSoftplus:
      return score_of<ScoreFn::kSqrtSoftplus>(x, row);
  }
  return 0.0f;
}

// Maximum and sum of the exponentials of the row, the same in every lane. Shuffle trees, so a fixed order.
template <int kValues>
__device__ __forceinline__ RowStatistics softmax_statistics(const float (&x)[kValues]) {
  RowStatistics row;
  row.max = x[0];
#pragma unroll
  for (int i = 1; i < kValues; ++i) row.max = fmaxf(row.max, x[i]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) row.max = fmaxf(row.max, __shfl_xor_sync(kAllLanes, row.max, offset));
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) sum += expf(x[i] - row.max);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  const float inverse = reciprocal_approx(sum);  // of 1 to 1024: one Newton step makes it as good as a division
  row.inverse_sum = fmaf(inverse, fmaf(-sum, inverse, 1.0f), inverse);
  return row;
}

// The smallest built number of values a lane that holds the row; 12 and 24 are there for 384 and 768 experts.
template <typename Function>
void dispatch_row_layout(int num_experts, Function&& function) {
  const int values = (num_experts + kWarpSize - 1) / kWarpSize;
  if (values <= 1) return function(RowLayout<1>());
  if (values <= 2) return function(RowLayout<2>());
  if (values <= 4) return function(RowLayout<4>());
  if (values <= 8) return function(RowLayout<8>());
  if (values <= 12) return function(RowLayout<12>());
  if (values <= 16) return function(RowLayout<16>());
  if (values <= 24) return function(RowLayout<24>());
  return function(RowLayout<32>());
}

}  // namespace moe
