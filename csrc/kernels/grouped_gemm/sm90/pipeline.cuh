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

  // Called by one thread, before a __syncthreads or cluster_sync. The arrivals that `full` and `empty` wait for.
  __device__ void init(int producer_arrivals, int consumer_arrivals = kConsumers) const {
    for (int stage = 0; stage < Config::kStages; ++stage) {
      barrier_init(full(stage), producer_arrivals);
      barrier_init(empty(stage), consumer_arrivals);
    }
  }
};

// Where in the ring a warpgroup is: the stages that it has passed. The phase flips with every round.
template <typename Config>
struct RingPosition {
  static_assert((Config::kStages & (Config::kStages - 1)) == 0, "else the count's overflow would move it");
  uint32_t passed = 0;

  __device__ int stage() const { return passed % Config::kStages; }
  __device__ int previous_stage() const { return (passed - 1) % Config::kStages; }
  __device__ uint32_t phase() const { return passed / Config::kStages & 1; }
  __device__ void advance(int blocks = 1) { passed += blocks; }
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

// Calls body(constant), the constant being `value`: a multiple of kStep, from kStep to kMost.
template <int kMost, int kStep, typename Body>
__device__ __forceinline__ void dispatch_multiple(int value, Body&& body) {
  if constexpr (kMost == kStep) {
    body(std::integral_constant<int, kMost>{});
  } else {
    if (value == kMost) body(std::integral_constant<int, kMost>{});
    else dispatch_multiple<kMost - kStep, kStep>(value, body);
  }
}

struct Nothing {
  __device__ void operator()(int) const {}
};

// The products of a tile's `blocks` >= 1 stages. Of the last one kLastSteps x 16 of the contraction are multiplied. A
// stage is given back one block late, when its products are known to be done, by give_back(stage, block); the last one
// is the caller's to give back, and returned. kGathered: cp.async wrote into the stages, so each consumer fences before
// wgmma reads them. kColumns: of the tile's columns those that are computed. Fragment f of the consumer is fragment
// first_fragment + f * kFragmentStride of the stage. meanwhile(block) is called while a stage's products run.
template <typename Config, typename Element, bool kAKMajor, bool kBKMajor, bool kGathered, int kColumns = Config::kCols,
          int kFragmentStride = 1, int kLastSteps = kSteps, typename GiveBack, typename Meanwhile = Nothing>
__device__ __forceinline__ int multiply(Outputs<Config>& outputs, const Ring<Config>& ring,
                                        RingPosition<Config>& position, int blocks, int first_fragment,
                                        GiveBack give_back, Meanwhile meanwhile = {}) {
  // A fragment's 64 rows: 64 rows of 128 bytes, or one MN-major chunk. Both are 8192 bytes.
  const uint32_t a_offset = first_fragment * 8192;
  int previous = 0;
  auto multiply_block = [&](int block, auto steps) {
    barrier_wait(ring.full(position.stage()), position.phase());
    if constexpr (kGathered) proxy_fence();
    const uint64_t a = operand_descriptor<kAKMajor>(ring.a(position.stage()) + a_offset);
    const uint64_t b = operand_descriptor<kBKMajor>(ring.b(position.stage()));
    pin<Config, kColumns / 2>(outputs);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < decltype(steps)::value; ++step)
#pragma unroll
      for (int f = 0; f < Config::kFragments; ++f) {
        wgmma<Element, !kAKMajor, !kBKMajor, kColumns>(
            outputs[f], a + f * kFragmentStride * (8192 >> 4) + step * kDescriptorStep<kAKMajor>,
            b + step * kDescriptorStep<kBKMajor>, block > 0 || step > 0);
      }
    wgmma_commit();
    meanwhile(block);
    wgmma_wait<1>();
    if (block > 0) give_back(previous, block - 1);
    previous = position.stage();
    position.advance();
  };
  constexpr bool kPartial = kLastSteps < kSteps;
  for (int block = 0; block < blocks - kPartial; ++block) {
    multiply_block(block, std::integral_constant<int, kSteps>{});
  }
  if constexpr (kPartial) multiply_block(blocks - 1, std::integral_constant<int, kLastSteps>{});
  wgmma_wait<0>();
  pin<Config, kColumns / 2>(outputs);
  return previous;
}

}  // namespace moe::sm90
