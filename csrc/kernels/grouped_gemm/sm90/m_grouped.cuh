// The m-grouped product on Hopper with the rows as wgmma's A, for the epilogue that swap_ab.cuh does not have. It
// computes what sm80/m_grouped.cuh does, to the bit:
//
//   y[r, :] = x[row(r), :] @ b[e].T   (b [E, n, k], K-major)    or    x[row(r), :] @ b[e]   (b [E, k, n], MN-major)
//
// One persistent block an SM. The producer warpgroup keeps the ring of stages full: weights by TMA, the gathered rows
// by cp.async of its 128 threads. Two consumer warpgroups multiply and store.
#pragma once

#include "epilogues.cuh"
#include "operands.cuh"

namespace moe::sm90 {

template <typename Config, typename Epilogue>
struct MGroupedShared {
  static constexpr int kBarriers = Ring<Config>::kBytes + kConsumers * Epilogue::kSharedBytes;
  static constexpr int kBytes = kBarriers + Ring<Config>::kBarrierBytes;
  static_assert(kBytes <= kMaxSharedBytes, "more than an SM has");
};

template <typename Config, bool kKMajor, typename Element>
__device__ __forceinline__ void produce(const MGroupedOperands<Element>& operands, const Ring<Config>& ring) {
  TileScheduler<Config::kRows> scheduler(operands.expert_offsets, operands.num_experts, operands.num_rows,
                                         operands.column_tiles);
  RingPosition<Config> position;
  const int blocks = (operands.k + kDepth - 1) / kDepth;
  Tile tile;
  while (scheduler.next(tile) && tile.expert < operands.num_experts) {
    RowGather<Element, Config::kRows> rows(operands, tile);
    for (int block = 0; block < blocks; ++block, position.advance()) {
      barrier_wait(ring.empty(position.stage()), position.phase() ^ 1);
      const uint32_t full = ring.full(position.stage());
      if (threadIdx.x == 0) {
        barrier_arrive_expect(full, Config::kBBytes);
        load_weights<Config::kCols, kKMajor, false>(operands, ring.b(position.stage()), full, block * kDepth,
                                                    tile.column_tile, tile.expert);
      }
      rows.load(ring.a(position.stage()));
      cp_async_arrive(full);
    }
  }
}

template <typename Config, bool kKMajor, typename Element, typename Epilogue>
__device__ __forceinline__ void consume(const MGroupedOperands<Element>& operands, const Epilogue& epilogue,
                                        const Ring<Config>& ring, const Consumer& consumer) {
  constexpr int kOutputCols = Config::kCols / (Epilogue::kGated ? 2 : 1);
  TileScheduler<Config::kRows> scheduler(operands.expert_offsets, operands.num_experts, operands.num_rows,
                                         operands.column_tiles);
  RingPosition<Config> position;
  typename Epilogue::Worker worker(epilogue, consumer);
  const int blocks = (operands.k + kDepth - 1) / kDepth;
  const int first_fragment = consumer.index * Config::kFragments;
  auto give_back = [&](int stage, int) {
    if (consumer.leads()) barrier_arrive(ring.empty(stage));
  };
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
    // A warpgroup without rows multiplies all the same. Tiles that last equally long keep the blocks that share weights
    // abreast, and only so do they share them in L2: with short tiles v4-pro-ep8 at T = 8192 took 4.05 ms instead
    // of 2.59, fine-16 2.23 instead of 1.86.
    Outputs<Config> outputs;  // declared here: nothing lives on from tile to tile
    const int last =
        multiply<Config, Element, true, kKMajor, true>(outputs, ring, position, blocks, first_fragment, give_back);
    give_back(last, blocks - 1);
#pragma unroll
    for (int f = 0; f < Config::kFragments; ++f) worker.finish(mine, f, outputs[f]);
  }
  if (consumer.leads()) tma_wait_all();
}

// 504 registers a thread of each kind are there to share out. The gather keeps 8 row numbers.
template <typename Config, bool kKMajor, typename Element, typename Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    m_grouped_kernel(const __grid_constant__ MGroupedOperands<Element> operands,
                     const __grid_constant__ Epilogue epilogue) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = MGroupedShared<Config, Epilogue>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const Ring<Config> ring{base, base + Shared::kBarriers};
  if (threadIdx.x == 0) {
    ring.init(1 + 128);
    barrier_init_fence();
    prefetch_map(operands.weights);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<56>();
    produce<Config, kKMajor>(operands, ring);
  } else {
    take_registers<224>();
    const int index = threadIdx.x / 128 - 1;
    const Consumer consumer{index, base + Ring<Config>::kBytes + index * Epilogue::kSharedBytes};
    consume<Config, kKMajor>(operands, epilogue, ring, consumer);
  }
#endif
}

}  // namespace moe::sm90
