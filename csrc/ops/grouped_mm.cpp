// Operators grouped_mm (also the down projection) and weight_grad: see kernels/grouped_mm.cu and weight_grad.cu.
#include "ops.h"

namespace moe {

Tensor grouped_mm(Tensor a, Tensor b, OptionalTensor bias, Tensor expert_offsets, bool transpose_b) {
  check_dim(a, "a", 2);
  check_dim(b, "b", 3);
  a = aligned(a), b = aligned(b), bias = aligned(bias);
  const ScalarType dtype = a.scalar_type();
  const int64_t num_rows = a.size(0), k = a.size(1), num_experts = b.size(0), n = b.size(transpose_b ? 1 : 2);
  Tensor c = new_empty(a, {num_rows, n}, dtype);

  GroupedMmParams params = {};
  params.a = checked_data(a, "a", dtype, {num_rows, k});
  params.b = checked_data(b, "b", dtype, {num_experts, transpose_b ? n : k, transpose_b ? k : n});
  params.bias = checked_data(bias, "bias", dtype, {num_experts, n});
  params.expert_offsets = int_data(expert_offsets, "expert_offsets", {num_experts + 1});
  params.c = c.data_ptr();
  params.num_rows = checked_int(num_rows, "the number of rows of a");
  params.num_experts = checked_int(num_experts, "num_experts");
  params.n = checked_width(n, "n");
  params.k = checked_width(k, "k");
  params.transpose_b = transpose_b;
  params.dtype = half_dtype_of(a, "a");
  const Launch launch(a);
  launch_grouped_mm(params, launch.stream());
  return c;
}

namespace {

// Into a new tensor, or added to the fp32 buffer.
Tensor launch_weight_grad(const OptionalTensor& buffer, Tensor grad, Tensor a, const Tensor& expert_offsets,
                          const OptionalTensor& grad_sorted_rows, const OptionalTensor& a_sorted_rows, int64_t top_k) {
  check_dim(grad, "grad", 2);
  check_dim(a, "a", 2);
  check_dim(expert_offsets, "expert_offsets", 1);
  check(top_k >= 1, "top_k must be 1 or more, got ", top_k);
  grad = aligned(grad), a = aligned(a);
  const ScalarType dtype = grad.scalar_type();
  const int64_t num_experts = expert_offsets.size(0) - 1, n = grad.size(1), k = a.size(1);
  const int64_t grad_rows = grad.size(0) * (grad_sorted_rows.has_value() ? top_k : 1);
  const int64_t a_rows = a.size(0) * (a_sorted_rows.has_value() ? top_k : 1);
  check(grad_rows == a_rows, "grad and a must have the same number of rows, got ", grad_rows, " and ", a_rows);
  Tensor output = buffer.has_value() ? *buffer : new_empty(grad, {num_experts, n, k}, dtype);

  WeightGradParams params = {};
  params.grad = checked_data(grad, "grad", dtype, {grad.size(0), n});
  params.a = checked_data(a, "a", dtype, {a.size(0), k});
  params.expert_offsets = int_data(expert_offsets, "expert_offsets", {num_experts + 1});
  params.grad_sorted_rows = int_data(grad_sorted_rows, "grad_sorted_rows", {grad_rows});
  params.a_sorted_rows = int_data(a_sorted_rows, "a_sorted_rows", {a_rows});
  params.output = output.data_ptr();
  params.accumulate = buffer.has_value();
  if (params.accumulate) checked_data(buffer, "the gradient's buffer", ScalarType::Float, {num_experts, n, k});
  params.num_rows = grad_rows;
  params.num_experts = checked_int(num_experts, "num_experts");
  params.n = checked_width(n, "n");
  params.k = checked_width(k, "k");
  params.top_k = checked_int(top_k, "top_k");
  params.dtype = half_dtype_of(grad, "grad");
  const Launch launch(grad);
  moe::launch_weight_grad(params, launch.stream());
  return output;
}

}  // namespace

Tensor weight_grad(Tensor grad, Tensor a, Tensor expert_offsets, OptionalTensor grad_sorted_rows,
                   OptionalTensor a_sorted_rows, int64_t top_k) {
  return launch_weight_grad(std::nullopt, grad, a, expert_offsets, grad_sorted_rows, a_sorted_rows, top_k);
}

void weight_grad_accumulate(Tensor buffer, Tensor grad, Tensor a, Tensor expert_offsets,
                            OptionalTensor grad_sorted_rows, OptionalTensor a_sorted_rows, int64_t top_k) {
  launch_weight_grad(buffer, grad, a, expert_offsets, grad_sorted_rows, a_sorted_rows, top_k);
}

}  // namespace moe
