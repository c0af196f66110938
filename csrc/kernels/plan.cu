// The plan: a stable counting sort of the slots by expert.
//
//   expert_offsets[e] = number of slots with an id below e, ids outside [0, E) not counted     [E + 1] int32
//   sorted_rows[r]    = slot of row r: expert by expert, ascending inside an expert; -1 past the last     [S] int32
//   row_of_slot[s]    = row of slot s, -1 for an id outside [0, E)                              [S] int32
//
// Slots are cut into chunks, one a block, at most kMaxBlocks. Two launches:
//   rank   a block walks its chunk in tiles of 128 slots a warp (32 where S is small). Each warp ranks its own slots
//          against each other, 32 at a time in order (lanes with the same id find each other by ballots over the id's
//          bits), with a histogram of its own; then the histograms are summed over the warps. row_of_slot holds, in
//          between, the rank of the slot inside its chunk; the chunk's counts go to the workspace, [chunks, E].
//   place  every block sums the table of counts over all chunks (the experts' totals, whose prefix sums are the
//          offsets) and over the chunks before its own, and adds to each rank where its expert and chunk begin.
// Up to one tile (4096 slots, or fewer where E > 1024) one block does both in one launch.
//
// The table is read once a block, 98 KB of 16-bit counts for S = 262144, E = 768 and 64 chunks: 1 us at 64 bytes a
// clock. Both launches together are predicted at 8 us there on an H100, the single block at 3 us for S = 1024, E = 128.
//
// Deterministic: every rank is a count; the only atomics add integers, and nothing depends on their order.
// Source: counting sort with per-chunk histograms, as in every radix sort.

#include <algorithm>

#include "common/error.h"
#include "params.h"

namespace moe {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr int kManyBatches = 4;      // of 32 slots, a warp and tile: what a lane keeps in registers
constexpr int kFewSlots = 64 * 1024;  // up to here one batch a warp, so that more multiprocessors take part
constexpr int kMaxWarps = 32;
constexpr int kWarpStep = 8;  // the warps of a block are a multiple, for the loads in flight of sum_over_warps
constexpr int kMaxBlocks = 128;
constexpr int kHistogramEntries = 32 * 1024;  // warps * experts: 64 KB of 16-bit counts, which every sm_80+ card has

// How the launcher cuts S slots.
struct Cut {
  int warps;         // of a block: as many as have room for a histogram each
  int stride;        // entries between the histograms of two warps: E rounded up to 8
  int batches;       // of 32 slots, a warp and tile
  int chunks;        // blocks; 1 when one block does both steps
  int64_t chunk;     // slots of a chunk, a multiple of the tile
  bool wide_counts;  // the chunks' counts need 32 bits
};

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

Cut cut_slots(int64_t num_slots, int num_experts) {
  Cut cut;
  cut.stride = round_up(num_experts, 8);
  cut.warps = kMaxWarps;
  while (cut.warps * cut.stride > kHistogramEntries) cut.warps /= 2;
  cut.wide_counts = false;
  if (num_slots <= cut.warps * kManyBatches * kWarpSize) {
    cut.batches = num_slots <= cut.warps * kWarpSize ? 1 : kManyBatches;
    const int for_slots = (static_cast<int>(num_slots) + kWarpSize * cut.batches - 1) / (kWarpSize * cut.batches);
    const int for_experts = (num_experts + kWarpSize - 1) / kWarpSize;
    cut.warps = std::min(cut.warps, round_up(std::max(for_slots, for_experts), kWarpStep));
    cut.chunks = 1;
    cut.chunk = num_slots;
    return cut;
  }
  cut.batches = num_slots <= kFewSlots ? 1 : kManyBatches;
  const int64_t tile = cut.warps * cut.batches * kWarpSize;
  const int64_t tiles = (num_slots + tile - 1) / tile;
  const int64_t tiles_of_chunk = (tiles + kMaxBlocks - 1) / kMaxBlocks;
  cut.chunk = tiles_of_chunk * tile;
  cut.chunks = static_cast<int>((tiles + tiles_of_chunk - 1) / tiles_of_chunk);
  cut.wide_counts = cut.chunk > 65535;
  return cut;
}

// Shared memory of a block: running[E] counts of the chunk so far (later: where each expert begins), then the warps'
// histograms.
struct BlockMemory {
  int32_t* running;     // [stride]
  uint16_t* histogram;  // [warps][stride]
};

int shared_bytes(const Cut& cut) {
  return cut.stride * static_cast<int>(sizeof(int32_t)) + cut.warps * cut.stride * static_cast<int>(sizeof(uint16_t));
}

__device__ __forceinline__ BlockMemory block_memory(int stride) {
  extern __shared__ __align__(16) char plan_memory[];
  return {reinterpret_cast<int32_t*>(plan_memory), reinterpret_cast<uint16_t*>(plan_memory + stride * 4)};
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
    ids[b] = slot < params.num_slots ? params.topk_ids[slot] : -1;
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

// Turns the warps' counts into sums over the warps from each one to the last, and adds the sum of all to running: the
// rank of a slot is then running - sum + rank in the warp. Two experts at a time, in the halves of 32 bits: no sum is
// above 4096.
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
    memory.running[2 * pair] += sum & 0xffff;
    memory.running[2 * pair + 1] += sum >> 16;
  }
}

// Ranks one tile inside the block's chunk; memory.running is 0 before the first. The caller waits for all warps before
// it changes memory.running or ranks the next tile.
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
    if (ids[b] >= 0) ranks[b] += memory.running[ids[b]] - histogram[ids[b]];
  }
}

__device__ __forceinline__ void clear_running(const BlockMemory& memory, int stride) {
  for (int e = threadIdx.x; e < stride; e += blockDim.x) memory.running[e] = 0;
  __syncthreads();
}

template <int kBatches, typename Count>
__global__ void __launch_bounds__(kMaxWarps * kWarpSize) plan_rank_kernel(const PlanParams params, int stride,
                                                                          int64_t chunk) {
  const BlockMemory memory = block_memory(stride);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t begin = blockIdx.x * chunk;
  const int64_t end = min(begin + chunk, params.num_slots);
  clear_running(memory, stride);
  for (int64_t tile = begin; tile < end; tile += blockDim.x * kBatches) {
    const int64_t warp_first = tile + warp * (kBatches * kWarpSize);
    int ids[kBatches], ranks[kBatches];
    rank_tile(params, memory, stride, warp_first, ids, ranks);
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      const int64_t slot = warp_first + b * kWarpSize + lane;
      if (slot < end) params.row_of_slot[slot] = ids[b] >= 0 ? ranks[b] : -1;
    }
    __syncthreads();
  }
  Count* counts = static_cast<Count*>(params.workspace) + static_cast<int64_t>(blockIdx.x) * stride;
  for (int e = threadIdx.x; e < stride; e += blockDim.x) counts[e] = static_cast<Count>(memory.running[e]);
}

// --------------------------------------------------------------------------------------------------------------- place

__device__ __forceinline__ int inclusive_sum_in_warp(int value, int lane) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int below = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// Exclusive prefix sum over the block's threads, and the sum of all.
__device__ __forceinline__ int block_prefix_sum(int value, int* total) {
  __shared__ int warp_sums[kMaxWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
  const int sum = inclusive_sum_in_warp(value, lane);
  if (lane == kWarpSize - 1) warp_sums[warp] = sum;
  __syncthreads();
  const int warp_sum = lane < warps ? warp_sums[lane] : 0;
  const int warps_to_lane = inclusive_sum_in_warp(warp_sum, lane);
  __syncthreads();
  *total = __shfl_sync(kAllLanes, warps_to_lane, kWarpSize - 1);
  return __shfl_sync(kAllLanes, warps_to_lane - warp_sum, warp) + sum - value;
}

// begin[e] is the number of slots of expert e; it becomes the row where the expert begins, plus before[e] unless
// `before` is null. Block 0 writes the offsets. Returns the number of rows.
__device__ __forceinline__ int begin_experts(const PlanParams& params, int32_t* begin, const int32_t* before) {
  int rows = 0;
  for (int base = 0; base < params.num_experts; base += blockDim.x) {
    const int e = base + threadIdx.x;
    const bool inside = e < params.num_experts;
    int total;
    const int offset = rows + block_prefix_sum(inside ? begin[e] : 0, &total);
    if (inside) {
      if (blockIdx.x == 0) params.expert_offsets[e] = offset;
      begin[e] = offset + (before != nullptr ? before[e] : 0);
    }
    rows += total;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) params.expert_offsets[params.num_experts] = rows;
  __syncthreads();
  return rows;
}

template <typename Count>
struct alignas(2 * sizeof(Count)) CountPair {
  Count first, second;
};

// begin[e] = sum of the table's column e, before[e] = sum of its rows above the block's own. A thread takes two columns
// and every groups-th row, as many groups as the block has threads for.
template <typename Count>
__device__ __forceinline__ void sum_table(const Count* table, int stride, int32_t* begin, int32_t* before) {
  for (int e = threadIdx.x; e < stride; e += blockDim.x) begin[e] = before[e] = 0;
  __syncthreads();
  constexpr int kLoads = 16;  // in flight
  const int chunks = gridDim.x, own = blockIdx.x, threads = blockDim.x, columns = stride / 2;
  const int groups = max(threads / columns, 1);
  const auto* pairs = reinterpret_cast<const CountPair<Count>*>(table);
  for (int item = threadIdx.x; item < columns * groups; item += threads) {
    const int column = item % columns;
    int all[2] = {0, 0}, above[2] = {0, 0};
    for (int base = item / columns; base < chunks; base += kLoads * groups) {
      CountPair<Count> counts[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int row = base + i * groups;
        counts[i] = row < chunks ? pairs[row * columns + column] : CountPair<Count>{0, 0};
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const bool is_above = base + i * groups < own;
        all[0] += counts[i].first;
        all[1] += counts[i].second;
        above[0] += is_above ? counts[i].first : 0;
        above[1] += is_above ? counts[i].second : 0;
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      atomicAdd(begin + 2 * column + j, all[j]);
      atomicAdd(before + 2 * column + j, above[j]);
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void place_slot(const PlanParams& params, const int32_t* begin, int64_t slot, int id,
                                           int rank) {
  const int row = id >= 0 ? begin[id] + rank : -1;
  params.row_of_slot[slot] = row;
  if (row >= 0) params.sorted_rows[row] = static_cast<int32_t>(slot);
}

template <typename Count>
__global__ void __launch_bounds__(kMaxWarps * kWarpSize) plan_place_kernel(const PlanParams params, int stride,
                                                                           int64_t chunk) {
  extern __shared__ __align__(16) int32_t place_memory[];
  int32_t* begin = place_memory;
  int32_t* before = place_memory + stride;
  sum_table(static_cast<const Count*>(params.workspace), stride, begin, before);
  const int rows = begin_experts(params, begin, before);
  const int64_t first = blockIdx.x * chunk;
  const int64_t end = min(first + chunk, params.num_slots);
  for (int64_t slot = first + threadIdx.x; slot < end; slot += blockDim.x) {
    const int rank = params.row_of_slot[slot];
    place_slot(params, begin, slot, rank >= 0 ? params.topk_ids[slot] : -1, rank);
    if (slot >= rows) params.sorted_rows[slot] = -1;
  }
}

// Both steps of at most one tile.
template <int kBatches>
__global__ void __launch_bounds__(kMaxWarps * kWarpSize) plan_small_kernel(const PlanParams params, int stride) {
  const BlockMemory memory = block_memory(stride);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t warp_first = warp * (kBatches * kWarpSize);
  int ids[kBatches], ranks[kBatches];
  clear_running(memory, stride);
  rank_tile(params, memory, stride, warp_first, ids, ranks);
  __syncthreads();
  const int rows = begin_experts(params, memory.running, nullptr);
#pragma unroll
  for (int b = 0; b < kBatches; ++b) {
    const int64_t slot = warp_first + b * kWarpSize + lane;
    if (slot >= params.num_slots) continue;
    place_slot(params, memory.running, slot, ids[b], ranks[b]);
    if (slot >= rows) params.sorted_rows[slot] = -1;
  }
}

// -------------------------------------------------------------------------------------------------------------- launch

// The attribute belongs to the device that is current, so it is set at every launch that needs it.
template <typename Kernel>
void allow_shared_memory(Kernel kernel, int bytes) {
  if (bytes <= 48 * 1024) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "plan: shared memory");
}

template <int kBatches, typename Count>
void launch_rank_and_place(const PlanParams& params, const Cut& cut, cudaStream_t stream) {
  const int bytes = shared_bytes(cut);
  allow_shared_memory(plan_rank_kernel<kBatches, Count>, bytes);
  plan_rank_kernel<kBatches, Count>
      <<<cut.chunks, cut.warps * kWarpSize, bytes, stream>>>(params, cut.stride, cut.chunk);
  check_launch("plan_rank");
  const int place_bytes = 2 * cut.stride * static_cast<int>(sizeof(int32_t));  // at most 32 KB
  plan_place_kernel<Count><<<cut.chunks, kMaxWarps * kWarpSize, place_bytes, stream>>>(params, cut.stride, cut.chunk);
  check_launch("plan_place");
}

template <int kBatches>
void launch_small(const PlanParams& params, const Cut& cut, cudaStream_t stream) {
  const int bytes = shared_bytes(cut);
  allow_shared_memory(plan_small_kernel<kBatches>, bytes);
  plan_small_kernel<kBatches><<<1, cut.warps * kWarpSize, bytes, stream>>>(params, cut.stride);
  check_launch("plan");
}

}  // namespace

int64_t plan_workspace_bytes(int64_t num_slots, int num_experts) {
  const Cut cut = cut_slots(num_slots, num_experts);
  if (cut.chunks == 1) return 0;
  return static_cast<int64_t>(cut.chunks) * cut.stride * (cut.wide_counts ? 4 : 2);
}

void launch_plan(const PlanParams& params, cudaStream_t stream) {
  const Cut cut = cut_slots(params.num_slots, params.num_experts);
  const bool one_batch = cut.batches == 1;
  if (cut.chunks == 1) {
    one_batch ? launch_small<1>(params, cut, stream) : launch_small<kManyBatches>(params, cut, stream);
  } else if (cut.wide_counts) {
    launch_rank_and_place<kManyBatches, int32_t>(params, cut, stream);
  } else if (one_batch) {
    launch_rank_and_place<1, uint16_t>(params, cut, stream);
  } else {
    launch_rank_and_place<kManyBatches, uint16_t>(params, cut, stream);
  }
}

}  // namespace moe
