// The tiles that a block computes, and which one a call gets.
#pragma once

#include <cstdint>

namespace moe {

// kRows x kCols outputs a block, kDepth of the contraction a stage, kStages stages in flight; kWarpsM x kWarpsN warps
// share the outputs. A gated tile spends half of its columns on the gate and half on the up projection.
template <int kRowsValue, int kColsValue, int kWarpsMValue, int kWarpsNValue, int kStagesValue, int kBlocksPerSmValue>
struct TileConfig {
  static constexpr int kRows = kRowsValue;
  static constexpr int kCols = kColsValue;
  static constexpr int kDepth = 64;  // 128 bytes: one swizzle period, one full line of L2
  static constexpr int kWarpsM = kWarpsMValue;
  static constexpr int kWarpsN = kWarpsNValue;
  static constexpr int kStages = kStagesValue;
  static constexpr int kBlocksPerSm = kBlocksPerSmValue;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpRows = kRows / kWarpsM;
  static constexpr int kWarpCols = kCols / kWarpsN;
  static constexpr int kStageBytes = (kRows + kCols) * kDepth * 2;
  // The epilogue lays a warp's fp32 outputs over the drained stages. 8 floats of padding put the four rows that a
  // half-warp writes at once into different banks.
  static constexpr int kStagingStride = kWarpCols + 8;
  static constexpr int kStagingBytes = kWarpsM * kWarpsN * kWarpRows * kStagingStride * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes > kStagingBytes ? kStages * kStageBytes : kStagingBytes;

  static_assert(kWarpRows % 16 == 0 && kWarpCols % 32 == 0,
                "a warp computes m16n8 pieces, gate and up apart, 16 columns a sum");
  static_assert(kRows % (kThreads / 8) == 0 && kCols % (kThreads / 8) == 0, "every thread copies whole passes");
};

// 64x64 a warp: a 16-deep step reads 4 KB of shared memory for 32 products, so the tensor cores and not the reads
// decide.
using Tile128x128 = TileConfig<128, 128, 2, 2, 3, 2>;
using Tile128x256 = TileConfig<128, 256, 2, 4, 3, 1>;
// 32x64 a warp: more reads, but four warps a scheduler hide each other's latencies where the contraction is short.
// H100, the weight gradients of v4-flash at T = 4096: 7.3 ms against 8.1 ms with 64x64 a warp; m-grouped products lost
// 5 to 10% with it.
using WeightGradTile = TileConfig<128, 256, 4, 4, 3, 1>;
using Tile64x128 = TileConfig<64, 128, 1, 4, 4, 2>;
// Few rows an expert: the weights' bytes in flight decide, 3 blocks x 3 stages x 16 KB an SM.
using Tile16x128 = TileConfig<16, 128, 1, 4, 4, 3>;

enum class TileChoice { kAuto, k16x128, k64x128, k128x128, k128x256 };

}  // namespace moe
