// The tiles of the sm_90a engine.
#pragma once

namespace moe::sm90 {

// kRows x kCols outputs a tile, 64 of the contraction a stage. Cooperative: the two consumer warpgroups share a tile, half of the
// rows each. Ping-pong: each has a tile of its own, and one's epilogue runs beside the other's products.
template <int kRowsValue, int kColsValue, int kStagesValue, bool kPingPongValue>
struct TileConfig {
  static constexpr int kRows = kRowsValue;
  static constexpr int kCols = kColsValue;
  static constexpr int kStages = kStagesValue;
  static constexpr bool kPingPong = kPingPongValue;
  static constexpr int kFragments = kRows / (kPingPong ? 64 : 128);  // of 64 rows, a warpgroup
  static constexpr int kABytes = kRows * 128;
  static constexpr int kBBytes = kCols * 128;
  static constexpr int kStageBytes = kABytes + kBBytes;
};

using Cooperative128x256 = TileConfig<128, 256, 4, false>;
using Cooperative256x128 = TileConfig<256, 128, 4, false>;
using PingPong128x128 = TileConfig<128, 128, 4, true>;

constexpr int kThreads = 384;  // a producer warpgroup and two consumer warpgroups
constexpr int kMaxSharedBytes = 232448;

}  // namespace moe::sm90
