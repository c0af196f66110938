// The plan: a stable counting sort of the slots by expert.
//
//   expert_offsets[e] = number of slots with an id below e, ids outside [0, E) not counted     [E + 1] int32
//   sorted_rows[r]    = slot of row r: expert by expert, ascending inside an expert; -1 past the last     [S] int32
//   row_of_slot[s]    = row of slot s, -1 for an id outside [0, E)                              [S] int32
//
// Slots are cut into chunks, one a block, at most kMaxBlocks. Two launches:
//   count  a block counts the slots of each expert in kGroup chunks, one after the other: the table gets what it has
//          counted before each of them, [chunks, E], and at their end, [groups, E];
//   place  a block sorts its chunk by expert in shared memory while `count` still runs, in tiles of 128 slots a warp
//          (32 where S is small): each warp ranks its own slots against each other, 32 at a time in order (lanes with
//          the same id find each other by ballots over the id's bits), with a histogram of its own; then the histograms
//          are summed over the warps, and over the experts. Then the block sums the table over all groups (the experts'
//          totals, whose prefix sums are the offsets) and over the groups and chunks before its own: where the rows of
//          each expert begin for it. Rows are written in sorted order, so that neighbours go to one sector: written
//          slot by slot the scattered words took 6 us of the kernel's 15 for S = 262144, E = 768.
// Up to one tile (2048 slots, or fewer where E > 2048) one block does all in one launch.
//
// What it takes is instructions and barriers, most of them run once. Of a table with a row a chunk every block would
// read 196 KB for S = 262144, E = 768 and 128 chunks; of this one 26 KB.
//
// Deterministic: every rank is a count; the only atomics add integers, and nothing depends on their order.
// Source: counting sort with per-chunk histograms, as in every radix sort.

#include <algorithm>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "plan_tile.cuh"

namespace moe {
namespace {

constexpr int kFewSlots = 64 * 1024;  // up to here one batch a warp, so that more multiprocessors take part
constexpr int kMaxBlocks = 128;
constexpr int kGroup = 8;                     // chunks that one block counts
constexpr int kHistogramEntries = 32 * 1024;  // warps * experts: 64 KB of 16-bit counts, which every sm_80+ card has

// How the launcher cuts S slots.
struct Cut {
  int warps;         // of a block, as far as there is room for a histogram each
  int stride;        // entries between the histograms of two warps: E rounded up to 8
  int batches;       // of 32 slots, a warp and tile
  int chunks;        // blocks; 1 when one block does both steps
  int64_t chunk;     // slots of a chunk, a multiple of the tile
  bool wide_counts;  // the counts of a group need more than 16 bits
};

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

int groups_of(int chunks) { return (chunks + kGroup - 1) / kGroup; }

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
  cut.wide_counts = cut.chunk * kGroup > 65535;
  return cut;
}

// --------------------------------------------------------------------------------------------------------------- count

// Where the table of counts keeps its rows.
template <typename Count>
struct CountTable {
  Count* before;  // [chunks][stride] of the slots of the chunks of the same group before it
  Count* groups;  // [groups][stride]
};

template <typename Count>
__device__ __forceinline__ CountTable<Count> count_table(void* workspace, int stride, int chunks) {
  auto* before = static_cast<Count*>(workspace);
  return {before, before + static_cast<int64_t>(chunks) * stride};
}

template <typename Count>
__device__ __forceinline__ void store_counts(Count* row, const int32_t* counted, int stride) {
  for (int e = threadIdx.x; e < stride; e += blockDim.x) row[e] = static_cast<Count>(counted[e]);
}

template <int kBatches, typename Count>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    plan_count_kernel(const PlanParams params, int stride, int64_t chunk, int chunks) {
  constexpr int kTiles = 8;  // whose ids are in flight
  extern __shared__ __align__(16) int32_t counted[];
  const CountTable<Count> table = count_table<Count>(params.workspace, stride, chunks);
  const int64_t end = min((blockIdx.x + int64_t{1}) * kGroup * chunk, params.num_slots);
  const int64_t tile = kBatches * blockDim.x;
  int64_t next_chunk = blockIdx.x * kGroup * chunk;
  Count* before = table.before + static_cast<int64_t>(blockIdx.x) * kGroup * stride;
  for (int e = threadIdx.x; e < stride; e += blockDim.x) counted[e] = 0;
  wait_for_previous_kernels();
  allow_next_kernel();  // only now: the next kernel reads topk_ids before it waits for this one
  for (int64_t begin = next_chunk; begin < end; begin += kTiles * tile) {
    int ids[kTiles][kBatches];
#pragma unroll
    for (int i = 0; i < kTiles * kBatches; ++i) {
      const int64_t slot = begin + i * blockDim.x + threadIdx.x;
      ids[i / kBatches][i % kBatches] = slot < end ? params.topk_ids[slot] : -1;
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int64_t first = begin + t * tile;
      if (first < end && first == next_chunk) {
        __syncthreads();
        store_counts(before, counted, stride);
        __syncthreads();
        next_chunk += chunk;
        before += stride;
      }
#pragma unroll
      for (int b = 0; b < kBatches; ++b) {
        if (ids[t][b] >= 0 && ids[t][b] < params.num_experts) atomicAdd(counted + ids[t][b], 1);
      }
    }
  }
  __syncthreads();
  store_counts(table.groups + static_cast<int64_t>(blockIdx.x) * stride, counted, stride);
}

// --------------------------------------------------------------------------------------------------------------- place

// How many counts of the table lie in 16 bytes.
template <typename Count>
constexpr int kCounts = 16 / sizeof(Count);

// Where the sums of column c lie in memory.all and memory.above: neighbouring threads add to neighbouring words.
template <typename Count>
__device__ __forceinline__ int sum_index(int c, int stride) {
  return c % kCounts<Count> * (stride / kCounts<Count>)+c / kCounts<Count>;
}

// The counts in 16 bytes.
template <typename Count>
__device__ __forceinline__ void unpack_counts(const uint4& loaded, int (&counts)[kCounts<Count>]) {
  const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
  for (int i = 0; i < kCounts<Count>; ++i) {
    counts[i] = sizeof(Count) == 4 ? words[i % 4] : words[i / 2] >> 16 * (i % 2) & 0xffff;
  }
}

// Adds to memory.all the sums of the table's columns over all groups, and to memory.above those over the groups and
// chunks before the block's own. A thread takes 16 bytes of every parts-th group's row, as many parts as the block has
// threads for; the first one also takes the row of the block's own chunk.
template <typename Count>
__device__ __forceinline__ void sum_table(const CountTable<Count>& table, int stride, const BlockMemory& memory) {
  constexpr int kLoads = 4;  // in flight
  const int groups = (gridDim.x + kGroup - 1) / kGroup, own = blockIdx.x / kGroup;
  const int vectors = stride / kCounts<Count>, parts = min(max(static_cast<int>(blockDim.x) / vectors, 1), groups);
  const auto* rows = reinterpret_cast<const uint4*>(table.groups);
  const auto* before = reinterpret_cast<const uint4*>(table.before) + static_cast<int64_t>(blockIdx.x) * vectors;
  for (int item = threadIdx.x; item < vectors * parts; item += blockDim.x) {
    const int part = item / vectors, vector = item - part * vectors;
    int all[kCounts<Count>] = {}, above[kCounts<Count>] = {};
    if (part == 0) unpack_counts<Count>(before[vector], above);
#pragma unroll 1
    for (int base = part; base < groups; base += kLoads * parts) {
      uint4 loaded[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int row = base + i * parts;
        loaded[i] = row < groups ? rows[row * vectors + vector] : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const bool is_above = base + i * parts < own;
        int counts[kCounts<Count>];
        unpack_counts<Count>(loaded[i], counts);
#pragma unroll
        for (int j = 0; j < kCounts<Count>; ++j) {
          all[j] += counts[j];
          if (is_above) above[j] += counts[j];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kCounts<Count>; ++j) {
      atomicAdd(memory.all + j * vectors + vector, all[j]);
      atomicAdd(memory.above + j * vectors + vector, above[j]);
    }
  }
}

// memory.begin[e] = the row where expert e begins, plus its slots in the chunks above. Block 0 writes the offsets.
// Returns the number of rows.
template <typename Count>
__device__ __forceinline__ int begin_experts(const PlanParams& params, const BlockMemory& memory, int stride) {
  const auto index = [&](int c) { return sum_index<Count>(c, stride); };
  const int rows = scan_pairs(
      stride / 2, [&](int pair) { return Pair{memory.all[index(2 * pair)], memory.all[index(2 * pair + 1)]}; },
      [&](int pair, int first, int second) {
        memory.begin[2 * pair] = first + memory.above[index(2 * pair)];
        memory.begin[2 * pair + 1] = second + memory.above[index(2 * pair + 1)];
        if (blockIdx.x != 0) return;
        if (2 * pair < params.num_experts) params.expert_offsets[2 * pair] = first;
        if (2 * pair + 1 < params.num_experts) params.expert_offsets[2 * pair + 1] = second;
      });
  if (blockIdx.x == 0 && threadIdx.x == 0) params.expert_offsets[params.num_experts] = rows;
  __syncthreads();
  return rows;
}

// Writes the rows of a sorted tile of `count` slots with an expert; `rows` is the number of all rows.
template <int kBatches>
__device__ __forceinline__ void place_tile(const PlanParams& params, const BlockMemory& memory, int64_t tile, int count,
                                           int rows, const int (&ids)[kBatches], const int (&places)[kBatches]) {
  for (int place = threadIdx.x; place < count; place += blockDim.x) {
    const uint32_t entry = memory.sorted[place];
    const int id = entry >> kSlotBits;
    const int row = memory.begin[id] + place - memory.local[id];
    params.sorted_rows[row] = static_cast<int32_t>(tile) + static_cast<int32_t>(entry & ((1 << kSlotBits) - 1));
  }
  const int64_t warp_first = tile + threadIdx.x / kWarpSize * (kBatches * kWarpSize);
#pragma unroll
  for (int b = 0; b < kBatches; ++b) {
    const int64_t slot = warp_first + b * kWarpSize + threadIdx.x % kWarpSize;
    if (slot >= params.num_slots) continue;
    const int id = ids[b];
    params.row_of_slot[slot] = id >= 0 ? memory.begin[id] + places[b] - memory.local[id] : -1;
    if (slot >= rows) params.sorted_rows[slot] = -1;
  }
}

// Launched while plan_count_kernel runs, which has waited for what wrote topk_ids: they may be read at once. Two blocks
// on a multiprocessor by registers, so that there is room beside one of plan_count_kernel.
template <int kBatches, typename Count>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, 2)
    plan_place_kernel(const PlanParams params, int stride, int64_t chunk) {
  const BlockMemory memory = block_memory(stride, kBatches);
  const int64_t first = blockIdx.x * chunk, end = min(first + chunk, params.num_slots);
  const int warp_offset = threadIdx.x / kWarpSize * (kBatches * kWarpSize);
  int ids[kBatches], places[kBatches];
  rank_tile(params, memory, stride, first + warp_offset, ids, places);
  int count = sort_tile(memory, stride, ids, places);
  for (int i = threadIdx.x; i < 2 * stride; i += blockDim.x) memory.all[i] = 0;
  __syncthreads();
  wait_for_previous_kernels();
  allow_next_kernel();
  sum_table(count_table<Count>(params.workspace, stride, gridDim.x), stride, memory);
  __syncthreads();
  const int rows = begin_experts<Count>(params, memory, stride);
  place_tile(params, memory, first, count, rows, ids, places);
  __syncthreads();
  for (int64_t tile = first + blockDim.x * kBatches; tile < end; tile += blockDim.x * kBatches) {
    __syncthreads();
    for (int e = threadIdx.x; e < stride; e += blockDim.x) memory.begin[e] += memory.local[e + 1] - memory.local[e];
    __syncthreads();
    rank_tile(params, memory, stride, tile + warp_offset, ids, places);
    count = sort_tile(memory, stride, ids, places);
    __syncthreads();
    place_tile(params, memory, tile, count, rows, ids, places);
  }
}

// All of it, for at most one tile: where an expert's slots begin in the tile is where its rows begin.
template <int kBatches>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize) plan_small_kernel(const PlanParams params, int stride) {
  const BlockMemory memory = block_memory(stride, kBatches);
  const int warp_first = threadIdx.x / kWarpSize * (kBatches * kWarpSize);
  int ids[kBatches], places[kBatches];
  wait_for_previous_kernels();
  allow_next_kernel();
  rank_tile(params, memory, stride, warp_first, ids, places);
  const int rows = sort_tile(memory, stride, ids, places);
  for (int e = threadIdx.x; e <= params.num_experts; e += blockDim.x) params.expert_offsets[e] = memory.local[e];
#pragma unroll
  for (int b = 0; b < kBatches; ++b) {
    const int slot = warp_first + b * kWarpSize + threadIdx.x % kWarpSize;
    if (slot >= params.num_slots) continue;
    params.row_of_slot[slot] = ids[b] >= 0 ? places[b] : -1;
    if (ids[b] >= 0) params.sorted_rows[places[b]] = slot;
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
void launch_count_and_place(const PlanParams& params, const Cut& cut, cudaStream_t stream) {
  const int threads = cut.warps * kWarpSize, bytes = shared_bytes(cut.warps, cut.stride, cut.batches);
  launch_overlapped("plan_count", plan_count_kernel<kBatches, Count>, groups_of(cut.chunks), threads,
                    cut.stride * static_cast<int>(sizeof(int32_t)), stream, params, cut.stride, cut.chunk, cut.chunks);
  allow_shared_memory(plan_place_kernel<kBatches, Count>, bytes);
  launch_overlapped("plan_place", plan_place_kernel<kBatches, Count>, cut.chunks, threads, bytes, stream, params,
                    cut.stride, cut.chunk);
}

template <int kBatches>
void launch_small(const PlanParams& params, const Cut& cut, cudaStream_t stream) {
  const int bytes = shared_bytes(cut.warps, cut.stride, cut.batches);
  allow_shared_memory(plan_small_kernel<kBatches>, bytes);
  launch_overlapped("plan", plan_small_kernel<kBatches>, 1, cut.warps * kWarpSize, bytes, stream, params, cut.stride);
}

}  // namespace

int64_t plan_workspace_bytes(int64_t num_slots, int num_experts) {
  const Cut cut = cut_slots(num_slots, num_experts);
  if (cut.chunks == 1) return 0;
  return static_cast<int64_t>(cut.chunks + groups_of(cut.chunks)) * cut.stride * (cut.wide_counts ? 4 : 2);
}

void launch_plan(const PlanParams& params, cudaStream_t stream) {
  const Cut cut = cut_slots(params.num_slots, params.num_experts);
  const bool one_batch = cut.batches == 1;
  if (cut.chunks == 1) {
    one_batch ? launch_small<1>(params, cut, stream) : launch_small<kManyBatches>(params, cut, stream);
  } else if (cut.wide_counts) {
    launch_count_and_place<kManyBatches, int32_t>(params, cut, stream);
  } else if (one_batch) {
    launch_count_and_place<1, uint16_t>(params, cut, stream);
  } else {
    launch_count_and_place<kManyBatches, uint16_t>(params, cut, stream);
  }
}

}  // namespace moe
