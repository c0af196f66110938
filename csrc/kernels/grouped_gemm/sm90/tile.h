// The tiles of the sm_90a engine.
#pragma once

namespace moe::sm90 {

// kRows x kCols outputs a tile, 64 of the contraction a stage. The two consumer warpgroups share a tile, half of the
// rows each, or, with kInTurn, each has tiles of its own. kBuffers pieces of 8 KB a consumer lie between its outputs
// and TMA's stores.
template <int kRowsValue, int kColsValue, int kStagesValue, int kBuffersValue, bool kInTurn = false>
struct TileConfig {
  static constexpr int kRows = kRowsValue;
  static constexpr int kCols = kColsValue;
  static constexpr int kStages = kStagesValue;
  static constexpr int kBuffers = kBuffersValue;
  static constexpr int kFragments = kRows / (kInTurn ? 64 : 128);  // of 64 rows, a warpgroup
  static constexpr int kABytes = kRows * 128;
  static constexpr int kBBytes = kCols * 128;
  static constexpr int kStageBytes = kABytes + kBBytes;
};

// The m-grouped products with the weights as wgmma's A: 256 columns of the weights by up to kMostRows rows (an epilogue
// may want fewer), as many as make an expert's tiles equally high.
using SwapAB = TileConfig<256, 192, 4, 0>;
constexpr int kMostRows = 184;

// The same where an expert has many rows, which lie in order: 128 columns of the weights by up to 192 rows, and while
// one consumer stores its tile the other one multiplies. Both blocks of a pair want the same rows, each brings half of
// them to both: 28 KB of a stage's 40 come from L2, as much an output as with SwapAB. H200, time over that of SwapAB,
// down projection / input gradient, in pairs with such halves, with boxes of 32 rows, and with 184 rows without pairs:
// olmoe at T = 32768 0.92 / 0.95, 0.94 / 1.00, 1.17 / 1.36; fine-7b 0.85 / 0.84, 0.94 / 0.96, 1.23 (input gradient).
using PingPong = TileConfig<128, 192, 4, 4, true>;

// The m-grouped products with the rows as A. Per stage 48 KB come from L2 for 128x256 outputs: at 650 TFLOP/s 7.7 TB/s,
// which L2 just gives; 128x128 tiles want 10. H100, ms of the down projection, 4 stages and 2 buffers against 3 and 4:
// fine-16 at T = 4096 0.61, 0.63; v3-ep8 at T = 8192 0.43, 0.47; fine-7b 0.34, 0.35.
//
// The weight gradients, A 128 columns wide as the gather is. H200, ms of the gate and up weights' gradient against
// ping-pong 128x192, in one run: olmoe at T = 32768 3.70, 4.36; fine-16 at T = 16384 3.96, 4.84.
using Cooperative128x256 = TileConfig<128, 256, 4, 2>;

constexpr int kThreads = 384;  // a producer warpgroup and two consumer warpgroups
constexpr int kMaxSharedBytes = 232448;

}  // namespace moe::sm90
