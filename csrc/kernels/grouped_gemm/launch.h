// Host side of the engine: which tile a call gets, how many blocks are started, the launch itself.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/error.h"
#include "../params.h"
#include "tile.h"

namespace moe {

struct DeviceLimits {
  int compute_capability;  // 90 for 9.0
  int multiprocessors;
  int shared_bytes_per_block;  // what a block may ask for
  int shared_bytes_per_multiprocessor;
};

DeviceLimits device_limits();  // of the current device

// The tile of a product whose `num_rows` rows are shared by `num_experts` groups. kAuto never comes back.
TileChoice choose_tile(int64_t num_rows, int num_experts, const DeviceLimits& limits);

// The tile of a weight gradient: its outputs are the weights' shape, whatever the routing.
TileChoice weight_grad_tile(const DeviceLimits& limits);

// Makes choose_tile answer `choice` from now on, kAuto to end that: for tests and tuning.
void force_tile(TileChoice choice);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class Engine { kAuto, kSm80, kSm90 };

// The engine of grouped_mm, and of up_proj but for interleaved weights, with so many elements in an expert's weights.
// sm_90a code runs on compute capability 9.0 alone, and only where it was built. kAuto never comes back.
Engine choose_engine(int64_t num_rows, int64_t expert_elements, const DeviceLimits& limits);

// The engine of down_proj_backward and of up_proj with interleaved weights.
Engine padded_engine(int64_t num_rows, int num_experts, const DeviceLimits& limits);

// The engine of a weight gradient.
Engine weight_grad_engine(int64_t num_rows, const DeviceLimits& limits);

// Makes every product use this engine where the card has it, kAuto to end that: for tests and tuning.
void force_engine(Engine engine);

// Blocks of a persistent launch: no more than there are tiles, no more than run at once.
template <typename Config>
int persistent_blocks(int64_t tiles, const DeviceLimits& limits) {
  const int by_memory = limits.shared_bytes_per_multiprocessor / (Config::kSharedBytes + 1024);
  const int per_sm = std::max(1, std::min(Config::kBlocksPerSm, by_memory));
  return static_cast<int>(
      std::min<int64_t>(std::max<int64_t>(tiles, 1), static_cast<int64_t>(limits.multiprocessors) * per_sm));
}

// Allows the kernel its shared memory, once a device. The kernel is a template argument because different kernels may
// have one type.
template <typename Config, auto kKernel>
void allow_shared_memory(const char* name) {
  static std::atomic<uint64_t> done{0};
  int device = 0;
  check_cuda(cudaGetDevice(&device), name);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((done.load(std::memory_order_relaxed) & bit) != 0) return;
  check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes), name);
  done.fetch_or(bit, std::memory_order_relaxed);
}

template <typename Body>
void dispatch_half(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(__nv_bfloat16{});
    case DType::kFloat16:
      return body(__half{});
    default:
      throw std::runtime_error("moe_kernels: the kernels store bfloat16 and float16 only");
  }
}

template <typename Body>
void dispatch_tile(TileChoice choice, Body&& body) {
  switch (choice) {
    case TileChoice::k16x128:
      return body(Tile16x128{});
    case TileChoice::k64x128:
      return body(Tile64x128{});
    case TileChoice::k128x256:
      return body(Tile128x256{});
    default:
      return body(Tile128x128{});
  }
}

}  // namespace moe
