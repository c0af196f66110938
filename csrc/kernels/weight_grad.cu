// weight_grad: out[e] = sum over the rows of expert e of outer(grad, a): the weight gradients of both projections and
// of grouped_mm.
//
//   grad [S or T, n], a [S or T, k]  ->  out [E, n, k]; see grouped_gemm/sm90/ and sm80/k_grouped.cuh
#include "grouped_gemm/sm80/launch.cuh"
#include "grouped_gemm/sm90/launch.cuh"

namespace moe {

namespace {

template <typename Element>
void weight_grad_sm80(const WeightGradParams& params, cudaStream_t stream) {
  const sm80::KGroupedOperands<Element> operands{static_cast<const Element*>(params.grad),
                                                 static_cast<const Element*>(params.a),
                                                 params.expert_offsets,
                                                 params.grad_sorted_rows,
                                                 params.a_sorted_rows,
                                                 params.top_k,
                                                 params.num_experts,
                                                 params.n,
                                                 params.k};
  auto launch = [&](const auto& epilogue) {
    if (weight_grad_tile(device_limits()) == TileChoice::k128x256) {
      sm80::launch_k_grouped<WeightGradTile>(operands, epilogue, stream, "weight_grad");
    } else {
      sm80::launch_k_grouped<Tile128x128>(operands, epilogue, stream, "weight_grad");
    }
  };
  if (params.accumulate) launch(AccumulateEpilogue{static_cast<float*>(params.output), params.k});
  else launch(StoreEpilogue<Element>{nullptr, static_cast<Element*>(params.output), params.k});
}

template <bool kAccumulate, typename Element>
void weight_grad_sm90(const WeightGradParams& params, cudaStream_t stream) {
  if (params.grad_sorted_rows != nullptr) {
    sm90::launch_k_grouped<sm90::Gathered::kGrad, kAccumulate, Element>(params, stream);
  } else if (params.a_sorted_rows != nullptr) {
    sm90::launch_k_grouped<sm90::Gathered::kA, kAccumulate, Element>(params, stream);
  } else {
    sm90::launch_k_grouped<sm90::Gathered::kNone, kAccumulate, Element>(params, stream);
  }
}

}  // namespace

void launch_weight_grad(const WeightGradParams& params, cudaStream_t stream) {
  if (params.num_experts == 0) return;
  // The sm_90a engine gathers one side.
  const bool gathers_both = params.grad_sorted_rows != nullptr && params.a_sorted_rows != nullptr;
  const bool sm90 = !gathers_both && weight_grad_engine(params.num_rows, device_limits()) == Engine::kSm90;
  dispatch_half(params.dtype, [&](auto element) {
    using Element = decltype(element);
    if (!sm90) weight_grad_sm80<Element>(params, stream);
    else if (params.accumulate) weight_grad_sm90<true, Element>(params, stream);
    else weight_grad_sm90<false, Element>(params, stream);
  });
}

}  // namespace moe
