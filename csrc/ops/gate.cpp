// Operators gate and gate_backward: see kernels/gate.cu and kernels/gate_backward.cu for the formulas.
#include "ops.h"

namespace moe {
namespace {

constexpr int64_t kMaxExperts = 1024;  // a token's scores stay in the registers of one warp
constexpr int64_t kMaxTopK = 32;       // a lane of it owns one choice

void check_sizes(const Tensor& router_logits, int64_t top_k) {
  check(router_logits.dim() == 2, "router_logits must have shape [ T E ]");
  const int64_t num_experts = router_logits.size(1);
  check(num_experts >= 1 && num_experts <= kMaxExperts, "gate wants 1 to ", kMaxExperts, " experts, got ", num_experts);
  check(top_k >= 1 && top_k <= kMaxTopK, "top_k must be 1 to ", kMaxTopK, ", got ", top_k);
}

// Rows that are not aligned to a vector are read element by element.
void* logits_data(const Tensor& logits, const char* name) {
  const uintptr_t element = dtype_of(logits, name) == DType::kFloat32 ? 4 : 2;
  return checked_data(logits, name, logits.scalar_type(), {logits.size(0), logits.size(1)}, element);
}

void check_choice(int64_t num_experts, int64_t top_k, int64_t num_expert_groups, int64_t topk_groups) {
  check(top_k <= num_experts, "top_k must be at most the number of experts ", num_experts, ", got ", top_k);
  check(num_expert_groups >= 1 && num_experts % num_expert_groups == 0, "num_expert_groups must divide ", num_experts,
        ", got ", num_expert_groups);
  check(topk_groups >= 1 && topk_groups <= num_expert_groups, "topk_groups must be 1 to ", num_expert_groups, ", got ",
        topk_groups);
}

}  // namespace

std::tuple<Tensor, Tensor> gate(Tensor router_logits, OptionalTensor correction_bias, OptionalTensor given_ids,
                                int64_t top_k, std::string score_fn, int64_t num_expert_groups, int64_t topk_groups,
                                bool renormalize, double routed_scaling_factor) {
  check_sizes(router_logits, top_k);
  const int64_t num_tokens = router_logits.size(0), num_experts = router_logits.size(1);
  if (!given_ids.has_value()) check_choice(num_experts, top_k, num_expert_groups, topk_groups);
  Tensor topk_weights = new_empty(router_logits, {num_tokens, top_k}, ScalarType::Float);
  Tensor topk_ids = new_empty(router_logits, {num_tokens, top_k}, ScalarType::Int);

  GateParams params = {};
  params.router_logits = logits_data(router_logits, "router_logits");
  params.correction_bias = float_data(correction_bias, "correction_bias", {num_experts});
  params.given_ids = int_data(given_ids, "given_ids", {num_tokens, top_k});
  params.topk_weights = float_data(topk_weights, "topk_weights", {num_tokens, top_k});
  params.topk_ids = int_data(topk_ids, "topk_ids", {num_tokens, top_k});
  params.num_tokens = num_tokens;
  params.num_experts = static_cast<int>(num_experts);
  params.top_k = static_cast<int>(top_k);
  params.num_expert_groups = static_cast<int>(num_expert_groups);
  params.topk_groups = static_cast<int>(topk_groups);
  params.logits_dtype = dtype_of(router_logits, "router_logits");
  params.score_fn = score_fn_of(score_fn);
  params.renormalize = renormalize;
  params.routed_scaling_factor = static_cast<float>(routed_scaling_factor);
  const Launch launch(router_logits);
  launch_gate(params, launch.stream());
  return {topk_weights, topk_ids};
}

Tensor gate_backward(Tensor grad_topk_weights, Tensor router_logits, Tensor topk_ids, std::string score_fn,
                     bool renormalize, double routed_scaling_factor) {
  check(topk_ids.dim() == 2, "topk_ids must have shape [ T K ]");
  const int64_t top_k = topk_ids.size(1);
  check_sizes(router_logits, top_k);
  const int64_t num_tokens = router_logits.size(0), num_experts = router_logits.size(1);
  Tensor grad_logits = new_empty(router_logits, {num_tokens, num_experts}, router_logits.scalar_type());

  GateBackwardParams params = {};
  params.grad_topk_weights = float_data(grad_topk_weights, "grad_topk_weights", {num_tokens, top_k});
  params.router_logits = logits_data(router_logits, "router_logits");
  params.topk_ids = int_data(topk_ids, "topk_ids", {num_tokens, top_k});
  params.grad_logits = checked_data(grad_logits, "grad_logits", router_logits.scalar_type(), {num_tokens, num_experts});
  params.num_tokens = num_tokens;
  params.num_experts = static_cast<int>(num_experts);
  params.top_k = static_cast<int>(top_k);
  params.logits_dtype = dtype_of(router_logits, "router_logits");
  params.score_fn = score_fn_of(score_fn);
  params.renormalize = renormalize;
  params.routed_scaling_factor = static_cast<float>(routed_scaling_factor);
  const Launch launch(router_logits);
  launch_gate_backward(params, launch.stream());
  return grad_logits;
}

}  // namespace moe
