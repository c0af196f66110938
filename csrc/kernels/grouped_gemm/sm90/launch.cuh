// Launchers of the kernels of the sm_90a engine.
#pragma once

#include <array>
#include <atomic>

#include "../launch.h"
#include "activate_backward.cuh"
#include "interleaved.cuh"
#include "k_grouped.cuh"
#include "m_grouped.cuh"
#include "ping_pong.cuh"
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
  operands.weights =
      kGated && kWeightsKMajor ? gated_experts_map(dtype, product.weights, experts, n / 2, k, kTileColumns / 2)
      : kGated                 ? gated_columns_map(dtype, product.weights, experts, k, n / 2, kDepth)
      : kWeightsKMajor         ? experts_map(dtype, product.weights, experts, n, k, kTileColumns)
                               : expert_chunks_map(dtype, product.weights, experts, k, n, kDepth, kTileColumns / 64);
  operands.whole_chunks = whole_chunks(n);
  operands.x = static_cast<const Element*>(product.x);
  operands.row_index = product.row_index;
  operands.row_divisor = Divisor(product.row_divisor);
  operands.expert_offsets = product.expert_offsets;
  operands.num_experts = experts;
  operands.num_rows = product.num_rows;
  operands.column_tiles = static_cast<int>(ceil_div(n, kTileColumns));
  operands.k = k;
  return operands;
}

// A launch of this kernel whose blocks, two by two, are clusters.
template <auto kKernel>
class PairedLaunch {
 public:
  PairedLaunch(const PairedLaunch&) = delete;  // config_ points into it
  PairedLaunch(int shared_bytes, cudaStream_t stream, const char* name) : name_(name) {
    pairs_.id = cudaLaunchAttributeClusterDimension;
    pairs_.val.clusterDim = {2, 1, 1};
    config_.gridDim = dim3(2), config_.blockDim = dim3(kThreads), config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    config_.attrs = &pairs_;
    config_.numAttrs = 1;
  }

  // How many blocks run at once, one a multiprocessor. Asked once a device: where a cluster's part of the device has an
  // odd number of multiprocessors, one is left over.
  int blocks_at_once() const {
    static std::array<std::atomic<int>, 64> known{};  // by device, and 1 more
    int device = 0;
    check_cuda(cudaGetDevice(&device), name_);
    const bool remembered = device < static_cast<int>(known.size());
    if (const int blocks = remembered ? known[device].load(std::memory_order_relaxed) : 0; blocks > 0)
      return blocks - 1;
    int pairs = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&pairs, kKernel, &config_), name_);
    if (remembered) known[device].store(2 * pairs + 1, std::memory_order_relaxed);
    return 2 * pairs;
  }

  void drop_pairs() { config_.numAttrs = 0; }

  template <typename... Arguments>
  void operator()(int64_t blocks, const Arguments&... arguments) {
    config_.gridDim = dim3(static_cast<unsigned>(blocks));
    cudaLaunchKernelEx(&config_, kKernel, arguments...);
    check_launch(name_);
  }

 private:
  const char* name_;
  cudaLaunchAttribute pairs_ = {};
  cudaLaunchConfig_t config_ = {};
};

// Blocks of an m-grouped product: no more than there are tiles, no more than one an SM.
inline int blocks_of(const Product& product, int tile_rows, int column_tiles, const char* name) {
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
  const auto operands = operands_of<true, kWeightsKMajor, false, Config::kCols, 0, Element>(product);
  const int blocks = blocks_of(product, Config::kRows, operands.column_tiles, name);
  kKernel<<<blocks, kThreads, Shared::kBytes, stream>>>(operands, epilogue);
  check_launch(name);
}

template <bool kGathered, bool kWeightsKMajor, typename Element, typename Epilogue>
void launch_swap_ab(const Product& product, const Epilogue& epilogue, cudaStream_t stream, const char* name) {
  using Config = SwapAB;
  constexpr auto kKernel = swap_ab_kernel<Config, Element, kGathered, kWeightsKMajor, Epilogue>;
  allow_shared_memory<SwapABShared, kKernel>(name);
  const auto operands =
      operands_of<kGathered, kWeightsKMajor, Epilogue::kGated, Config::kRows, kRowBox, Element>(product);
  const int blocks = blocks_of(product, Epilogue::kMostRows, operands.column_tiles, name);
  kKernel<<<blocks, kThreads, SwapABShared::kSharedBytes, stream>>>(operands, epilogue);
  check_launch(name);
}

// An m-grouped product whose rows lie in order: by ping_pong.cuh where its tiles are high, that is where an expert has
// some less than a multiple of 192 rows, or many, and where columns and device make pairs. H200, time over that of
// swap_ab.cuh, down projection / input gradient, by rows an expert: 64 1.08 / 1.05, 85 1.05 / 1.10, 171 0.98 / 0.96,
// 256 1.09 / 1.07, 341 0.96 / 0.98, 384 0.98 / 0.94, 512 0.95 / 0.96, 1024 0.91 / 0.91.
constexpr int kHeightForPingPong = 160;

template <bool kWeightsKMajor, typename Element, typename Epilogue>
void launch_in_order(const Product& product, const Epilogue& epilogue, cudaStream_t stream, const char* name) {
  using Config = PingPong;
  constexpr auto kKernel = ping_pong_kernel<Config, Element, kWeightsKMajor, Epilogue>;
  const int64_t rows = ceil_div(product.num_rows, product.num_experts);
  const bool high = rows >= kHeightForPingPong * ceil_div(rows, Config::kCols);
  const bool in_pairs = high && ceil_div(product.n, Config::kRows) % 2 == 0;
  PairedLaunch<kKernel> launch(PingPongShared::kSharedBytes, stream, name);
  if (in_pairs) allow_shared_memory<PingPongShared, kKernel>(name);
  const int at_once = in_pairs ? launch.blocks_at_once() : 0;
  if (at_once == 0) return launch_swap_ab<false, kWeightsKMajor, Element>(product, epilogue, stream, name);
  const auto operands = operands_of<false, kWeightsKMajor, false, Config::kRows, kPairedRows, Element>(product);
  const int blocks = std::min(blocks_of(product, Config::kCols, operands.column_tiles, name), at_once);
  launch(blocks / 2 * 2, operands, epilogue);
}

template <Gathered kGathered, bool kAccumulate, typename Element>
void launch_k_grouped(const WeightGradParams& params, cudaStream_t stream) {
  using Config = Cooperative128x256;
  constexpr auto kKernel = k_grouped_kernel<Config, Element, kGathered, kAccumulate>;
  constexpr bool kTransposed = kGathered == Gathered::kA;
  using Shared = KGroupedShared<Config>;
  using Store = WeightStore<Element, kAccumulate, kTransposed>;
  allow_shared_memory<SharedBytes<Shared>, kKernel>("weight_grad");
  KGroupedOperands<Element> operands = {};
  const void* a_data = kTransposed ? params.a : params.grad;
  const void* b_data = kTransposed ? params.grad : params.a;
  operands.a_columns = kTransposed ? params.k : params.n;
  operands.b_columns = kTransposed ? params.n : params.k;
  if (kGathered == Gathered::kNone) {
    operands.a = ragged_map(params.dtype, a_data, operands.a_columns, operands.a_columns);
  }
  operands.b = ragged_map(params.dtype, b_data, operands.b_columns, operands.b_columns);
  operands.gathered = static_cast<const Element*>(a_data);
  operands.row_index = kTransposed ? params.a_sorted_rows : params.grad_sorted_rows;
  operands.row_divisor = Divisor(params.top_k);
  operands.expert_offsets = params.expert_offsets;
  operands.num_experts = params.num_experts;
  const Store store{experts_map(kAccumulate ? DType::kFloat32 : params.dtype, params.output, params.num_experts,
                                params.n, params.k, Store::kBoxRows),
                    params.output};
  const int64_t row_tiles = ceil_div(operands.a_columns, Config::kRows);
  const int64_t tiles = params.num_experts * row_tiles * ceil_div(operands.b_columns, Config::kCols);
  PairedLaunch<kKernel> launch(Shared::kBytes, stream, "weight_grad");
  int at_once = row_tiles % 2 == 0 ? launch.blocks_at_once() : 0;
  if (at_once == 0) {  // pairs would straddle columns of B, or the device holds none
    launch.drop_pairs();
    at_once = device_limits().multiprocessors;
  }
  launch(std::min<int64_t>(tiles, at_once), operands, store);
}

}  // namespace moe::sm90
