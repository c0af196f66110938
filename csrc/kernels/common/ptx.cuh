// Single instructions that CUDA C++ has no spelling for.
#pragma once

namespace moe {

// 1/x within 1 ulp for x >= 2^-126, exactly 0 for infinity: one instruction, where a division branches for subnormals.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// sqrt(x) within 1 ulp; subnormal x counts as 0.
__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace moe
