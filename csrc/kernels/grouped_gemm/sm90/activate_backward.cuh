// The epilogue of down_proj_backward: see DownProjBackwardParams. The outputs are u = grad_output @ down_proj, as
// swap_ab.cuh has them: 64 columns a fragment by the tile's rows.
//
// Behind a tile's products the producer sends the pre-activation and the routing weights through the ring, 32 rows a
// stage. The gradients overwrite the pre-activation where it lies, in the layout in which it came, and TMA stores them
// from there; a stage goes back to the producer when TMA and every thread have read it.
#pragma once

#include "../scheduler.cuh"
#include "epilogues.cuh"
#include "swap_ab_epilogues.cuh"

namespace moe::sm90 {

template <typename Element, ActivationSet kSet, bool kInterleavedColumns = false>
struct ActivateBackwardEpilogue {
  static constexpr bool kGated = false;  // the tile itself has one kind of column
  static constexpr bool kLoads = true;
  // With more rows ptxas spills, but for swiglu without a limit, which would bear 160: the fewer registers the outputs
  // take, the more chains of exp and division are under way at once; the lower a tile, the more weights a row. On an
  // H200, mean over the benchmark's shapes, its 160, 136 and 128 rows are each 1% slower than 144.
  static constexpr int kMostRows = kSet == ActivationSet::kGated                                        ? 112
                                   : kSet == ActivationSet::kSwiGLUs || kSet == ActivationSet::kUngated ? 128
                                                                                                        : 144;
  static constexpr bool kGatedActivation = is_gated(kSet);
  static constexpr int kHalves = kGatedActivation ? 2 : 1;
  static constexpr int kStageRows = 32;
  CUtensorMap gate, up;            // ragged, the halves of pre_activation [S, kHalves * columns], in boxes of
                                   // kStageRows; interleaved: `gate` is all of it
  CUtensorMap grad_gate, grad_up;  // likewise, of grad_pre_activation
  CUtensorMap weighted_rows;       // likewise, [S, columns]
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

 private:
  // A stage: for each of a tile's four fragments a piece of kStageRows x 64 of the gate, one of the up half and one for
  // the weighted rows, then the routing weights.
  static constexpr int kBoxBytes = kStageRows * 128;
  static constexpr int kFragmentBytes = 3 * kBoxBytes;
  static constexpr int kWeightsOffset = 4 * kFragmentBytes;
  static_assert(kWeightsOffset + kStageRows * 4 <= SwapAB::kStageBytes, "more than a stage has");

  // Where the two pieces of a fragment begin in their maps.
  __device__ static int gate_column(int column) { return kInterleavedColumns ? 2 * column : column; }
  __device__ static int up_column(int column) { return kInterleavedColumns ? 2 * column + 64 : column; }

 public:
  // The producer's part of a tile, all of its 128 threads.
  class Loader {
   public:
    __device__ Loader(const ActivateBackwardEpilogue& epilogue, const Tile& tile) : epilogue_(epilogue) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = tile.row_begin + threadIdx.x + i * 128;
        weights_[i] = row < tile.row_end ? __ldg(epilogue.topk_weights + __ldg(epilogue.sorted_rows + row)) : 0.0f;
      }
    }

    // Fills the tile's piece-th stage. Arrives on `full` as the loads of a product's stage do: every thread once, and
    // thread 0 for TMA too.
    __device__ void load(const Tile& tile, int piece, uint32_t stage, uint32_t full) const {
      if (threadIdx.x == 0) {
        const int first = tile.column_tile * SwapAB::kRows;
        const int fragments = min(4, (epilogue_.columns - first + 63) / 64);
        barrier_arrive_expect(full, fragments * kHalves * kBoxBytes);
        const int row = ragged_row(tile.row_begin + piece * kStageRows, tile.row_end);
        for (int fragment = 0; fragment < fragments; ++fragment) {
          const uint32_t to = stage + fragment * kFragmentBytes;
          const int column = first + fragment * 64;
          tma_load(to, epilogue_.gate, full, gate_column(column), row, kRaggedRows, tile.row_end);
          if constexpr (kGatedActivation) {
            tma_load(to + kBoxBytes, kInterleavedColumns ? epilogue_.gate : epilogue_.up, full, up_column(column), row,
                     kRaggedRows, tile.row_end);
          }
        }
      }
      const int lane = threadIdx.x % 32;
      if (static_cast<int>(threadIdx.x) / 32 == piece % 4) {
        store_shared(stage + kWeightsOffset + lane * 4, __float_as_uint(piece < 4 ? weights_[0] : weights_[1]));
      }
      barrier_arrive(full);
    }

   private:
    const ActivateBackwardEpilogue& epilogue_;
    float weights_[2];  // of rows threadIdx.x and + 128 of the tile
  };

  // A consumer's part of a tile, behind its products: stage after stage, from `position` on.
  template <typename Config, int kCount>
  __device__ __forceinline__ void finish(const ConsumerTile& tile, const float (&outputs)[2][kCount],
                                         const Ring<Config>& ring, RingPosition<Config>& position,
                                         const Consumer& consumer) const {
#pragma unroll
    for (int piece = 0; piece * kStageRows < kMostRows; ++piece) {
      const int row = tile.row + piece * kStageRows;
      if (row >= tile.row_end) break;
      barrier_wait(ring.full(position.stage()), position.phase());
      const uint32_t stage = ring.a(position.stage());
      const uint32_t mine = stage + consumer.index * 2 * kFragmentBytes;
#pragma unroll
      for (int group = 0; group < kStageRows / 16; ++group) {
        if (piece * kStageRows + group * 16 >= kMostRows) break;
        if (group > 0 && row + group * 16 >= tile.row_end) break;
        dispatch_activation<kSet>(activation.kind, [&](auto tag) {
          gradients<decltype(tag)::kind>(tile, outputs, piece * (kStageRows / 2) + group * 8, row, group, mine,
                                         stage + kWeightsOffset);
        });
      }
      proxy_fence();
      consumer.sync();
      if (consumer.leads()) {
        store(tile, row, mine);
        if (piece > 0) {
          tma_wait_read<1>();
          barrier_arrive(ring.empty(position.previous_stage()));
        }
      } else {
        barrier_arrive(ring.empty(position.stage()));
      }
      position.advance();
    }
    if (consumer.leads()) {
      tma_wait_read<0>();
      barrier_arrive(ring.empty(position.previous_stage()));
    }
  }

 private:
  __device__ __forceinline__ void store(const ConsumerTile& tile, int row, uint32_t shared) const {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const int column = tile.column + f * 64;
      if (column >= columns) break;
      const uint32_t piece = shared + f * kFragmentBytes;
      store_ragged(grad_gate, piece, gate_column(column), row, tile.row_end);
      if constexpr (kGatedActivation) {
        store_ragged(kInterleavedColumns ? grad_gate : grad_up, piece + kBoxBytes, up_column(column), row,
                     tile.row_end);
      }
      store_ragged(weighted_rows, piece + 2 * kBoxBytes, column, row, tile.row_end);
    }
    tma_commit();
  }

  // 16 rows of both fragments: puts the gradients where the pre-activation was. The outputs are those from `first` on.
  template <Activation kKind, int kCount>
  __device__ __forceinline__ void gradients(const ConsumerTile& tile, const float (&outputs)[2][kCount], int first,
                                            int row, int group, uint32_t shared, uint32_t shared_weights) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    uint32_t weights[2][2];  // [j][i]: of row 8 j + 2 (lane % 4) + i
    load_shared(weights[0], shared_weights + (group * 16 + lane % 4 * 2) * 4);
    load_shared(weights[1], shared_weights + (group * 16 + 8 + lane % 4 * 2) * 4);
    float sums[2];  // of a fragment, of the row that this thread stores
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      // Whether this thread's second column exists. If not, its output may be NaN: an infinite gradient times 0.
      const bool both = columns > tile.column + f * 64 + warp * 16 + 8;
      uint32_t words[8] = {}, weighted[4];
      read(shared + f * kFragmentBytes, group, words);
      float products[2][2];  // [j][i]: the sum over this thread's two columns
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // this thread's two columns
          const int at = 2 * j + half;
          uint32_t& one = words[kInterleavedColumns ? 2 * at : at];
          uint32_t& other = words[kInterleavedColumns ? 2 * at + 1 : 4 + at];
          float gate[2], up[2], activated[2];
          unpack(one, other, gate, up);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float u = outputs[f][first + 2 * at + i], weight = __uint_as_float(weights[j][i]);
            const auto of = activate_backward<kSet, kKind>(activation, gate[i], up[i]);
            if (half == 0) products[j][i] = __fmul_rn(of.activated, u);
            else if (both) products[j][i] = __fmaf_rn(of.activated, u, products[j][i]);
            gate[i] = of.by_gate * (weight * u), up[i] = of.by_up * (weight * u);
            activated[i] = of.activated * weight;
          }
          pack(gate, up, one, other);
          weighted[at] = pack2<Element>(activated[0], activated[1]);
        }
      sums[f] = sum_of_columns(products);
      write(shared + f * kFragmentBytes, group, words);
      stmatrix_x4_transposed(shared + f * kFragmentBytes + 2 * kBoxBytes + transposed_offset(group), weighted);
    }
    store_partial(tile, row + group * 16, sums);
  }

  // The 8 threads of a warp that share rows have 2 of a fragment's 16 columns each. Adds up those of four, neighbours
  // first, of the row that this thread is to store: 8 j + 2 (lane % 4) + i.
  __device__ __forceinline__ static float sum_of_columns(const float (&products)[2][2]) {
    const bool j = threadIdx.x & 4, i = threadIdx.x & 8;
    float sums[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      sums[k] = (j ? products[1][k] : products[0][k]) + __shfl_xor_sync(~0u, j ? products[0][k] : products[1][k], 4);
    }
    return (i ? sums[1] : sums[0]) + __shfl_xor_sync(~0u, i ? sums[0] : sums[1], 8);
  }

  // sums: of the two fragments, of which this thread adds up the other half of one and stores it.
  __device__ __forceinline__ void store_partial(const ConsumerTile& tile, int first_row, const float (&sums)[2]) const {
    const int lane = threadIdx.x % 32;
    const bool f = lane & 16;
    const float sum = (f ? sums[1] : sums[0]) + __shfl_xor_sync(~0u, f ? sums[0] : sums[1], 16);
    const int row = first_row + lane / 4 % 2 * 8 + lane % 4 * 2 + lane / 8 % 2;
    const int column = tile.column + (f ? 64 : 0) + threadIdx.x % 128 / 32 * 16;
    if (row < tile.row_end && column < columns) {
      partials[static_cast<int64_t>(row) * num_partials + static_cast<unsigned>(column) / kRoutingGradColumns] = sum;
    }
  }

  // The pre-activation of the 8 outputs that a thread has of 16 rows: four words of their gates and four of their ups,
  // or, interleaved, a word for each.
  __device__ __forceinline__ static void read(uint32_t shared, int group, uint32_t (&words)[8]) {
    if constexpr (kInterleavedColumns) {
#pragma unroll
      for (int i = 0; i < 8; ++i) words[i] = load_shared(shared + interleaved_offset(group, i));
    } else {
      auto& halves = reinterpret_cast<uint32_t (&)[2][4]>(words);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        ldmatrix_x4_transposed(halves[half], shared + half * kBoxBytes + transposed_offset(group));
      }
    }
  }

  __device__ __forceinline__ static void write(uint32_t shared, int group, const uint32_t (&words)[8]) {
    if constexpr (kInterleavedColumns) {
#pragma unroll
      for (int i = 0; i < 8; ++i) store_shared(shared + interleaved_offset(group, i), words[i]);
    } else {
      auto& halves = reinterpret_cast<const uint32_t (&)[2][4]>(words);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        stmatrix_x4_transposed(shared + half * kBoxBytes + transposed_offset(group), halves[half]);
      }
    }
  }

  // Of two outputs: a word of gates and one of ups, or, interleaved, one for each output.
  __device__ __forceinline__ static void unpack(uint32_t one, uint32_t other, float (&gate)[2], float (&up)[2]) {
    const float2 first = unpack2<Element>(one), second = unpack2<Element>(other);
    gate[0] = first.x, gate[1] = kInterleavedColumns ? second.x : first.y;
    up[0] = kInterleavedColumns ? first.y : second.x, up[1] = second.y;
  }

  __device__ __forceinline__ static void pack(const float (&gate)[2], const float (&up)[2], uint32_t& one,
                                              uint32_t& other) {
    one = kInterleavedColumns ? pack2<Element>(gate[0], up[0]) : pack2<Element>(gate[0], gate[1]);
    other = kInterleavedColumns ? pack2<Element>(gate[1], up[1]) : pack2<Element>(up[0], up[1]);
  }

  // Of the gate and up of this thread's i-th output of 16 rows, 4 bytes, in a fragment's two pieces of 64 columns.
  __device__ __forceinline__ static int interleaved_offset(int group, int i) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const int row = group * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
    const int chunk = warp % 2 * 4 + i / 2 % 2 * 2 + lane / 16;  // of 16 bytes
    return warp / 2 * kBoxBytes + row * 128 + ((chunk ^ row % 8) << 4) + lane / 4 % 4 * 4;
  }
};

}  // namespace moe::sm90
