// The product of one tile: cp.async fills kStages stages ahead, each warp multiplies its part of the stage that has
// landed; then the fp32 outputs go through shared memory to the epilogue, eight columns of a row to a lane.
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
  // Where only two warps share a tensor core, the fragments of the next step are read while this one is multiplied;
  // with four, the other warps hide the reads, and 128 registers a thread leave no room for a second set.
  static constexpr int kBuffers = Config::kThreads >= 512 ? 1 : 2;

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

  // load(part, a_stage, b_stage, block): starts one of kSteps parts of the copies of that 64-deep block.
  // before_barrier(block) runs in every block after the last part was started and before the barrier behind which the
  // next block's copies start.
  //
  // Copies and fragment reads are spread between the products: a burst of either leaves the tensor cores idle. With two
  // fragment buffers the last step of a block waits for the next block and reads its first fragments before it
  // multiplies.
  template <typename Load, typename BeforeBarrier>
  __device__ void run(int num_blocks, Load load, BeforeBarrier before_barrier) {
#pragma unroll
    for (int block = 0; block < Config::kStages - 1; ++block) {
      if (block < num_blocks) each_part([&](auto part) { load(part, a_stage(block), b_stage(block), block); });
      cp_async_commit();
    }
    cp_async_wait<Config::kStages - 2>();
    __syncthreads();
    if (kBuffers == 2 && num_blocks > 0) load_fragments(0, a_stage(0), b_stage(0), 0);
    int read = 0, write = Config::kStages - 1;
    for (int block = 0; block < num_blocks; ++block) {
      const int ahead = block + Config::kStages - 1;
      const int next = read + 1 == Config::kStages ? 0 : read + 1;
      each_part([&](auto part) {
        constexpr int kStep = decltype(part)::value;
        if (kBuffers == 1) load_fragments(0, a_stage(read), b_stage(read), kStep);
        if (kBuffers == 2 && kStep + 1 < kSteps)
          load_fragments((kStep + 1) & 1, a_stage(read), b_stage(read), kStep + 1);
        if (ahead < num_blocks) load(part, a_stage(write), b_stage(write), ahead);
        if (kStep + 1 == kSteps) {
          cp_async_commit();  // an empty group at the end keeps the count of groups right
          before_barrier(block);
          cp_async_wait<Config::kStages - 2>();
          __syncthreads();  // block + 1 has landed for all threads, and nobody still reads the stage that is filled
                            // next
          if (kBuffers == 2 && block + 1 < num_blocks) load_fragments(0, a_stage(next), b_stage(next), 0);
        }
        multiply(kStep & (kBuffers - 1));
      });
      write = read;
      read = next;
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  // place_of(row, column) with row and output column relative to the tile. Leaves the shared memory free for the next
  // tile.
  template <typename Epilogue, typename PlaceOf>
  __device__ void finish(const Epilogue& epilogue, PlaceOf place_of) {
    float* staging = reinterpret_cast<float*>(shared_) + threadIdx.x / 32 * Config::kWarpRows * Config::kStagingStride;
    stage_outputs(staging);
    __syncwarp();
    constexpr int kOutputCols = Config::kWarpCols / (Epilogue::kGated ? 2 : 1);
    constexpr int kGroups = kOutputCols / 8;
    static_assert(Config::kWarpRows * kGroups % 32 == 0, "the epilogue is called by whole warps");
#pragma unroll(Epilogue::kInterleaved ? 1 : 2)  // two at a time spill where they are 16 columns each
    for (int item = threadIdx.x % 32; item < Config::kWarpRows * kGroups; item += 32) {
      const int row = item / kGroups, column = item % kGroups * 8;
      float first[8], second[8];
      const float* from = staging + row * Config::kStagingStride + column;
      if constexpr (Epilogue::kInterleaved) {
        float low[8], high[8];
        read_staged(from + column, low);
        read_staged(from + column + 8, high);
        deinterleave(low, high, first, second);
      } else {
        read_staged(from, first);
        if constexpr (kGated) read_staged(from + kOutputCols, second);
      }
      const OutputPlace place = place_of(warp_m_ * Config::kWarpRows + row, warp_n_ * kOutputCols + column);
      epilogue(place, first, second);
    }
    __syncthreads();
  }

 private:
  __device__ uint32_t a_stage(int stage) const { return stages_ + stage * Config::kStageBytes; }
  __device__ uint32_t b_stage(int stage) const { return a_stage(stage) + kABytes; }

  // Column of the stage where the n-th 16 columns of this warp begin. A gated warp takes half from each half of the
  // tile, so that gate and up of one column meet in it.
  __device__ int b_column(int n) const {
    if constexpr (kGated) {
      constexpr int kHalf = Config::kWarpCols / 2;
      const int local = n * 16;
      return local < kHalf ? warp_n_ * kHalf + local : Config::kCols / 2 + warp_n_ * kHalf + local - kHalf;
    }
    return warp_n_ * Config::kWarpCols + n * 16;
  }

  template <typename Body>
  __device__ static void each_part(Body&& body) {
    static_assert(kSteps == 4, "one call a step");
    body(Step<0>{});
    body(Step<1>{});
    body(Step<2>{});
    body(Step<3>{});
  }

  __device__ void load_fragments(int buffer, uint32_t a_stage, uint32_t b_stage, int step) {
#pragma unroll
    for (int m = 0; m < kStepsM; ++m) {
      load_a_fragment<kAKMajor, Config::kRows>(a_[buffer][m], a_stage, warp_m_ * Config::kWarpRows + m * 16, step);
    }
#pragma unroll
    for (int n = 0; n < kStepsN; ++n)
      load_b_fragment<kBKMajor, Config::kCols>(b_[buffer][n], b_stage, b_column(n), step);
  }

  __device__ void multiply(int buffer) {
#pragma unroll
    for (int m = 0; m < kStepsM; ++m)
#pragma unroll
      for (int n = 0; n < kStepsN; ++n) {
        mma_m16n8k16<Element>(outputs_[m][2 * n], a_[buffer][m], b_[buffer][n][0], b_[buffer][n][1]);
        mma_m16n8k16<Element>(outputs_[m][2 * n + 1], a_[buffer][m], b_[buffer][n][2], b_[buffer][n][3]);
      }
  }

  // Accumulator layout of m16n8: elements 0, 1 are row lane / 4, columns 2 (lane % 4) and the next; 2, 3 the row 8
  // below.
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
  uint32_t a_[kBuffers][kStepsM][4], b_[kBuffers][kStepsN][4];
};

}  // namespace moe::sm80
