// What the kernels that move whole rows of bf16 or fp16 share: 16-byte vectors, and rows cut into chunks of columns.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../params.h"
#include "vector.cuh"

namespace moe {

constexpr int kVectorSize = 8;  // numbers in 16 bytes

struct RowChunk {
  int64_t row;
  int chunk;
};

// Chunks row by row: warp w of the grid has chunk w % chunks of row w / chunks. In 32-bit divisions, although w may
// pass 2^32: a 64-bit one costs a warp about as much as summing four vectors.
template <int kWarps>
__device__ __forceinline__ RowChunk row_chunk_of_warp(unsigned block, int warp, int chunks) {
  const unsigned whole = block / chunks;  // this many times kWarps rows lie before
  const unsigned rest = (block - whole * chunks) * kWarps + warp;
  return {static_cast<int64_t>(whole) * kWarps + rest / chunks, static_cast<int>(rest % chunks)};
}

// function(Element()) for the type that dtype names.
template <typename Function>
void dispatch_half(DType dtype, const char* kernel, Function&& function) {
  if (dtype == DType::kBFloat16) return function(__nv_bfloat16());
  if (dtype == DType::kFloat16) return function(__half());
  throw std::runtime_error(std::string("moe_kernels: ") + kernel + " stores bfloat16 or float16 only");
}

}  // namespace moe
