// up_proj: rows[r] = act(hidden_states[t] @ gate_up_proj[e].T (+ bias)), the rows gathered by the kernel itself, the
// activation applied to the fp32 accumulators.
//
//   hidden_states [T, H], gate_up_proj [E, W, H]  ->  rows [S, I] (and pre_activation [S, W])
//   transposed: gate_up_proj [E, H, W], its W columns gate and up half by half or in turn; so is the pre-activation
//
// Its input gradient is grouped_mm, its weight gradient weight_grad.
#include <cmath>

#include "grouped_gemm/sm80/launch.cuh"
#include "grouped_gemm/sm90/launch.cuh"

namespace moe {

namespace {

// How gate_up_proj lies.
enum class Layout { kRows, kTransposed, kInterleaved };

template <ActivationSet kSet, Layout kLayout, typename Element>
void up_proj_sm80(const UpProjParams& params, cudaStream_t stream) {
  const sm80::MGroupedOperands<Element> operands{static_cast<const Element*>(params.hidden_states),
                                                 params.plan.sorted_rows,
                                                 params.top_k,
                                                 static_cast<const Element*>(params.gate_up_proj),
                                                 params.plan.expert_offsets,
                                                 params.num_experts,
                                                 static_cast<int>(params.num_rows),
                                                 (is_gated(kSet) ? 2 : 1) * params.intermediate_size,
                                                 params.hidden_size};
  const ActivateEpilogue<Element, kSet, kLayout == Layout::kInterleaved> epilogue{
      static_cast<const Element*>(params.gate_up_bias),
      static_cast<Element*>(params.rows),
      static_cast<Element*>(params.pre_activation),
      params.intermediate_size,
      {params.activation, params.swiglu_limit, params.swiglu_alpha}};
  constexpr bool kIsRows = kLayout == Layout::kRows;
  sm80::launch_m_grouped<kIsRows, kIsRows>(operands, epilogue, stream, "up_proj");
}

sm90::Product product_of(const UpProjParams& params, int width) {
  return {params.dtype,
          params.hidden_states,
          params.plan.sorted_rows,
          params.top_k,
          params.gate_up_proj,
          params.plan.expert_offsets,
          params.num_experts,
          static_cast<int>(params.num_rows),
          width,
          params.hidden_size};
}

template <ActivationSet kSet, bool kWeightsKMajor, typename Element>
void up_proj_sm90(const UpProjParams& params, cudaStream_t stream) {
  constexpr int kHalves = is_gated(kSet) ? 2 : 1;
  const int columns = params.intermediate_size;
  Element* pre = static_cast<Element*>(params.pre_activation);
  auto map = [&](void* data, int pitch) {
    return sm90::ragged_map(params.dtype, data, columns, pitch, sm90::kPieceRows);
  };
  sm90::SwappedActivateEpilogue<Element, kSet> epilogue = {};
  epilogue.rows = map(params.rows, columns);
  if (pre != nullptr) epilogue.gate = map(pre, kHalves * columns);
  if (pre != nullptr && is_gated(kSet)) epilogue.up = map(pre + columns, kHalves * columns);
  epilogue.rows_data = static_cast<Element*>(params.rows);
  epilogue.pre_activation_data = pre;
  epilogue.bias = static_cast<const Element*>(params.gate_up_bias);
  epilogue.columns = columns;
  epilogue.activation = {params.activation, params.swiglu_limit, params.swiglu_alpha};
  sm90::launch_swap_ab<true, kWeightsKMajor, Element>(product_of(params, kHalves * columns), epilogue, stream,
                                                      "up_proj");
}

template <typename Element>
void up_proj_interleaved_sm90(const UpProjParams& params, cudaStream_t stream) {
  const int columns = params.intermediate_size;
  sm90::ActivateInterleavedEpilogue<Element, ActivationSet::kSwiGLUs, sm90::Cooperative128x256::kBuffers> epilogue = {};
  epilogue.rows = sm90::ragged_map(params.dtype, params.rows, columns, columns);
  if (params.pre_activation != nullptr)
    epilogue.pre_activation = sm90::ragged_map(params.dtype, params.pre_activation, 2 * columns, 2 * columns);
  epilogue.rows_data = static_cast<Element*>(params.rows);
  epilogue.pre_activation_data = static_cast<Element*>(params.pre_activation);
  epilogue.bias = static_cast<const Element*>(params.gate_up_bias);
  epilogue.columns = columns;
  epilogue.activation = {params.activation, params.swiglu_limit, params.swiglu_alpha};
  sm90::launch_m_grouped<sm90::Cooperative128x256, false, Element>(product_of(params, 2 * columns), epilogue, stream,
                                                                   "up_proj");
}

}  // namespace

void launch_up_proj(const UpProjParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const int64_t expert_elements =
      (params.activation > Activation::kReGLU ? int64_t{1} : 2) * params.intermediate_size * params.hidden_size;
  const bool sm90 = choose_engine(params.num_rows, expert_elements, device_limits()) == Engine::kSm90;
  dispatch_half(params.dtype, [&](auto element) {
    using Element = decltype(element);
    if (params.is_transposed && !params.is_concatenated) {
      padded_engine(params.num_rows, params.num_experts, device_limits()) == Engine::kSm90
          ? up_proj_interleaved_sm90<Element>(params, stream)
          : up_proj_sm80<ActivationSet::kSwiGLUs, Layout::kInterleaved, Element>(params, stream);
    } else if (params.is_transposed) {
      sm90 ? up_proj_sm90<ActivationSet::kSwiGLUs, false, Element>(params, stream)
           : up_proj_sm80<ActivationSet::kSwiGLUs, Layout::kTransposed, Element>(params, stream);
    } else if (params.activation > Activation::kReGLU) {
      sm90 ? up_proj_sm90<ActivationSet::kUngated, true, Element>(params, stream)
           : up_proj_sm80<ActivationSet::kUngated, Layout::kRows, Element>(params, stream);
    } else if (!sm90) {
      up_proj_sm80<ActivationSet::kGated, Layout::kRows, Element>(params, stream);
    } else if (params.activation == Activation::kSwiGLU && std::isinf(params.swiglu_limit)) {
      up_proj_sm90<ActivationSet::kSwiGLUWithoutLimit, true, Element>(params, stream);
    } else if (params.activation == Activation::kSwiGLU) {
      up_proj_sm90<ActivationSet::kSwiGLU, true, Element>(params, stream);
    } else {
      up_proj_sm90<ActivationSet::kGated, true, Element>(params, stream);
    }
  });
}

}  // namespace moe
