// The m-grouped product on Hopper: the same as sm80/m_grouped.cuh computes, to the bit.
//
//   y[r, :] = x[row(r), :] @ b[e].T   (b [E, n, k], K-major)    or    x[row(r), :] @ b[e]   (b [E, k, n], MN-major)
//
// One persistent block an SM. The producer warpgroup keeps the ring of stages full: weights by TMA, rows by TMA, or,
// where they are gathered, by cp.async of its 128 threads. Two consumer warpgroups multiply and store.
#pragma once

#include "../../common/divisor.h"
#include "../scheduler.cuh"
#include "epilogues.cuh"
#include "pipeline.cuh"

namespace moe::sm90 {

template <typename Element>
struct MGroupedOperands {
  CUtensorMap rows;               // [S, k], unless gathered
  CUtensorMap weights;            // [E, n, k] (gated: [E, 2, n / 2, k]) or [E, k, n]
  const Element* x;               // [rows, k] when gathered
  const int32_t* row_index;       // [S] when gathered: row(r) = row_index[r] / row_divisor
  Divisor row_divisor;            // K
  const int32_t* expert_offsets;  // [E + 1]
  int num_experts;
  int num_rows;  // S
  int k;
};

template <typename Config, typename Epilogue>
struct MGroupedShared {
  static constexpr int kBarriers = Ring<Config>::kBytes + kConsumers * Epilogue::kSharedBytes;
  static constexpr int kBytes = kBarriers + Ring<Config>::kBarrierBytes + kConsumers * Epilogue::kBarriers * 8;
  static_assert(kBytes <= kMaxSharedBytes, "more than an SM has");
};

// Copies kRows gathered rows, 64 columns a stage, stage after stage. Thread t copies 16-byte chunk t % 8 of rows t / 8
// + 16 i. Behind the tile's last row it repeats that row, or copies nothing: products of different rows do not mix, and
// such outputs are not stored.
template <typename Element, int kRows>
class RowGather {
 public:
  __device__ RowGather(const MGroupedOperands<Element>& operands, const Tile& tile) {
    const int t = threadIdx.x, rows = tile.row_end - tile.row_begin;
    shared_offset_ = t / 8 * 128 + ((t % 8 ^ t / 8 % 8) << 4);
    depth_ = operands.k;
    passes_ = (min(rows, kRows) + 15) / 16;
    from_ = reinterpret_cast<const uint4*>(operands.x);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = tile.row_begin + min(t / 8 + 16 * i, rows - 1);
      const uint32_t source = operands.row_divisor.divide(__ldg(operands.row_index + row));
      chunks_[i] = source * (operands.k / 8) + t % 8;
    }
  }
  // Few instructions: at full speed a stage of a 128 x 128 tile lasts 750 cycles.
  __device__ void load(uint32_t stage) {
    const uint32_t to = stage + shared_offset_;
    if (depth_ < kDepth) return load_last(to);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (i < passes_) cp_async_16(to + i * 2048, from_ + chunks_[i]);
    }
    from_ += kDepth / 8;
    depth_ -= kDepth;
  }

 private:
  static constexpr int kPasses = kRows / 16;

  __device__ void load_last(uint32_t to) const {
    const bool inside = threadIdx.x % 8 * 8 < depth_;
#pragma unroll
    for (int i = 0; i < kPasses; ++i)
      cp_async_16(to + i * 2048, from_ + (inside ? chunks_[i] : chunks_[i] - threadIdx.x % 8), inside);
  }

  uint32_t shared_offset_;
  int depth_;                 // columns left
  int passes_;                // of 16 rows that the tile has
  const uint4* from_;         // of x, moved on to the stage's columns
  uint32_t chunks_[kPasses];  // of 16 bytes, from there: 32 bits reach 64 GB
};

// Loads the weights of one stage; called by one thread.
template <typename Config, bool kKMajor, bool kGated>
__device__ __forceinline__ void load_weights(const CUtensorMap& map, uint32_t stage, uint32_t barrier, int depth,
                                             int column_tile, int expert) {
  if constexpr (kKMajor && kGated) {
    tma_load(stage, map, barrier, depth, column_tile * (Config::kCols / 2), 0, expert);
  } else if constexpr (kKMajor) {
    tma_load(stage, map, barrier, depth, column_tile * Config::kCols, expert);
  } else {
#pragma unroll
    for (int chunk = 0; chunk < Config::kCols / 64; ++chunk) {
      tma_load(stage + chunk * kMnChunkBytes, map, barrier, column_tile * Config::kCols + chunk * 64, depth, expert);
    }
  }
}

template <typename Config, typename Element, bool kGathered, bool kKMajor, typename Epilogue>
__device__ __forceinline__ void produce(const MGroupedOperands<Element>& operands, const Ring<Config>& ring,
                                        int column_tiles) {
  if (!kGathered && threadIdx.x >= 32) return;
  TileScheduler<Config::kRows> scheduler(operands.expert_offsets, operands.num_experts, operands.num_rows,
                                         column_tiles);
  RingPosition<Config> position;
  const int blocks = (operands.k + kDepth - 1) / kDepth;
  Tile tile;
  while (scheduler.next(tile) && tile.expert < operands.num_experts) {
    auto each_stage = [&](auto load_rows) {
      for (int block = 0; block < blocks; ++block, position.advance()) {
        barrier_wait(ring.empty(position.stage), position.phase ^ 1);
        if constexpr (!kGathered) __syncwarp();  // one lane alone goes on: none may fall a whole round behind
        const uint32_t full = ring.full(position.stage);
        if (threadIdx.x == 0) {
          barrier_arrive_expect(full, Config::kBBytes + (kGathered ? 0 : Config::kABytes));
          load_weights<Config, kKMajor, Epilogue::kGated>(operands.weights, ring.b(position.stage), full,
                                                          block * kDepth, tile.column_tile, tile.expert);
        }
        load_rows(ring.a(position.stage), full, block * kDepth);
      }
    };
    if constexpr (kGathered) {
      RowGather<Element, Config::kRows> rows(operands, tile);
      each_stage([&](uint32_t stage, uint32_t full, int depth) {
        rows.load(stage);
        cp_async_arrive(full);
      });
    } else {
      each_stage([&](uint32_t stage, uint32_t full, int depth) {
        if (threadIdx.x == 0) tma_load(stage, operands.rows, full, depth, tile.row_begin);
      });
      __syncwarp();
    }
  }
}

template <typename Config, typename Element, bool kGathered, bool kKMajor, typename Epilogue>
__device__ __forceinline__ void consume(const MGroupedOperands<Element>& operands, const Epilogue& epilogue,
                                        const Ring<Config>& ring, const Consumer& consumer, int column_tiles) {
  constexpr int kOutputCols = Config::kCols / (Epilogue::kGated ? 2 : 1);
  constexpr int kTurn = Config::kPingPong ? 2 : 1;
  TileScheduler<Config::kRows> scheduler(operands.expert_offsets, operands.num_experts, operands.num_rows, column_tiles,
                                         Config::kPingPong ? consumer.index : 0, kTurn);
  RingPosition<Config> position;
  typename Epilogue::Worker worker(epilogue, consumer);
  const int blocks = (operands.k + kDepth - 1) / kDepth;
  const int first_fragment = Config::kPingPong ? 0 : consumer.index * Config::kFragments;
  if (Config::kPingPong && consumer.index == 1) position.advance(blocks);
  if (consumer.index == 1) Turns<Config>::give_to(0);
  Tile tile;
  while (scheduler.next(tile)) {
    const ConsumerTile mine{tile.row_begin + first_fragment * 64, tile.row_end, tile.column_tile * kOutputCols,
                            tile.expert};
    const bool has_expert = tile.expert < operands.num_experts;
    if (!has_expert) {
      epilogue.zeros(mine.row, min(mine.row + Config::kFragments * 64, mine.row_end), mine.column,
                     min(mine.column + kOutputCols, epilogue.columns));
      continue;
    }
    worker.begin(mine);
    Turns<Config>::wait(consumer.index);
    // A warpgroup without rows multiplies all the same. Tiles that last equally long keep the blocks that share weights
    // abreast, and only so do they share them in L2: with short tiles v4-pro-ep8 at T = 8192 took 4.05 ms instead
    // of 2.59, fine-16 2.23 instead of 1.86.
    Outputs<Config> outputs;  // declared here: nothing lives on from tile to tile
    const int last = multiply<Config, Element, true, kKMajor, kGathered>(outputs, ring, position, blocks,
                                                                         first_fragment, consumer.leads());
    if (consumer.leads()) barrier_arrive(ring.empty(last));
    Turns<Config>::give_to(consumer.index ^ 1);
    if (Config::kPingPong) position.advance(blocks);
#pragma unroll
    for (int f = 0; f < Config::kFragments; ++f) worker.finish(mine, f, outputs[f]);
  }
  if (consumer.leads()) tma_wait_all();
}

// 504 registers a thread of each kind are there to share out. The gather keeps 8 row numbers.
template <typename Config, typename Element, bool kGathered, bool kKMajor, typename Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    m_grouped_kernel(const __grid_constant__ MGroupedOperands<Element> operands,
                     const __grid_constant__ Epilogue epilogue) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = MGroupedShared<Config, Epilogue>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const Ring<Config> ring{base, base + Shared::kBarriers};
  const uint32_t epilogue_barriers = ring.barriers + Ring<Config>::kBarrierBytes;
  constexpr int kOutputCols = Config::kCols / (Epilogue::kGated ? 2 : 1);
  const int column_tiles = (epilogue.columns + kOutputCols - 1) / kOutputCols;
  if (threadIdx.x == 0) {
    ring.init(kGathered ? 1 + 128 : 1);
    for (int i = 0; i < kConsumers * Epilogue::kBarriers; ++i) barrier_init(epilogue_barriers + i * 8, 1);
    barrier_init_fence();
    prefetch_map(operands.weights);
    if (!kGathered) prefetch_map(operands.rows);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<kGathered ? 56 : 40>();
    produce<Config, Element, kGathered, kKMajor, Epilogue>(operands, ring, column_tiles);
  } else {
    take_registers<kGathered ? 224 : 232>();
    const int index = threadIdx.x / 128 - 1;
    const Consumer consumer{index, base + Ring<Config>::kBytes + index * Epilogue::kSharedBytes,
                            epilogue_barriers + index * Epilogue::kBarriers * 8};
    consume<Config, Element, kGathered, kKMajor>(operands, epilogue, ring, consumer, column_tiles);
  }
#endif
}

}  // namespace moe::sm90
