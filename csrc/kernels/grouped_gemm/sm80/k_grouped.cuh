// The k-grouped product: the contraction runs over an expert's rows. It makes the weight gradients.
//
//   out[e] [n, k] = sum over the rows r of expert e, ascending, of outer(grad[row(r), :], a[row(r), :])
//
// Both operands lie row by row, so both are MN-major and ldmatrix transposes them. Either may be gathered; its row
// numbers travel through a small ring in shared memory, read from global memory one 64-row block before they are
// needed. Tiles are numbered expert by expert, along the rows of the output, so that what is written at the same time
// lies together; block b computes tiles b, b + gridDim.x, ... An expert without rows gets zeros. Deterministic: one
// block a tile.
#pragma once

#include "tile_product.cuh"

namespace moe::sm80 {

template <typename Element>
struct KGroupedOperands {
  const Element* grad;              // [rows, n]
  const Element* a;                 // [rows, k]
  const int32_t* expert_offsets;    // [E + 1]
  const int32_t* grad_sorted_rows;  // [S] or null
  const int32_t* a_sorted_rows;     // [S] or null
  int row_divisor;                  // K
  int num_experts;
  int n;
  int k;
};

// Row numbers of the 64-deep blocks that are about to be copied, -1 behind the expert's last row.
struct RowRing {
  int grad[2][kDepth];
  int a[2][kDepth];
};

template <typename Element>
struct ExpertRows {
  int begin, end;
  const KGroupedOperands<Element>& operands;

  __device__ int row(const int32_t* sorted_rows, int block, int i) const {
    const int row = begin + block * kDepth + i;
    if (row >= end) return -1;
    return sorted_rows == nullptr ? row : sorted_rows[row] / operands.row_divisor;
  }
  // Threads 0..63 fetch the row numbers of `grad`, 64..127 those of `a`.
  __device__ int fetch(int block) const {
    const int t = threadIdx.x;
    if (t >= 2 * kDepth) return -1;
    return row(t < kDepth ? operands.grad_sorted_rows : operands.a_sorted_rows, block, t % kDepth);
  }
  __device__ static void put(RowRing& ring, int block, int row) {
    const int t = threadIdx.x;
    if (t < kDepth) ring.grad[block & 1][t] = row;
    else if (t < 2 * kDepth) ring.a[block & 1][t - kDepth] = row;
  }
};

template <typename Config, typename Element>
__device__ __forceinline__ void k_grouped_main_loop(TileProduct<Config, Element, false, false, false>& product,
                                                    RowRing& ring, const KGroupedOperands<Element>& operands,
                                                    int expert, int n_tile, int k_tile) {
  const ExpertRows<Element> rows{operands.expert_offsets[expert], operands.expert_offsets[expert + 1], operands};
  const MnMajorLoader<Element, Config::kRows, Config::kThreads> grad(operands.grad, operands.n, n_tile * Config::kRows);
  const MnMajorLoader<Element, Config::kCols, Config::kThreads> a(operands.a, operands.k, k_tile * Config::kCols);
  const int num_blocks = (rows.end - rows.begin + kDepth - 1) / kDepth;
  constexpr int kAhead = Config::kStages - 1;  // a block is copied kAhead blocks before it is multiplied
  int fetched = rows.fetch(kAhead);
  product.run(
      num_blocks,
      [&](auto part, uint32_t grad_stage, uint32_t a_stage, int block) {
        if (block < kAhead) {  // the first copies: no ring yet
          grad.load(part, grad_stage, [&](int i) { return rows.row(operands.grad_sorted_rows, block, i); });
          a.load(part, a_stage, [&](int i) { return rows.row(operands.a_sorted_rows, block, i); });
          if (block == kAhead - 1 && decltype(part)::value == 0) {
            rows.put(ring, kAhead, fetched);
            fetched = rows.fetch(kAhead + 1);
          }
        } else {
          grad.load(part, grad_stage, [&](int i) { return ring.grad[block & 1][i]; });
          a.load(part, a_stage, [&](int i) { return ring.a[block & 1][i]; });
        }
      },
      [&](int block) {
        // The copies of block + kAhead read its half of the ring; the next block's numbers go into the other half.
        rows.put(ring, block + kAhead + 1, fetched);
        fetched = rows.fetch(block + kAhead + 2);
      });
}

template <typename Config, typename Element, typename Epilogue>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    k_grouped_kernel(const KGroupedOperands<Element> operands, const Epilogue epilogue) {
  static_assert(Config::kThreads >= 2 * kDepth, "one thread fetches one row number");
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ RowRing ring;
  const int n_tiles = (operands.n + Config::kRows - 1) / Config::kRows;
  const int k_tiles = (operands.k + Config::kCols - 1) / Config::kCols;
  const int tiles_per_expert = n_tiles * k_tiles;
  TileProduct<Config, Element, false, false, false> product(shared);
  for (int64_t index = blockIdx.x; index < static_cast<int64_t>(operands.num_experts) * tiles_per_expert;
       index += gridDim.x) {
    const int expert = static_cast<int>(index / tiles_per_expert);
    const int local = static_cast<int>(index % tiles_per_expert);
    const int k_tile = local % k_tiles, n_tile = local / k_tiles;
    product.clear();
    k_grouped_main_loop<Config, Element>(product, ring, operands, expert, n_tile, k_tile);
    product.finish(epilogue, [&](int row, int column) {
      OutputPlace place;
      const int in_expert = n_tile * Config::kRows + row;
      place.row = static_cast<int64_t>(expert) * operands.n + in_expert;
      place.column = k_tile * Config::kCols + column;
      place.expert = expert;
      place.exists = in_expert < operands.n && place.column < operands.k;
      place.has_expert = true;
      return place;
    });
  }
}

}  // namespace moe::sm80
