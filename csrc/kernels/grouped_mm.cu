// grouped_mm: c[r] = a[r] @ b[e].T (+ bias[e]) or a[r] @ b[e]. It is the down projection of the forward flow, the input
// gradient of the up projection, and a public operation.
//
//   a [S, k], b [E, n, k] or [E, k, n]  ->  c [S, n]
#include "grouped_gemm/sm80/launch.cuh"
#include "grouped_gemm/sm90/launch.cuh"

namespace moe {

namespace {

template <bool kTransposeB, typename Element>
void grouped_mm_sm80(const GroupedMmParams& params, cudaStream_t stream) {
  const sm80::MGroupedOperands<Element> operands{static_cast<const Element*>(params.a),
                                                 nullptr,
                                                 1,
                                                 static_cast<const Element*>(params.b),
                                                 params.expert_offsets,
                                                 params.num_experts,
                                                 static_cast<int>(params.num_rows),
                                                 params.n,
                                                 params.k};
  const StoreEpilogue<Element> epilogue{static_cast<const Element*>(params.bias), static_cast<Element*>(params.c),
                                        params.n};
  sm80::launch_m_grouped<kTransposeB>(operands, epilogue, stream, "grouped_mm");
}

template <bool kTransposeB, typename Element>
void grouped_mm_sm90(const GroupedMmParams& params, cudaStream_t stream) {
  const sm90::Product product{params.dtype,
                              params.a,
                              nullptr,
                              1,
                              params.b,
                              params.expert_offsets,
                              params.num_experts,
                              static_cast<int>(params.num_rows),
                              params.n,
                              params.k};
  const sm90::SwappedStoreEpilogue<Element> epilogue{
      sm90::ragged_map(params.dtype, params.c, params.n, params.n, sm90::kPieceRows), static_cast<Element*>(params.c),
      static_cast<const Element*>(params.bias), params.n};
  sm90::launch_in_order<kTransposeB, Element>(product, epilogue, stream, "grouped_mm");
}

}  // namespace

void launch_grouped_mm(const GroupedMmParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const bool sm90 = params.num_experts > 0 &&
                    choose_engine(params.num_rows, int64_t{params.n} * params.k, device_limits()) == Engine::kSm90;
  dispatch_half(params.dtype, [&](auto element) {
    using Element = decltype(element);
    if (params.transpose_b) {
      sm90 ? grouped_mm_sm90<true, Element>(params, stream) : grouped_mm_sm80<true, Element>(params, stream);
    } else {
      sm90 ? grouped_mm_sm90<false, Element>(params, stream) : grouped_mm_sm80<false, Element>(params, stream);
    }
  });
}

}  // namespace moe
