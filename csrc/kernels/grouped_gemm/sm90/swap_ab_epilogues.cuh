// The epilogues of swap_ab.cuh and ping_pong.cuh. A fragment's outputs are 64 columns of the product (wgmma's rows) by
// the tile's rows (wgmma's columns); stmatrix transposes them on their way into shared memory, 64 rows x 64 columns a
// time, and TMA stores them through ragged maps, which end at the tile's last row.
//
// Every epilogue has kGated, columns and zeros as those of epilogues.cuh; kMostRows, the highest tile for which its
// registers suffice in swap_ab.cuh; kLoads, whether it reads tensors of its own (activate_backward.cuh, which has a
// Loader and finish), or else store(tile, outputs, stager).
#pragma once

#include "epilogues.cuh"

namespace moe::sm90 {

constexpr int kPieceRows = 64;  // and 64 columns: kPieceBytes, as many as a fragment of a stage has

// What is added to the outputs of this thread's two columns of a fragment's 64: 16 warp + lane / 4 and the one 8 above.
struct ColumnBias {
  float low = -0.0f, high = -0.0f;  // x + -0 is x, for x = -0 too

  // bias: of the fragment's first column, or null. Columns from `columns` on are not read.
  template <typename Element>
  __device__ ColumnBias(const Element* bias, int columns) {
    const int column = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    if (bias != nullptr && column < columns) low = static_cast<float>(bias[column]);
    if (bias != nullptr && column + 8 < columns) high = static_cast<float>(bias[column + 8]);
  }
};

// The 8 outputs that a thread has of 16 rows, with the bias.
template <int kCount>
__device__ __forceinline__ void take8(const float (&outputs)[kCount], int first, ColumnBias bias, float (&values)[8]) {
  // The sums are worked out anew wherever they are used: kept beside the outputs they would cost the last registers.
  asm volatile("" : "+f"(bias.low), "+f"(bias.high));
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = outputs[first + i] + (i % 4 < 2 ? bias.low : bias.high);
}

// A tile's way out of the registers, piece by piece, through kBuffers pieces of shared memory in turn, kPitch bytes
// apart.
template <int kBuffers, int kPitch = kPieceBytes>
class TransposedStager {
 public:
  __device__ TransposedStager(const Consumer& consumer, uint32_t shared) : consumer_(consumer), shared_(shared) {}

  // Stores up to kPieceRows rows of 64 columns; values_of(group, values) gives this thread's 8 values of 16 rows.
  template <typename Element, typename ValuesOf>
  __device__ __forceinline__ void store(const CUtensorMap& map, int column, int row, int row_end, ValuesOf values_of) {
    const uint32_t piece = shared_ + turn_ * kPitch;
#pragma unroll
    for (int group = 0; group < kPieceRows / 16; ++group) {
      if (group > 0 && row + group * 16 >= row_end) break;
      float values[8];
      values_of(group, values);
      uint32_t words[4];
      pack_matrix<Element>(values, words);
      write_matrix<true>(consumer_, piece, group, words);
    }
    proxy_fence();
    if (consumer_.leads()) tma_wait_read<kBuffers - 2>();  // the next piece's buffer then is everybody's to fill
    consumer_.sync();
    if (consumer_.leads()) {
      store_ragged(map, piece, column, row, row_end);
      tma_commit();
    }
    turn_ = (turn_ + 1) % kBuffers;
  }

 private:
  const Consumer& consumer_;
  const uint32_t shared_;
  int turn_ = 0;
};

// Calls store(first row, first output) for every piece of a tile's rows.
template <int kCount, typename Store>
__device__ __forceinline__ void each_piece(const ConsumerTile& tile, Store store) {
#pragma unroll
  for (int piece = 0; piece < kCount * 2 / kPieceRows; ++piece) {
    const int row = tile.row + piece * kPieceRows;
    if (row >= tile.row_end) return;
    store(row, piece * (kPieceRows / 2));
  }
}

// c[row] = outputs (+ bias[expert])
template <typename Element>
struct SwappedStoreEpilogue {
  static constexpr bool kGated = false, kLoads = false;
  static constexpr int kMostRows = moe::sm90::kMostRows;
  CUtensorMap output;  // ragged, [S, columns], in boxes of kPieceRows
  Element* output_data;
  const Element* bias;  // [E, columns] or null
  int columns;

  __device__ void zeros(int row, int row_end, int column, int column_end) const {
    store_zeros(output_data, columns, row, row_end, column, column_end);
  }

  template <int kFragments, int kCount, typename Stager>
  __device__ __forceinline__ void store(const ConsumerTile& tile, const float (&outputs)[kFragments][kCount],
                                        Stager& stager) const {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const int column = tile.column + f * 64;
      if (column >= columns) return;
      const Element* expert_bias =
          bias == nullptr ? nullptr : bias + static_cast<int64_t>(tile.expert) * columns + column;
      const ColumnBias added(expert_bias, columns - column);
      each_piece<kCount>(tile, [&](int row, int first) {
        stager.template store<Element>(output, column, row, tile.row_end, [&](int group, float (&values)[8]) {
          take8(outputs[f], first + group * 8, added, values);
        });
      });
    }
  }
};

// rows[row] = act(outputs (+ bias[expert])), the outputs kept as pre_activation for training.
template <typename Element, ActivationSet kSet>
struct SwappedActivateEpilogue {
  static constexpr bool kGated = is_gated(kSet), kLoads = false;
  static constexpr int kMostRows = moe::sm90::kMostRows;
  CUtensorMap rows;      // ragged, [S, columns], in boxes of kPieceRows
  CUtensorMap gate, up;  // likewise, the halves of pre_activation; up only when gated
  Element* rows_data;
  Element* pre_activation_data;  // null: not kept
  const Element* bias;           // [E, columns or 2 * columns] or null
  int columns;                   // I
  ActivationParams activation;

  __device__ void zeros(int row, int row_end, int column, int column_end) const {
    store_zeros(rows_data, columns, row, row_end, column, column_end);
    if (pre_activation_data == nullptr) return;
    for (int half = 0; half < (kGated ? 2 : 1); ++half) {
      store_zeros(pre_activation_data + half * columns, (kGated ? 2 : 1) * columns, row, row_end, column, column_end);
    }
  }

  template <int kCount, typename Stager>
  __device__ __forceinline__ void store(const ConsumerTile& tile, const float (&outputs)[2][kCount],
                                        Stager& stager) const {
    if constexpr (kGated) {
      store_columns(tile, tile.column, outputs[0], outputs[1], stager);
    } else {
      store_columns(tile, tile.column, outputs[0], outputs[0], stager);
      store_columns(tile, tile.column + 64, outputs[1], outputs[1], stager);
    }
  }

 private:
  // 64 columns. Ungated, `up_outputs` is not read.
  template <int kCount, typename Stager>
  __device__ __forceinline__ void store_columns(const ConsumerTile& tile, int column,
                                                const float (&gate_outputs)[kCount], const float (&up_outputs)[kCount],
                                                Stager& stager) const {
    if (column >= columns) return;
    const Element* expert_bias =
        bias == nullptr ? nullptr : bias + static_cast<int64_t>(tile.expert) * (kGated ? 2 : 1) * columns + column;
    const ColumnBias gate_bias(expert_bias, columns - column);
    const ColumnBias up_bias(kGated && bias != nullptr ? expert_bias + columns : nullptr, columns - column);
    each_piece<kCount>(tile, [&](int row, int first) {
      auto take_gate = [&](int group, float (&values)[8]) {
        take8(gate_outputs, first + group * 8, gate_bias, values);
      };
      auto take_up = [&](int group, float (&values)[8]) { take8(up_outputs, first + group * 8, up_bias, values); };
      auto store = [&](const CUtensorMap& map, auto values_of) {
        stager.template store<Element>(map, column, row, tile.row_end, values_of);
      };
      if (pre_activation_data != nullptr) {
        store(gate, take_gate);
        if constexpr (kGated) store(up, take_up);
      }
      store(rows, [&](int group, float (&values)[8]) {
        float gate_values[8], up_values[8];
        take_gate(group, gate_values);
        if constexpr (kGated) take_up(group, up_values);
        activate8<kSet>(activation, gate_values, up_values, values);
      });
    });
  }
};

}  // namespace moe::sm90
