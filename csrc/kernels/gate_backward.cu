// Gradient of the gate's weights to the router logits; the choice and the correction bias have none.
//
//   p_k = score(logits[t, ids[t, k]]),  u_k = routed_scaling_factor * grad_topk_weights[t, k]
//   dp_k = u_k                                                      without renormalize
//        = (u_k - sum_j u_j p_j / sum) / sum,  sum = sum_j p_j + 1e-20     with it
//   sigmoid, sqrtsoftplus: grad_logits[t, e] = sum over the k with ids[t, k] = e of dp_k * score'(logit), else 0
//   softmax:               grad_logits[t, e] = p_e * (sum over the k with ids[t, k] = e of dp_k - sum_k dp_k p_k)
//
// router_logits and grad_logits [T, E] in one dtype, ids [T, K]; slots with an id outside [0, E) take no part. Scores
// are computed anew from the logits. One warp a token: lane k owns slot k, then every lane its experts (gate_row.cuh).
// Only softmax reads the whole row; the others read K logits and write the row.
//
// Deterministic: sums over k are taken k ascending, an id that occurs twice (given ids may) is added by its first lane.
// Source: derivative of gate.cu's formula.

#include "common/error.h"
#include "gate_row.cuh"

namespace moe {
namespace {

// Shared memory of one warp, in front of Layout::kExperts floats.
struct BackwardStorage {
  float terms[kMaxTopK];
};

__device__ __forceinline__ float sum_ascending(BackwardStorage* storage, int count, int lane, float mine) {
  __syncwarp();
  storage->terms[lane] = mine;
  __syncwarp();
  float sum = 0.0f;
  for (int k = 0; k < count; ++k) sum += storage->terms[k];
  return sum;
}

// Derivative of the score by its logit; for softmax the diagonal part alone is not of use, so it is 1 there.
__device__ __forceinline__ float score_slope(ScoreFn score_fn, float logit, float score) {
  switch (score_fn) {
    case ScoreFn::kSoftmax:
      return 1.0f;
    case ScoreFn::kSigmoid:
      return score * (1.0f - score);
    case ScoreFn::kSqrtSoftplus: {
      // the score underflows to 0 for very negative logits, where the derivative's limit is 0
      const float sigmoid = score_of<ScoreFn::kSigmoid>(logit, RowStatistics());
      return score > 0.0f ? sigmoid / (2.0f * score) : score;
    }
  }
  return 0.0f;
}

struct Slot {
  bool valid;
  int id;
  float score;
  float grad;  // of the score: dp_k
  float slope;
};

__device__ __forceinline__ Slot load_slot(const GateBackwardParams& params, const RowStatistics& row,
                                          BackwardStorage* storage, int64_t token, int lane) {
  Slot slot = {};
  float upstream = 0.0f;
  if (lane < params.top_k) {
    const int64_t index = token * params.top_k + lane;
    slot.id = params.topk_ids[index];
    slot.valid = slot.id >= 0 && slot.id < params.num_experts;
    if (slot.valid) {
      const float logit = load_logit(params.router_logits, params.logits_dtype, token * params.num_experts + slot.id);
      slot.score = score_of(logit, params.score_fn, row);
      slot.slope = score_slope(params.score_fn, logit, slot.score);
      upstream = params.grad_topk_weights[index] * params.routed_scaling_factor;
    }
  }
  slot.grad = upstream;
  if (params.renormalize) {
    const float sum = sum_ascending(storage, params.top_k, lane, slot.score) + kRenormalizeEpsilon;
    const float along = sum_ascending(storage, params.top_k, lane, upstream * slot.score);
    slot.grad = slot.valid ? (upstream - along / sum) / sum : 0.0f;
  }
  return slot;
}

// by_expert[id] = sum of slot.grad * slot.slope over the slots that name the id, k ascending; 0 for the others.
template <typename Layout>
__device__ __forceinline__ void scatter_slots(BackwardStorage* storage, float* by_expert, const Slot& slot, int lane) {
  using Vector = LogitVector<float, Layout::kVector>;
#pragma unroll
  for (int c = 0; c < Layout::kChunks; ++c) {
    *reinterpret_cast<Vector*>(by_expert + Layout::expert(lane, c * Layout::kVector)) = Vector{};
  }
  __syncwarp();
  storage->terms[lane] = slot.grad * slot.slope;
  unsigned peers = __match_any_sync(kAllLanes, slot.valid ? slot.id : -1 - lane);
  __syncwarp();
  if (slot.valid && __ffs(peers) - 1 == lane) {
    float sum = 0.0f;
    for (; peers != 0; peers &= peers - 1) sum += storage->terms[__ffs(peers) - 1];
    by_expert[slot.id] = sum;
  }
  __syncwarp();
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float(float x) {
  return __float2half_rn(x);
}

template <typename T, typename Layout>
__device__ __forceinline__ void store_row(T* row, int num_experts, int lane, const float (&x)[Layout::kValues]) {
  using Vector = LogitVector<T, Layout::kVector>;
  const bool aligned = num_experts % Layout::kVector == 0;
#pragma unroll
  for (int c = 0; c < Layout::kChunks; ++c) {
    const int first = Layout::expert(lane, c * Layout::kVector);
    Vector vector;
#pragma unroll
    for (int j = 0; j < Layout::kVector; ++j) vector.values[j] = from_float<T>(x[c * Layout::kVector + j]);
    if (aligned) {
      if (first < num_experts) *reinterpret_cast<Vector*>(row + first) = vector;
    } else {
#pragma unroll
      for (int j = 0; j < Layout::kVector; ++j) {
        if (first + j < num_experts) row[first + j] = vector.values[j];
      }
    }
  }
}

template <typename Layout>
__device__ __forceinline__ void store_grad(const GateBackwardParams& params, int64_t token, int lane,
                                           const float (&x)[Layout::kValues]) {
  const int64_t offset = token * params.num_experts;
  switch (params.logits_dtype) {
    case DType::kFloat32:
      return store_row<float, Layout>(static_cast<float*>(params.grad_logits) + offset, params.num_experts, lane, x);
    case DType::kBFloat16:
      return store_row<__nv_bfloat16, Layout>(static_cast<__nv_bfloat16*>(params.grad_logits) + offset,
                                              params.num_experts, lane, x);
    case DType::kFloat16:
      return store_row<__half, Layout>(static_cast<__half*>(params.grad_logits) + offset, params.num_experts, lane, x);
  }
}

template <typename Layout>
__global__ void __launch_bounds__(kGateWarps* kWarpSize) gate_backward_kernel(const GateBackwardParams params) {
  extern __shared__ __align__(16) char backward_memory[];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kGateWarps + warp;
  if (token >= params.num_tokens) return;
  char* base = backward_memory + warp * (sizeof(BackwardStorage) + Layout::kExperts * sizeof(float));
  auto* storage = reinterpret_cast<BackwardStorage*>(base);
  auto* by_expert = reinterpret_cast<float*>(base + sizeof(BackwardStorage));

  const bool softmax = params.score_fn == ScoreFn::kSoftmax;
  float x[Layout::kValues];
  RowStatistics row;
  if (softmax) {
    load_logits<Layout>(params.router_logits, params.logits_dtype, token, params.num_experts, lane, x);
    row = softmax_statistics(x);
  }
  const Slot slot = load_slot(params, row, storage, token, lane);
  const float mean = softmax ? sum_ascending(storage, params.top_k, lane, slot.grad * slot.score) : 0.0f;
  scatter_slots<Layout>(storage, by_expert, slot, lane);
#pragma unroll
  for (int i = 0; i < Layout::kValues; ++i) {
    const float grad = by_expert[Layout::expert(lane, i)];
    x[i] = softmax ? score_of<ScoreFn::kSoftmax>(x[i], row) * (grad - mean) : grad;
  }
  store_grad<Layout>(params, token, lane, x);
}

}  // namespace

void launch_gate_backward(const GateBackwardParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  dispatch_row_layout(params.num_experts, [&](auto layout) {
    using Layout = decltype(layout);
    const auto blocks = static_cast<unsigned>((params.num_tokens + kGateWarps - 1) / kGateWarps);
    const int bytes = kGateWarps * static_cast<int>(sizeof(BackwardStorage) + Layout::kExperts * sizeof(float));
    gate_backward_kernel<Layout><<<blocks, kGateWarps * kWarpSize, bytes, stream>>>(params);
    check_launch("gate_backward");
  });
}

}  // namespace moe
