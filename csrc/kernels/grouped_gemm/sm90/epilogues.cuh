// What happens to a consumer's fp32 outputs. The results are laid into shared memory as TMA wants them, 64 rows x 64
// columns a time, and TMA stores them through ragged maps, which end at the expert's last row.
//
// An epilogue of an m-grouped product has `kGated` (two columns of the tile, gate and up, make an output column),
// `columns` (output columns in all) and zeros(rows, columns) for rows without an expert; for what m_grouped.cuh, and
// swap_ab.cuh and ping_pong.cuh, want besides see interleaved.cuh and swap_ab_epilogues.cuh.
#pragma once

#include "../../common/activation.cuh"
#include "../../common/vector.cuh"
#include "pipeline.cuh"
#include "tensor_map.h"

namespace moe::sm90 {

constexpr int kPieceBytes = 64 * 128;  // 64 rows x 64 columns

// A consumer warpgroup's part of a tile.
struct ConsumerTile {
  int row;      // of the first fragment
  int row_end;  // of the group: rows from here on do not exist
  int column;   // first output column
  int expert;
};

struct Consumer {
  int index;         // 0 or 1
  uint32_t staging;  // shared memory of this warpgroup's epilogue

  __device__ int thread() const { return threadIdx.x % 128; }
  __device__ bool leads() const { return threadIdx.x % 128 == 0; }
  __device__ void sync() const {
    if (index == 0) named_barrier_sync<1, 128>();
    else named_barrier_sync<2, 128>();
  }
  // Shared address, in the piece at `piece`, of this lane's 16 bytes of a stmatrix of columns 16 group ..
  // + 15.
  __device__ uint32_t matrix_address(uint32_t piece, int group) const {
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16;
    return piece + row * 128 + (((2 * group + threadIdx.x % 32 / 16) ^ (row % 8)) << 4);
  }
  // Rows of this thread's outputs 4 j, 4 j + 1; those of 4 j + 2, 4 j + 3 lie 8 below.
  __device__ int row() const { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }
  __device__ int column() const { return threadIdx.x % 4 * 2; }
};

// The 8 values that a thread has of 16 columns: outputs 8 group .. + 7.
template <typename Element>
__device__ __forceinline__ void pack_matrix(const float (&values)[8], uint32_t (&words)[4]) {
  const uint4 packed = pack8<Element>(values);
  words[0] = packed.x, words[1] = packed.y, words[2] = packed.z, words[3] = packed.w;
}

template <int kCount>
__device__ __forceinline__ void take8(const float (&outputs)[kCount], int first, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = outputs[first + i];
}

// Adds bias[0 .. 63] to 64 columns: outputs first .. first + 31. Columns beyond `columns` are not read.
template <typename Element, int kCount>
__device__ __forceinline__ void add_bias(float (&outputs)[kCount], int first, const Element* bias, int columns,
                                         int lane_column) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int column = 8 * j + lane_column;
    if (column >= columns) continue;
    typename Pair<Element>::Type pair;
    const unsigned word = __ldg(reinterpret_cast<const unsigned*>(bias + column));
    memcpy(&pair, &word, sizeof(pair));
    const float2 added = Pair<Element>::to_float(pair);
    outputs[first + 4 * j] += added.x, outputs[first + 4 * j + 1] += added.y;
    outputs[first + 4 * j + 2] += added.x, outputs[first + 4 * j + 3] += added.y;
  }
}

// Rows [row, row_end) x columns [column, column_end) of data become 0. Bounds of columns are multiples of 8.
template <typename Element>
__device__ __forceinline__ void store_zeros(Element* data, int pitch, int row, int row_end, int column,
                                            int column_end) {
  const int chunks = (column_end - column) / 8;
  for (int i = threadIdx.x % 128; i < (row_end - row) * chunks; i += 128) {
    const int64_t place = static_cast<int64_t>(row + i / chunks) * pitch + column + i % chunks * 8;
    *reinterpret_cast<uint4*>(data + place) = make_uint4(0, 0, 0, 0);
  }
}

// Where, in a piece, this lane's 16 bytes lie of a transposed stmatrix or ldmatrix of rows 16 group .. + 15.
__device__ __forceinline__ int transposed_offset(int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const int row = group * 16 + lane / 16 * 8 + lane % 8;
  return row * 128 + (((2 * warp + lane / 8 % 2) ^ (row % 8)) << 4);
}

// Lays what pack_matrix made of 16 columns into a piece, or, transposed, of 16 rows.
template <bool kTransposed>
__device__ __forceinline__ void write_matrix(const Consumer& consumer, uint32_t piece, int group,
                                             const uint32_t (&words)[4]) {
  if constexpr (kTransposed) stmatrix_x4_transposed(piece + transposed_offset(group), words);
  else stmatrix_x4(consumer.matrix_address(piece, group), words);
}

// Lays 64 columns into a piece, or, transposed, 64 rows; values_of(group, values) gives this thread's 8 values of 16.
template <typename Element, bool kTransposed = false, typename ValuesOf>
__device__ __forceinline__ void write_piece(const Consumer& consumer, uint32_t piece, ValuesOf values_of) {
#pragma unroll
  for (int group = 0; group < 4; ++group) {
    float values[8];
    values_of(group, values);
    uint32_t words[4];
    pack_matrix<Element>(values, words);
    write_matrix<kTransposed>(consumer, piece, group, words);
  }
}

// Lays 32 columns of fp32 into a piece, outputs first .. first + 15; or, transposed, twice 32 rows of 128 bytes, first
// those of the first two warps' outputs.
template <bool kTransposed, int kCount>
__device__ __forceinline__ void write_piece_fp32(const Consumer& consumer, uint32_t piece,
                                                 const float (&outputs)[kCount], int first) {
  if constexpr (!kTransposed) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // 8 columns i / 2; this thread's row, or the one 8 below
      const int row = consumer.row() + i % 2 * 8, column = i / 2 * 8 + consumer.column();
      const uint32_t address = piece + row * 128 + ((column / 4 ^ row % 8) << 4) + column % 4 * 4;
      const int at = first + i / 2 * 4 + i % 2 * 2;
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(outputs[at]), "f"(outputs[at + 1])
                   : "memory");
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // of 8 rows this thread's two, in its column and in the one 8 above
      const int row = consumer.column() + i % 2, column = consumer.row() + i / 2 * 8;
      const uint32_t address =
          piece + column / 32 * (kPieceBytes / 2) + row * 128 + ((column % 32 / 4 ^ row) << 4) + column % 4 * 4;
      asm volatile(
          "st.shared.f32 [%0], %1;\nst.shared.f32 [%0 + 1024], %2;\nst.shared.f32 [%0 + 2048], %3;\n"
          "st.shared.f32 [%0 + 3072], %4;" ::"r"(address),
          "f"(outputs[first + i]), "f"(outputs[first + 4 + i]), "f"(outputs[first + 8 + i]),
          "f"(outputs[first + 12 + i])
          : "memory");
    }
  }
}

// Pieces of a consumer's own shared memory between its outputs and TMA's stores, in turn.
template <int kBuffers>
class Stager {
 public:
  static constexpr int kBytes = kBuffers * kPieceBytes;

  __device__ explicit Stager(const Consumer& consumer) : consumer_(consumer) {}

  // Stores a piece that write(address) lays there.
  template <typename Write, typename Store>
  __device__ __forceinline__ void store(Write write, Store store_piece) {
    const uint32_t piece = consumer_.staging + turn_ * kPieceBytes;
    if (consumer_.leads()) tma_wait_read<kBuffers - 1>();
    consumer_.sync();
    write(piece);
    proxy_fence();
    consumer_.sync();
    if (consumer_.leads()) {
      store_piece(piece);
      tma_commit();
    }
    turn_ = (turn_ + 1) % kBuffers;
  }

 private:
  const Consumer& consumer_;
  int turn_ = 0;
};

__device__ __forceinline__ void store_ragged(const CUtensorMap& map, uint32_t piece, int column, int row, int row_end) {
  tma_store(map, piece, column, ragged_row(row, row_end), kRaggedRows, row_end);
}

}  // namespace moe::sm90
