// The epilogue of up_proj where gate and up take turns in the columns: the two of an output column are neighbours, and
// so one thread's, and the pre-activation is stored as it comes.
#pragma once

#include "epilogues.cuh"

namespace moe::sm90 {

template <typename Element, ActivationSet kSet, int kBuffers>
struct ActivateInterleavedEpilogue {
  static constexpr bool kGated = true;
  static constexpr int kSharedBytes = Stager<kBuffers>::kBytes;
  CUtensorMap rows;            // ragged, [S, columns]
  CUtensorMap pre_activation;  // ragged, [S, 2 * columns]
  Element* rows_data;
  Element* pre_activation_data;  // null: not kept
  const Element* bias;           // [E, 2 * columns] or null
  int columns;                   // I
  ActivationParams activation;

  __device__ void zeros(int row, int row_end, int column, int column_end) const {
    store_zeros(rows_data, columns, row, row_end, column, column_end);
    if (pre_activation_data != nullptr)
      store_zeros(pre_activation_data, 2 * columns, row, row_end, 2 * column, 2 * column_end);
  }

  class Worker {
   public:
    __device__ Worker(const ActivateInterleavedEpilogue& epilogue, const Consumer& consumer)
        : epilogue_(epilogue), consumer_(consumer), stager_(consumer) {}

    template <int kCount>
    __device__ __forceinline__ void finish(const ConsumerTile& tile, int fragment, float (&outputs)[kCount]) {
      const int row = tile.row + fragment * 64;
      if (row >= tile.row_end) return;
#pragma unroll
      for (int piece = 0; piece < kCount / 32; ++piece) {
        const int column = 2 * tile.column + piece * 64, width = 2 * epilogue_.columns;
        if (column >= width) break;
        if (epilogue_.bias != nullptr) {
          const Element* bias = epilogue_.bias + static_cast<int64_t>(tile.expert) * width + column;
          add_bias(outputs, piece * 32, bias, width - column, consumer_.column());
        }
        if (epilogue_.pre_activation_data != nullptr) {
          auto values_of = [&](int group, float (&values)[8]) { take8(outputs, piece * 32 + group * 8, values); };
          stager_.store(
              [&](uint32_t shared) { write_piece<Element>(consumer_, shared, values_of); },
              [&](uint32_t shared) { store_ragged(epilogue_.pre_activation, shared, column, row, tile.row_end); });
        }
      }
#pragma unroll
      for (int piece = 0; piece < kCount / 64; ++piece) {
        const int column = tile.column + piece * 64;
        if (column >= epilogue_.columns) break;
        stager_.store(
            [&](uint32_t shared) {
#pragma unroll
              for (int group = 0; group < 4; ++group) activate16(outputs, piece * 64 + group * 16, shared, group);
            },
            [&](uint32_t shared) { store_ragged(epilogue_.rows, shared, column, row, tile.row_end); });
      }
    }

   private:
    // 16 output columns: outputs first .. first + 15, of which this thread has columns lane % 4, + 4, + 8, + 12. Lanes
    // exchange with their neighbour until each has two columns beside each other.
    template <int kCount>
    __device__ __forceinline__ void activate16(const float (&outputs)[kCount], int first, uint32_t piece,
                                               int group) const {
      float gate[8], up[8], values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) gate[i] = outputs[first + 2 * i], up[i] = outputs[first + 2 * i + 1];
      activate8<kSet>(epilogue_.activation, gate, up, values);  // columns i / 2; this thread's row, or the one 8 below
      const bool is_odd = threadIdx.x % 2 == 1;
      const int row = consumer_.row(), column = threadIdx.x % 2 * 4 + (threadIdx.x & 2);
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // 8 columns, of which both rows' values fill a word
        const uint32_t low = pack2<Element>(values[half * 4], values[half * 4 + 1]);
        const uint32_t high = pack2<Element>(values[half * 4 + 2], values[half * 4 + 3]);
        const uint32_t received = __shfl_xor_sync(~0u, is_odd ? low : high, 1);
        const uint32_t left = is_odd ? received : low, right = is_odd ? high : received;
        const uint32_t address = piece + row * 128 + (((2 * group + half) ^ row % 8) << 4) + column * 2;
        store_shared(address, __byte_perm(left, right, 0x5410));
        store_shared(address + 8 * 128, __byte_perm(left, right, 0x7632));
      }
    }

    const ActivateInterleavedEpilogue& epilogue_;
    const Consumer& consumer_;
    Stager<kBuffers> stager_;
  };
};

}  // namespace moe::sm90
