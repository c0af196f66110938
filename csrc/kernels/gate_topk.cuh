// The top K of a row that a warp holds: finding the top K does not sort the row.
//   1. the K-th largest of the 32 lanes' maxima (64 half-lane maxima for K > 16) bounds the K-th largest value from
//      below, because each maximum is another element: a bitonic sort of one value a lane;
//   2. only elements not below the bound are candidates: about 22 of 768 for K = 16;
//   3. a candidate's place is the number of larger keys (value, then descending id), no two of which are equal.
// More than kMaxCandidates (long runs of equal values) are left to K rounds of a plain maximum.
//
// Deterministic: no atomics, places are counted.
#pragma once

#include <climits>

#include "gate_row.cuh"

namespace moe {

constexpr int kMaxCandidates = 64;
constexpr float kMaxBound = 1e12f;     // up to here mask_above does not overflow
constexpr float kBoundMargin = 2e-6f;  // relative, and of 1e-6 at least: takes what equals the bound above it

// Shared memory of one warp, in front of `values` of Layout::kExperts floats and the groups' scores.
struct GateStorage {
  unsigned long long keys[kMaxCandidates];
  int candidates[kMaxCandidates];
  int chosen[kMaxTopK];
  float weights[kMaxTopK];  // scores of the chosen; zero from top_k on
};

struct WarpMemory {
  GateStorage* storage;
  float* values;        // [Layout::kExperts] choice of every expert, NaN past the last
  float* group_scores;  // [num_expert_groups], only where groups are chosen
};

// Unsigned integers in the order of the floats.
__device__ __forceinline__ unsigned ordered_bits(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

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

// Bit i: whether x[i] lies above the bound, by more than 2^-80. Multiply-adds that saturate at 0 and 1, and sums of
// powers of two below 2^24: comparisons and selects run at half their rate, on the pipe that is the busiest here.
template <int kValues>
__device__ __forceinline__ unsigned mask_above(const float (&x)[kValues], float bound) {
  constexpr float kScale = 1.2089258196146292e24f;  // 2^80
  constexpr int kHalf = (kValues + 1) / 2;
  if (fabsf(bound) < 1e-15f) bound = -1e-15f;  // from here on no float lies less than 2^-80 beside it
  const float scaled = -kScale * bound;
  float low = 0.0f, high = 0.0f;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    low = fmaf(__saturatef(fmaf(x[i], kScale, scaled)), static_cast<float>(1u << i), low);
    const int j = i + kHalf;
    if (j < kValues) {
      high = fmaf(__saturatef(fmaf(x[j < kValues ? j : 0], kScale, scaled)), static_cast<float>(1u << i), high);
    }
  }
  return static_cast<unsigned>(low) | static_cast<unsigned>(high) << kHalf;
}

// Writes the ids of the elements above the bound and gives their number; writes nothing where that is above
// kMaxCandidates, or gives more than kMaxCandidates where a lane has more than 15.
template <typename Layout>
__device__ __forceinline__ int collect_candidates(GateStorage* storage, float bound, int lane,
                                                  const float (&x)[Layout::kValues]) {
  constexpr int kCountBits = Layout::kValues < 2 ? 1 : Layout::kValues < 4 ? 2 : Layout::kValues < 8 ? 3 : 4;
  unsigned mask = mask_above(x, bound);
  const int mine = __popc(mask);
  const unsigned lanes_below = (1u << lane) - 1;
  int first = 0, total = 0;
#pragma unroll
  for (int bit = 0; bit < kCountBits; ++bit) {
    const unsigned lanes = __ballot_sync(kAllLanes, (mine >> bit & 1) != 0);
    first += __popc(lanes & lanes_below) << bit;
    total += __popc(lanes) << bit;
  }
  if (Layout::kValues > 15 && __any_sync(kAllLanes, mine > 15)) total = kMaxCandidates + 1;
  if (total > kMaxCandidates) return total;
  for (int* slot = storage->candidates + first; mask != 0; ++slot) {
    const int i = 31 - __clz(mask);
    *slot = Layout::expert(lane, i);
    mask ^= 1u << i;
  }
  __syncwarp();
  return total;
}

// What a candidate is compared by, and its score.
struct Scored {
  float choice, score;
};

// chosen[place of a candidate] = its id, and weights[place] its score. kKeys candidates a lane; scored(id) is `Scored`.
template <int kKeys, typename Function>
__device__ __forceinline__ void place_candidates(GateStorage* storage, int total, int top_k, int lane,
                                                 Function&& scored) {
  int ids[kKeys], above[kKeys];  // above: the number of larger keys, negative
  float scores[kKeys];
  unsigned long long mine[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int index = lane + kWarpSize * i;
    const bool valid = index < total;
    ids[i] = valid ? storage->candidates[index] : 0;
    const Scored values = scored(ids[i]);
    scores[i] = values.score;
    mine[i] = static_cast<unsigned long long>(ordered_bits(values.choice)) << 32 | ~static_cast<unsigned>(ids[i]);
    if (!valid) mine[i] = 0;  // below every key: the loop over the keys reads four at a time
    above[i] = valid ? 0 : -kMaxTopK;
    storage->keys[index] = mine[i];
  }
  __syncwarp();
#pragma unroll 2
  for (int base = 0; base < total; base += 4) {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const ulonglong2 others = *reinterpret_cast<const ulonglong2*>(storage->keys + base + j);
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        above[i] = subtract_if_larger(subtract_if_larger(above[i], others.x, mine[i]), others.y, mine[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    if (-above[i] < top_k) {
      storage->chosen[-above[i]] = ids[i];
      storage->weights[-above[i]] = scores[i];
    }
  }
  __syncwarp();
}

// Places `total` candidates, at most kMaxCandidates.
template <typename Function>
__device__ __forceinline__ void place_all(GateStorage* storage, int total, int top_k, int lane, Function&& scored) {
  if (total <= kWarpSize) {
    place_candidates<1>(storage, total, top_k, lane, scored);
  } else {
    place_candidates<2>(storage, total, top_k, lane, scored);
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

}  // namespace moe
