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

// tanh(x) within 2^-11 of it.
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x within 2^-22 of it, relatively; subnormal results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// e^x: the ratio is off by 2^-22 and, as x * log2(e) is rounded, by 2^-24 |x|.
__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(x * 1.44269504088896340736f); }

// log2(x) within 2^-22, absolutely between 0.5 and 2, else relatively.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// count - (other > mine): the borrow of a subtraction, three instructions where a comparison and an addition take four.
__device__ __forceinline__ int subtract_if_larger(int count, unsigned long long other, unsigned long long mine) {
  asm("{\n"
      "  .reg .u32 difference;\n"
      "  sub.cc.u32 difference, %1, %2;\n"
      "  subc.cc.u32 difference, %3, %4;\n"
      "  subc.u32 %0, %0, 0;\n"
      "}"
      : "+r"(count)
      : "r"(static_cast<unsigned>(mine)), "r"(static_cast<unsigned>(other)), "r"(static_cast<unsigned>(mine >> 32)),
        "r"(static_cast<unsigned>(other >> 32)));
  return count;
}

// Returns when the kernels before this one in the stream are complete and what they wrote is seen. Nothing is to be
// read or written before it, unless the kernel was launched the ordinary way.
__device__ __forceinline__ void wait_for_previous_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the blocks of the next kernel start once every block of this one has said so; it promises nothing about data.
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace moe
