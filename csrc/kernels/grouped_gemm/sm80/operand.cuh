// One operand of a tile product: how its stage lies in shared memory, how it is copied there and how a warp reads it
// back.
//
// K-major: the stage is [kExtent rows][64 of the contraction], 128 bytes a row. MN-major: [64 of the
// contraction][kExtent]. Either way the 16-byte chunks of a row are permuted by XOR with (row % 8): the 8 rows that one
// ldmatrix phase reads, and the 8 chunks that a quarter-warp of cp.async writes, fall into 8 different bank groups.
#pragma once

#include "ptx.cuh"

namespace moe::sm80 {

constexpr int kDepth = 64;
constexpr int kSteps = kDepth / 16;  // 16-deep products of a stage; a stage's copies are issued in as many parts

template <int kValue>
struct Step {
  static constexpr int value = kValue;
};

// Copies [kExtent rows][64 deep]; each thread copies the same chunk of kPasses rows, which it names once a tile.
template <typename Element, int kExtent, int kThreads>
class KMajorLoader {
 public:
  static constexpr int kRowStep = kThreads / 8;
  static constexpr int kPasses = kExtent / kRowStep;

  // row_of(i): the row of the source that becomes row i of the tile, or -1: zeros.
  template <typename RowOf>
  __device__ KMajorLoader(const Element* source, int length, RowOf row_of)
      : source_(source + threadIdx.x % 8 * 8), length_(length), chunk_column_(threadIdx.x % 8 * 8) {
    const int row = threadIdx.x / 8;
    shared_offset_ = row * 128 + ((threadIdx.x % 8) ^ (row % 8)) * 16;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) rows_[i] = row_of(row + i * kRowStep);
  }

  // Starts one part of the copy of columns depth .. depth + 63 into the stage at shared memory address `stage`.
  template <int kPart>
  __device__ void load(Step<kPart>, uint32_t stage, int depth) const {
    const bool inside = depth + chunk_column_ < length_;
#pragma unroll
    for (int i = kPart * kPasses / kSteps; i < (kPart + 1) * kPasses / kSteps; ++i) {
      const bool valid = inside && rows_[i] >= 0;
      const Element* from = valid ? source_ + static_cast<int64_t>(rows_[i]) * length_ + depth : source_;
      cp_async_16(stage + shared_offset_ + i * kRowStep * 128, from, valid);
    }
  }

 private:
  const Element* source_;
  int length_;  // elements of a source row, the length of the contraction
  int chunk_column_;
  uint32_t shared_offset_;
  int rows_[kPasses];
};

// Copies [64 deep][kExtent columns] beginning at column `column` of a source whose rows are the contraction.
template <typename Element, int kExtent, int kThreads>
class MnMajorLoader {
 public:
  static constexpr int kChunks = kExtent / 8;
  static constexpr int kRowStep = kThreads / kChunks;
  static constexpr int kPasses = kDepth / kRowStep;
  static_assert(kRowStep % 8 == 0 || kPasses == 1, "the swizzle of a thread's rows must be one");

  __device__ MnMajorLoader(const Element* source, int pitch, int column) : pitch_(pitch), row_(threadIdx.x / kChunks) {
    const int chunk = threadIdx.x % kChunks;
    column_valid_ = column + chunk * 8 < pitch;
    source_ = column_valid_ ? source + column + chunk * 8 : source;
    shared_offset_ = row_ * kExtent * 2 + ((chunk & ~7) | ((chunk ^ row_) & 7)) * 16;
  }

  // column_of(i): the column of the source where columns i .. i + 7 of the stage come from, or -1: zeros.
  template <typename ColumnOf>
  __device__ MnMajorLoader(const Element* source, int pitch, ColumnOf column_of)
      : pitch_(pitch), row_(threadIdx.x / kChunks) {
    const int chunk = threadIdx.x % kChunks;
    const int column = column_of(chunk * 8);
    column_valid_ = column >= 0;
    source_ = column_valid_ ? source + column : source;
    shared_offset_ = row_ * kExtent * 2 + ((chunk & ~7) | ((chunk ^ row_) & 7)) * 16;
  }

  // Starts one part of the copy. row_of(i): the source row that is row i of the stage, or -1: zeros.
  template <int kPart, typename RowOf>
  __device__ void load(Step<kPart>, uint32_t stage, RowOf row_of) const {
#pragma unroll
    for (int i = kPart * kPasses / kSteps; i < (kPart + 1) * kPasses / kSteps; ++i) {
      const int row = row_of(row_ + i * kRowStep);
      const Element* from = source_ + static_cast<int64_t>(max(row, 0)) * pitch_;  // an address to be had, read or not
      cp_async_16(stage + shared_offset_ + i * kRowStep * kExtent * 2, from, column_valid_ && row >= 0);
    }
  }

 private:
  const Element* source_;
  int pitch_;  // elements of a source row
  int row_;
  bool column_valid_;
  uint32_t shared_offset_;
};

// 16 rows (A) x 16 deep as one ldmatrix.x4: registers a0..a3 of mma.m16n8k16.
template <bool kKMajor, int kExtent>
__device__ __forceinline__ void load_a_fragment(uint32_t (&fragment)[4], uint32_t stage, int row, int step) {
  const int lane = threadIdx.x % 32;
  const int p = lane % 8, q = lane / 8;
  if constexpr (kKMajor) {
    const int chunk = (step * 2 + q / 2) ^ p;
    ldmatrix_x4<false>(fragment, stage + (row + p + 8 * (q & 1)) * 128 + chunk * 16);
  } else {
    const int chunk = row / 8 + (q & 1);
    ldmatrix_x4<true>(fragment,
                      stage + (step * 16 + p + 8 * (q / 2)) * kExtent * 2 + ((chunk & ~7) | ((chunk ^ p) & 7)) * 16);
  }
}

// 16 columns (B) x 16 deep: b0, b1 of the first 8 columns, then of the next 8.
template <bool kKMajor, int kExtent>
__device__ __forceinline__ void load_b_fragment(uint32_t (&fragment)[4], uint32_t stage, int column, int step) {
  const int lane = threadIdx.x % 32;
  const int p = lane % 8, q = lane / 8;
  if constexpr (kKMajor) {
    const int chunk = (step * 2 + (q & 1)) ^ p;
    ldmatrix_x4<false>(fragment, stage + (column + p + 8 * (q / 2)) * 128 + chunk * 16);
  } else {
    const int chunk = column / 8 + q / 2;
    ldmatrix_x4<true>(fragment,
                      stage + (step * 16 + p + 8 * (q & 1)) * kExtent * 2 + ((chunk & ~7) | ((chunk ^ p) & 7)) * 16);
  }
}

}  // namespace moe::sm80
