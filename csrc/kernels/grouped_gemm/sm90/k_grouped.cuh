// The k-grouped product on Hopper: the same as sm80/k_grouped.cuh computes, to the bit. It makes the weight gradients.
//
//   out[e] [n, k] (+)= sum over the rows r of expert e, ascending, of outer(grad[row(r), :], a[row(r), :])
//
// Both operands lie row by row, so both are MN-major: a stage is 64 rows, in chunks of 64 columns. One side may be
// gathered, by cp.async of the producer's 128 threads; it gets the narrow side of the tile. The other comes through a
// ragged map, which reads zeros behind the expert's last row. Tiles are numbered expert by expert, along the rows of
// the output. An expert without rows gets zeros, or, where the gradient is added to what is there, nothing. Of an
// expert's last 64 rows only so many steps of 16 are multiplied as it has. A tile's outputs go through its last stage
// and two buffers (Stager), so that hardly a product waits for TMA's stores.
#pragma once

#include "../../common/divisor.h"
#include "epilogues.cuh"
#include "pipeline.cuh"

namespace moe::sm90 {

template <typename Element>
struct KGroupedOperands {
  CUtensorMap ragged;             // the side that is not gathered, or both
  CUtensorMap ragged_too;         // the other one when nothing is gathered
  const Element* gathered;        // [T, width of the gathered side]
  const int32_t* row_index;       // [S]: row(r) = row_index[r] / row_divisor
  Divisor row_divisor;            // K
  const int32_t* expert_offsets;  // [E + 1]
  int num_experts;
  int n;
  int k;
};

enum class Gathered { kNone, kGrad, kA };

// Copies 64 gathered rows x 128 columns a stage. Thread t copies 16-byte chunk t % 8 of both column chunks of rows t /
// 8 + 16 i. Row numbers are read one stage ahead of their copies. Columns behind the last one repeat others: such
// outputs are not stored.
template <typename Element>
class ColumnGather {
 public:
  __device__ ColumnGather(const KGroupedOperands<Element>& operands, int width) : operands_(operands), width_(width) {
    shared_offset_ = threadIdx.x / 8 * 128 + ((threadIdx.x % 8 ^ threadIdx.x / 8 % 8) << 4);
  }
  // Columns column .. column + 127 of rows begin .. end - 1.
  __device__ void start(int column, int begin, int end) {
    const int wanted = column + threadIdx.x % 8 * 8;
    const int first = min(wanted, width_ - 8);
    second_chunk_ = min(wanted + 64, width_ - 8) - first;
    column_ = operands_.gathered + first;
    next_ = begin + threadIdx.x / 8;
    end_ = end;
    read_rows();
  }
  // A stage may have fewer than 64 rows only as the last one.
  __device__ void load(uint32_t stage, bool whole) {
    const Element* from[4];
    bool exists[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      exists[i] = rows_[i] >= 0;
      from[i] = column_ + static_cast<int64_t>(operands_.row_divisor.divide(max(rows_[i], 0))) * width_;
    }
    if (!whole) {
      copy(stage, [&](uint32_t shared, const Element* source, int i) { cp_async_16(shared, source, exists[i]); }, from);
      return;
    }
    read_rows();  // of the next stage
    copy(stage, [&](uint32_t shared, const Element* source, int) { cp_async_16(shared, source); }, from);
  }

 private:
  template <typename Copy>
  __device__ __forceinline__ void copy(uint32_t stage, Copy copy_16, const Element* (&from)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      copy_16(stage + shared_offset_ + i * 2048, from[i], i);
      copy_16(stage + kMnChunkBytes + shared_offset_ + i * 2048, from[i] + second_chunk_, i);
    }
  }
  __device__ void read_rows() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = next_ + 16 * i;
      rows_[i] = row < end_ ? __ldg(operands_.row_index + row) : -1;
    }
    next_ += 64;
  }
  const KGroupedOperands<Element>& operands_;
  const Element* column_;
  int width_, end_, next_, second_chunk_;
  uint32_t shared_offset_;
  int rows_[4];
};

struct WeightTile {
  int expert, row, column;  // row of n, column of k
  int begin, end;           // the expert's rows
};

// Block b computes tiles b, b + gridDim.x, ...
template <typename Config, typename Element>
class WeightTiles {
 public:
  __device__ explicit WeightTiles(const KGroupedOperands<Element>& operands)
      : operands_(operands),
        column_tiles_((operands.k + Config::kCols - 1) / Config::kCols),
        expert_tiles_(column_tiles_ * ((operands.n + Config::kRows - 1) / Config::kRows)),
        local_(blockIdx.x) {}

  __device__ bool next(WeightTile& tile) {
    expert_ += local_ / expert_tiles_;
    local_ %= expert_tiles_;
    if (expert_ >= operands_.num_experts) return false;
    const int row_tile = local_ / column_tiles_;
    tile = {expert_, row_tile * Config::kRows, (local_ - row_tile * column_tiles_) * Config::kCols,
            __ldg(operands_.expert_offsets + expert_), __ldg(operands_.expert_offsets + expert_ + 1)};
    local_ += gridDim.x;
    return true;
  }

 private:
  const KGroupedOperands<Element>& operands_;
  int column_tiles_, expert_tiles_;
  int expert_ = 0, local_;  // tiles of an expert: far below 2^31
};

template <int kChunks>
__device__ __forceinline__ void load_ragged(const CUtensorMap& map, uint32_t stage, uint32_t barrier, int column,
                                            int row, int end) {
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    tma_load(stage + chunk * kMnChunkBytes, map, barrier, column + chunk * 64, ragged_row(row, end), kRaggedRows, end);
  }
}

template <typename Config, typename Element, Gathered kGathered>
__device__ __forceinline__ void produce_weight_tiles(const KGroupedOperands<Element>& operands,
                                                     const Ring<Config>& ring) {
  constexpr int kTmaBytes =
      (kGathered == Gathered::kGrad ? 0 : Config::kABytes) + (kGathered == Gathered::kA ? 0 : Config::kBBytes);
  if (kGathered == Gathered::kNone && threadIdx.x > 0) return;
  constexpr bool kGradGathered = kGathered == Gathered::kGrad;
  WeightTiles<Config, Element> tiles(operands);
  RingPosition<Config> position;
  ColumnGather<Element> gather(operands, kGradGathered ? operands.n : operands.k);
  WeightTile tile, upcoming;
  bool more = tiles.next(tile);
  if (kGathered != Gathered::kNone && more) gather.start(kGradGathered ? tile.row : tile.column, tile.begin, tile.end);
  while (more) {
    more = tiles.next(upcoming);  // its loads are under way while this tile's first rows are copied
    for (int row = tile.begin; row < tile.end; row += kDepth, position.advance()) {
      barrier_wait(ring.empty(position.stage()), position.phase() ^ 1);
      const uint32_t full = ring.full(position.stage());
      if (threadIdx.x == 0) {
        barrier_arrive_expect(full, kTmaBytes);
        if (kGathered != Gathered::kGrad) {
          load_ragged<Config::kRows / 64>(operands.ragged, ring.a(position.stage()), full, tile.row, row, tile.end);
        }
        if (kGathered != Gathered::kA) {
          const CUtensorMap& map = kGathered == Gathered::kNone ? operands.ragged_too : operands.ragged;
          load_ragged<Config::kCols / 64>(map, ring.b(position.stage()), full, tile.column, row, tile.end);
        }
      }
      if constexpr (kGathered != Gathered::kNone) {
        const bool whole = row + kDepth <= tile.end;
        gather.load(kGradGathered ? ring.a(position.stage()) : ring.b(position.stage()), whole);
        cp_async_arrive(full);
        if (row + kDepth >= tile.end && more) {  // row numbers of the next tile, as early as those of the next stage
          gather.start(kGradGathered ? upcoming.row : upcoming.column, upcoming.begin, upcoming.end);
        }
      }
    }
    if (kGathered != Gathered::kNone && tile.begin == tile.end && more) {
      gather.start(kGradGathered ? upcoming.row : upcoming.column, upcoming.begin, upcoming.end);
    }
    tile = upcoming;
  }
}

// out[e] = outputs, in the weights' type; or, in fp32, out[e] += outputs. 64 rows x 128 bytes a piece.
template <typename Element, bool kAccumulate>
struct WeightStore {
  static constexpr int kPieceColumns = kAccumulate ? 32 : 64;
  CUtensorMap output;  // [E, n, k], boxes of 64 rows
  void* output_data;

  __device__ void zeros(const KGroupedOperands<Element>& operands, const WeightTile& tile, int row, int rows,
                        int columns) const {
    Element* expert = static_cast<Element*>(output_data) + static_cast<int64_t>(tile.expert) * operands.n * operands.k;
    store_zeros(expert, operands.k, row, min(row + rows, operands.n), tile.column,
                min(tile.column + columns, operands.k));
  }

  template <typename Stager, int kCount>
  __device__ __forceinline__ void finish(Stager& stager, const WeightTile& tile, int row, int width,
                                         float (&outputs)[kCount]) const {
#pragma unroll
    for (int piece = 0; piece < 2 * kCount / kPieceColumns; ++piece) {
      const int column = tile.column + piece * kPieceColumns;
      if (column >= width) break;
      if constexpr (kAccumulate) {
        stager.store_fp32(outputs, piece * 16,
                          [&](uint32_t shared) { tma_add(output, shared, column, row, tile.expert); });
      } else {
        stager.template store<Element>(
            [&](int group, float (&values)[8]) { take8(outputs, piece * 32 + group * 8, values); },
            [&](uint32_t shared) { tma_store_streaming(output, shared, column, row, tile.expert); });
      }
    }
  }
};

// What a consumer does whose part of the tile lies outside the output. One warp follows the ring, and the others wait
// for it: a warp that polls alone could fall a whole round behind, where a barrier's phase looks the same again.
template <typename Config>
__device__ __forceinline__ void skip(const Ring<Config>& ring, RingPosition<Config>& position, int blocks,
                                     const Consumer& consumer) {
  if (consumer.thread() < 32) {
    for (int block = 0; block < blocks; ++block) {
      barrier_wait(ring.full(position.stage()), position.phase());
      __syncwarp();
      if (consumer.leads()) barrier_arrive(ring.empty(position.stage()));
      position.advance();
    }
  } else {
    position.advance(blocks);
  }
  consumer.sync();
}

// Calls body(constant), the constant being `steps`, from 1 to kMost.
template <int kMost, typename Body>
__device__ __forceinline__ void dispatch_steps(int steps, Body&& body) {
  if constexpr (kMost == 1) {
    body(std::integral_constant<int, kMost>{});
  } else {
    if (steps == kMost) body(std::integral_constant<int, kMost>{});
    else dispatch_steps<kMost - 1>(steps, body);
  }
}

template <typename Config, typename Element, Gathered kGathered, bool kAccumulate>
__device__ __forceinline__ void consume_weight_tiles(const KGroupedOperands<Element>& operands,
                                                     const WeightStore<Element, kAccumulate>& store,
                                                     const Ring<Config>& ring, const Consumer& consumer) {
  WeightTiles<Config, Element> tiles(operands);
  RingPosition<Config> position;
  Stager<Config::kFragments, Config::kBuffers> stager(consumer);
  auto give_back = [&](int stage, int) {
    if (consumer.leads()) barrier_arrive(ring.empty(stage));
  };
  const int first_fragment = consumer.index * Config::kFragments;
  WeightTile tile, upcoming;
  for (bool more = tiles.next(tile); more; tile = upcoming) {
    more = tiles.next(upcoming);  // its loads are under way during this tile
    const int blocks = (tile.end - tile.begin + kDepth - 1) / kDepth;
    const int first_row = tile.row + first_fragment * 64;
    if (blocks == 0) {
      if constexpr (!kAccumulate) store.zeros(operands, tile, first_row, Config::kFragments * 64, Config::kCols);
      continue;
    }
    if (first_row >= operands.n) {
      skip<Config>(ring, position, blocks, consumer);
      continue;
    }
    Outputs<Config> outputs;  // declared here: nothing lives on from tile to tile
    int last = 0;
    dispatch_steps<kSteps>((tile.end - tile.begin - 1) % kDepth / 16 + 1, [&](auto steps) {
      last = multiply<Config, Element, false, false, kGathered != Gathered::kNone, Config::kCols, 1,
                      decltype(steps)::value>(outputs, ring, position, blocks, first_fragment, give_back);
    });
    stager.begin(ring.a(last) + first_fragment * 8192);
#pragma unroll
    for (int f = 0; f < Config::kFragments; ++f) {
      const int row = first_row + f * 64;
      if (row < operands.n) store.finish(stager, tile, row, operands.k, outputs[f]);
    }
    stager.end();
    give_back(last, 0);
  }
  if (consumer.leads()) tma_wait_all();
}

template <typename Config>
struct KGroupedShared {
  static constexpr int kBarriers =
      Ring<Config>::kBytes + kConsumers * Stager<Config::kFragments, Config::kBuffers>::kBytes;
  static constexpr int kBytes = kBarriers + Ring<Config>::kBarrierBytes;
  static_assert(kBytes <= kMaxSharedBytes, "more than an SM has");
};

template <typename Config, typename Element, Gathered kGathered, bool kAccumulate>
__global__ void __launch_bounds__(kThreads, 1)
    k_grouped_kernel(const __grid_constant__ KGroupedOperands<Element> operands,
                     const __grid_constant__ WeightStore<Element, kAccumulate> store) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const Ring<Config> ring{base, base + KGroupedShared<Config>::kBarriers};
  if (threadIdx.x == 0) {
    ring.init(kGathered == Gathered::kNone ? 1 : 1 + 128);
    barrier_init_fence();
    prefetch_map(operands.ragged);
    prefetch_map(store.output);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<kGathered == Gathered::kNone ? 24 : 56>();
    produce_weight_tiles<Config, Element, kGathered>(operands, ring);
  } else {
    take_registers<kGathered == Gathered::kNone ? 240 : 224>();
    const int index = threadIdx.x / 128 - 1;
    const Consumer consumer{index,
                            base + Ring<Config>::kBytes + index * Stager<Config::kFragments, Config::kBuffers>::kBytes};
    consume_weight_tiles<Config, Element, kGathered, kAccumulate>(operands, store, ring, consumer);
  }
#endif
}

}  // namespace moe::sm90
