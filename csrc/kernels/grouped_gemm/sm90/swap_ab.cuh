// The m-grouped product with its operands swapped: the weights are wgmma's A, the rows its B. It computes
//
//   y[r, :] = x[row(r), :] @ b[e].T   (b [E, n, k], K-major)    or    x[row(r), :] @ b[e]   (b [E, k, n], MN-major)
//
// to the bit as m_grouped.cuh does. wgmma takes its B in steps of 8 rows, so that a tile is as high as its expert wants
// it: where m_grouped.cuh pads 272 rows to three tiles of 128, here are two of 136. All tiles of an expert are equally
// high, which keeps the blocks that share its weights abreast, and only so do they share them in L2.
//
// The producer finds the tiles, ahead of time, and notes each beside its first stage, or beside a stage that holds
// nothing else. What it wrote every thread of the consumers reads, and each arrives on that stage's `empty` barrier;
// for stages of which only wgmma reads one thread arrives as all.
#pragma once

#include "operands.cuh"
#include "swap_ab_epilogues.cuh"

namespace moe::sm90 {

struct SwapABShared {
  static constexpr int kNotes = Ring<SwapAB>::kBytes + Ring<SwapAB>::kBarrierBytes;
  static constexpr int kSharedBytes = kNotes + TileNotes<SwapAB::kStages>::kBytes;
  static_assert(kSharedBytes <= kMaxSharedBytes && kNotes % 16 == 0, "more than an SM has, or not aligned");
};

constexpr int kRowBox = 64;  // rows that TMA brings at a time where they are not gathered: each instruction costs

template <typename Config, typename Element, bool kGathered, bool kKMajor, typename Epilogue>
__device__ __forceinline__ void produce_swapped(const MGroupedOperands<Element>& operands, const Epilogue& epilogue,
                                                const Ring<Config>& ring, const TileNotes<Config::kStages>& notes) {
  if (!kGathered && threadIdx.x >= 32) return;
  TileScheduler<Epilogue::kMostRows, true> scheduler(operands.expert_offsets, operands.num_experts, operands.num_rows,
                                                     operands.column_tiles);
  RingPosition<Config> position;
  const int blocks = (operands.k + kDepth - 1) / kDepth;
  Tile tile;
  auto note_alone = [&] {  // a stage that holds nothing
    barrier_wait(ring.empty(position.stage()), position.phase() ^ 1);
    if constexpr (!kGathered) __syncwarp();
    if (threadIdx.x == 0) {
      notes.write(position.stage(), tile);
      barrier_arrive(ring.full(position.stage()));
    }
    if constexpr (kGathered) barrier_arrive(ring.full(position.stage()));
    position.advance();
  };
  while (scheduler.next(tile)) {
    if (tile.expert >= operands.num_experts) {
      note_alone();
      continue;
    }
    const int boxes = kGathered ? 0 : (tile.height + kRowBox - 1) / kRowBox;
    auto each_stage = [&](auto load_rows) {
      for (int block = 0; block < blocks; ++block, position.advance()) {
        barrier_wait(ring.empty(position.stage()), position.phase() ^ 1);
        if constexpr (!kGathered) __syncwarp();  // one lane alone goes on: none may fall a whole round behind
        const uint32_t full = ring.full(position.stage());
        if (threadIdx.x == 0) {
          if (block == 0) notes.write(position.stage(), tile);
          barrier_arrive_expect(full, Config::kABytes + boxes * kRowBox * 128);
          load_weights<Config::kRows, kKMajor, Epilogue::kGated>(operands, ring.a(position.stage()), full,
                                                                 block * kDepth, tile.column_tile, tile.expert);
        }
        load_rows(ring.b(position.stage()), full, block * kDepth);
      }
    };
    if constexpr (kGathered) {
      RowGather<Element, (Epilogue::kMostRows + 15) / 16 * 16> rows(operands, tile);
      each_stage([&](uint32_t stage, uint32_t full, int depth) {
        rows.load(stage);
        cp_async_arrive(full);
      });
    } else {
      each_stage([&](uint32_t stage, uint32_t full, int depth) {
        if (threadIdx.x != 0) return;
        for (int box = 0; box < boxes; ++box) {
          tma_load(stage + box * kRowBox * 128, operands.rows, full, depth, tile.row_begin + box * kRowBox);
        }
      });
      __syncwarp();
    }
    if constexpr (Epilogue::kLoads) {
      static_assert(kGathered, "every thread of the producer is needed");
      const typename Epilogue::Loader loader(epilogue, tile);
      const int height = tile.row_end - tile.row_begin;
      for (int piece = 0; piece * Epilogue::kStageRows < height; ++piece, position.advance()) {
        barrier_wait(ring.empty(position.stage()), position.phase() ^ 1);
        loader.load(tile, piece, ring.a(position.stage()), ring.full(position.stage()));
      }
    }
  }
  tile.expert = kNoTile;
  note_alone();
}

// A consumer has 128 of the tile's 256 columns: 64 of the gate and the same of the up half, or 128 neighbours.
template <typename Config, typename Element, bool kGathered, bool kKMajor, typename Epilogue>
__device__ __forceinline__ void consume_swapped(const MGroupedOperands<Element>& operands, const Epilogue& epilogue,
                                                const Ring<Config>& ring, const TileNotes<Config::kStages>& notes,
                                                const Consumer& consumer) {
  constexpr bool kGated = Epilogue::kGated;
  constexpr int kOutputCols = Config::kRows / (kGated ? 2 : 1);
  RingPosition<Config> position;
  const int blocks = (operands.k + kDepth - 1) / kDepth;
  const int first_fragment = consumer.index * (kGated ? 1 : Config::kFragments);
  auto give_back = [&](int stage, int block) {
    if (consumer.leads()) barrier_arrive(ring.empty(stage), block == 0 ? 1 : 128);
  };
  while (true) {
    barrier_wait(ring.full(position.stage()), position.phase());
    const Tile tile = notes.read(position.stage());
    if (!consumer.leads()) barrier_arrive(ring.empty(position.stage()));
    if (tile.expert == kNoTile) break;
    const int column = tile.column_tile * kOutputCols + consumer.index * (kOutputCols / 2);
    const ConsumerTile mine{tile.row_begin, tile.row_end, column, tile.expert};
    if (tile.expert >= operands.num_experts) {
      epilogue.zeros(mine.row, mine.row_end, column, min(column + kOutputCols / 2, epilogue.columns));
      give_back(position.stage(), 0);
      position.advance();
      continue;
    }
    Outputs<Config> outputs;  // declared here: nothing lives on from tile to tile
    int last = 0;
    dispatch_multiple<Epilogue::kMostRows, 8>(tile.height, [&](auto height) {
      last = multiply<Config, Element, kKMajor, true, kGathered, decltype(height)::value, kGated ? 2 : 1>(
          outputs, ring, position, blocks, first_fragment, give_back);
    });
    if constexpr (Epilogue::kLoads) {
      give_back(last, blocks - 1);
      epilogue.finish(mine, outputs, ring, position, consumer);
    } else {
      // Nobody but this consumer reads its fragments of the last stage: the outputs go through that memory.
      consumer.sync();  // all four warps' products are done
      // They lie side by side or, of a gated tile, two fragments apart.
      constexpr int kPitch = (kGated ? 2 : 1) * kPieceBytes;
      TransposedStager<2, kPitch> stager(consumer, ring.a(last) + first_fragment * kPieceBytes);
      epilogue.store(mine, outputs, stager);
      if (consumer.leads()) tma_wait_read<0>();
      give_back(last, blocks - 1);
    }
  }
  if (consumer.leads()) tma_wait_all();
}

// 504 registers a thread of each kind are there to share out. The gather keeps 12 row addresses.
template <typename Config, typename Element, bool kGathered, bool kKMajor, typename Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    swap_ab_kernel(const __grid_constant__ MGroupedOperands<Element> operands,
                   const __grid_constant__ Epilogue epilogue) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const Ring<Config> ring{base, base + Ring<Config>::kBytes};
  const TileNotes<Config::kStages> notes(base + SwapABShared::kNotes);
  if (threadIdx.x == 0) {
    ring.init(kGathered ? 1 + 128 : 1, kConsumers * 128);
    barrier_init_fence();
    prefetch_map(operands.weights);
    if (!kGathered) prefetch_map(operands.rows);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<40>();
    produce_swapped<Config, Element, kGathered, kKMajor>(operands, epilogue, ring, notes);
  } else {
    take_registers<232>();
    const int index = threadIdx.x / 128 - 1;
    const Consumer consumer{index, 0};
    consume_swapped<Config, Element, kGathered, kKMajor>(operands, epilogue, ring, notes, consumer);
  }
#endif
}

}  // namespace moe::sm90
