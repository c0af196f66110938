// The choice of tiles. See launch.h.
#include "launch.h"

#include <array>
#include <mutex>

namespace moe {

namespace {

std::atomic<TileChoice> forced_tile{TileChoice::kAuto};
std::atomic<Engine> forced_engine{Engine::kAuto};

// Whether sm_90a code is in this build; without it the kernels of that engine are empty.
#ifdef MOE_SM90A
constexpr bool kHasSm90 = true;
#else
constexpr bool kHasSm90 = false;
#endif

DeviceLimits query_limits(int device) {
  DeviceLimits limits{};
  auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device), "device attributes");
    return value;
  };
  limits.compute_capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  limits.shared_bytes_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits.shared_bytes_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return limits;
}

int shared_bytes_of(TileChoice choice) {
  int bytes = 0;
  dispatch_tile(choice, [&](auto config) { bytes = decltype(config)::kSharedBytes; });
  return bytes;
}

}  // namespace

DeviceLimits device_limits() {
  constexpr int kCached = 64;
  static std::array<std::once_flag, kCached> asked;
  static std::array<DeviceLimits, kCached> limits;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  if (device >= kCached) return query_limits(device);
  std::call_once(asked[device], [&] { limits[device] = query_limits(device); });
  return limits[device];
}

void force_engine(Engine engine) { forced_engine.store(engine, std::memory_order_relaxed); }

namespace {

// few_rows: at so many rows and fewer the sm_80 engine is as fast, or faster.
Engine engine_beyond(int64_t few_rows, int64_t num_rows, const DeviceLimits& limits) {
  const Engine forced = forced_engine.load(std::memory_order_relaxed);
  constexpr int64_t kMostRows = int64_t{1} << 30;  // of a ragged tensor map
  const bool possible = kHasSm90 && limits.compute_capability == 90 && num_rows <= kMostRows;
  if (!possible || forced == Engine::kSm80) return Engine::kSm80;
  if (forced == Engine::kSm90) return Engine::kSm90;
  return num_rows > few_rows ? Engine::kSm90 : Engine::kSm80;
}

}  // namespace

// H100, ms of a forward call, sm_80 against sm_90a: qwen3-30b at T = 1 (8 rows, 3 M elements an expert) 0.045, 0.048;
// at T = 16 (128 rows) 0.292, 0.283; mixtral at T = 1 (2 rows, 117 M elements) 0.285, 0.269; v4-flash at T = 1 (6 rows,
// 17 M and 8 M elements) 0.167, 0.135.
Engine choose_engine(int64_t num_rows, int64_t expert_elements, const DeviceLimits& limits) {
  constexpr int64_t kLittle = int64_t{1} << 25;
  return engine_beyond(num_rows * expert_elements <= kLittle ? 16 : 0, num_rows, limits);
}

// Few rows an expert: the small tiles of the sm_80 engine are at the memory's limit. H100, ms of down_proj_backward of
// mixtral, sm_80 against sm_90a: 4 rows an expert 0.314, 0.319; 16 0.329, 0.325; 32 0.364, 0.335; of qwen3-30b: 4
// 0.138, 0.141; 16 0.149, 0.149.
Engine padded_engine(int64_t num_rows, int num_experts, const DeviceLimits& limits) {
  return engine_beyond(int64_t{16} * num_experts, num_rows, limits);
}

Engine weight_grad_engine(int64_t num_rows, const DeviceLimits& limits) { return engine_beyond(0, num_rows, limits); }

void force_tile(TileChoice choice) { forced_tile.store(choice, std::memory_order_relaxed); }

// Measured on an H100, up_proj / grouped_mm, ms (docs/tuning.md): 96 rows an expert (v4-flash, T = 4096) 64x128 5.04
// / 2.26, 128x128 3.66 / 1.82, 128x256 3.60 / 1.80; 4096 rows (olmoe) 9.49 / 4.41, 7.19 / 3.61, 6.90 / 3.14.
TileChoice choose_tile(int64_t num_rows, int num_experts, const DeviceLimits& limits) {
  TileChoice choice = forced_tile.load(std::memory_order_relaxed);
  if (choice == TileChoice::kAuto) {
    const int64_t rows_per_expert = num_rows / std::max(num_experts, 1);
    choice = rows_per_expert <= 16   ? TileChoice::k16x128
             : rows_per_expert <= 48 ? TileChoice::k64x128
                                     : TileChoice::k128x256;
  }
  return shared_bytes_of(choice) <= limits.shared_bytes_per_block ? choice : TileChoice::k128x128;
}

TileChoice weight_grad_tile(const DeviceLimits& limits) {
  const bool fits = shared_bytes_of(TileChoice::k128x256) <= limits.shared_bytes_per_block;
  const TileChoice forced = forced_tile.load(std::memory_order_relaxed);
  return fits && (forced == TileChoice::kAuto || forced == TileChoice::k128x256) ? TileChoice::k128x256
                                                                                 : TileChoice::k128x128;
}

}  // namespace moe
