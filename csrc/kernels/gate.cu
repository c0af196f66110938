// The gate: scores, choice of top_k experts, weights.
//
//   scores  = softmax | sigmoid | sqrt(softplus) of router_logits [T, E] (fp32, bf16 or fp16), in fp32
//   choice  = scores + correction_bias, NaN counting as -inf; -inf outside the topk_groups best groups of experts
//   ids     = the top_k largest choices, largest first, equal ones by ascending id   [T, K] int32
//   weights = scores[ids] (/ (sum + 1e-20)) * routed_scaling_factor                   [T, K] fp32
//
// One warp a token, the row in its registers. Finding the top K does not sort the row:
//   1. the K-th largest of the 32 lanes' maxima (64 half-lane maxima for K > 16) bounds the K-th largest value from
//      below, because each maximum is another element: a bitonic sort of one value a lane;
//   2. only elements not below the bound are candidates: about 22 of 768 for K = 16. They go to shared memory as 64-bit
//      keys (value, then descending id), no two of which are equal;
//   3. a candidate's place is the number of larger keys.
// More than kMaxCandidates (long runs of equal values) are left to K rounds of a plain maximum.
//
// Instructions a warp for E = 768, K = 16, sigmoid: loads 90, scores 24 * 9, bias and NaN 70, maxima and candidates
// 150, sort 60, places 130, weights 90: about 800, or 14 us for 16384 tokens on an H100 (132 * 4 * 1.75 G/s), under the
// 17 us that the 50 MB of fp32 logits take.
//
// Deterministic: no atomics, places are counted, the weights are summed k ascending.
// Source: DeepSeek-V3 report, section 2.1.2; group-limited choice as in its published inference code; sqrtsoftplus as
// in DeepSeek-V4's.

#include <climits>

#include "common/error.h"
#include "gate_row.cuh"

namespace moe {
namespace {

constexpr int kMaxCandidates = 64;

// Shared memory of one warp, in front of `values` of Layout::kExperts floats and the groups' scores.
struct GateStorage {
  unsigned long long candidates[kMaxCandidates];
  int chosen[kMaxTopK];
  float weights[kMaxTopK];
};

struct WarpMemory {
  GateStorage* storage;
  float* values;        // [Layout::kExperts] choice of every expert, NaN past the last
  float* group_scores;  // [num_expert_groups], only where groups are chosen
};

__host__ __device__ inline bool chooses_groups(const GateParams& params) {
  return params.topk_groups < params.num_expert_groups;
}

template <typename Layout>
__host__ __device__ inline int warp_memory_bytes(const GateParams& params) {
  const int group_floats = chooses_groups(params) ? (params.num_expert_groups + 3) / 4 * 4 : 0;
  return static_cast<int>(sizeof(GateStorage)) + (Layout::kExperts + group_floats) * static_cast<int>(sizeof(float));
}

template <typename Layout>
__device__ __forceinline__ WarpMemory warp_memory(const GateParams& params) {
  extern __shared__ __align__(16) char gate_memory[];
  char* base = gate_memory + threadIdx.x / kWarpSize * warp_memory_bytes<Layout>(params);
  WarpMemory memory;
  memory.storage = reinterpret_cast<GateStorage*>(base);
  memory.values = reinterpret_cast<float*>(base + sizeof(GateStorage));
  memory.group_scores = memory.values + Layout::kExperts;
  return memory;
}

// Unsigned integers in the order of the floats.
__device__ __forceinline__ unsigned ordered_bits(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

// ------------------------------------------------------------------------------------------------------- choice values

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
    case ScoreFn::kSoftmax: score_row<ScoreFn::kSoftmax>(x, row); break;
    case ScoreFn::kSigmoid: score_row<ScoreFn::kSigmoid>(x, row); break;
    case ScoreFn::kSqrtSoftplus: score_row<ScoreFn::kSqrtSoftplus>(x, row); break;
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

// -------------------------------------------------------------------------------------------------------------- groups

// Score of every group: its best choice, or with a bias the sum of its two best. A power of two of lanes shares one.
__device__ void score_groups(const GateParams& params, const WarpMemory& memory, int lane) {
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
__device__ void drop_losing_groups(const GateParams& params, const WarpMemory& memory, int lane) {
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

// --------------------------------------------------------------------------------------------------------------- top K

// One value a lane: the larger or the smaller of it and of lane ^ offset's.
__device__ __forceinline__ float exchange(float value, int offset, bool keep_larger) {
  const float other = __shfl_xor_sync(kAllLanes, value, offset);
  return keep_larger ? fmaxf(value, other) : fminf(value, other);
}

// Turns a bitonic sequence of 32 lanes into a descending one.
__device__ __forceinline__ float merge_descending(float value, int lane) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = exchange(value, offset, (lane & offset) == 0);
  return value;
}

__device__ __forceinline__ float sort_descending(float value, int lane) {
#pragma unroll
  for (int size = 2; size < kWarpSize; size *= 2) {
#pragma unroll
    for (int offset = size / 2; offset > 0; offset /= 2) {
      value = exchange(value, offset, ((lane & offset) == 0) == ((lane & size) == 0));
    }
  }
  return merge_descending(value, lane);
}

// A value that at least top_k elements of the row reach, or -inf.
template <int kValues>
__device__ __forceinline__ float lower_bound_of_top(const float (&x)[kValues], int top_k, int lane) {
  constexpr int kHalf = (kValues + 1) / 2;
  float first = -INFINITY, second = -INFINITY;  // also what a lane without experts shows
#pragma unroll
  for (int i = 0; i < kHalf; ++i) first = fmaxf(first, x[i]);
#pragma unroll
  for (int i = kHalf; i < kValues; ++i) second = fmaxf(second, x[i]);
  float sorted;
  if (top_k <= 16 || kValues == 1) {
    sorted = sort_descending(fmaxf(first, second), lane);
  } else {
    // the upper 32 of two descending sequences are bitonic: the larger of each one and its mirror image
    first = sort_descending(first, lane);
    second = sort_descending(second, lane);
    sorted = merge_descending(fmaxf(first, __shfl_xor_sync(kAllLanes, second, 31)), lane);
  }
  return __shfl_sync(kAllLanes, sorted, top_k - 1);
}

// Writes the candidates' keys and gives their number; writes nothing when there are more than kMaxCandidates.
template <typename Layout>
__device__ __forceinline__ int collect_candidates(const WarpMemory& memory, float bound, int lane,
                                                  const float (&x)[Layout::kValues]) {
  unsigned mask = 0;
#pragma unroll
  for (int i = 0; i < Layout::kValues; ++i) {
    if (x[i] >= bound) mask |= 1u << i;
  }
  const int mine = __popc(mask);
  int end = mine;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int below = __shfl_up_sync(kAllLanes, end, offset);
    if (lane >= offset) end += below;
  }
  const int total = __shfl_sync(kAllLanes, end, kWarpSize - 1);
  if (total > kMaxCandidates) return total;
  for (unsigned long long* slot = memory.storage->candidates + end - mine; mask != 0; mask &= mask - 1, ++slot) {
    const int id = Layout::expert(lane, __ffs(mask) - 1);
    *slot = static_cast<unsigned long long>(ordered_bits(memory.values[id])) << 32 | ~static_cast<unsigned>(id);
  }
  // the loop over the keys reads four at a time: 0 is below every key
  if (lane < 3 && total + lane < kMaxCandidates) memory.storage->candidates[total + lane] = 0;
  __syncwarp();
  return total;
}

// chosen[place of a key] = its id. kKeys keys a lane.
template <int kKeys>
__device__ __forceinline__ void place_candidates(GateStorage* storage, int total, int top_k, int lane) {
  unsigned long long mine[kKeys];
  int place[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    mine[i] = storage->candidates[lane + kWarpSize * i];  // past `total` it is not used
    place[i] = lane + kWarpSize * i < total ? 0 : kMaxTopK;
  }
  for (int base = 0; base < total; base += 4) {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const ulonglong2 others = *reinterpret_cast<const ulonglong2*>(storage->candidates + base + j);
#pragma unroll
      for (int i = 0; i < kKeys; ++i) place[i] += (others.x > mine[i]) + (others.y > mine[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    if (place[i] < top_k) storage->chosen[place[i]] = static_cast<int>(~static_cast<unsigned>(mine[i]));
  }
}

// K rounds of a warp-wide maximum over the values in shared memory.
template <typename Layout>
__device__ __forceinline__ void choose_by_rounds(const WarpMemory& memory, int top_k, int lane) {
  for (int k = 0; k < top_k; ++k) {
    unsigned best = 0;
    int id = INT_MAX;
#pragma unroll 1
    for (int i = 0; i < Layout::kValues; ++i) {
      const float value = memory.values[Layout::expert(lane, i)];
      const unsigned key = isnan(value) ? 0 : ordered_bits(value);
      if (key > best) {
        best = key;
        id = Layout::expert(lane, i);
      }
    }
    const unsigned largest = __reduce_max_sync(kAllLanes, best);
    const int winner = __reduce_min_sync(kAllLanes, best == largest ? id : INT_MAX);
    if (winner == id) {
      memory.storage->chosen[k] = winner;
      memory.values[winner] = NAN;
    }
    __syncwarp();
  }
}

template <typename Layout>
__device__ __forceinline__ void choose(const GateParams& params, const WarpMemory& memory, int lane,
                                       float (&x)[Layout::kValues]) {
  store_values<Layout>(memory.values, lane, x);
  __syncwarp();
  if (chooses_groups(params)) {
    drop_losing_groups(params, memory, lane);
    reload_values<Layout>(memory.values, lane, x);
  }
  const float bound = lower_bound_of_top(x, params.top_k, lane);
  const int total = collect_candidates<Layout>(memory, bound, lane, x);
  if (total <= kWarpSize) {
    place_candidates<1>(memory.storage, total, params.top_k, lane);
  } else if (total <= kMaxCandidates) {
    place_candidates<2>(memory.storage, total, params.top_k, lane);
  } else {
    choose_by_rounds<Layout>(memory, params.top_k, lane);
  }
  __syncwarp();
}

// -------------------------------------------------------------------------------------------------------------- kernel

// Lane k weighs id k; an id outside [0, E) weighs nothing.
__device__ __forceinline__ void store_weights(const GateParams& params, const RowStatistics& row, GateStorage* storage,
                                              int64_t token, int lane, int id) {
  float weight = 0.0f;
  if (lane < params.top_k && id >= 0 && id < params.num_experts) {
    const int64_t index = token * params.num_experts + id;
    weight = score_of(load_logit(params.router_logits, params.logits_dtype, index), params.score_fn, row);
  }
  if (params.renormalize) {
    storage->weights[lane] = weight;
    __syncwarp();
    float sum = 0.0f;
    for (int k = 0; k < params.top_k; ++k) sum += storage->weights[k];
    weight = weight / (sum + kRenormalizeEpsilon);
  }
  if (lane < params.top_k) {
    params.topk_weights[token * params.top_k + lane] = weight * params.routed_scaling_factor;
    params.topk_ids[token * params.top_k + lane] = id;
  }
}

template <typename Layout>
__global__ void __launch_bounds__(kGateWarps * kWarpSize, Layout::kValues <= 24 ? 8 : 5)
    gate_kernel(const GateParams params) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kGateWarps + threadIdx.x / kWarpSize;
  if (token >= params.num_tokens) return;
  const WarpMemory memory = warp_memory<Layout>(params);
  RowStatistics row;
  int id = -1;
  const bool chooses = params.given_ids == nullptr;
  if (chooses || params.score_fn == ScoreFn::kSoftmax) {
    float x[Layout::kValues];
    load_logits<Layout>(params.router_logits, params.logits_dtype, token, params.num_experts, lane, x);
    if (params.score_fn == ScoreFn::kSoftmax) row = softmax_statistics(x);
    if (chooses) {
      choices_of<Layout>(params, row, lane, x);
      choose<Layout>(params, memory, lane, x);
    }
  }
  if (lane < params.top_k) id = chooses ? memory.storage->chosen[lane] : params.given_ids[token * params.top_k + lane];
  store_weights(params, row, memory.storage, token, lane, id);
}

}  // namespace

void launch_gate(const GateParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  dispatch_row_layout(params.num_experts, [&](auto layout) {
    using Layout = decltype(layout);
    const auto blocks = static_cast<unsigned>((params.num_tokens + kGateWarps - 1) / kGateWarps);
    const int bytes = kGateWarps * warp_memory_bytes<Layout>(params);  // at most 36 KB
    gate_kernel<Layout><<<blocks, kGateWarps * kWarpSize, bytes, stream>>>(params);
    check_launch("gate");
  });
}

}  // namespace moe
