// The m-grouped product: the rows of the output are grouped by expert, each group meets its expert's weights.
//
//   y[r, :] = x[row(r), :] @ b[e].T   (b [E, n, k], K-major)    or    x[row(r), :] @ b[e]   (b [E, k, n], MN-major)
//
// x is gathered where row_index is given: row(r) = row_index[r] / row_divisor, else row(r) = r. A block computes one
// tile after another (scheduler.cuh). Deterministic: a tile belongs to one block and nothing is summed across blocks.
#pragma once

#include "../scheduler.cuh"
#include "tile_product.cuh"

namespace moe::sm80 {

template <typename Element>
struct MGroupedOperands {
  const Element* x;               // [rows, k]
  const int32_t* row_index;       // [S] or null
  int row_divisor;                // K
  const Element* weights;         // [E, n, k] or [E, k, n]
  const int32_t* expert_offsets;  // [E + 1]
  int num_experts;
  int num_rows;  // S
  int n;         // of a gated product both halves
  int k;
};

template <typename Config, typename Element, bool kWeightsKMajor, bool kGated>
struct MGroupedMainLoop {
  using Product = TileProduct<Config, Element, true, kWeightsKMajor, kGated>;
  using RowLoader = KMajorLoader<Element, Config::kRows, Config::kThreads>;

  __device__ static void run(Product& product, const MGroupedOperands<Element>& operands, const Tile& tile) {
    const RowLoader rows(operands.x, operands.k, [&](int i) {
      const int row = tile.row_begin + i;
      if (row >= tile.row_end) return -1;
      return operands.row_index == nullptr ? row : operands.row_index[row] / operands.row_divisor;
    });
    const Element* expert = operands.weights + static_cast<int64_t>(tile.expert) * operands.n * operands.k;
    const int num_blocks = (operands.k + kDepth - 1) / kDepth;
    auto nothing = [](int) {};
    if constexpr (kWeightsKMajor) {
      const KMajorLoader<Element, Config::kCols, Config::kThreads> columns(
          expert, operands.k, [&](int i) { return weight_column(operands.n, tile.column_tile, i); });
      product.run(
          num_blocks,
          [&](auto part, uint32_t a_stage, uint32_t b_stage, int block) {
            rows.load(part, a_stage, block * kDepth);
            columns.load(part, b_stage, block * kDepth);
          },
          nothing);
    } else {
      using ColumnLoader = MnMajorLoader<Element, Config::kCols, Config::kThreads>;
      const ColumnLoader columns = [&] {
        if constexpr (kGated) {
          return ColumnLoader(expert, operands.n,
                              [&](int i) { return weight_column(operands.n, tile.column_tile, i); });
        } else {
          return ColumnLoader(expert, operands.n, tile.column_tile * Config::kCols);
        }
      }();
      product.run(
          num_blocks,
          [&](auto part, uint32_t a_stage, uint32_t b_stage, int block) {
            rows.load(part, a_stage, block * kDepth);
            columns.load(part, b_stage,
                         [&](int i) { return block * kDepth + i < operands.k ? block * kDepth + i : -1; });
          },
          nothing);
    }
  }

  // The one of the expert's n columns that is column i of the tile, or -1. Gated: the tile's second half is up.
  __device__ static int weight_column(int n, int column_tile, int i) {
    if constexpr (kGated) {
      constexpr int kHalf = Config::kCols / 2;
      const int column = column_tile * kHalf + i % kHalf;
      return column < n / 2 ? column + (i < kHalf ? 0 : n / 2) : -1;
    }
    const int column = column_tile * Config::kCols + i;
    return column < n ? column : -1;
  }
};

template <typename Config, typename Element, bool kWeightsKMajor, typename Epilogue>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    m_grouped_kernel(const MGroupedOperands<Element> operands, const Epilogue epilogue) {
  extern __shared__ __align__(1024) uint8_t shared[];
  using MainLoop = MGroupedMainLoop<Config, Element, kWeightsKMajor, Epilogue::kGated && !Epilogue::kInterleaved>;
  constexpr int kOutputCols = Config::kCols / (Epilogue::kGated ? 2 : 1);
  const int column_tiles = (epilogue.columns + kOutputCols - 1) / kOutputCols;
  TileScheduler<Config::kRows> scheduler(operands.expert_offsets, operands.num_experts, operands.num_rows,
                                         column_tiles);
  typename MainLoop::Product product(shared);
  Tile tile;
  while (scheduler.next(tile)) {
    const bool has_expert = tile.expert < operands.num_experts;
    product.clear();
    if (has_expert) MainLoop::run(product, operands, tile);
    product.finish(epilogue, [&](int row, int column) {
      OutputPlace place;
      place.row = tile.row_begin + row;
      place.column = tile.column_tile * kOutputCols + column;
      place.expert = tile.expert;
      place.exists = tile.row_begin + row < tile.row_end && place.column < epilogue.columns;
      place.has_expert = has_expert;
      return place;
    });
  }
}

}  // namespace moe::sm80
