// grouped_mm: c[r] = a[r] @ b[e].T (+ bias[e]) or a[r] @ b[e]. It is the down projection of the forward flow, the input gradient of
// the up projection, and a public operation.
//
//   a [S, k], b [E, n, k] or [E, k, n]  ->  c [S, n]
#include "grouped_gemm/sm80/launch.cuh"

namespace moe {

void launch_grouped_mm(const GroupedMmParams& params, cudaStream_t stream) {
  dispatch_half(params.dtype, [&](auto element) {
    using Element = decltype(element);
    const sm80::MGroupedOperands<Element> operands{static_cast<const Element*>(params.a),
                                                   nullptr,
                                                   1,
                                                   static_cast<const Element*>(params.b),
                                                   params.expert_offsets,
                                                   params.num_experts,
                                                   static_cast<int>(params.num_rows),
                                                   params.n,
                                                   params.k};
    const StoreEpilogue<Element> epilogue{static_cast<const Element*>(params.bias), static_cast<Element*>(params.c), params.n};
    if (params.transpose_b) {
      sm80::launch_m_grouped<true>(operands, epilogue, stream, "grouped_mm");
    } else {
      sm80::launch_m_grouped<false>(operands, epilogue, stream, "grouped_mm");
    }
  });
}

}  // namespace moe
