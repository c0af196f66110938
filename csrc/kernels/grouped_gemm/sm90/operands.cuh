// What the m-grouped products read, and how the producer brings it into a stage.
#pragma once

#include "../../common/divisor.h"
#include "../scheduler.cuh"
#include "pipeline.cuh"

namespace moe::sm90 {

template <typename Element>
struct MGroupedOperands {
  CUtensorMap rows;               // [S, k], unless gathered
  CUtensorMap weights;            // [E, n, k] (gated: [E, 2, n / 2, k]) or [E, k, n] (gated: [E, k, 2, n / 2])
  bool whole_chunks;              // of [E, k, n]: see tensor_map.h
  const Element* x;               // [rows, k] when gathered
  const int32_t* row_index;       // [S] when gathered: row(r) = row_index[r] / row_divisor
  Divisor row_divisor;            // K
  const int32_t* expert_offsets;  // [E + 1]
  int num_experts;
  int num_rows;      // S
  int column_tiles;  // of the weights' columns
  int k;
};

constexpr int kNoTile = -1;  // in place of an expert: the block is done

// Places in shared memory, 16 bytes each, where the producer, who finds the tiles, notes them for the consumers.
template <int kPlaces>
class TileNotes {
 public:
  static constexpr int kBytes = 16 * kPlaces;

  __device__ explicit TileNotes(uint32_t shared) : shared_(shared) {}

  __device__ void write(int place, const Tile& tile) const {
    static_assert(kMostRows < 256 && PingPong::kCols < 256, "a height is 8 bits");
    const uint32_t words[4] = {static_cast<uint32_t>(tile.expert), static_cast<uint32_t>(tile.row_begin),
                               static_cast<uint32_t>(tile.row_end),
                               static_cast<uint32_t>(tile.column_tile * 256 + tile.height)};
    store_shared(shared_ + place * 16, words);
  }
  __device__ Tile read(int place) const {
    uint32_t words[4];
    load_shared(words, shared_ + place * 16);
    return {static_cast<int>(words[0]), static_cast<int>(words[1]), static_cast<int>(words[2]),
            static_cast<int>(words[3] / 256), static_cast<int>(words[3] % 256)};
  }

 private:
  uint32_t shared_;
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

// Loads kColumns columns of the weights for one stage; called by one thread. kGated: half of them are the gate's, in
// front, and half the same of the up half.
template <int kColumns, bool kKMajor, bool kGated, typename Element>
__device__ __forceinline__ void load_weights(const MGroupedOperands<Element>& operands, uint32_t stage,
                                             uint32_t barrier, int depth, int column_tile, int expert) {
  constexpr int kChunks = kColumns / 64, kHalf = kChunks / 2;
  const CUtensorMap& map = operands.weights;
  if constexpr (kKMajor && kGated) {
    tma_load(stage, map, barrier, depth, column_tile * (kColumns / 2), 0, expert);
  } else if constexpr (kKMajor) {
    tma_load(stage, map, barrier, depth, column_tile * kColumns, expert);
  } else if constexpr (kGated) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      tma_load(stage + chunk * kMnChunkBytes, map, barrier, (column_tile * kHalf + chunk % kHalf) * 64, chunk / kHalf,
               depth, expert);
    }
  } else if (operands.whole_chunks) {
    tma_load(stage, map, barrier, 0, depth, column_tile * kChunks, expert);
  } else {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      tma_load(stage + chunk * kMnChunkBytes, map, barrier, (column_tile * kChunks + chunk) * 64, depth, 0, expert);
    }
  }
}

}  // namespace moe::sm90
