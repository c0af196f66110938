// The m-grouped product for experts of many rows, which lie in order: what swap_ab.cuh computes, to the bit, with the
// weights as wgmma's A too. There both consumers share a tile, and nothing is multiplied while its outputs leave; here
// each has tiles of its own, half as wide, and multiplies while the other one stores.
//
// Narrower tiles want more of L2, so two blocks, a cluster, compute neighbouring columns of the same rows, and each
// brings half of the rows to both. Tile i of a block is consumer i % 2's. The producer finds the tiles and notes each
// for its consumer. Products of a block's tiles begin in order: a consumer takes its turn when the other one's last
// products are under way, so that stages of one tile have all landed before the next tile's are waited for.
#pragma once

#include "operands.cuh"
#include "swap_ab_epilogues.cuh"

namespace moe::sm90 {

constexpr int kPairedRows = PingPong::kCols / 2;  // of a tile: what one block of a pair brings

// The next tile of each consumer: `full` (it is noted), `empty` (all its threads have read it).
struct NextTiles {
  static constexpr int kBarrierBytes = 16 * kConsumers;
  TileNotes<kConsumers> notes;
  uint32_t barriers;

  __device__ uint32_t full(int consumer) const { return barriers + consumer * 8; }
  __device__ uint32_t empty(int consumer) const { return full(kConsumers + consumer); }

  __device__ void init() const {
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      barrier_init(full(consumer), 1);
      barrier_init(empty(consumer), 128);
    }
  }
};

struct PingPongShared {
  static constexpr int kStaging = Ring<PingPong>::kBytes;
  static constexpr int kBarriers = kStaging + kConsumers * PingPong::kBuffers * kPieceBytes;
  static constexpr int kNotes = kBarriers + Ring<PingPong>::kBarrierBytes;
  static constexpr int kNoteBarriers = kNotes + TileNotes<kConsumers>::kBytes;
  static constexpr int kSharedBytes = kNoteBarriers + NextTiles::kBarrierBytes;
  static_assert(kSharedBytes <= kMaxSharedBytes && kNotes % 16 == 0, "more than an SM has, or not aligned");
};

template <typename Config, typename Element, bool kKMajor>
__device__ __forceinline__ void produce_in_turn(const MGroupedOperands<Element>& operands, const Ring<Config>& ring,
                                                const NextTiles& next) {
  if (threadIdx.x >= 32) return;
  TileScheduler<Config::kCols, true, true> scheduler(operands.expert_offsets, operands.num_experts, operands.num_rows,
                                                     operands.column_tiles);
  RingPosition<Config> position;
  const int blocks = (operands.k + kDepth - 1) / kDepth;
  Tile tile;
  int count = 0;
  auto note = [&] {
    const int consumer = count % 2;
    barrier_wait(next.empty(consumer), count / 2 % 2 ^ 1);
    __syncwarp();
    if (threadIdx.x == 0) {
      next.notes.write(consumer, tile);
      barrier_arrive(next.full(consumer));
    }
    ++count;
  };
  while (scheduler.next(tile)) {
    note();
    if (tile.expert >= operands.num_experts) continue;
    const int boxes = tile.height > kPairedRows ? 2 : 1;
    for (int block = 0; block < blocks; ++block, position.advance()) {
      barrier_wait(ring.empty(position.stage()), position.phase() ^ 1);
      __syncwarp();  // one lane alone goes on: none may fall a whole round behind
      if (threadIdx.x != 0) continue;
      const uint32_t full = ring.full(position.stage());
      barrier_arrive_expect(full, Config::kABytes + boxes * kPairedRows * 128);
      load_weights<Config::kRows, kKMajor, false>(operands, ring.a(position.stage()), full, block * kDepth,
                                                  tile.column_tile, tile.expert);
      if (const int box = cluster_rank(); box < boxes) {
        tma_load_for_both(ring.b(position.stage()) + box * kPairedRows * 128, operands.rows, full, block * kDepth,
                          tile.row_begin + box * kPairedRows);
      }
    }
    __syncwarp();
  }
  tile.expert = kNoTile;
  for (int consumer = 0; consumer < kConsumers; ++consumer) note();
}

// The right to multiply, which passes from consumer to consumer, tile by tile.
class Turns {
 public:
  __device__ explicit Turns(int consumer) : is_first_(consumer == 0) {
    if (!is_first_) pass_on();
  }
  __device__ __forceinline__ void take() const {
    if (is_first_) named_barrier_sync<3, 256>();
    else named_barrier_sync<4, 256>();
  }
  __device__ __forceinline__ void pass_on() const {
    if (is_first_) named_barrier_arrive<4, 256>();
    else named_barrier_arrive<3, 256>();
  }

 private:
  bool is_first_;
};

template <typename Config, typename Element, bool kKMajor, typename Epilogue>
__device__ __forceinline__ void consume_in_turn(const MGroupedOperands<Element>& operands, const Epilogue& epilogue,
                                                const Ring<Config>& ring, const NextTiles& next,
                                                const Consumer& consumer) {
  static_assert(!Epilogue::kGated && !Epilogue::kLoads);
  const int blocks = (operands.k + kDepth - 1) / kDepth;
  RingPosition<Config> position;
  position.advance(consumer.index * blocks);
  auto give_back = [&](int stage, int) {  // to both blocks, which write into it
    if (consumer.thread() < 2) barrier_arrive_at(ring.empty(stage), consumer.thread());
  };
  const Turns turns(consumer.index);
  auto pass_on = [&](int block) {
    if (block == blocks - 1) turns.pass_on();
  };
  TransposedStager<Config::kBuffers> stager(consumer, consumer.staging);
  for (uint32_t phase = 0;; phase ^= 1) {
    barrier_wait(next.full(consumer.index), phase);
    const Tile tile = next.notes.read(consumer.index);
    barrier_arrive(next.empty(consumer.index));
    if (tile.expert == kNoTile) break;
    const ConsumerTile mine{tile.row_begin, tile.row_end, tile.column_tile * Config::kRows, tile.expert};
    if (tile.expert >= operands.num_experts) {  // as all tiles from here on: nobody waits for a turn any more
      epilogue.zeros(mine.row, mine.row_end, mine.column, min(mine.column + Config::kRows, epilogue.columns));
      continue;
    }
    turns.take();
    Outputs<Config> outputs;  // declared here: nothing lives on from tile to tile
    int last = 0;
    dispatch_multiple<Config::kCols, 8>(tile.height, [&](auto height) {
      last = multiply<Config, Element, kKMajor, true, false, decltype(height)::value>(outputs, ring, position, blocks,
                                                                                      0, give_back, pass_on);
    });
    give_back(last, blocks - 1);
    position.advance(blocks);  // the other consumer's
    epilogue.store(mine, outputs, stager);
  }
  if (consumer.leads()) tma_wait_all();
}

// 504 registers a thread of each kind are there to share out.
template <typename Config, typename Element, bool kKMajor, typename Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    ping_pong_kernel(const __grid_constant__ MGroupedOperands<Element> operands,
                     const __grid_constant__ Epilogue epilogue) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = PingPongShared;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const Ring<Config> ring{base, base + Shared::kBarriers};
  const NextTiles next{TileNotes<kConsumers>(base + Shared::kNotes), base + Shared::kNoteBarriers};
  if (threadIdx.x == 0) {
    ring.init(1, 2);
    next.init();
    barrier_init_fence();
    prefetch_map(operands.weights);
    prefetch_map(operands.rows);
  }
  cluster_sync();  // a block's copies and arrivals reach its neighbour's barriers
  if (threadIdx.x < 128) {
    give_registers<40>();
    produce_in_turn<Config, Element, kKMajor>(operands, ring, next);
  } else {
    take_registers<232>();
    const int index = threadIdx.x / 128 - 1;
    const Consumer consumer{index, base + Shared::kStaging + index * Config::kBuffers * kPieceBytes};
    consume_in_turn<Config, Element, kKMajor>(operands, epilogue, ring, next, consumer);
  }
  cluster_sync();  // nor does a block end before
#endif
}

}  // namespace moe::sm90
