// The k-grouped product on Hopper: the same as sm80/k_grouped.cuh computes, to the bit. It makes the weight gradients.
//
//   out[e] [n, k] (+)= sum over the rows r of expert e, ascending, of outer(grad[row(r), :], a[row(r), :])
//
// Both operands lie row by row, so both are MN-major: a stage is 64 rows, in chunks of 64 columns. One side may be
// gathered, by cp.async of the producer's 128 threads; it becomes wgmma's A, 128 columns of it a tile. The other one
// becomes B, 256 columns through a ragged map, which reads zeros behind the expert's last row. Where `a` is gathered,
// outputs are those of out[e] transposed, and are transposed back on their way out. Tiles are numbered expert by
// expert, inside an expert by columns of B, inside those by columns of A. Where A's tiles come in pairs, two blocks
// whose tiles share columns of B are a cluster: each loads half of them for both. An expert without rows gets zeros,
// or, where the gradient is added to what is there, nothing. Of an expert's last 64 rows only so many steps of 16 are
// multiplied as it has.
//
// Outputs leave through buffers of their own, so that the tile's last stage goes back to the producer at once: with the
// outputs in that stage too products waited for the next tile's rows (256 to 512 rows an expert: 3% slower). Pieces for
// which no buffer is free wait in registers, but for those in fp32, and leave while the next tile's products run.
#pragma once

#include "../../common/divisor.h"
#include "epilogues.cuh"
#include "pipeline.cuh"

namespace moe::sm90 {

enum class Gathered { kNone, kGrad, kA };

template <typename Element>
struct KGroupedOperands {
  CUtensorMap a;  // A where nothing is gathered
  CUtensorMap b;
  const Element* gathered;        // [T, a_columns]: A
  const int32_t* row_index;       // [S]: row(r) = row_index[r] / row_divisor
  Divisor row_divisor;            // K
  const int32_t* expert_offsets;  // [E + 1]
  int num_experts;
  int a_columns;  // n, or k where `a` is gathered
  int b_columns;  // the other one
};

// Copies 64 gathered rows x 128 columns a stage. Thread t copies 16-byte chunk t % 8 of both column chunks of rows t /
// 8 + 16 i. Row numbers are read one stage ahead of their copies. Columns behind the last one repeat others: such
// outputs are not stored.
template <typename Element>
class ColumnGather {
 public:
  __device__ explicit ColumnGather(const KGroupedOperands<Element>& operands) : operands_(operands) {
    shared_offset_ = threadIdx.x / 8 * 128 + ((threadIdx.x % 8 ^ threadIdx.x / 8 % 8) << 4);
  }
  // Columns column .. column + 127 of rows begin .. end - 1.
  __device__ void start(int column, int begin, int end) {
    const int wanted = column + threadIdx.x % 8 * 8;
    const int first = min(wanted, operands_.a_columns - 8);
    second_chunk_ = min(wanted + 64, operands_.a_columns - 8) - first;
    column_ = operands_.gathered + first;
    next_ = begin + threadIdx.x / 8;
    end_ = end;
    read_rows();
  }
  // Where the next stage's rows lie. If it is whole, row numbers of the one behind it are read.
  __device__ void locate(bool whole) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      exists_[i] = rows_[i] >= 0;
      from_[i] = column_ + static_cast<int64_t>(operands_.row_divisor.divide(max(rows_[i], 0))) * operands_.a_columns;
    }
    if (whole) read_rows();
  }
  // Copies the located rows. A stage may have fewer than 64 of them only as the last one.
  __device__ void load(uint32_t stage, bool whole) const {
    if (whole) copy(stage, [](uint32_t shared, const Element* source, bool) { cp_async_16(shared, source); });
    else copy(stage, [](uint32_t shared, const Element* source, bool exists) { cp_async_16(shared, source, exists); });
  }

 private:
  template <typename Copy>
  __device__ __forceinline__ void copy(uint32_t stage, Copy copy_16) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      copy_16(stage + shared_offset_ + i * 2048, from_[i], exists_[i]);
      copy_16(stage + kMnChunkBytes + shared_offset_ + i * 2048, from_[i] + second_chunk_, exists_[i]);
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
  int end_, next_, second_chunk_;
  uint32_t shared_offset_;
  int rows_[4];
  const Element* from_[4];
  bool exists_[4];
};

struct WeightTile {
  int expert, row, column;  // column of A, column of B
  int begin, end;           // the expert's rows
};

// Block b computes tiles b, b + gridDim.x and so on.
template <typename Config, typename Element>
class WeightTiles {
 public:
  __device__ explicit WeightTiles(const KGroupedOperands<Element>& operands)
      : operands_(operands),
        row_tiles_((operands.a_columns + Config::kRows - 1) / Config::kRows),
        expert_tiles_(row_tiles_ * ((operands.b_columns + Config::kCols - 1) / Config::kCols)),
        local_(blockIdx.x) {}

  __device__ bool next(WeightTile& tile) {
    expert_ += local_ / expert_tiles_;
    local_ %= expert_tiles_;
    if (expert_ >= operands_.num_experts) return false;
    const int column_tile = local_ / row_tiles_;
    tile = {expert_, (local_ - column_tile * row_tiles_) * Config::kRows, column_tile * Config::kCols,
            __ldg(operands_.expert_offsets + expert_), __ldg(operands_.expert_offsets + expert_ + 1)};
    local_ += gridDim.x;
    return true;
  }

 private:
  const KGroupedOperands<Element>& operands_;
  int row_tiles_, expert_tiles_;
  int expert_ = 0, local_;  // tiles of an expert: far below 2^31
};

// The columns of B of a stage; of two blocks in a cluster each brings half of them to both.
template <typename Config>
__device__ __forceinline__ void load_b(const CUtensorMap& map, uint32_t stage, uint32_t full, const WeightTile& tile,
                                       int row) {
  constexpr int kChunks = Config::kCols / 64;
  const bool paired = cluster_blocks() == 2;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (!paired) {
      tma_load(stage + i * kMnChunkBytes, map, full, tile.column + i * 64, ragged_row(row, tile.end), kRaggedRows,
               tile.end);
    } else if (i < kChunks / 2) {
      const int chunk = cluster_rank() * (kChunks / 2) + i;
      tma_load_for_both(stage + chunk * kMnChunkBytes, map, full, tile.column + chunk * 64, ragged_row(row, tile.end),
                        kRaggedRows, tile.end);
    }
  }
}

template <typename Config, typename Element, Gathered kGathered>
__device__ __forceinline__ void produce_weight_tiles(const KGroupedOperands<Element>& operands,
                                                     const Ring<Config>& ring) {
  constexpr bool kGathers = kGathered != Gathered::kNone;
  if (!kGathers && threadIdx.x > 0) return;
  WeightTiles<Config, Element> tiles(operands);
  RingPosition<Config> position;
  ColumnGather<Element> gather(operands);
  WeightTile tile, upcoming;
  bool more = tiles.next(tile);
  if (kGathers && more) gather.start(tile.row, tile.begin, tile.end);
  while (more) {
    more = tiles.next(upcoming);  // its loads are under way while this tile's first rows are copied
    for (int row = tile.begin; row < tile.end; row += kDepth, position.advance()) {
      const bool whole = row + kDepth <= tile.end;
      if constexpr (kGathers) gather.locate(whole);
      barrier_wait(ring.empty(position.stage()), position.phase() ^ 1);
      const uint32_t full = ring.full(position.stage());
      static_assert(Config::kStages <= 4, "each stage's TMA has a warp of its own");
      if (threadIdx.x == (kGathers ? position.stage() * 32 : 0)) {  // each warp in turn: TMA delays its copies
        barrier_arrive_expect(full, Config::kBBytes + (kGathers ? 0 : Config::kABytes));
        if constexpr (!kGathers) {
#pragma unroll
          for (int chunk = 0; chunk < Config::kRows / 64; ++chunk) {
            tma_load(ring.a(position.stage()) + chunk * kMnChunkBytes, operands.a, full, tile.row + chunk * 64,
                     ragged_row(row, tile.end), kRaggedRows, tile.end);
          }
        }
        load_b<Config>(operands.b, ring.b(position.stage()), full, tile, row);
      }
      if constexpr (kGathers) {
        gather.load(ring.a(position.stage()), whole);
        cp_async_arrive(full);
        if (row + kDepth >= tile.end && more) {  // row numbers of the next tile, as early as those of the next stage
          gather.start(upcoming.row, upcoming.begin, upcoming.end);
        }
      }
    }
    if (kGathers && tile.begin == tile.end && more) gather.start(upcoming.row, upcoming.begin, upcoming.end);
    tile = upcoming;
  }
}

// Two pieces of a tile that wait in registers, in the storage type, until the next tile's products run. They leave
// during these stages: in the very first one the pieces stored before them may still fill the buffers. H200, mean time
// of both weight gradients over 16 shapes, 1 without late pieces: stages 1 and 3 0.971, 1 and 2 0.973, 0 and 1 0.985, 2
// and 3 0.987.
constexpr int kFirstLateStage = 1, kSecondLateStage = 3;

template <typename Element>
class LatePieces {
 public:
  static constexpr int kPieces = 2;

  // values_of as for write_piece.
  template <typename ValuesOf>
  __device__ __forceinline__ void keep(int piece, ValuesOf values_of) {
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      float values[8];
      values_of(group, values);
      pack_matrix<Element>(values, words_[piece][group]);
    }
  }

  // Lays a piece into shared memory.
  template <bool kTransposed>
  __device__ __forceinline__ void write(const Consumer& consumer, int piece, uint32_t shared) const {
#pragma unroll
    for (int group = 0; group < 4; ++group) write_matrix<kTransposed>(consumer, shared, group, words_[piece][group]);
  }

 private:
  uint32_t words_[kPieces][4][4];
};

// out[e] = outputs, in the weights' type; or, in fp32, out[e] += outputs. A piece has 64 columns of A: untransposed 64
// rows of out by 128 bytes, transposed 128 bytes of 64 rows, or in fp32 twice 128 bytes of 32 rows.
template <typename Element, bool kAccumulate, bool kTransposed>
struct WeightStore {
  static constexpr bool kAdds = kAccumulate;
  static constexpr int kBoxRows = kAccumulate && kTransposed ? 32 : 64;
  static constexpr int kPieceColumns = kAccumulate ? 32 : 64;  // of B
  CUtensorMap output;                                          // [E, n, k], boxes of kBoxRows
  void* output_data;

  __device__ void zeros(const KGroupedOperands<Element>& operands, const WeightTile& tile, int row, int rows,
                        int columns) const {
    const int row_end = min(row + rows, operands.a_columns);
    const int column_end = min(tile.column + columns, operands.b_columns);
    Element* expert = static_cast<Element*>(output_data) +
                      static_cast<int64_t>(tile.expert) * operands.a_columns * operands.b_columns;
    if constexpr (kTransposed) store_zeros(expert, operands.a_columns, tile.column, column_end, row, row_end);
    else store_zeros(expert, operands.b_columns, row, row_end, tile.column, column_end);
  }

  // What a consumer has not stored yet of the tile before. In fp32 that would be too many registers.
  struct Late {
    LatePieces<Element> pieces;
    int row, column, expert;  // of the first piece
    int stored = LatePieces<Element>::kPieces;
  };

  // The outputs of a consumer, whose first column of A is `row`: kBuffers pieces at once. The others become `late`, or
  // leave one whenever a buffer has been read.
  template <int kBuffers, int kCount>
  __device__ __forceinline__ void store_tile(const Consumer& consumer, const WeightTile& tile, int row, int b_columns,
                                             const float (&outputs)[kCount], Late& late) const {
    constexpr int kPieces = 2 * kCount / kPieceColumns;
    static_assert(kBuffers <= kPieces);
    const bool leads = consumer.leads();
    auto exists = [&](int piece) { return tile.column + piece * kPieceColumns < b_columns; };
    auto buffer = [&](int piece) { return consumer.staging + piece % kBuffers * kPieceBytes; };
    if (leads) tma_wait_read<0>();  // of the tile before
    consumer.sync();
#pragma unroll
    for (int piece = 0; piece < kBuffers; ++piece) {
      if (exists(piece)) write(consumer, buffer(piece), outputs, piece);
    }
    proxy_fence();
    consumer.sync();
#pragma unroll
    for (int piece = 0; piece < kBuffers; ++piece) {
      if (leads && exists(piece)) store(buffer(piece), row, tile.column + piece * kPieceColumns, tile.expert);
    }
    if constexpr (kAccumulate) {
#pragma unroll
      for (int piece = kBuffers; piece < kPieces; ++piece) {
        if (!exists(piece)) break;
        if (leads) tma_wait_read<kBuffers - 1>();
        consumer.sync();
        write(consumer, buffer(piece), outputs, piece);
        proxy_fence();
        consumer.sync();
        if (leads) store(buffer(piece), row, tile.column + piece * kPieceColumns, tile.expert);
      }
    } else {
      static_assert(kPieces == kBuffers + LatePieces<Element>::kPieces);
#pragma unroll
      for (int piece = kBuffers; piece < kPieces; ++piece) {
        late.pieces.keep(piece - kBuffers,
                         [&](int group, float (&values)[8]) { take8(outputs, piece * 32 + group * 8, values); });
      }
      late.row = row, late.column = tile.column + kBuffers * kPieceColumns, late.expert = tile.expert;
      late.stored = 0;
    }
  }

  // Stores the late piece unless that is done.
  template <int kPiece, int kBuffers>
  __device__ __forceinline__ void store_late(const Consumer& consumer, int b_columns, Late& late) const {
    if (late.stored > kPiece) return;
    late.stored = kPiece + 1;
    const int column = late.column + kPiece * kPieceColumns;
    if (column >= b_columns) return;
    const uint32_t buffer = consumer.staging + kPiece % kBuffers * kPieceBytes;
    if (consumer.leads()) tma_wait_read<kBuffers - 1>();
    consumer.sync();
    late.pieces.template write<kTransposed>(consumer, kPiece, buffer);
    proxy_fence();
    consumer.sync();
    if (consumer.leads()) store(buffer, late.row, column, late.expert);
  }

 private:
  template <int kCount>
  __device__ __forceinline__ void write(const Consumer& consumer, uint32_t shared, const float (&outputs)[kCount],
                                        int piece) const {
    if constexpr (kAccumulate) {
      write_piece_fp32<kTransposed>(consumer, shared, outputs, piece * 16);
    } else {
      write_piece<Element, kTransposed>(
          consumer, shared, [&](int group, float (&values)[8]) { take8(outputs, piece * 32 + group * 8, values); });
    }
  }

  // One thread. row: of A, column: of B.
  __device__ __forceinline__ void store(uint32_t shared, int row, int column, int expert) const {
    if constexpr (kAccumulate && kTransposed) {
      tma_add(output, shared, row, column, expert);
      tma_add(output, shared + kPieceBytes / 2, row + 32, column, expert);
    } else if constexpr (kAccumulate) {
      tma_add(output, shared, column, row, expert);
    } else if constexpr (kTransposed) {
      tma_store_streaming(output, shared, row, column, expert);
    } else {
      tma_store_streaming(output, shared, column, row, expert);
    }
    tma_commit();
  }
};

// The stage's memory goes back to the producers that write into it: this block's, and its neighbour's in a cluster.
template <typename Config>
__device__ __forceinline__ void give_back(const Ring<Config>& ring, int stage, const Consumer& consumer) {
  if (consumer.thread() < cluster_blocks()) barrier_arrive_at(ring.empty(stage), consumer.thread());
}

// What a consumer does whose part of the tile lies outside the output. One warp follows the ring, and the others wait
// for it: a warp that polls alone could fall a whole round behind, where a barrier's phase looks the same again.
template <typename Config>
__device__ __forceinline__ void skip(const Ring<Config>& ring, RingPosition<Config>& position, int blocks,
                                     const Consumer& consumer) {
  if (consumer.thread() < 32) {
    for (int block = 0; block < blocks; ++block) {
      barrier_wait(ring.full(position.stage()), position.phase());
      __syncwarp();
      give_back(ring, position.stage(), consumer);
      position.advance();
    }
  } else {
    position.advance(blocks);
  }
  consumer.sync();
}

template <typename Config, typename Element, bool kGathers, typename Store>
__device__ __forceinline__ void consume_weight_tiles(const KGroupedOperands<Element>& operands, const Store& store,
                                                     const Ring<Config>& ring, const Consumer& consumer) {
  WeightTiles<Config, Element> tiles(operands);
  RingPosition<Config> position;
  static_assert(Config::kFragments == 1, "a consumer has 64 columns of A");
  WeightTile tile, upcoming;
  typename Store::Late late;
  auto store_late = [&](int stage) {
    if constexpr (!Store::kAdds) {
      if (stage == kFirstLateStage) store.template store_late<0, Config::kBuffers>(consumer, operands.b_columns, late);
      if (stage == kSecondLateStage) store.template store_late<1, Config::kBuffers>(consumer, operands.b_columns, late);
    }
  };
  auto store_all_late = [&] { store_late(kFirstLateStage), store_late(kSecondLateStage); };
  for (bool more = tiles.next(tile); more; tile = upcoming) {
    more = tiles.next(upcoming);  // its loads are under way during this tile
    const int blocks = (tile.end - tile.begin + kDepth - 1) / kDepth;
    const int row = tile.row + consumer.index * 64;
    if (blocks == 0) {
      if constexpr (!Store::kAdds) store.zeros(operands, tile, row, 64, Config::kCols);
      continue;
    }
    if (row >= operands.a_columns) {
      store_all_late();
      skip<Config>(ring, position, blocks, consumer);
      continue;
    }
    Outputs<Config> outputs;  // declared here: nothing lives on from tile to tile
    int last = 0;
    dispatch_multiple<kSteps, 1>((tile.end - tile.begin - 1) % kDepth / 16 + 1, [&](auto steps) {
      last = multiply<Config, Element, false, false, kGathers, Config::kCols, 1, decltype(steps)::value>(
          outputs, ring, position, blocks, consumer.index, [&](int stage, int) { give_back(ring, stage, consumer); },
          store_late);
    });
    give_back(ring, last, consumer);
    store_all_late();
    store.template store_tile<Config::kBuffers>(consumer, tile, row, operands.b_columns, outputs[0], late);
    if (!more || upcoming.end - upcoming.begin <= kDepth) store_all_late();  // its products are too short
  }
  if (consumer.leads()) tma_wait_all();
}

template <typename Config>
struct KGroupedShared {
  static constexpr int kBarriers = Ring<Config>::kBytes + kConsumers * Config::kBuffers * kPieceBytes;
  static constexpr int kBytes = kBarriers + Ring<Config>::kBarrierBytes;
  static_assert(kBytes <= kMaxSharedBytes, "more than an SM has");
};

// 504 registers a thread of each kind are there to share out. The gather keeps 4 addresses and 4 row numbers.
template <typename Config, typename Element, Gathered kGathered, bool kAccumulate>
__global__ void __launch_bounds__(kThreads, 1)
    k_grouped_kernel(const __grid_constant__ KGroupedOperands<Element> operands,
                     const __grid_constant__ WeightStore<Element, kAccumulate, kGathered == Gathered::kA> store) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr bool kGathers = kGathered != Gathered::kNone;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const Ring<Config> ring{base, base + KGroupedShared<Config>::kBarriers};
  if (threadIdx.x == 0) {
    ring.init(kGathers ? 1 + 128 : 1, kConsumers * cluster_blocks());
    barrier_init_fence();
    if constexpr (!kGathers) prefetch_map(operands.a);
    prefetch_map(operands.b);
    prefetch_map(store.output);
  }
  cluster_sync();  // a block's copies and arrivals reach its neighbour's barriers
  if (threadIdx.x < 128) {
    give_registers<kGathers ? 56 : 40>();
    produce_weight_tiles<Config, Element, kGathered>(operands, ring);
  } else {
    take_registers<kGathers ? 224 : 232>();
    const int index = threadIdx.x / 128 - 1;
    const Consumer consumer{index, base + Ring<Config>::kBytes + index * Config::kBuffers * kPieceBytes};
    consume_weight_tiles<Config, Element, kGathers>(operands, store, ring, consumer);
  }
  cluster_sync();  // nor does a block end before
#endif
}

}  // namespace moe::sm90
