// Tensor maps: what the copy engine (TMA) is told of a tensor. All maps cut it into boxes 128 bytes wide, swizzled as
// "128B".
#pragma once

#include <cstdint>

#include <cuda.h>

#include "../../params.h"

namespace moe::sm90 {

constexpr int kBoxColumns = 64;  // 128 bytes of bf16 or fp16: the swizzle's span

// [rows, columns] in boxes of box_rows x 64.
CUtensorMap rows_map(DType dtype, const void* data, int64_t rows, int columns, int box_rows);

// [E, rows, columns] in boxes of box_rows x 64; beyond an expert's rows and columns a box reads zeros and writes
// nothing. An fp32 tensor has boxes of 32 columns.
CUtensorMap experts_map(DType dtype, const void* data, int num_experts, int rows, int columns, int box_rows);

// [E, 2, rows, columns]: a box brings box_rows gate rows and the same up rows.
CUtensorMap gated_experts_map(DType dtype, const void* data, int num_experts, int rows, int columns, int box_rows);

// [E, rows, columns] in chunks of 64 columns, as an MN-major operand lies in shared memory. Where the columns are a
// multiple of 64 a box brings box_rows of `chunks` chunks: (0, row, first chunk, expert); else of one: (first column,
// row, 0, expert).
constexpr bool whole_chunks(int columns) { return columns % kBoxColumns == 0; }
CUtensorMap expert_chunks_map(DType dtype, const void* data, int num_experts, int rows, int columns, int box_rows,
                              int chunks);

// [E, rows, 2, columns]: a box brings box_rows x 64 of the gate columns or of the up columns.
CUtensorMap gated_columns_map(DType dtype, const void* data, int num_experts, int rows, int columns, int box_rows);

// Rows of `pitch` elements of which `columns` belong to the map, in boxes of box_rows x 64 that end at a row known on
// the device alone. Row r of a range that ends before row `end` has coordinates (column, ragged_row(r, end),
// kRaggedRows, end): beyond the range a box reads zeros and writes nothing. Such a coordinate sums to r * pitch modulo
// 2^64, and the bound of the second dimension cuts at `end`.
CUtensorMap ragged_map(DType dtype, const void* data, int columns, int pitch, int box_rows = 64);

constexpr int kRaggedRows = 1 << 30;
constexpr int ragged_row(int row, int end) { return kRaggedRows - (end - row); }

}  // namespace moe::sm90
