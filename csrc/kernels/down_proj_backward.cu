// down_proj backward: the product u = grad_output[t] @ down_proj[e] stays in fp32 registers; its epilogue recomputes
// the activation from the stored pre-activation and writes three results (DownProjBackwardParams). routing_grad then
// adds up the partial sums.
//
//   grad_output [T, H], down_proj [E, H, I], pre_activation [S, W]
//     ->  grad_pre_activation [S, W], weighted_rows [S, I], partials [S, ceil(I / 16)]
//
// Transposed: down_proj [E, I, H]. Interleaved: gate and up take turns in the W columns.
//
// Source: SonicMoE (arXiv 2512.14080) keeps the same two tensors between forward and backward.
#include <cmath>

#include "grouped_gemm/sm80/launch.cuh"
#include "grouped_gemm/sm90/launch.cuh"

namespace moe {

namespace {

template <ActivationSet kSet, bool kTransposed, bool kInterleaved, typename Element>
void down_proj_backward_sm80(const DownProjBackwardParams& params, cudaStream_t stream) {
  const sm80::MGroupedOperands<Element> operands{static_cast<const Element*>(params.grad_output),
                                                 params.plan.sorted_rows,
                                                 params.top_k,
                                                 static_cast<const Element*>(params.down_proj),
                                                 params.plan.expert_offsets,
                                                 params.num_experts,
                                                 static_cast<int>(params.num_rows),
                                                 params.intermediate_size,
                                                 params.hidden_size};
  const ActivateBackwardEpilogue<Element, kSet, kInterleaved> epilogue{
      params.topk_weights,
      params.plan.sorted_rows,
      static_cast<const Element*>(params.pre_activation),
      static_cast<Element*>(params.grad_pre_activation),
      static_cast<Element*>(params.weighted_rows),
      params.partials,
      params.intermediate_size,
      routing_grad_partials(params.intermediate_size),
      {params.activation, params.swiglu_limit, params.swiglu_alpha}};
  sm80::launch_m_grouped<kTransposed, !kTransposed>(operands, epilogue, stream, "down_proj_backward");
}

template <ActivationSet kSet, bool kTransposed, bool kInterleaved, typename Element>
void down_proj_backward_sm90(const DownProjBackwardParams& params, cudaStream_t stream) {
  using Epilogue = sm90::ActivateBackwardEpilogue<Element, kSet, kInterleaved>;
  constexpr int kHalves = is_gated(kSet) ? 2 : 1;
  const int columns = params.intermediate_size;
  const Element* pre = static_cast<const Element*>(params.pre_activation);
  Element* grad_pre = static_cast<Element*>(params.grad_pre_activation);
  auto map = [&](const void* data, int map_columns, int pitch) {
    return sm90::ragged_map(params.dtype, data, map_columns, pitch, Epilogue::kStageRows);
  };
  Epilogue epilogue = {};
  const int gate_columns = kInterleaved ? 2 * columns : columns;
  epilogue.gate = map(pre, gate_columns, kHalves * columns);
  epilogue.grad_gate = map(grad_pre, gate_columns, kHalves * columns);
  if (is_gated(kSet) && !kInterleaved) {
    epilogue.up = map(pre + columns, columns, kHalves * columns);
    epilogue.grad_up = map(grad_pre + columns, columns, kHalves * columns);
  }
  epilogue.weighted_rows = map(params.weighted_rows, columns, columns);
  epilogue.grad_pre_activation_data = grad_pre;
  epilogue.weighted_rows_data = static_cast<Element*>(params.weighted_rows);
  epilogue.topk_weights = params.topk_weights;
  epilogue.sorted_rows = params.plan.sorted_rows;
  epilogue.partials = params.partials;
  epilogue.columns = columns;
  epilogue.num_partials = routing_grad_partials(columns);
  epilogue.activation = {params.activation, params.swiglu_limit, params.swiglu_alpha};
  const sm90::Product product{
      params.dtype,     params.grad_output,         params.plan.sorted_rows, params.top_k,
      params.down_proj, params.plan.expert_offsets, params.num_experts,      static_cast<int>(params.num_rows),
      columns,          params.hidden_size};
  sm90::launch_swap_ab<true, kTransposed, Element>(product, epilogue, stream, "down_proj_backward");
}

template <ActivationSet kSet, typename Element>
void down_proj_backward(bool sm90, const DownProjBackwardParams& params, cudaStream_t stream) {
  if (sm90) down_proj_backward_sm90<kSet, false, false, Element>(params, stream);
  else down_proj_backward_sm80<kSet, false, false, Element>(params, stream);
}

template <bool kInterleaved, typename Element>
void down_proj_backward_transposed(bool sm90, const DownProjBackwardParams& params, cudaStream_t stream) {
  constexpr ActivationSet kSet = ActivationSet::kSwiGLUs;
  if (sm90) down_proj_backward_sm90<kSet, true, kInterleaved, Element>(params, stream);
  else down_proj_backward_sm80<kSet, true, kInterleaved, Element>(params, stream);
}

}  // namespace

void launch_down_proj_backward(const DownProjBackwardParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const bool sm90 = padded_engine(params.num_rows, params.num_experts, device_limits()) == Engine::kSm90;
  dispatch_half(params.dtype, [&](auto element) {
    using Element = decltype(element);
    if (params.is_transposed) {
      params.is_concatenated ? down_proj_backward_transposed<false, Element>(sm90, params, stream)
                             : down_proj_backward_transposed<true, Element>(sm90, params, stream);
    } else if (params.activation > Activation::kReGLU) {
      down_proj_backward<ActivationSet::kUngated, Element>(sm90, params, stream);
    } else if (!sm90 || params.activation != Activation::kSwiGLU) {
      down_proj_backward<ActivationSet::kGated, Element>(sm90, params, stream);
    } else if (std::isinf(params.swiglu_limit)) {
      down_proj_backward_sm90<ActivationSet::kSwiGLUWithoutLimit, false, false, Element>(params, stream);
    } else {
      down_proj_backward_sm90<ActivationSet::kSwiGLU, false, false, Element>(params, stream);
    }
  });
}

}  // namespace moe
