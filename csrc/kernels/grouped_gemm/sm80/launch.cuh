// Launchers of the two kernels of the sm_80 engine.
#pragma once

#include "../launch.h"
#include "k_grouped.cuh"
#include "m_grouped.cuh"

namespace moe::sm80 {

template <typename Config, bool kWeightsKMajor, typename Element, typename Epilogue>
void launch_m_grouped(const MGroupedOperands<Element>& operands, const Epilogue& epilogue, const DeviceLimits& limits,
                      cudaStream_t stream, const char* name) {
  constexpr auto kKernel = m_grouped_kernel<Config, Element, kWeightsKMajor, Epilogue>;
  allow_shared_memory<Config, kKernel>(name);
  const int64_t row_tiles =
      ceil_div(operands.num_rows, Config::kRows) + std::min(operands.num_experts + 1, operands.num_rows);
  const int64_t column_tiles = ceil_div(epilogue.columns, Config::kCols / (Epilogue::kGated ? 2 : 1));
  if (row_tiles * column_tiles >= int64_t{1} << 31)
    throw std::runtime_error(std::string("moe_kernels: too many tiles in ") + name);
  const int blocks = persistent_blocks<Config>(row_tiles * column_tiles, limits);
  kKernel<<<blocks, Config::kThreads, Config::kSharedBytes, stream>>>(operands, epilogue);
  check_launch(name);
}

// Picks the tile by the number of rows an expert has in the mean: of all, or of the smallest and one for many rows,
// which is half the code.
template <bool kWeightsKMajor, bool kAllTiles = true, typename Element, typename Epilogue>
void launch_m_grouped(const MGroupedOperands<Element>& operands, const Epilogue& epilogue, cudaStream_t stream,
                      const char* name) {
  if (operands.num_rows == 0) return;
  const DeviceLimits limits = device_limits();
  const TileChoice choice = choose_tile(operands.num_rows, operands.num_experts, limits);
  auto launch = [&](auto config) {
    launch_m_grouped<decltype(config), kWeightsKMajor>(operands, epilogue, limits, stream, name);
  };
  if constexpr (kAllTiles) dispatch_tile(choice, launch);
  else if (choice == TileChoice::k16x128) launch(Tile16x128{});
  else launch(Tile128x128{});
}

template <typename Config, typename Element, typename Epilogue>
void launch_k_grouped(const KGroupedOperands<Element>& operands, const Epilogue& epilogue, cudaStream_t stream,
                      const char* name) {
  constexpr auto kKernel = k_grouped_kernel<Config, Element, Epilogue>;
  allow_shared_memory<Config, kKernel>(name);
  const int64_t tiles =
      operands.num_experts * ceil_div(operands.n, Config::kRows) * ceil_div(operands.k, Config::kCols);
  kKernel<<<persistent_blocks<Config>(tiles, device_limits()), Config::kThreads, Config::kSharedBytes, stream>>>(
      operands, epilogue);
  check_launch(name);
}

}  // namespace moe::sm80
