// weight_grad: out[e] = sum over the rows of expert e of outer(grad, a): the weight gradients of both projections and of grouped_mm.
//
//   grad [S or T, n], a [S or T, k]  ->  out [E, n, k]; see grouped_gemm/sm80/k_grouped.cuh
#include "grouped_gemm/sm80/launch.cuh"

namespace moe {

void launch_weight_grad(const WeightGradParams& params, cudaStream_t stream) {
  dispatch_half(params.dtype, [&](auto element) {
    using Element = decltype(element);
    const sm80::KGroupedOperands<Element> operands{static_cast<const Element*>(params.grad),
                                                   static_cast<const Element*>(params.a),
                                                   params.expert_offsets,
                                                   params.grad_sorted_rows,
                                                   params.a_sorted_rows,
                                                   params.top_k,
                                                   params.num_experts,
                                                   params.n,
                                                   params.k};
    const StoreEpilogue<Element> epilogue{nullptr, static_cast<Element*>(params.output), params.k};
    if (weight_grad_tile(device_limits()) == TileChoice::k128x256) {
      sm80::launch_k_grouped<WeightGradTile>(operands, epilogue, stream, "weight_grad");
    } else {
      sm80::launch_k_grouped<Tile128x128>(operands, epilogue, stream, "weight_grad");
    }
  });
}

}  // namespace moe
