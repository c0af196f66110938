// Launches that overlap the end of the kernel before them (programmatic dependent launch, compute capability 9.0).
#pragma once

#include <initializer_list>
#include <utility>

#include "error.h"

namespace moe {

// Whether the current device runs code in which wait_for_previous_kernels waits: that of compute capability 9.0, if it
// was built. A newer card compiles the PTX of 8.0 for itself, in which nothing waits.
inline bool launches_overlap() {
  bool built = false;
  for (int architecture : {__CUDA_ARCH_LIST__}) built = built || architecture == 900;
  int device = 0, major = 0;
  return built && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

// Launches a kernel every thread of which calls wait_for_previous_kernels before it reads or writes global memory. Its
// blocks then take their places while the last ones of the kernel before are still at work.
template <typename... Parameters, typename... Arguments>
void launch_overlapped(const char* name, void (*kernel)(Parameters...), unsigned blocks, int threads, int shared_bytes,
                       cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = launches_overlap() ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...), name);
}

}  // namespace moe
