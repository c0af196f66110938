// The product of one tile: cp.async fills kStages stages ahead, each warp multiplies its part of the stage that has landed; then
// the fp32 outputs go through shared memory to the epilogue, eight columns of a row to a lane.
//
// Every output is one chain of mma.m16n8k16 over the contraction, ascending from zero: no tile shape changes a bit.
#pragma once

#include "../epilogues.cuh"
#include "../tile.h"
#include "operand.cuh"

namespace moe::sm80 {

template <typename Config, typename Element, bool kAKMajor, bool kBKMajor, bool kGated>
class TileProduct {
 public:
  static constexpr int kStepsM = Config::kWarpRows / 16;
  static constexpr int kStepsN = Config::kWarpCols / 16;
  static constexpr int kABytes = Config::kRows * kDepth * 2;

  __device__ explicit TileProduct(uint8_t* shared) : shared_(shared), stages_(shared_address(shared)) {
    const int warp = threadIdx.x / 32;
    warp_m_ = warp % Config::kWarpsM;
    warp_n_ = warp / Config::kWarpsM;
  }

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kStepsM; ++m)
#pragma unroll
      for (int n = 0; n < 2 * kStepsN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) outputs_[m][n][i] = 0.0f;
  }

  // load(a_stage, b_stage, block): starts the copies of that 64-deep block. after(block) runs once its block has been multiplied.
  template <typename Load, typename After>
  __device__ void run(int num_blocks, Load load, After after) {
#pragma unroll
    for (int block = 0; block < Config::kStages - 1; ++block) {
      if (block < num_blocks) load(a_stage(block), b_stage(block), block);
      cp_async_commit();
    }
    int read = 0, write = Config::kStages - 1;
    for (int block = 0; block < num_blocks; ++block) {
      cp_async_wait<Config::kStages - 2>();
      __syncthreads();  // block has landed for all threads, and nobody still reads the stage that is filled next
      const int ahead = block + Config::kStages - 1;
      if (ahead < num_blocks) load(a_stage(write), b_stage(write), ahead);
      cp_async_commit();  // an empty group at the end keeps the count of groups right
      multiply(a_stage(read), b_stage(read));
      after(block);
      read = read + 1 == Config::kStages ? 0 : read + 1;
      write = write + 1 == Config::kStages ? 0 : write + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  // place_of(row, column) with row and output column relative to the tile. Leaves the shared memory free for the next tile.
  template <typename Epilogue, typename PlaceOf>
  __device__ void finish(const Epilogue& epilogue, PlaceOf place_of) {
    float* staging = reinterpret_cast<float*>(shared_) + threadIdx.x / 32 * Config::kWarpRows * Config::kStagingStride;
    stage_outputs(staging);
    __syncwarp();
    constexpr int kOutputCols = Config::kWarpCols / (kGated ? 2 : 1);
    constexpr int kGroups = kOutputCols / 8;
    static_assert(Config::kWarpRows * kGroups % 32 == 0, "the epilogue is called by whole warps");
#pragma unroll 2
    for (int item = threadIdx.x % 32; item < Config::kWarpRows * kGroups; item += 32) {
      const int row = item / kGroups, column = item % kGroups * 8;
      float first[8], second[8];
      read_staged(staging + row * Config::kStagingStride + column, first);
      if constexpr (kGated) read_staged(staging + row * Config::kStagingStride + kOutputCols + column, second);
      const OutputPlace place = place_of(warp_m_ * Config::kWarpRows + row, warp_n_ * kOutputCols + column);
      epilogue(place, first, second);
    }
    __syncthreads();
  }

 private:
  __device__ uint32_t a_stage(int stage) const { return stages_ + stage * Config::kStageBytes; }
  __device__ uint32_t b_stage(int stage) const { return a_stage(stage) + kABytes; }

  // Column of the stage where the n-th 16 columns of this warp begin. A gated warp takes half from each half of the tile, so
  // that gate and up of one column meet in it.
  __device__ int b_column(int n) const {
    if constexpr (kGated) {
      constexpr int kHalf = Config::kWarpCols / 2;
      const int local = n * 16;
      return local < kHalf ? warp_n_ * kHalf + local : Config::kCols / 2 + warp_n_ * kHalf + local - kHalf;
    }
    return warp_n_ * Config::kWarpCols + n * 16;
  }

  __device__ void load_fragments(uint32_t (&a)[kStepsM][4], uint32_t (&b)[kStepsN][4], uint32_t a_stage, uint32_t b_stage,
                                 int step) const {
#pragma unroll
    for (int m = 0; m < kStepsM; ++m) {
      load_a_fragment<kAKMajor, Config::kRows>(a[m], a_stage, warp_m_ * Config::kWarpRows + m * 16, step);
    }
#pragma unroll
    for (int n = 0; n < kStepsN; ++n) load_b_fragment<kBKMajor, Config::kCols>(b[n], b_stage, b_column(n), step);
  }

  // The fragments of the next 16-deep step are read while those of this one are multiplied.
  __device__ void multiply(uint32_t a_stage, uint32_t b_stage) {
    uint32_t a[2][kStepsM][4], b[2][kStepsN][4];
    load_fragments(a[0], b[0], a_stage, b_stage, 0);
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      const int now = step & 1;
      if (step + 1 < kDepth / 16) load_fragments(a[now ^ 1], b[now ^ 1], a_stage, b_stage, step + 1);
#pragma unroll
      for (int m = 0; m < kStepsM; ++m)
#pragma unroll
        for (int n = 0; n < kStepsN; ++n) {
          mma_m16n8k16<Element>(outputs_[m][2 * n], a[now][m], b[now][n][0], b[now][n][1]);
          mma_m16n8k16<Element>(outputs_[m][2 * n + 1], a[now][m], b[now][n][2], b[now][n][3]);
        }
    }
  }

  // Accumulator layout of m16n8: elements 0, 1 are row lane / 4, columns 2 (lane % 4) and the next; 2, 3 the row 8 below.
  __device__ void stage_outputs(float* staging) const {
    const int lane = threadIdx.x % 32;
    float* corner = staging + lane / 4 * Config::kStagingStride + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kStepsM; ++m)
#pragma unroll
      for (int n = 0; n < 2 * kStepsN; ++n) {
        float* at = corner + m * 16 * Config::kStagingStride + n * 8;
        *reinterpret_cast<float2*>(at) = make_float2(outputs_[m][n][0], outputs_[m][n][1]);
        *reinterpret_cast<float2*>(at + 8 * Config::kStagingStride) = make_float2(outputs_[m][n][2], outputs_[m][n][3]);
      }
  }

  __device__ static void read_staged(const float* from, float (&values)[8]) {
    const float4 low = *reinterpret_cast<const float4*>(from);
    const float4 high = *reinterpret_cast<const float4*>(from + 4);
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  }

  uint8_t* shared_;
  uint32_t stages_;
  int warp_m_, warp_n_;
  float outputs_[kStepsM][2 * kStepsN][4];
};

}  // namespace moe::sm80
