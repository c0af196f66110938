// Operator plan: see kernels/plan.cu.
#include <limits>

#include "ops.h"

namespace moe {
namespace {

constexpr int64_t kMaxExperts = 4096;  // a block counts its slots an expert in shared memory

}  // namespace

std::tuple<Tensor, Tensor, Tensor> plan(Tensor topk_ids, int64_t num_experts) {
  check(topk_ids.dim() == 2, "topk_ids must have shape [ T K ]");
  check(num_experts >= 1 && num_experts <= kMaxExperts, "plan wants 1 to ", kMaxExperts, " experts, got ", num_experts);
  const int64_t num_tokens = topk_ids.size(0), top_k = topk_ids.size(1), num_slots = num_tokens * top_k;
  check(num_slots <= std::numeric_limits<int32_t>::max(), "T*K must be below 2^31, got ", num_tokens, " * ", top_k);
  Tensor expert_offsets = new_empty(topk_ids, {num_experts + 1}, ScalarType::Int);
  Tensor sorted_rows = new_empty(topk_ids, {num_slots}, ScalarType::Int);
  Tensor row_of_slot = new_empty(topk_ids, {num_tokens, top_k}, ScalarType::Int);
  const int64_t workspace_bytes = plan_workspace_bytes(num_slots, static_cast<int>(num_experts));
  OptionalTensor workspace;  // few slots need none
  if (workspace_bytes > 0) workspace = new_empty(topk_ids, {workspace_bytes}, ScalarType::Byte);

  PlanParams params = {};
  params.topk_ids = int_data(topk_ids, "topk_ids", {num_tokens, top_k});
  params.expert_offsets = int_data(expert_offsets, "expert_offsets", {num_experts + 1});
  params.sorted_rows = int_data(sorted_rows, "sorted_rows", {num_slots});
  params.row_of_slot = int_data(row_of_slot, "row_of_slot", {num_tokens, top_k});
  params.workspace = checked_data(workspace, "workspace", ScalarType::Byte, {workspace_bytes});
  params.num_slots = num_slots;
  params.num_experts = static_cast<int>(num_experts);
  const Launch launch(topk_ids);
  launch_plan(params, launch.stream());
  return {expert_offsets, sorted_rows, row_of_slot};
}

}  // namespace moe
