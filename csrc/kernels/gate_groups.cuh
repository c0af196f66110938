// The gate where experts are chosen by groups: the choices of all experts, -inf outside the topk_groups best groups, in
// registers and in shared memory, and the top K of them.
#pragma once

#include "gate_topk.cuh"

namespace moe {

__device__ __forceinline__ float score_of_expert(const GateParams& params, const RowStatistics& row, int64_t token,
                                                 int id) {
  const float logit = load_logit(params.router_logits, params.logits_dtype, token * params.num_experts + id);
  return score_of(logit, params.score_fn, row);
}

template <ScoreFn kScoreFn, int kValues>
__device__ __forceinline__ void score_row(float (&x)[kValues], const RowStatistics& row) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) x[i] = score_of<kScoreFn>(x[i], row);
}

// Logits become choices: biased scores, NaN as -inf, and NaN in the registers past the last expert, where no comparison
// with it holds.
template <typename Layout>
__device__ __forceinline__ void choices_of(const GateParams& params, const RowStatistics& row, int lane,
                                           float (&x)[Layout::kValues]) {
  switch (params.score_fn) {
    case ScoreFn::kSoftmax:
      score_row<ScoreFn::kSoftmax>(x, row);
      break;
    case ScoreFn::kSigmoid:
      score_row<ScoreFn::kSigmoid>(x, row);
      break;
    case ScoreFn::kSqrtSoftplus:
      score_row<ScoreFn::kSqrtSoftplus>(x, row);
      break;
  }
  if (params.correction_bias != nullptr) {
    float bias[Layout::kValues];
    load_row<float, Layout>(params.correction_bias, params.num_experts, lane, 0.0f, bias);
#pragma unroll
    for (int i = 0; i < Layout::kValues; ++i) x[i] += bias[i];
  }
#pragma unroll
  for (int i = 0; i < Layout::kValues; ++i) x[i] = fmaxf(x[i], -INFINITY);  // fmaxf drops a NaN
  if (params.num_experts < Layout::kExperts) {
#pragma unroll
    for (int i = 0; i < Layout::kValues; ++i) {
      if (Layout::expert(lane, i) >= params.num_experts) x[i] = NAN;
    }
  }
}

template <typename Layout>
__device__ __forceinline__ void store_values(float* values, int lane, const float (&x)[Layout::kValues]) {
  using Vector = LogitVector<float, Layout::kVector>;
#pragma unroll
  for (int c = 0; c < Layout::kChunks; ++c) {
    Vector vector;
#pragma unroll
    for (int j = 0; j < Layout::kVector; ++j) vector.values[j] = x[c * Layout::kVector + j];
    *reinterpret_cast<Vector*>(values + Layout::expert(lane, c * Layout::kVector)) = vector;
  }
}

template <typename Layout>
__device__ __forceinline__ void reload_values(const float* values, int lane, float (&x)[Layout::kValues]) {
  using Vector = LogitVector<float, Layout::kVector>;
#pragma unroll
  for (int c = 0; c < Layout::kChunks; ++c) {
    const Vector vector = *reinterpret_cast<const Vector*>(values + Layout::expert(lane, c * Layout::kVector));
#pragma unroll
    for (int j = 0; j < Layout::kVector; ++j) x[c * Layout::kVector + j] = vector.values[j];
  }
}

// Score of every group: its best choice, or with a bias the sum of its two best. A power of two of lanes shares one.
__device__ inline void score_groups(const GateParams& params, const WarpMemory& memory, int lane) {
  const int num_groups = params.num_expert_groups;
  const int size = params.num_experts / num_groups;
  int sharing = 1;
  while (2 * sharing * num_groups <= kWarpSize) sharing *= 2;
  const int first = lane / sharing, step = kWarpSize / sharing, part = lane % sharing;
  for (int base = 0; base < num_groups; base += step) {
    const int group = base + first;
    float best = -INFINITY, second = -INFINITY;
    if (group < num_groups) {
      const float* values = memory.values + group * size;
      const int rotation = group * sharing % size;  // groups of 32 experts would all read the same bank
      for (int j = part; j < size; j += sharing) {
        const int index = j + rotation < size ? j + rotation : j + rotation - size;
        const float value = values[index];
        second = fmaxf(second, fminf(best, value));
        best = fmaxf(best, value);
      }
    }
    for (int offset = sharing / 2; offset > 0; offset /= 2) {
      const float other_best = __shfl_xor_sync(kAllLanes, best, offset);
      const float other_second = __shfl_xor_sync(kAllLanes, second, offset);
      second = fmaxf(fminf(best, other_best), fmaxf(second, other_second));
      best = fmaxf(best, other_best);
    }
    const bool two = params.correction_bias != nullptr && size > 1;
    if (group < num_groups && part == 0) memory.group_scores[group] = fmaxf(two ? best + second : best, -INFINITY);
  }
}

// -inf for the experts of every group that topk_groups other groups beat; ties go to the lower group.
__device__ inline void drop_losing_groups(const GateParams& params, const WarpMemory& memory, int lane) {
  score_groups(params, memory, lane);
  __syncwarp();
  const int num_groups = params.num_expert_groups;
  const int size = params.num_experts / num_groups;
  for (int group = lane; group < num_groups; group += kWarpSize) {
    const float score = memory.group_scores[group];
    int better = 0;
    for (int other = 0; other < num_groups; ++other) {
      const float other_score = memory.group_scores[other];
      better += other_score > score || (other_score == score && other < group);
    }
    if (better >= params.topk_groups) {
      for (int j = 0; j < size; ++j) memory.values[group * size + j] = -INFINITY;
    }
  }
  __syncwarp();
}

// The top K, x being the logits.
template <typename Layout>
__device__ __forceinline__ void choose_of_groups(const GateParams& params, const RowStatistics& row,
                                                 const WarpMemory& memory, int lane, float (&x)[Layout::kValues]) {
  choices_of<Layout>(params, row, lane, x);
  store_values<Layout>(memory.values, lane, x);
  __syncwarp();
  drop_losing_groups(params, memory, lane);
  reload_values<Layout>(memory.values, lane, x);
  const float bound = lower_bound_of_top(x, params.top_k, lane);
  const float lowered = bound - kBoundMargin * fmaxf(fabsf(bound), 1e-6f);
  const int total = collect_candidates<Layout>(memory.storage, lowered, lane, x);
  if (total > kMaxCandidates || !(fabsf(bound) < kMaxBound)) {
    return choose_by_rounds<Layout>(memory, params.top_k, lane);
  }
  place_all(memory.storage, total, params.top_k, lane, [&](int id) { return Scored{memory.values[id], 0.0f}; });
}

}  // namespace moe
