// The operators as C++ functions; their schemas and shapes are those of moe_kernels/schemas.py.
#pragma once

#include "checks.h"

namespace moe {

std::tuple<Tensor, Tensor> gate(Tensor router_logits, OptionalTensor correction_bias, OptionalTensor given_ids,
                                int64_t top_k, std::string score_fn, int64_t num_expert_groups, int64_t topk_groups,
                                bool renormalize, double routed_scaling_factor);

Tensor gate_backward(Tensor grad_topk_weights, Tensor router_logits, Tensor topk_ids, std::string score_fn,
                     bool renormalize, double routed_scaling_factor);

std::tuple<Tensor, Tensor, Tensor> plan(Tensor topk_ids, int64_t num_experts);

std::tuple<Tensor, Tensor> up_proj(Tensor hidden_states, Tensor gate_up_proj, OptionalTensor gate_up_bias,
                                   Tensor expert_offsets, Tensor sorted_rows, int64_t top_k, std::string activation,
                                   std::optional<double> swiglu_limit, double swiglu_alpha, bool is_transposed,
                                   bool is_concatenated, bool keep_pre_activation);

Tensor grouped_mm(Tensor a, Tensor b, OptionalTensor bias, Tensor expert_offsets, bool transpose_b);

Tensor weight_grad(Tensor grad, Tensor a, Tensor expert_offsets, OptionalTensor grad_sorted_rows,
                   OptionalTensor a_sorted_rows, int64_t top_k);

void weight_grad_accumulate(Tensor buffer, Tensor grad, Tensor a, Tensor expert_offsets,
                            OptionalTensor grad_sorted_rows, OptionalTensor a_sorted_rows, int64_t top_k);

Tensor bias_grad(Tensor grad, OptionalTensor topk_weights, Tensor expert_offsets, OptionalTensor sorted_rows,
                 int64_t top_k);

Tensor combine(Tensor rows, OptionalTensor topk_weights, Tensor row_of_slot);

std::tuple<Tensor, Tensor> combine_backward(Tensor grad_output, Tensor rows, Tensor topk_weights, Tensor sorted_rows,
                                            Tensor row_of_slot);

Tensor permute(Tensor hidden_states, Tensor sorted_rows, Tensor row_of_slot);

std::tuple<Tensor, Tensor, Tensor> down_proj_backward(Tensor grad_output, Tensor topk_weights, Tensor down_proj,
                                                      OptionalTensor down_bias, Tensor pre_activation,
                                                      Tensor expert_offsets, Tensor sorted_rows, Tensor row_of_slot,
                                                      std::string activation, std::optional<double> swiglu_limit,
                                                      double swiglu_alpha, bool is_transposed, bool is_concatenated);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts(
    Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, Tensor topk_ids,
    OptionalTensor gate_up_bias, OptionalTensor down_bias, std::string activation, std::optional<double> swiglu_limit,
    double swiglu_alpha, bool is_transposed, bool is_concatenated, bool keep_pre_activation);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts_backward(
    Tensor grad_output, Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights,
    OptionalTensor gate_up_bias, OptionalTensor down_bias, Tensor pre_activation, Tensor expert_offsets,
    Tensor sorted_rows, Tensor row_of_slot, std::string activation, std::optional<double> swiglu_limit,
    double swiglu_alpha, bool is_transposed, bool is_concatenated, std::vector<bool> needs);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts_accumulate(
    Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, Tensor topk_ids,
    OptionalTensor gate_up_bias, OptionalTensor down_bias, std::string activation, std::optional<double> swiglu_limit,
    double swiglu_alpha, bool is_transposed, bool is_concatenated, bool keep_pre_activation,
    OptionalTensor gate_up_grad, OptionalTensor down_grad);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts_backward_accumulate(
    OptionalTensor gate_up_grad, OptionalTensor down_grad, Tensor grad_output, Tensor hidden_states,
    Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, OptionalTensor gate_up_bias, OptionalTensor down_bias,
    Tensor pre_activation, Tensor expert_offsets, Tensor sorted_rows, Tensor row_of_slot, std::string activation,
    std::optional<double> swiglu_limit, double swiglu_alpha, bool is_transposed, bool is_concatenated,
    std::vector<bool> needs);

}  // namespace moe
