// The gate: scores, choice of top_k experts, weights.
//
//   scores  = softmax | sigmoid | sqrt(softplus) of router_logits [T, E] (fp32, bf16 or fp16), in fp32
//   choice  = scores + correction_bias, NaN counting as -inf; -inf outside the topk_groups best groups of experts
//   ids     = the top_k largest choices, largest first, equal ones by ascending id   [T, K] int32
//   weights = scores[ids] (/ (sum + 1e-20)) * routed_scaling_factor                   [T, K] fp32
//
// One warp a token, the row in its registers; gate_topk.cuh finds the top K. The accurate functions of all E logits
// would take as long as reading them does. So the row is searched by estimates (one hardware instruction for a
// sigmoid), with the bound lowered by what they may be off by: every element that an exact search would choose is among
// the candidates. Only candidates are scored exactly, and placed by that: the result is that of the exact search. Where
// more than 64 candidates are left (choices too close for the estimates), or the bound is not finite, the choices are
// searched in K rounds.
//
// Deterministic: no atomics, the weights are summed k ascending.
// Source: DeepSeek-V3 report, section 2.1.2; group-limited choice as in its published inference code; sqrtsoftplus as
// in DeepSeek-V4's.

#include "common/launch.cuh"
#include "gate_groups.cuh"

namespace moe {
namespace {

__host__ __device__ inline bool chooses_groups(const GateParams& params) {
  return params.topk_groups < params.num_expert_groups;
}

template <typename Layout>
__host__ __device__ inline int warp_memory_bytes(const GateParams& params) {
  const int group_floats = chooses_groups(params) ? (params.num_expert_groups + 3) / 4 * 4 : 0;
  return static_cast<int>(sizeof(GateStorage)) + (Layout::kExperts + group_floats) * static_cast<int>(sizeof(float));
}

template <typename Layout>
__device__ __forceinline__ WarpMemory warp_memory(const GateParams& params) {
  extern __shared__ __align__(16) char gate_memory[];
  char* base = gate_memory + threadIdx.x / kWarpSize * warp_memory_bytes<Layout>(params);
  WarpMemory memory;
  memory.storage = reinterpret_cast<GateStorage*>(base);
  memory.values = reinterpret_cast<float*>(base + sizeof(GateStorage));
  memory.group_scores = memory.values + Layout::kExperts;
  return memory;
}

// ----------------------------------------------------------------------------------------------------------- estimates

// How far apart two estimates may be when the choices are the other way round: absolute + relative * |estimate|.
struct Slack {
  float absolute, relative;
};

// Logits become estimates that rise with the choices, -inf past the last expert.
//   sigmoid       2 * choice - 1 = tanh(x / 2) + 2 * bias, each within 2^-11
//   sqrtsoftplus  the choice within 5e-4: the root of an error of 2^-22 near 0
//   softmax       the logit: its score's errors, below 2^-21 relatively, and x - max rounded, for max - x up to 75;
//                 with a bias the choice itself
template <typename Layout, ScoreFn kScoreFn>
__device__ __forceinline__ Slack estimate_choices(const GateParams& params, const RowStatistics& row, int lane,
                                                  float (&x)[Layout::kValues]) {
  constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
  constexpr float kBiasScale = kScoreFn == ScoreFn::kSigmoid ? 2.0f : 1.0f;
  const bool biased = params.correction_bias != nullptr;
  Slack slack = {kBoundMargin * 1e-6f, kBoundMargin};
  if constexpr (kScoreFn == ScoreFn::kSigmoid) {
#pragma unroll
    for (int i = 0; i < Layout::kValues; ++i) x[i] = tanh_approx(0.5f * x[i]);
    slack.absolute = 1e-3f;
  } else if constexpr (kScoreFn == ScoreFn::kSqrtSoftplus) {
#pragma unroll
    for (int i = 0; i < Layout::kValues; ++i) {
      const float tail = log2_approx(1.0f + exp2_approx(-kLog2E * fabsf(x[i])));
      x[i] = sqrt_approx(fmaf(kLn2, tail, fmaxf(x[i], 0.0f)));
    }
    slack.absolute = 1.1e-3f;
  } else if (biased) {
    score_row<ScoreFn::kSoftmax>(x, row);
  } else {
    slack.absolute = 2e-5f;
  }
  if (biased) {
    float bias[Layout::kValues];
    load_row<float, Layout>(params.correction_bias, params.num_experts, lane, 0.0f, bias);
#pragma unroll
    for (int i = 0; i < Layout::kValues; ++i) x[i] = fmaf(kBiasScale, bias[i], x[i]);
  }
  if (params.num_experts < Layout::kExperts) {
#pragma unroll
    for (int i = 0; i < Layout::kValues; ++i) {
      if (Layout::expert(lane, i) >= params.num_experts) x[i] = -INFINITY;
    }
  }
  return slack;
}

// Whether estimates as high as the bound keep to their slack; false also for NaN and infinities.
template <ScoreFn kScoreFn>
__device__ __forceinline__ bool estimates_hold(const GateParams& params, const RowStatistics& row, float bound) {
  bool hold = fabsf(bound) < kMaxBound;
  if constexpr (kScoreFn == ScoreFn::kSoftmax) {
    hold = hold && row.inverse_sum > 0.0f && (params.correction_bias != nullptr || row.max - bound < 75.0f);
  }
  return hold;
}

// Choice and score of one expert, as the formula says.
template <ScoreFn kScoreFn, typename T>
__device__ __forceinline__ Scored score_exactly(const GateParams& params, const RowStatistics& row, int64_t token,
                                                int id) {
  const float logit = to_float(static_cast<const T*>(params.router_logits)[token * params.num_experts + id]);
  const float bias = params.correction_bias != nullptr ? params.correction_bias[id] : 0.0f;
  const float score = score_of<kScoreFn>(logit, row);
  return {fmaxf(score + bias, -INFINITY), score};
}

// The K rounds over the exact choices: in loops of few registers, because they are seldom used.
template <typename Layout, ScoreFn kScoreFn, typename T>
__device__ __forceinline__ void search_all(const GateParams& params, const RowStatistics& row, const WarpMemory& memory,
                                           int64_t token, int lane) {
#pragma unroll 1
  for (int id = lane; id < Layout::kExperts; id += kWarpSize) {
    memory.values[id] = id < params.num_experts ? score_exactly<kScoreFn, T>(params, row, token, id).choice : NAN;
  }
  __syncwarp();
  choose_by_rounds<Layout>(memory, params.top_k, lane);
  if (lane < params.top_k) {
    memory.storage->weights[lane] = score_exactly<kScoreFn, T>(params, row, token, memory.storage->chosen[lane]).score;
  }
  __syncwarp();
}

// ------------------------------------------------------------------------------------------------------------- kernels

// storage->weights holds the scores, 0 from top_k on.
__device__ __forceinline__ void store_weights(const GateParams& params, const GateStorage* storage, int64_t token,
                                              int lane, int id) {
  float weight = storage->weights[lane];
  if (params.renormalize) {
    float sum = 0.0f;
    for (int k = 0; k < params.top_k; k += 4) {
      const float4 terms = *reinterpret_cast<const float4*>(storage->weights + k);
      sum = ((sum + terms.x) + terms.y) + terms.z + terms.w;
    }
    weight = weight / (sum + kRenormalizeEpsilon);
  }
  if (lane < params.top_k) {
    params.topk_weights[token * params.top_k + lane] = weight * params.routed_scaling_factor;
    params.topk_ids[token * params.top_k + lane] = id;
  }
}

// Blocks on a multiprocessor, by registers: as many as the compiler can serve without spilling.
template <typename Layout, ScoreFn kScoreFn>
constexpr int kGateBlocks =
    Layout::kValues < 24 ? 8 : (Layout::kValues == 24 ? 7 : 5) - (kScoreFn == ScoreFn::kSoftmax ? 2 : 0);

template <typename Layout, ScoreFn kScoreFn, typename T>
__global__ void __launch_bounds__(kGateWarps* kWarpSize, kGateBlocks<Layout, kScoreFn>)
    gate_kernel(const GateParams params) {
  const int lane = threadIdx.x % kWarpSize;
  const WarpMemory memory = warp_memory<Layout>(params);
  GateStorage* storage = memory.storage;
  storage->weights[lane] = 0.0f;
  wait_for_previous_kernels();
  allow_next_kernel();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kGateWarps + threadIdx.x / kWarpSize;
  if (token >= params.num_tokens) return;
  float x[Layout::kValues];
  load_logits_of<T, Layout>(params.router_logits, token, params.num_experts, lane, x);
  RowStatistics row;
  if constexpr (kScoreFn == ScoreFn::kSoftmax) row = softmax_statistics(x);
  const Slack slack = estimate_choices<Layout, kScoreFn>(params, row, lane, x);
  const float bound = lower_bound_of_top(x, params.top_k, lane);
  const float lowered = bound - fmaf(slack.relative, fabsf(bound), slack.absolute);
  const int total = collect_candidates<Layout>(storage, lowered, lane, x);
  if (total <= kMaxCandidates && estimates_hold<kScoreFn>(params, row, bound)) {
    place_all(storage, total, params.top_k, lane,
              [&](int id) { return score_exactly<kScoreFn, T>(params, row, token, id); });
  } else {
    search_all<Layout, kScoreFn, T>(params, row, memory, token, lane);
  }
  store_weights(params, storage, token, lane, storage->chosen[lane]);
}

// Groups, or given ids, of which an id outside [0, E) weighs nothing. One token a warp.
template <typename Layout>
__global__ void __launch_bounds__(kGateWarps* kWarpSize, kGateBlocks<Layout, ScoreFn::kSoftmax>)
    gate_groups_kernel(const GateParams params) {
  wait_for_previous_kernels();
  allow_next_kernel();
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kGateWarps + threadIdx.x / kWarpSize;
  if (token >= params.num_tokens) return;
  const WarpMemory memory = warp_memory<Layout>(params);
  RowStatistics row;
  const bool chooses = params.given_ids == nullptr;
  if (chooses || params.score_fn == ScoreFn::kSoftmax) {
    float x[Layout::kValues];
    load_logits<Layout>(params.router_logits, params.logits_dtype, token, params.num_experts, lane, x);
    if (params.score_fn == ScoreFn::kSoftmax) row = softmax_statistics(x);
    if (chooses) choose_of_groups<Layout>(params, row, memory, lane, x);
  }
  int id = -1;
  if (lane < params.top_k) id = chooses ? memory.storage->chosen[lane] : params.given_ids[token * params.top_k + lane];
  __syncwarp();
  const bool weighs = id >= 0 && id < params.num_experts;
  memory.storage->weights[lane] = weighs ? score_of_expert(params, row, token, id) : 0.0f;
  __syncwarp();
  store_weights(params, memory.storage, token, lane, id);
}

// -------------------------------------------------------------------------------------------------------------- launch

template <typename Function>
void dispatch_score_fn(ScoreFn score_fn, Function&& function) {
  switch (score_fn) {
    case ScoreFn::kSoftmax:
      return function(std::integral_constant<ScoreFn, ScoreFn::kSoftmax>());
    case ScoreFn::kSigmoid:
      return function(std::integral_constant<ScoreFn, ScoreFn::kSigmoid>());
    case ScoreFn::kSqrtSoftplus:
      return function(std::integral_constant<ScoreFn, ScoreFn::kSqrtSoftplus>());
  }
}

template <typename Layout, ScoreFn kScoreFn>
auto gate_kernel_for(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return gate_kernel<Layout, kScoreFn, __nv_bfloat16>;
    case DType::kFloat16:
      return gate_kernel<Layout, kScoreFn, __half>;
    default:
      return gate_kernel<Layout, kScoreFn, float>;
  }
}

}  // namespace

void launch_gate(const GateParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const auto blocks = static_cast<unsigned>((params.num_tokens + kGateWarps - 1) / kGateWarps);
  constexpr int kThreads = kGateWarps * kWarpSize;
  dispatch_row_layout(params.num_experts, [&](auto layout) {
    using Layout = decltype(layout);
    const int bytes = kGateWarps * warp_memory_bytes<Layout>(params);  // at most 36 KB
    if (params.given_ids != nullptr || chooses_groups(params)) {
      return launch_overlapped("gate", gate_groups_kernel<Layout>, blocks, kThreads, bytes, stream, params);
    }
    dispatch_score_fn(params.score_fn, [&](auto score_fn) {
      launch_overlapped("gate", gate_kernel_for<Layout, decltype(score_fn)::value>(params.logits_dtype), blocks,
                        kThreads, bytes, stream, params);
    });
  });
}

}  // namespace moe
