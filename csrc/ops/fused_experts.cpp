// Operators fused_experts and fused_experts_backward: the flow, stage by stage, in one call; and their forms that add
// weight gradients to fp32 buffers.
#include <utility>

#include "ops.h"

namespace moe {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts(
    Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, Tensor topk_ids,
    OptionalTensor gate_up_bias, OptionalTensor down_bias, std::string activation, std::optional<double> swiglu_limit,
    double swiglu_alpha, bool is_transposed, bool is_concatenated, bool keep_pre_activation) {
  check_dim(topk_ids, "topk_ids", 2);
  check_dim(gate_up_proj, "gate_up_proj", 3);
  const Launch launch(hidden_states);
  auto [expert_offsets, sorted_rows, row_of_slot] = plan(topk_ids, gate_up_proj.size(0));
  auto [rows, pre_activation] =
      up_proj(hidden_states, gate_up_proj, gate_up_bias, expert_offsets, sorted_rows, topk_ids.size(1), activation,
              swiglu_limit, swiglu_alpha, is_transposed, is_concatenated, keep_pre_activation);
  Tensor expert_rows = grouped_mm(rows, down_proj, down_bias, expert_offsets, !is_transposed);
  Tensor output = combine(expert_rows, topk_weights, row_of_slot);
  return {output, pre_activation, expert_offsets, sorted_rows, row_of_slot};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts_accumulate(
    Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, Tensor topk_ids,
    OptionalTensor gate_up_bias, OptionalTensor down_bias, std::string activation, std::optional<double> swiglu_limit,
    double swiglu_alpha, bool is_transposed, bool is_concatenated, bool keep_pre_activation, OptionalTensor,
    OptionalTensor) {  // the buffers are for the backward alone
  return fused_experts(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, gate_up_bias, down_bias,
                       activation, swiglu_limit, swiglu_alpha, is_transposed, is_concatenated, keep_pre_activation);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts_backward(
    Tensor grad_output, Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights,
    OptionalTensor gate_up_bias, OptionalTensor down_bias, Tensor pre_activation, Tensor expert_offsets,
    Tensor sorted_rows, Tensor row_of_slot, std::string activation, std::optional<double> swiglu_limit,
    double swiglu_alpha, bool is_transposed, bool is_concatenated, std::vector<bool> needs) {
  return fused_experts_backward_accumulate(std::nullopt, std::nullopt, grad_output, hidden_states, gate_up_proj,
                                           down_proj, topk_weights, gate_up_bias, down_bias, pre_activation,
                                           expert_offsets, sorted_rows, row_of_slot, activation, swiglu_limit,
                                           swiglu_alpha, is_transposed, is_concatenated, needs);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts_backward_accumulate(
    OptionalTensor gate_up_grad, OptionalTensor down_grad, Tensor grad_output, Tensor hidden_states,
    Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, OptionalTensor gate_up_bias, OptionalTensor down_bias,
    Tensor pre_activation, Tensor expert_offsets, Tensor sorted_rows, Tensor row_of_slot, std::string activation,
    std::optional<double> swiglu_limit, double swiglu_alpha, bool is_transposed, bool is_concatenated,
    std::vector<bool> needs) {
  check(needs.size() == 6, "needs must have 6 entries, got ", needs.size());
  check_dim(topk_weights, "topk_weights", 2);
  const int64_t top_k = topk_weights.size(1);
  const ScalarType dtype = hidden_states.scalar_type();
  const Launch launch(hidden_states);
  OptionalTensor grad_hidden_states, grad_gate_up_proj, grad_down_proj, grad_topk_weights;
  OptionalTensor grad_gate_up_bias, grad_down_bias, grad_pre_activation;
  // Into `grad`, or added to the buffer where there is one. A transposed weight's gradient has its factors swapped.
  auto weight_grad_into = [&](OptionalTensor& grad, const OptionalTensor& buffer, Tensor rows, Tensor a,
                              OptionalTensor rows_gathered, OptionalTensor a_gathered) {
    if (is_transposed) std::swap(rows, a), std::swap(rows_gathered, a_gathered);
    if (buffer.has_value()) weight_grad_accumulate(*buffer, rows, a, expert_offsets, rows_gathered, a_gathered, top_k);
    else grad = weight_grad(rows, a, expert_offsets, rows_gathered, a_gathered, top_k);
  };

  {
    auto [grad_pre, weighted_rows, grad_weights] =
        down_proj_backward(grad_output, topk_weights, down_proj, down_bias, pre_activation, expert_offsets, sorted_rows,
                           row_of_slot, activation, swiglu_limit, swiglu_alpha, is_transposed, is_concatenated);
    if (needs[2]) weight_grad_into(grad_down_proj, down_grad, grad_output, weighted_rows, sorted_rows, std::nullopt);
    if (needs[3]) grad_topk_weights = grad_weights;
    grad_pre_activation = grad_pre;
  }  // weighted_rows is free before the next [S, H] is taken
  if (needs[5]) grad_down_bias = bias_grad(grad_output, topk_weights, expert_offsets, sorted_rows, top_k);
  if (needs[1])
    weight_grad_into(grad_gate_up_proj, gate_up_grad, *grad_pre_activation, hidden_states, std::nullopt, sorted_rows);
  if (needs[4]) grad_gate_up_bias = bias_grad(*grad_pre_activation, std::nullopt, expert_offsets, std::nullopt, top_k);
  if (needs[0]) {
    Tensor grad_rows = grouped_mm(*grad_pre_activation, gate_up_proj, std::nullopt, expert_offsets, is_transposed);
    grad_hidden_states = combine(grad_rows, std::nullopt, row_of_slot);
  }
  // an output that nobody wants has no elements
  auto or_empty = [&](const OptionalTensor& grad, ScalarType type) {
    return grad.has_value() ? *grad : new_empty(hidden_states, {0}, type);
  };
  return {or_empty(grad_hidden_states, dtype), or_empty(grad_gate_up_proj, dtype),
          or_empty(grad_down_proj, dtype),     or_empty(grad_topk_weights, ScalarType::Float),
          or_empty(grad_gate_up_bias, dtype),  or_empty(grad_down_bias, dtype)};
}

}  // namespace moe
