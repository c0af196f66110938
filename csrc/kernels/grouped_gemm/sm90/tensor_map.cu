// Encoding of tensor maps by the driver, about 0.15 us each: done at every launch, nothing is kept. See tensor_map.h.
#include "tensor_map.h"

#include <stdexcept>
#include <string>

#include "../../common/error.h"

namespace moe::sm90 {

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion(kName, &entry, 12000, cudaEnableDefault, &found), "tensor map");
#else
    check_cuda(cudaGetDriverEntryPoint(kName, &entry, cudaEnableDefault, &found), "tensor map");
#endif
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("moe_kernels: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(entry);
  }();
  return function;
}

CUtensorMapDataType type_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  }
}

int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// strides[i]: bytes between neighbours in dimension i + 1.
template <int kRank>
CUtensorMap encode(DType dtype, const void* data, const cuuint64_t (&sizes)[kRank],
                   const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank]) {
  CUtensorMap map;
  cuuint32_t element_strides[kRank];
  for (auto& stride : element_strides) stride = 1;
  auto try_encode = [&] {
    return encoder()(&map, type_of(dtype), kRank, const_cast<void*>(data), sizes, strides, box, element_strides,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = try_encode();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // a thread that has not used CUDA yet, such as autograd's
    int device = 0;
    check_cuda(cudaGetDevice(&device), "tensor map");
    check_cuda(cudaSetDevice(device), "tensor map");
    result = try_encode();
  }
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("moe_kernels: tensor map refused, code " + std::to_string(result));
  return map;
}

}  // namespace

CUtensorMap rows_map(DType dtype, const void* data, int64_t rows, int columns, int box_rows) {
  const cuuint64_t pitch = columns * bytes_of(dtype);
  return encode<2>(dtype, data, {cuuint64_t(columns), cuuint64_t(rows)}, {pitch}, {kBoxColumns, cuuint32_t(box_rows)});
}

CUtensorMap experts_map(DType dtype, const void* data, int num_experts, int rows, int columns, int box_rows) {
  const cuuint64_t pitch = columns * bytes_of(dtype);
  const cuuint32_t box_columns = static_cast<cuuint32_t>(128 / bytes_of(dtype));
  return encode<3>(dtype, data, {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(num_experts)}, {pitch, pitch * rows},
                   {box_columns, cuuint32_t(box_rows), 1});
}

CUtensorMap gated_experts_map(DType dtype, const void* data, int num_experts, int rows, int columns, int box_rows) {
  const cuuint64_t pitch = columns * bytes_of(dtype);
  return encode<4>(dtype, data, {cuuint64_t(columns), cuuint64_t(rows), 2, cuuint64_t(num_experts)},
                   {pitch, pitch * rows, 2 * pitch * rows}, {kBoxColumns, cuuint32_t(box_rows), 2, 1});
}

CUtensorMap expert_chunks_map(DType dtype, const void* data, int num_experts, int rows, int columns, int box_rows,
                              int chunks) {
  const bool whole = whole_chunks(columns);
  const cuuint64_t pitch = columns * bytes_of(dtype);
  return encode<4>(dtype, data,
                   {cuuint64_t(whole ? kBoxColumns : columns), cuuint64_t(rows),
                    cuuint64_t(whole ? columns / kBoxColumns : 1), cuuint64_t(num_experts)},
                   {pitch, kBoxColumns * cuuint64_t(bytes_of(dtype)), pitch * rows},
                   {kBoxColumns, cuuint32_t(box_rows), cuuint32_t(whole ? chunks : 1), 1});
}

CUtensorMap gated_columns_map(DType dtype, const void* data, int num_experts, int rows, int columns, int box_rows) {
  const cuuint64_t half = columns * bytes_of(dtype);
  return encode<4>(dtype, data, {cuuint64_t(columns), 2, cuuint64_t(rows), cuuint64_t(num_experts)},
                   {half, 2 * half, 2 * half * rows}, {kBoxColumns, 1, cuuint32_t(box_rows), 1});
}

CUtensorMap ragged_map(DType dtype, const void* data, int columns, int pitch, int box_rows) {
  constexpr cuuint64_t kUnbounded = (cuuint64_t{1} << 31) - 1;
  const cuuint64_t row_bytes = pitch * bytes_of(dtype);
  const cuuint64_t back = (cuuint64_t{1} << 35) - row_bytes;
  return encode<4>(dtype, data, {cuuint64_t(columns), kRaggedRows, kUnbounded, kUnbounded},
                   {row_bytes, back, row_bytes}, {kBoxColumns, cuuint32_t(box_rows), 1, 1});
}

}  // namespace moe::sm90
