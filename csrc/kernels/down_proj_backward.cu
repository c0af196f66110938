// down_proj backward: the product u = grad_output[t] @ down_proj[e] stays in fp32 registers; its epilogue recomputes the activation
// from the stored pre-activation and writes three results (DownProjBackwardParams). routing_grad then adds up the partial sums.
//
//   grad_output [T, H], down_proj [E, H, I], pre_activation [S, W]
//     ->  grad_pre_activation [S, W], weighted_rows [S, I], partials [S, ceil(I / 32)]
//
// Source: SonicMoE (arXiv 2512.14080) keeps the same two tensors between forward and backward.
#include "grouped_gemm/sm80/launch.cuh"

namespace moe {

namespace {

template <bool kGated, typename Element>
void down_proj_backward(const DownProjBackwardParams& params, cudaStream_t stream) {
  const sm80::MGroupedOperands<Element> operands{static_cast<const Element*>(params.grad_output),
                                                 params.plan.sorted_rows,
                                                 params.top_k,
                                                 static_cast<const Element*>(params.down_proj),
                                                 params.plan.expert_offsets,
                                                 params.num_experts,
                                                 static_cast<int>(params.num_rows),
                                                 params.intermediate_size,
                                                 params.hidden_size};
  const ActivateBackwardEpilogue<Element, kGated> epilogue{params.topk_weights,
                                                           params.plan.sorted_rows,
                                                           static_cast<const Element*>(params.pre_activation),
                                                           static_cast<Element*>(params.grad_pre_activation),
                                                           static_cast<Element*>(params.weighted_rows),
                                                           params.partials,
                                                           params.intermediate_size,
                                                           routing_grad_partials(params.intermediate_size),
                                                           {params.activation, params.swiglu_limit}};
  sm80::launch_m_grouped<false>(operands, epilogue, stream, "down_proj_backward");
}

}  // namespace

void launch_down_proj_backward(const DownProjBackwardParams& params, cudaStream_t stream) {
  dispatch_half(params.dtype, [&](auto element) {
    using Element = decltype(element);
    if (params.activation <= Activation::kReGLU) {
      down_proj_backward<true, Element>(params, stream);
    } else {
      down_proj_backward<false, Element>(params, stream);
    }
  });
}

}  // namespace moe
