// Binds the CUDA implementations, in flow order, to the operators that moe_kernels/schemas.py defines. Nothing else is
// here: the schemas live in Python, because the same operators exist where this module was not built.
#include "ops/ops.h"

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) {
  m.impl("gate", TORCH_BOX(&moe::gate));
  m.impl("gate_backward", TORCH_BOX(&moe::gate_backward));
  m.impl("plan", TORCH_BOX(&moe::plan));
  m.impl("up_proj", TORCH_BOX(&moe::up_proj));
  m.impl("grouped_mm", TORCH_BOX(&moe::grouped_mm));
  m.impl("weight_grad", TORCH_BOX(&moe::weight_grad));
  m.impl("weight_grad_accumulate", TORCH_BOX(&moe::weight_grad_accumulate));
  m.impl("bias_grad", TORCH_BOX(&moe::bias_grad));
  m.impl("permute", TORCH_BOX(&moe::permute));
  m.impl("combine", TORCH_BOX(&moe::combine));
  m.impl("combine_backward", TORCH_BOX(&moe::combine_backward));
  m.impl("down_proj_backward", TORCH_BOX(&moe::down_proj_backward));
  m.impl("fused_experts", TORCH_BOX(&moe::fused_experts));
  m.impl("fused_experts_accumulate", TORCH_BOX(&moe::fused_experts_accumulate));
  m.impl("fused_experts_backward", TORCH_BOX(&moe::fused_experts_backward));
  m.impl("fused_experts_backward_accumulate", TORCH_BOX(&moe::fused_experts_backward_accumulate));
}
