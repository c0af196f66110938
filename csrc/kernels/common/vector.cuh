// Eight storage elements as one 16-byte access, converted to and from fp32.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace moe {

template <typename Element>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  // Two instructions; those of __bfloat1622float2 are three.
  static __device__ __forceinline__ float2 to_float(Type pair) {
    unsigned word;
    memcpy(&word, &pair, sizeof(word));
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  }
  static __device__ __forceinline__ Type from_float(float low, float high) { return __floats2bfloat162_rn(low, high); }
};
template <>
struct Pair<__half> {
  using Type = __half2;
  static __device__ __forceinline__ float2 to_float(Type pair) { return __half22float2(pair); }
  static __device__ __forceinline__ Type from_float(float low, float high) { return __floats2half2_rn(low, high); }
};

template <typename Element>
__device__ __forceinline__ float2 unpack2(uint32_t word) {
  typename Pair<Element>::Type pair;
  memcpy(&pair, &word, sizeof(pair));
  return Pair<Element>::to_float(pair);
}

template <typename Element>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  const auto pair = Pair<Element>::from_float(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

template <typename Element>
__device__ __forceinline__ void unpack8(const uint4& packed, float (&values)[8]) {
  using PairType = typename Pair<Element>::Type;
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    PairType pair;
    memcpy(&pair, &words[i], sizeof(pair));
    const float2 both = Pair<Element>::to_float(pair);
    values[2 * i] = both.x;
    values[2 * i + 1] = both.y;
  }
}

template <typename Element>
__device__ __forceinline__ uint4 pack8(const float (&values)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto pair = Pair<Element>::from_float(values[2 * i], values[2 * i + 1]);
    memcpy(&words[i], &pair, sizeof(pair));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// For memory that nothing writes while the kernel runs.
template <typename Element>
__device__ __forceinline__ void load8_readonly(const Element* from, float (&values)[8]) {
  unpack8<Element>(__ldg(reinterpret_cast<const uint4*>(from)), values);
}

template <typename Element>
__device__ __forceinline__ void store8(Element* to, const float (&values)[8]) {
  *reinterpret_cast<uint4*>(to) = pack8<Element>(values);
}

}  // namespace moe
