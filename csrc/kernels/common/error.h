// CUDA errors become exceptions that name the kernel.
#pragma once

#include <stdexcept>
#include <string>

#include <cuda_runtime_api.h>

namespace moe {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("moe_kernels: ") + what + ": " + cudaGetErrorString(status));
  }
}

// To be called after every launch, with the kernel's name.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

}  // namespace moe
