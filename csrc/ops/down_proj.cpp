// Operator down_proj_backward: see kernels/down_proj_backward.cu and row_sums.cu. The forward down projection is
// grouped_mm.
#include "ops.h"

namespace moe {

namespace {

// The routing weights' gradient from the partial sums that the product's epilogue left.
Tensor routing_grad(const Tensor& partials, const Tensor& grad_output, const Tensor& topk_weights,
                    const OptionalTensor& down_bias, const DownProjBackwardParams& product, const int32_t* row_of_slot,
                    cudaStream_t stream) {
  Tensor grad_topk_weights = new_empty(topk_weights, {topk_weights.size(0), topk_weights.size(1)}, ScalarType::Float);
  RoutingGradParams params = {};
  params.partials = product.partials;
  params.row_of_slot = row_of_slot;
  params.grad_output = product.grad_output;
  params.down_bias =
      checked_data(down_bias, "down_bias", grad_output.scalar_type(), {product.num_experts, product.hidden_size});
  params.expert_offsets = product.plan.expert_offsets;
  params.grad_topk_weights = static_cast<float*>(grad_topk_weights.data_ptr());
  params.num_tokens = topk_weights.size(0);
  params.num_partials = static_cast<int>(partials.size(1));
  params.num_experts = product.num_experts;
  params.hidden_size = product.hidden_size;
  params.top_k = product.top_k;
  params.dtype = product.dtype;
  launch_routing_grad(params, stream);
  return grad_topk_weights;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> down_proj_backward(Tensor grad_output, Tensor topk_weights, Tensor down_proj,
                                                      OptionalTensor down_bias, Tensor pre_activation,
                                                      Tensor expert_offsets, Tensor sorted_rows, Tensor row_of_slot,
                                                      std::string activation, std::optional<double> swiglu_limit,
                                                      double swiglu_alpha, bool is_transposed, bool is_concatenated) {
  check_dim(topk_weights, "topk_weights", 2);
  check_dim(down_proj, "down_proj", 3);
  grad_output = aligned(grad_output), down_proj = aligned(down_proj), down_bias = aligned(down_bias);
  pre_activation = aligned(pre_activation);
  const ScalarType dtype = grad_output.scalar_type();
  const int64_t num_tokens = topk_weights.size(0), top_k = topk_weights.size(1), num_rows = num_tokens * top_k;
  const int64_t num_experts = down_proj.size(0), hidden_size = down_proj.size(is_transposed ? 2 : 1);
  const int64_t intermediate_size = down_proj.size(is_transposed ? 1 : 2);

  DownProjBackwardParams params = {};
  params.activation = activation_of(activation);
  check_layout(params.activation, is_transposed, is_concatenated);
  const int64_t width = (is_gated(params.activation) ? 2 : 1) * intermediate_size;
  params.intermediate_size = checked_width(intermediate_size, "intermediate_size");
  checked_width(width, "the width of pre_activation");
  Tensor grad_pre_activation = new_empty(grad_output, {num_rows, width}, dtype);
  Tensor weighted_rows = new_empty(grad_output, {num_rows, intermediate_size}, dtype);
  Tensor partials =
      new_empty(grad_output, {num_rows, routing_grad_partials(params.intermediate_size)}, ScalarType::Float);

  params.grad_output = checked_data(grad_output, "grad_output", dtype, {num_tokens, hidden_size});
  params.topk_weights = float_data(topk_weights, "topk_weights", {num_tokens, top_k});
  params.down_proj = checked_data(down_proj, "down_proj", dtype, {num_experts, down_proj.size(1), down_proj.size(2)});
  params.pre_activation = checked_data(pre_activation, "pre_activation", dtype, {num_rows, width});
  params.plan.expert_offsets = int_data(expert_offsets, "expert_offsets", {num_experts + 1});
  params.plan.sorted_rows = int_data(sorted_rows, "sorted_rows", {num_rows});
  params.grad_pre_activation = grad_pre_activation.data_ptr();
  params.weighted_rows = weighted_rows.data_ptr();
  params.partials = static_cast<float*>(partials.data_ptr());
  params.num_rows = checked_int(num_rows, "T * K");
  params.num_experts = checked_int(num_experts, "num_experts");
  params.hidden_size = checked_width(hidden_size, "hidden_size");
  params.top_k = checked_int(top_k, "top_k");
  params.dtype = half_dtype_of(grad_output, "grad_output");
  params.swiglu_limit = limit_of(swiglu_limit);
  params.swiglu_alpha = static_cast<float>(swiglu_alpha);
  params.is_transposed = is_transposed;
  params.is_concatenated = is_concatenated;
  const int32_t* row_of_slot_data = int_data(row_of_slot, "row_of_slot", {num_tokens, top_k});
  const Launch launch(grad_output);
  launch_down_proj_backward(params, launch.stream());
  Tensor grad_topk_weights =
      routing_grad(partials, grad_output, topk_weights, down_bias, params, row_of_slot_data, launch.stream());
  return {grad_pre_activation, weighted_rows, grad_topk_weights};
}

}  // namespace moe
