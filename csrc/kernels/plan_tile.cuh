// A block's share of the plan: one tile of slots, ranked and sorted by expert in shared memory. Used by plan.cu alone.
#pragma once

#include <algorithm>

#include "params.h"

namespace moe {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr int kManyBatches = 4;  // of 32 slots, a warp and tile: what a lane keeps in registers
constexpr int kMaxWarps = 16;
constexpr int kWarpStep = 8;   // the warps of a block are a multiple, for the loads in flight of sum_over_warps
constexpr int kSlotBits = 12;  // of a slot in its tile, beside the 12 bits of an expert

static_assert(kMaxWarps * kManyBatches * kWarpSize <= 1 << kSlotBits, "a slot of a tile has kSlotBits bits");

// Shared memory of a block. The histograms are done with before the last three come, which share their place.
struct BlockMemory {
  int32_t* local;       // [stride + 1] the tile's counts of each expert; then where its slots begin in `sorted`
  int32_t* begin;       // [stride] where the rows of each expert begin, for this block and tile
  uint16_t* histogram;  // [warps][stride]
  uint32_t* sorted;     // [tile] expert << kSlotBits | slot of the tile, by expert
  int32_t* all;         // [stride] sums of the table of counts, see sum_table
  int32_t* above;       // [stride]
};

constexpr int kLocalPadding = 8;  // keeps what follows aligned

__host__ __device__ inline int tile_slots(int warps, int batches) { return warps * batches * kWarpSize; }

inline int shared_bytes(int warps, int stride, int batches) {
  const int histogram = warps * stride * static_cast<int>(sizeof(uint16_t));
  const int after = (tile_slots(warps, batches) + 2 * stride) * static_cast<int>(sizeof(int32_t));
  return (2 * stride + kLocalPadding) * static_cast<int>(sizeof(int32_t)) + std::max(histogram, after);
}

__device__ __forceinline__ BlockMemory block_memory(int stride, int batches) {
  extern __shared__ __align__(16) int32_t plan_memory[];
  BlockMemory memory;
  memory.local = plan_memory;
  memory.begin = memory.local + stride + kLocalPadding;
  int32_t* shared = memory.begin + stride;
  memory.histogram = reinterpret_cast<uint16_t*>(shared);
  memory.sorted = reinterpret_cast<uint32_t*>(shared);
  memory.all = shared + tile_slots(blockDim.x / kWarpSize, batches);
  memory.above = memory.all + stride;
  return memory;
}

// ---------------------------------------------------------------------------------------------------------------- rank

// peers[b] = the lanes that hold the same id in batch b; only valid lanes (id >= 0) take part.
template <int kBatches>
__device__ __forceinline__ void lanes_with_same_id(const int (&ids)[kBatches], int num_experts,
                                                   unsigned (&peers)[kBatches]) {
#pragma unroll
  for (int b = 0; b < kBatches; ++b) peers[b] = __ballot_sync(kAllLanes, ids[b] >= 0);
  for (int bit = 1; bit < num_experts; bit <<= 1) {
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      const bool set = (ids[b] & bit) != 0;
      const unsigned with_bit = __ballot_sync(kAllLanes, set);
      peers[b] &= set ? with_bit : ~with_bit;
    }
  }
}

// Ranks of a warp's slots of one tile against each other; leaves the warp's counts in `histogram`.
template <int kBatches>
__device__ __forceinline__ void rank_in_warp(const PlanParams& params, int64_t first, uint16_t* histogram, int lane,
                                             int (&ids)[kBatches], int (&ranks)[kBatches]) {
#pragma unroll
  for (int b = 0; b < kBatches; ++b) {
    const int64_t slot = first + b * kWarpSize + lane;
    // past the L1 cache, which may hold what lay there before a kernel that this one did not wait for
    ids[b] = slot < params.num_slots ? __ldcg(params.topk_ids + slot) : -1;
    if (ids[b] < 0 || ids[b] >= params.num_experts) ids[b] = -1;
  }
  unsigned peers[kBatches];
  lanes_with_same_id(ids, params.num_experts, peers);
#pragma unroll
  for (int b = 0; b < kBatches; ++b) {
    const bool valid = ids[b] >= 0;
    const int before = __popc(peers[b] & ((1u << lane) - 1));
    const int counted = valid ? histogram[ids[b]] : 0;
    ranks[b] = counted + before;
    __syncwarp();
    if (valid && before == 0) histogram[ids[b]] = static_cast<uint16_t>(counted + __popc(peers[b]));
    __syncwarp();
  }
}

// Turns the warps' counts into sums over the warps from each one to the last; memory.local gets the sum of all. A
// slot's rank is then local - sum + rank in the warp. Two experts at a time, in the halves of 32 bits: no sum is above
// 2048.
__device__ __forceinline__ void sum_over_warps(const BlockMemory& memory, int stride) {
  auto* pairs = reinterpret_cast<uint32_t*>(memory.histogram);
  const int num_pairs = stride / 2, warps = blockDim.x / kWarpSize;
  for (int pair = threadIdx.x; pair < num_pairs; pair += blockDim.x) {
    uint32_t sum = 0;
    for (int end = warps; end > 0; end -= kWarpStep) {
      uint32_t counts[kWarpStep];
#pragma unroll
      for (int i = 0; i < kWarpStep; ++i) counts[i] = pairs[(end - 1 - i) * num_pairs + pair];
#pragma unroll
      for (int i = 0; i < kWarpStep; ++i) {
        sum += counts[i];
        pairs[(end - 1 - i) * num_pairs + pair] = sum;
      }
    }
    memory.local[2 * pair] = sum & 0xffff;
    memory.local[2 * pair + 1] = sum >> 16;
  }
}

// Ranks the slots of one tile; leaves their numbers in memory.local.
template <int kBatches>
__device__ __forceinline__ void rank_tile(const PlanParams& params, const BlockMemory& memory, int stride,
                                          int64_t warp_first, int (&ids)[kBatches], int (&ranks)[kBatches]) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  uint16_t* histogram = memory.histogram + warp * stride;
  auto* vectors = reinterpret_cast<uint4*>(histogram);
  for (int i = lane; i < stride / 8; i += kWarpSize) vectors[i] = make_uint4(0, 0, 0, 0);
  __syncwarp();
  rank_in_warp(params, warp_first, histogram, lane, ids, ranks);
  __syncthreads();
  sum_over_warps(memory, stride);
  __syncthreads();
#pragma unroll
  for (int b = 0; b < kBatches; ++b) {
    if (ids[b] >= 0) ranks[b] += memory.local[ids[b]] - histogram[ids[b]];
  }
  __syncthreads();
}

// ---------------------------------------------------------------------------------------------------------------- sort

__device__ __forceinline__ int inclusive_sum_in_warp(int value, int lane) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int below = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// Exclusive prefix sum over the block's threads, and the sum of all. Between two calls lies a barrier.
__device__ __forceinline__ int block_prefix_sum(int value, int* total) {
  __shared__ int warp_sums[kMaxWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
  const int sum = inclusive_sum_in_warp(value, lane);
  if (lane == kWarpSize - 1) warp_sums[warp] = sum;
  __syncthreads();
  const int warp_sum = lane < warps ? warp_sums[lane] : 0;
  const int warps_to_lane = inclusive_sum_in_warp(warp_sum, lane);
  *total = __shfl_sync(kAllLanes, warps_to_lane, kWarpSize - 1);
  return __shfl_sync(kAllLanes, warps_to_lane - warp_sum, warp) + sum - value;
}

struct Pair {
  int first, second;
};

// store(pair, sum before its first, sum before its second) for the pairs of numbers that pair_of(pair) gives. Returns
// the sum of all.
template <typename PairOf, typename Store>
__device__ __forceinline__ int scan_pairs(int num_pairs, PairOf&& pair_of, Store&& store) {
  int sum = 0;
  for (int base = 0; base < num_pairs; base += blockDim.x) {
    const int pair = base + threadIdx.x;
    const bool inside = pair < num_pairs;
    const Pair counts = inside ? pair_of(pair) : Pair{0, 0};
    int total;
    const int before = sum + block_prefix_sum(counts.first + counts.second, &total);
    if (inside) store(pair, before, before + counts.first);
    sum += total;
    if (base + blockDim.x < num_pairs) __syncthreads();
  }
  return sum;
}

// Sorts a ranked tile; ranks become places in memory.sorted. Returns the number of slots with an expert.
template <int kBatches>
__device__ __forceinline__ int sort_tile(const BlockMemory& memory, int stride, const int (&ids)[kBatches],
                                         int (&ranks)[kBatches]) {
  auto* pairs = reinterpret_cast<int2*>(memory.local);
  const int count = scan_pairs(
      stride / 2, [&](int pair) { return Pair{pairs[pair].x, pairs[pair].y}; },
      [&](int pair, int first, int second) { pairs[pair] = make_int2(first, second); });
  if (threadIdx.x == 0) memory.local[stride] = count;
  __syncthreads();
  const int warp_first = threadIdx.x / kWarpSize * (kBatches * kWarpSize), lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int b = 0; b < kBatches; ++b) {
    if (ids[b] < 0) continue;
    ranks[b] += memory.local[ids[b]];
    memory.sorted[ranks[b]] = static_cast<uint32_t>(ids[b] << kSlotBits | (warp_first + b * kWarpSize + lane));
  }
  return count;
}

}  // namespace
}  // namespace moe
