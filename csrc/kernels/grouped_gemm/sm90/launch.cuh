// Launchers of the kernels of the sm_90a engine.
#pragma once

#include "../launch.h"
#include "activate_backward.cuh"
#include "interleaved.cuh"
#include "k_grouped.cuh"
#include "m_grouped.cuh"
#include "swap_ab.cuh"

namespace moe::sm90 {

// What a launcher is given: the operands of sm80::MGroupedOperands, as plain pointers.
struct Product {
  DType dtype;
  const void* x;                  // [rows, k]
  const int32_t* row_index;       // [S] or null
  int row_divisor;                // K
  const void* weights;            // [E, n, k] or [E, k, n]
  const int32_t* expert_offsets;  // [E + 1]
  int num_experts;
  int num_rows;  // S
  int n;         // of a gated product both halves
  int k;
};

template <typename Config>
struct SharedBytes {
  static constexpr int kSharedBytes = Config::kBytes;
};

// kTileColumns: of the weights, a tile; kBoxRows: what TMA brings at a time of rows that lie in order.
template <bool kGathered, bool kWeightsKMajor, bool kGated, int kTileColumns, int kBoxRows, typename Element>
MGroupedOperands<Element> operands_of(const Product& product) {
  const DType dtype = product.dtype;
  const int experts = product.num_experts, n = product.n, k = product.k;
  if (kGathered && int64_t{product.num_rows} / product.row_divisor * (k / 8) >> 32 != 0)
    throw std::runtime_error("moe_kernels: more than 64 GB of rows to gather");
  MGroupedOperands<Element> operands = {};
  if (!kGathered) operands.rows = rows_map(dtype, product.x, product.num_rows, k, kBoxRows);
  operands.weights = kGated && kWeightsKMajor
                         ? gated_experts_map(dtype, product.weights, experts, n / 2, k, kTileColumns / 2)
                     : kGated         ? gated_columns_map(dtype, product.weights, experts, k, n / 2, kDepth)
                     : kWeightsKMajor ? experts_map(dtype, product.weights, experts, n, k, kTileColumns)
                                      : experts_map(dtype, product.weights, experts, k, n, kDepth);
  operands.x = static_cast<const Element*>(product.x);
  operands.row_index = product.row_index;
  operands.row_divisor = Divisor(product.row_divisor);
  operands.expert_offsets = product.expert_offsets;
  operands.num_experts = experts;
  operands.num_rows = product.num_rows;
  operands.k = k;
  return operands;
}

// Blocks of an m-grouped product: no more than there are tiles, no more than one an SM.
inline int blocks_of(const Product& product, int tile_rows, int64_t column_tiles, const char* name) {
  const int64_t row_tiles = ceil_div(product.num_rows, tile_rows) + std::min(product.num_experts + 1, product.num_rows);
  const int64_t tiles = row_tiles * column_tiles;
  if (tiles >= int64_t{1} << 30) throw std::runtime_error(std::string("moe_kernels: too many tiles in ") + name);
  return static_cast<int>(std::min<int64_t>(tiles, device_limits().multiprocessors));
}

template <typename Config, bool kWeightsKMajor, typename Element, typename Epilogue>
void launch_m_grouped(const Product& product, const Epilogue& epilogue, cudaStream_t stream, const char* name) {
  constexpr auto kKernel = m_grouped_kernel<Config, kWeightsKMajor, Element, Epilogue>;
  using Shared = MGroupedShared<Config, Epilogue>;
  allow_shared_memory<SharedBytes<Shared>, kKernel>(name);
  auto operands = operands_of<true, kWeightsKMajor, false, Config::kCols, 0, Element>(product);
  const int64_t column_tiles = ceil_div(epilogue.columns, Config::kCols / (Epilogue::kGated ? 2 : 1));
  operands.column_tiles = static_cast<int>(column_tiles);
  const int blocks = blocks_of(product, Config::kRows, column_tiles, name);
  kKernel<<<blocks, kThreads, Shared::kBytes, stream>>>(operands, epilogue);
  check_launch(name);
}

template <bool kGathered, bool kWeightsKMajor, typename Element, typename Epilogue>
void launch_swap_ab(const Product& product, const Epilogue& epilogue, cudaStream_t stream, const char* name) {
  using Config = SwapAB;
  constexpr auto kKernel = swap_ab_kernel<Config, Element, kGathered, kWeightsKMajor, Epilogue>;
  allow_shared_memory<SwapABShared, kKernel>(name);
  auto operands = operands_of<kGathered, kWeightsKMajor, Epilogue::kGated, Config::kRows, kRowBox, Element>(product);
  const int64_t column_tiles = ceil_div(epilogue.columns, Config::kRows / (Epilogue::kGated ? 2 : 1));
  operands.column_tiles = static_cast<int>(column_tiles);
  const int blocks = blocks_of(product, Epilogue::kMostRows, column_tiles, name);
  kKernel<<<blocks, kThreads, SwapABShared::kSharedBytes, stream>>>(operands, epilogue);
  check_launch(name);
}

template <typename Config, Gathered kGathered, bool kAccumulate, typename Element>
void launch_k_grouped(const WeightGradParams& params, cudaStream_t stream) {
  constexpr auto kKernel = k_grouped_kernel<Config, Element, kGathered, kAccumulate>;
  using Shared = KGroupedShared<Config>;
  allow_shared_memory<SharedBytes<Shared>, kKernel>("weight_grad");
  KGroupedOperands<Element> operands = {};
  const CUtensorMap grad = ragged_map(params.dtype, params.grad, params.n, params.n);
  const CUtensorMap a = ragged_map(params.dtype, params.a, params.k, params.k);
  operands.ragged = kGathered == Gathered::kGrad ? a : grad;
  operands.ragged_too = a;
  operands.gathered = static_cast<const Element*>(kGathered == Gathered::kGrad ? params.grad : params.a);
  operands.row_index = kGathered == Gathered::kGrad ? params.grad_sorted_rows : params.a_sorted_rows;
  operands.row_divisor = Divisor(params.top_k);
  operands.expert_offsets = params.expert_offsets;
  operands.num_experts = params.num_experts;
  operands.n = params.n;
  operands.k = params.k;
  const WeightStore<Element, kAccumulate> store{experts_map(kAccumulate ? DType::kFloat32 : params.dtype, params.output,
                                                            params.num_experts, params.n, params.k, 64),
                                                params.output};
  const int64_t tiles = params.num_experts * ceil_div(params.n, Config::kRows) * ceil_div(params.k, Config::kCols);
  const int blocks = static_cast<int>(std::min<int64_t>(tiles, device_limits().multiprocessors));
  kKernel<<<blocks, kThreads, Shared::kBytes, stream>>>(operands, store);
  check_launch("weight_grad");
}

}  // namespace moe::sm90
