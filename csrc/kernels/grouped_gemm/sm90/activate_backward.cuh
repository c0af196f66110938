// The epilogue of down_proj_backward: see DownProjBackwardParams. The outputs are u = grad_output @ down_proj.
//
// TMA brings the pre-activation, 64 rows x 64 columns a time, into one of two slots, the first two while the products
// still run. The gradients overwrite them where they lie, in the layout in which they came, and TMA stores them from
// there.
#pragma once

#include "epilogues.cuh"

namespace moe::sm90 {

template <typename Element, ActivationSet kSet, int kPieces, bool kInterleavedColumns = false>
struct ActivateBackwardEpilogue {
  static constexpr bool kGated = false;  // the tile itself has one kind of column
  static constexpr bool kGatedActivation = is_gated(kSet);
  static constexpr int kHalves = kGatedActivation ? 2 : 1;
  static constexpr int kSlotBytes = kHalves * kPieceBytes;
  static constexpr int kSharedBytes = 2 * kSlotBytes + kPieceBytes;
  static constexpr int kBarriers = 2;
  static constexpr int kUnits = 4;  // pieces of 64 x 64 of a consumer's part of a tile, kPieces beside each other
  CUtensorMap gate, up;             // ragged, the halves of pre_activation [S, kHalves * columns]; interleaved: `gate`
                                    // is all of it
  CUtensorMap grad_gate, grad_up;   // ragged, of grad_pre_activation, likewise
  CUtensorMap weighted_rows;        // ragged, [S, columns]
  Element* grad_pre_activation_data;
  Element* weighted_rows_data;
  const float* topk_weights;   // [T * K]
  const int32_t* sorted_rows;  // [S]
  float* partials;             // [S, num_partials]
  int columns;                 // I
  int num_partials;
  ActivationParams activation;

  __device__ void zeros(int row, int row_end, int column, int column_end) const {
    if constexpr (kInterleavedColumns) {
      store_zeros(grad_pre_activation_data, 2 * columns, row, row_end, 2 * column, 2 * column_end);
    } else {
      for (int half = 0; half < kHalves; ++half) {
        store_zeros(grad_pre_activation_data + half * columns, kHalves * columns, row, row_end, column, column_end);
      }
    }
    store_zeros(weighted_rows_data, columns, row, row_end, column, column_end);
  }

  class Worker {
   public:
    __device__ Worker(const ActivateBackwardEpilogue& epilogue, const Consumer& consumer)
        : epilogue_(epilogue), consumer_(consumer) {}

    __device__ __forceinline__ void begin(const ConsumerTile& tile) {
      if (!consumer_.leads()) return;
      tma_wait_read<0>();
      load(tile, 0);
      load(tile, 1);
    }

    template <int kCount>
    __device__ __forceinline__ void finish(const ConsumerTile& tile, int fragment, float (&outputs)[kCount]) {
      static_assert(kCount == kPieces * 32, "kPieces x 64 columns a fragment");
      const int row = tile.row + fragment * 64;
      if (row >= tile.row_end) return;
      const float weights[2] = {weight(tile, row + consumer_.row()), weight(tile, row + consumer_.row() + 8)};
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int unit = fragment * kPieces + piece;
        const uint32_t slot = consumer_.staging + unit % 2 * kSlotBytes;
        if (consumer_.leads()) {
          tma_wait_read<0>();
          if (unit >= 1) load(tile, unit + 1);  // `begin` loaded units 0 and 1
        }
        if (tile.column + piece * 64 >= epilogue_.columns) continue;
        consumer_.sync();
        barrier_wait(consumer_.barriers + unit % 2 * 8, phases_ >> unit % 2 & 1);
        phases_ ^= 1u << unit % 2;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          float u[8], sums[2], first[2][2], second[2][2];
          take8(outputs, piece * 32 + pair * 16, u);
          const int columns = epilogue_.columns - tile.column - piece * 64 - pair * 32;  // from here on
          gradients(slot, 2 * pair, u, weights, columns, first);
          take8(outputs, piece * 32 + pair * 16 + 8, u);
          gradients(slot, 2 * pair + 1, u, weights, columns - 16, second);
#pragma unroll
          for (int i = 0; i < 2; ++i) sums[i] = (first[0][i] + first[1][i]) + (second[0][i] + second[1][i]);
          store_partials(tile, row, tile.column + piece * 64 + pair * 32, sums);
        }
        proxy_fence();
        consumer_.sync();
        if (consumer_.leads()) {
          const int column = tile.column + piece * 64;
          store_ragged(epilogue_.grad_gate, slot, gate_column(column), row, tile.row_end);
          if constexpr (kGatedActivation) {
            store_ragged(kInterleavedColumns ? epilogue_.grad_gate : epilogue_.grad_up, slot + kPieceBytes,
                         up_column(column), row, tile.row_end);
          }
          store_ragged(epilogue_.weighted_rows, weighted_piece(), column, row, tile.row_end);
          tma_commit();
        }
      }
    }

   private:
    // Where the two pieces of a slot begin in their maps.
    __device__ static int gate_column(int column) { return kInterleavedColumns ? 2 * column : column; }
    __device__ static int up_column(int column) { return kInterleavedColumns ? 2 * column + 64 : column; }

    __device__ uint32_t weighted_piece() const { return consumer_.staging + 2 * kSlotBytes; }

    __device__ float weight(const ConsumerTile& tile, int row) const {
      if (row >= tile.row_end) return 0.0f;
      return __ldg(epilogue_.topk_weights + __ldg(epilogue_.sorted_rows + row));
    }

    // Starts the loads of a unit, if there are such rows and columns.
    __device__ void load(const ConsumerTile& tile, int unit) const {
      const int row = tile.row + unit / kPieces * 64, column = tile.column + unit % kPieces * 64;
      if (unit >= kUnits || row >= tile.row_end || column >= epilogue_.columns) return;
      const uint32_t slot = consumer_.staging + unit % 2 * kSlotBytes, barrier = consumer_.barriers + unit % 2 * 8;
      barrier_arrive_expect(barrier, kSlotBytes);
      tma_load(slot, epilogue_.gate, barrier, gate_column(column), ragged_row(row, tile.row_end), kRaggedRows,
               tile.row_end);
      if constexpr (kGatedActivation) {
        tma_load(slot + kPieceBytes, kInterleavedColumns ? epilogue_.gate : epilogue_.up, barrier, up_column(column),
                 ragged_row(row, tile.row_end), kRaggedRows, tile.row_end);
      }
    }

    __device__ static void unpack_matrix(const uint32_t (&words)[4], float (&values)[8]) {
      unpack8<Element>(make_uint4(words[0], words[1], words[2], words[3]), values);
    }

    // 16 columns of the slot: puts the gradients where the pre-activation was. sums[h][i]: dot(activated, u) over this
    // thread's two columns of the h-th 8, i = 0 its own row, 1 the row 8 below; 0 where there are no such columns.
    __device__ __forceinline__ void gradients(uint32_t slot, int group, const float (&u)[8], const float (&weights)[2],
                                              int columns, float (&sums)[2][2]) const {
      float gate[8], up[8], activated[8], by_gate[8], by_up[8];
      uint32_t words[4];
      const uint32_t gate_address = consumer_.matrix_address(slot, group), up_address = gate_address + kPieceBytes;
      if constexpr (kInterleavedColumns) {
        load_interleaved(slot, group, gate, up);
      } else {
        ldmatrix_x4(words, gate_address);
        unpack_matrix(words, gate);
        if constexpr (kGatedActivation) {
          ldmatrix_x4(words, up_address);
          unpack_matrix(words, up);
        }
      }
      activate8_backward<kSet>(epilogue_.activation, gate, up, activated, by_gate, by_up);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = half * 4 + i * 2;
          const float sum = dot2(activated[at], u[at], activated[at + 1], u[at + 1]);
          sums[half][i] = half * 8 < columns ? sum : 0.0f;  // an infinite gradient times a weight of 0 is NaN
        }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float weight = weights[i / 2 % 2];
        by_gate[i] *= weight * u[i];
        if constexpr (kGatedActivation) by_up[i] *= weight * u[i];
        activated[i] *= weight;
      }
      if constexpr (kInterleavedColumns) {
        store_interleaved(slot, group, by_gate, by_up);
      } else {
        pack_matrix<Element>(by_gate, words);
        stmatrix_x4(gate_address, words);
        if constexpr (kGatedActivation) {
          pack_matrix<Element>(by_up, words);
          stmatrix_x4(up_address, words);
        }
      }
      pack_matrix<Element>(activated, words);
      stmatrix_x4(consumer_.matrix_address(weighted_piece(), group), words);
    }

    // Shared address of the gate and up of this thread's two columns of the `half`-th 8 of a group, in turn: 8 bytes. i
    // = 0: its own row, 1: the row 8 below.
    __device__ __forceinline__ uint32_t interleaved_address(uint32_t slot, int group, int half, int i) const {
      const int row = consumer_.row() + 8 * i;
      const int chunk = group % 2 * 4 + half * 2 + threadIdx.x % 4 / 2;  // of 16 bytes, in the slot's piece group / 2
      return slot + group / 2 * kPieceBytes + row * 128 + ((chunk ^ row % 8) << 4) + threadIdx.x % 2 * 8;
    }

    __device__ __forceinline__ void load_interleaved(uint32_t slot, int group, float (&gate)[8], float (&up)[8]) const {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t words[2];
          load_shared(words, interleaved_address(slot, group, half, i));
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float2 pair = unpack2<Element>(words[j]);
            gate[half * 4 + i * 2 + j] = pair.x, up[half * 4 + i * 2 + j] = pair.y;
          }
        }
    }

    __device__ __forceinline__ void store_interleaved(uint32_t slot, int group, const float (&gate)[8],
                                                      const float (&up)[8]) const {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = half * 4 + i * 2;
          const uint32_t words[2] = {pack2<Element>(gate[at], up[at]), pack2<Element>(gate[at + 1], up[at + 1])};
          store_shared(interleaved_address(slot, group, half, i), words);
        }
    }

    __device__ __forceinline__ void store_partials(const ConsumerTile& tile, int first_row, int column,
                                                   float (&sums)[2]) const {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sums[i] += __shfl_xor_sync(~0u, sums[i], 1);
        sums[i] += __shfl_xor_sync(~0u, sums[i], 2);
        const int row = first_row + consumer_.row() + 8 * i;
        if (threadIdx.x % 4 == 0 && row < tile.row_end && column < epilogue_.columns) {
          epilogue_.partials[static_cast<int64_t>(row) * epilogue_.num_partials + column / kRoutingGradColumns] =
              sums[i];
        }
      }
    }

    const ActivateBackwardEpilogue& epilogue_;
    const Consumer& consumer_;
    uint32_t phases_ = 0;
  };
};

}  // namespace moe::sm90
