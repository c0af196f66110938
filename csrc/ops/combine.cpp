// Operators combine, combine_backward, permute and bias_grad: see kernels/combine.cu, permute.cu and row_sums.cu.
#include <limits>

#include "ops.h"

namespace moe {
namespace {

// The rows are moved 16 bytes at a time.
int width_of(const Tensor& rows, const char* name) {
  check_dim(rows, name, 2);
  const int64_t width = rows.size(1);
  check(width % 8 == 0 && width <= std::numeric_limits<int32_t>::max(), name,
        " must have rows of a multiple of 8 elements, got ", width);
  return static_cast<int>(width);
}

int checked_top_k(int64_t top_k) {
  check(top_k >= 1 && top_k <= std::numeric_limits<int32_t>::max(), "top_k must be positive, got ", top_k);
  return static_cast<int>(top_k);
}

}  // namespace

Tensor combine(Tensor rows, OptionalTensor topk_weights, Tensor row_of_slot) {
  rows = aligned(rows);
  check_dim(row_of_slot, "row_of_slot", 2);
  const int64_t num_tokens = row_of_slot.size(0), top_k = row_of_slot.size(1);
  const ScalarType dtype = rows.scalar_type();
  const int hidden_size = width_of(rows, "rows");
  Tensor output = new_empty(rows, {num_tokens, hidden_size}, dtype);

  CombineParams params = {};
  params.rows = checked_data(rows, "rows", dtype, {num_tokens * top_k, hidden_size});
  params.topk_weights = float_data(topk_weights, "topk_weights", {num_tokens, top_k});
  params.row_of_slot = int_data(row_of_slot, "row_of_slot", {num_tokens, top_k});
  params.output = checked_data(output, "output", dtype, {num_tokens, hidden_size});
  params.num_tokens = num_tokens;
  params.hidden_size = hidden_size;
  params.top_k = checked_top_k(top_k);
  params.dtype = half_dtype_of(rows, "rows");
  const Launch launch(rows);
  launch_combine(params, launch.stream());
  return output;
}

std::tuple<Tensor, Tensor> combine_backward(Tensor grad_output, Tensor rows, Tensor topk_weights, Tensor sorted_rows,
                                            Tensor row_of_slot) {
  grad_output = aligned(grad_output), rows = aligned(rows);
  check_dim(row_of_slot, "row_of_slot", 2);
  const int64_t num_tokens = row_of_slot.size(0), top_k = row_of_slot.size(1), num_rows = num_tokens * top_k;
  const ScalarType dtype = rows.scalar_type();
  const int hidden_size = width_of(rows, "rows");
  Tensor grad_rows = new_empty(rows, {num_rows, hidden_size}, dtype);
  Tensor grad_topk_weights = new_empty(topk_weights, {num_tokens, top_k}, ScalarType::Float);

  CombineBackwardParams params = {};
  params.grad_output = checked_data(grad_output, "grad_output", dtype, {num_tokens, hidden_size});
  params.rows = checked_data(rows, "rows", dtype, {num_rows, hidden_size});
  params.topk_weights = float_data(topk_weights, "topk_weights", {num_tokens, top_k});
  params.sorted_rows = int_data(sorted_rows, "sorted_rows", {num_rows});
  params.row_of_slot = int_data(row_of_slot, "row_of_slot", {num_tokens, top_k});
  params.grad_rows = checked_data(grad_rows, "grad_rows", dtype, {num_rows, hidden_size});
  params.grad_topk_weights = float_data(grad_topk_weights, "grad_topk_weights", {num_tokens, top_k});
  params.num_tokens = num_tokens;
  params.hidden_size = hidden_size;
  params.top_k = checked_top_k(top_k);
  params.dtype = half_dtype_of(rows, "rows");
  const Launch launch(rows);
  launch_combine_backward(params, launch.stream());
  return {grad_rows, grad_topk_weights};
}

Tensor permute(Tensor hidden_states, Tensor sorted_rows, Tensor row_of_slot) {
  hidden_states = aligned(hidden_states);
  check_dim(row_of_slot, "row_of_slot", 2);
  const int64_t num_tokens = row_of_slot.size(0), top_k = row_of_slot.size(1), num_rows = num_tokens * top_k;
  const ScalarType dtype = hidden_states.scalar_type();
  const int hidden_size = width_of(hidden_states, "hidden_states");
  Tensor rows = new_empty(hidden_states, {num_rows, hidden_size}, dtype);

  PermuteParams params = {};
  params.hidden_states = checked_data(hidden_states, "hidden_states", dtype, {num_tokens, hidden_size});
  params.sorted_rows = int_data(sorted_rows, "sorted_rows", {num_rows});
  params.row_of_slot = int_data(row_of_slot, "row_of_slot", {num_tokens, top_k});
  params.rows = checked_data(rows, "rows", dtype, {num_rows, hidden_size});
  params.num_tokens = num_tokens;
  params.hidden_size = hidden_size;
  params.top_k = checked_top_k(top_k);
  params.dtype = half_dtype_of(hidden_states, "hidden_states");
  const Launch launch(hidden_states);
  launch_permute(params, launch.stream());
  return rows;
}

Tensor bias_grad(Tensor grad, OptionalTensor topk_weights, Tensor expert_offsets, OptionalTensor sorted_rows,
                 int64_t top_k) {
  grad = aligned(grad);
  check(expert_offsets.dim() == 1 && expert_offsets.size(0) >= 2, "expert_offsets must have shape [ E+1 ]");
  check(sorted_rows.has_value() || !topk_weights.has_value(), "topk_weights want sorted_rows to find a row's slot");
  const int64_t num_experts = expert_offsets.size(0) - 1;
  const ScalarType dtype = grad.scalar_type();
  const int width = width_of(grad, "grad");
  const int64_t num_sources = grad.size(0);  // tokens with sorted_rows, else rows
  Tensor output = new_empty(grad, {num_experts, width}, dtype);

  BiasGradParams params = {};
  params.top_k = checked_top_k(top_k);
  params.grad = checked_data(grad, "grad", dtype, {num_sources, width});
  params.topk_weights = float_data(topk_weights, "topk_weights", {num_sources, top_k});
  params.expert_offsets = int_data(expert_offsets, "expert_offsets", {num_experts + 1});
  params.sorted_rows = int_data(sorted_rows, "sorted_rows", {num_sources * top_k});
  params.output = checked_data(output, "output", dtype, {num_experts, width});
  params.num_experts = static_cast<int>(num_experts);
  params.width = width;
  params.dtype = half_dtype_of(grad, "grad");
  const Launch launch(grad);
  launch_bias_grad(params, launch.stream());
  return output;
}

}  // namespace moe
