// Operator up_proj: see kernels/up_proj.cu.
#include "ops.h"

namespace moe {

std::tuple<Tensor, Tensor> up_proj(Tensor hidden_states, Tensor gate_up_proj, OptionalTensor gate_up_bias,
                                   Tensor expert_offsets, Tensor sorted_rows, int64_t top_k, std::string activation,
                                   std::optional<double> swiglu_limit, double swiglu_alpha, bool is_transposed,
                                   bool is_concatenated, bool keep_pre_activation) {
  check_dim(hidden_states, "hidden_states", 2);
  check_dim(gate_up_proj, "gate_up_proj", 3);
  hidden_states = aligned(hidden_states), gate_up_proj = aligned(gate_up_proj), gate_up_bias = aligned(gate_up_bias);
  const ScalarType dtype = hidden_states.scalar_type();
  const int64_t num_experts = gate_up_proj.size(0), hidden_size = hidden_states.size(1);
  const int64_t width = gate_up_proj.size(is_transposed ? 2 : 1);
  const int64_t num_rows = hidden_states.size(0) * top_k;

  UpProjParams params = {};
  params.activation = activation_of(activation);
  check_layout(params.activation, is_transposed, is_concatenated);
  const int halves = is_gated(params.activation) ? 2 : 1;
  params.intermediate_size =
      checked_width(checked_width(width, "the width of gate_up_proj") / halves, "intermediate_size");
  Tensor rows = new_empty(hidden_states, {num_rows, params.intermediate_size}, dtype);
  Tensor pre_activation = new_empty(hidden_states, {keep_pre_activation ? num_rows : 0, width}, dtype);

  params.hidden_states = checked_data(hidden_states, "hidden_states", dtype, {hidden_states.size(0), hidden_size});
  params.gate_up_proj =
      checked_data(gate_up_proj, "gate_up_proj", dtype,
                   {num_experts, is_transposed ? hidden_size : width, is_transposed ? width : hidden_size});
  params.gate_up_bias = checked_data(gate_up_bias, "gate_up_bias", dtype, {num_experts, width});
  params.plan.expert_offsets = int_data(expert_offsets, "expert_offsets", {num_experts + 1});
  params.plan.sorted_rows = int_data(sorted_rows, "sorted_rows", {num_rows});
  params.rows = rows.data_ptr();
  params.pre_activation = keep_pre_activation ? pre_activation.data_ptr() : nullptr;
  params.num_rows = checked_int(num_rows, "T * K");
  params.num_experts = checked_int(num_experts, "num_experts");
  params.hidden_size = checked_width(hidden_size, "hidden_size");
  params.top_k = checked_int(top_k, "top_k");
  params.dtype = half_dtype_of(hidden_states, "hidden_states");
  params.swiglu_limit = limit_of(swiglu_limit);
  params.swiglu_alpha = static_cast<float>(swiglu_alpha);
  params.is_transposed = is_transposed;
  params.is_concatenated = is_concatenated;
  const Launch launch(hidden_states);
  launch_up_proj(params, launch.stream());
  return {rows, pre_activation};
}

}  // namespace moe
