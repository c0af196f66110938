// The ring of stages between the producer and the consumer warpgroups, and the products of a tile.
#pragma once

#include "ptx.cuh"
#include "tile.h"
#include "wgmma.cuh"

namespace moe::sm90 {

constexpr int kConsumers = 2;

// Addresses of the stages and of their barriers in shared memory: `full` (the copies have landed), `empty` (the
// products are done).
template <typename Config>
struct Ring {
  static constexpr int kBytes = Config::kStages * Config::kStageBytes;
  static constexpr int kBarrierBytes = 16 * Config::kStages;
  uint32_t stages, barriers;

  __device__ uint32_t a(int stage) const { return stages + stage * Config::kStageBytes; }
  __device__ uint32_t b(int stage) const { return a(stage) + Config::kABytes; }
  __device__ uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ uint32_t empty(int stage) const { return barriers + (Config::kStages + stage) * 8; }

  // Called by one thread, before a __syncthreads.
  __device__ void init(int producer_arrivals) const {
    for (int stage = 0; stage < Config::kStages; ++stage) {
      barrier_init(full(stage), producer_arrivals);
      barrier_init(empty(stage), Config::kPingPong ? 1 : kConsumers);
    }
  }
};

// Where in the ring a warpgroup is. The phase flips with every round.
template <typename Config>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == Config::kStages) stage = 0, phase ^= 1;
  }
  __device__ void advance(int blocks) {
    const int reached = stage + blocks;
    stage = reached % Config::kStages;
    phase ^= (reached / Config::kStages) & 1;
  }
};

// A consumer's part of a tile: kFragments x 64 rows. Outputs of one fragment: Config::kCols / 2 registers, laid out as
// in wgmma.cuh.
template <typename Config>
using Outputs = float[Config::kFragments][Config::kCols / 2];

template <typename Config, int kCount>
__device__ __forceinline__ void pin(Outputs<Config>& outputs) {
#pragma unroll
  for (int f = 0; f < Config::kFragments; ++f) pin<kCount>(outputs[f]);
}

// The products of a tile's `blocks` >= 1 stages. A stage is given back one block late, when its products are known to
// be done; the last one is the caller's to give back, and returned. kGathered: cp.async wrote into the stages, so each
// consumer fences before wgmma reads them. kColumns: of the tile's columns those that are computed. Fragment f of the
// consumer is fragment first_fragment + f * kFragmentStride of the stage.
template <typename Config, typename Element, bool kAKMajor, bool kBKMajor, bool kGathered, int kColumns = Config::kCols,
          int kFragmentStride = 1>
__device__ __forceinline__ int multiply(Outputs<Config>& outputs, const Ring<Config>& ring,
                                        RingPosition<Config>& position, int blocks, int first_fragment, bool leader) {
  // A fragment's 64 rows: 64 rows of 128 bytes, or one MN-major chunk. Both are 8192 bytes.
  const uint32_t a_offset = first_fragment * 8192;
  int previous = 0;
  for (int block = 0; block < blocks; ++block) {
    barrier_wait(ring.full(position.stage), position.phase);
    if constexpr (kGathered) proxy_fence();
    const uint64_t a = operand_descriptor<kAKMajor>(ring.a(position.stage) + a_offset);
    const uint64_t b = operand_descriptor<kBKMajor>(ring.b(position.stage));
    pin<Config, kColumns / 2>(outputs);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int f = 0; f < Config::kFragments; ++f) {
        wgmma<Element, !kAKMajor, !kBKMajor, kColumns>(
            outputs[f], a + f * kFragmentStride * (8192 >> 4) + step * kDescriptorStep<kAKMajor>,
            b + step * kDescriptorStep<kBKMajor>, block > 0 || step > 0);
      }
    wgmma_commit();
    wgmma_wait<1>();
    if (block > 0 && leader) barrier_arrive(ring.empty(previous));
    previous = position.stage;
    position.advance();
  }
  wgmma_wait<0>();
  pin<Config, kColumns / 2>(outputs);
  return previous;
}

// Ping-pong: the tensor cores belong to one consumer at a time. Each waits for its turn before its products and gives
// the turn to the other after them.
template <typename Config>
struct Turns {
  __device__ static void wait(int consumer) {
    if constexpr (Config::kPingPong) consumer == 0 ? named_barrier_sync<3, 256>() : named_barrier_sync<4, 256>();
  }
  __device__ static void give_to(int consumer) {
    if constexpr (Config::kPingPong) consumer == 0 ? named_barrier_arrive<3, 256>() : named_barrier_arrive<4, 256>();
  }
};

}  // namespace moe::sm90
