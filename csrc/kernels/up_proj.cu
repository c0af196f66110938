// up_proj: rows[r] = act(hidden_states[t] @ gate_up_proj[e].T (+ bias)), the rows gathered by the kernel itself, the activation
// applied to the fp32 accumulators.
//
//   hidden_states [T, H], gate_up_proj [E, W, H]  ->  rows [S, I] (and pre_activation [S, W])
//
// Its input gradient is grouped_mm, its weight gradient weight_grad.
#include "grouped_gemm/sm80/launch.cuh"

namespace moe {

namespace {

template <bool kGated, typename Element>
void up_proj(const UpProjParams& params, cudaStream_t stream) {
  const int width = (kGated ? 2 : 1) * params.intermediate_size;
  const sm80::MGroupedOperands<Element> operands{static_cast<const Element*>(params.hidden_states),
                                                 params.plan.sorted_rows,
                                                 params.top_k,
                                                 static_cast<const Element*>(params.gate_up_proj),
                                                 params.plan.expert_offsets,
                                                 params.num_experts,
                                                 static_cast<int>(params.num_rows),
                                                 width,
                                                 params.hidden_size};
  const ActivateEpilogue<Element, kGated> epilogue{static_cast<const Element*>(params.gate_up_bias),
                                                   static_cast<Element*>(params.rows),
                                                   static_cast<Element*>(params.pre_activation),
                                                   params.intermediate_size,
                                                   {params.activation, params.swiglu_limit}};
  sm80::launch_m_grouped<true>(operands, epilogue, stream, "up_proj");
}

}  // namespace

void launch_up_proj(const UpProjParams& params, cudaStream_t stream) {
  dispatch_half(params.dtype, [&](auto element) {
    using Element = decltype(element);
    if (params.activation <= Activation::kReGLU) {
      up_proj<true, Element>(params, stream);
    } else {
      up_proj<false, Element>(params, stream);
    }
  });
}

}  // namespace moe
