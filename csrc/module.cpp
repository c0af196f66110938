// The Python module moe_kernels._C: facts of the build and of the choice of tiles. It takes no tensors; importing it
// registers the operators' CUDA implementations (bindings.cpp).
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels/grouped_gemm/launch.h"

namespace {

constexpr const char* kTileNames[] = {"auto", "16x128", "64x128", "128x128", "128x256"};

moe::TileChoice tile_by_name(const std::string& name) {
  for (int i = 0; i < 5; ++i) {
    if (name == kTileNames[i]) return static_cast<moe::TileChoice>(i);
  }
  throw std::invalid_argument("tile must be one of auto, 16x128, 64x128, 128x128, 128x256, got " + name);
}

constexpr const char* kEngineNames[] = {"auto", "sm80", "sm90"};

moe::Engine engine_by_name(const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name == kEngineNames[i]) return static_cast<moe::Engine>(i);
  }
  throw std::invalid_argument("engine must be one of auto, sm80, sm90, got " + name);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["architectures"] = std::vector<std::string>{MOE_CUDA_ARCHITECTURES};
  info["cuda_version"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info, "Architectures and CUDA version that this module was built with.");
  module.def(
      "choose_tile",
      [](int64_t num_rows, int num_experts, int shared_bytes_per_block) {
        const moe::DeviceLimits limits{80, 1, shared_bytes_per_block, shared_bytes_per_block};
        return std::string(kTileNames[static_cast<int>(moe::choose_tile(num_rows, num_experts, limits))]);
      },
      pybind11::arg("num_rows"), pybind11::arg("num_experts"), pybind11::arg("shared_bytes_per_block"),
      "The rows x columns tile that a grouped product of so many rows gets on a card with so much shared memory.");
  module.def(
      "force_tile", [](const std::string& name) { moe::force_tile(tile_by_name(name)); }, pybind11::arg("tile"),
      "Makes every product of the sm_80 engine use this tile from now on; \"auto\" ends that. For tests and tuning.");
  module.def(
      "choose_engine",
      [](int64_t num_rows, int64_t expert_elements, int compute_capability) {
        const moe::DeviceLimits limits{compute_capability, 1, 0, 0};
        return std::string(kEngineNames[static_cast<int>(moe::choose_engine(num_rows, expert_elements, limits))]);
      },
      pybind11::arg("num_rows"), pybind11::arg("expert_elements"), pybind11::arg("compute_capability"),
      "The engine of up_proj and grouped_mm, with so many elements in an expert's weights, on a card of this compute "
      "capability (90 for 9.0): sm80 or sm90.");
  module.def(
      "force_engine", [](const std::string& name) { moe::force_engine(engine_by_name(name)); }, pybind11::arg("engine"),
      "Makes every product use this engine, where the card has it, from now on; \"auto\" ends that. For tests and "
      "tuning.");
}
