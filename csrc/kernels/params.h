// What each kernel launcher takes: plain pointers and sizes, one struct a stage, the shape beside every pointer.
//
// T tokens, H hidden size, I expert width, E experts, K experts a token, S = T*K rows.
// W is the width of the pre-activation: 2*I for a gated activation, I for an ungated one.
// All pointers are device pointers to contiguous, 16-byte aligned memory unless a comment says otherwise. Sizes are
// elements.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace moe {

enum class DType { kFloat32, kBFloat16, kFloat16 };

enum class ScoreFn { kSoftmax, kSigmoid, kSqrtSoftplus };

enum class Activation { kSwiGLU, kSwiGLUOai, kGeGLU, kGeGLUTanh, kReGLU, kSiLU, kGELU, kReLU, kReLU2 };

// What `plan` makes of the routing.
struct Plan {
  const int32_t* expert_offsets;  // [E + 1] exclusive; the last one counts the rows that belong to an expert
  const int32_t* sorted_rows;     // [S] flat slot t*K + k of each row, expert by expert; -1 beyond expert_offsets[E]
  const int32_t* row_of_slot;     // [T, K] row of each slot, -1 where the id was outside [0, E)
};

struct GateParams {
  const void* router_logits;     // [T, E] of logits_dtype
  const float* correction_bias;  // [E] or null
  const int32_t* given_ids;      // [T, K] or null: then the gate chooses
  float* topk_weights;           // [T, K]
  int32_t* topk_ids;             // [T, K]
  int64_t num_tokens;
  int num_experts;        // 1 .. 1024
  int top_k;              // 1 .. 32
  int num_expert_groups;  // divides num_experts
  int topk_groups;        // 1 .. num_expert_groups
  DType logits_dtype;
  ScoreFn score_fn;
  bool renormalize;
  float routed_scaling_factor;
};

struct GateBackwardParams {
  const float* grad_topk_weights;  // [T, K]
  const void* router_logits;       // [T, E] of logits_dtype
  const int32_t* topk_ids;         // [T, K]
  void* grad_logits;               // [T, E] of logits_dtype
  int64_t num_tokens;
  int num_experts;
  int top_k;
  DType logits_dtype;
  ScoreFn score_fn;
  bool renormalize;
  float routed_scaling_factor;
};

struct PlanParams {
  const int32_t* topk_ids;  // [T, K]
  int32_t* expert_offsets;  // [E + 1]
  int32_t* sorted_rows;     // [S]
  int32_t* row_of_slot;     // [T, K]
  void* workspace;          // plan_workspace_bytes(num_slots, num_experts), contents undefined
  int64_t num_slots;        // S = T*K < 2^31
  int num_experts;          // 1 .. 4096
};

struct CombineParams {
  const void* rows;            // [S, H] of dtype
  const float* topk_weights;   // [T, K] or null: plain sum
  const int32_t* row_of_slot;  // [T, K]
  void* output;                // [T, H] of dtype
  int64_t num_tokens;
  int hidden_size;  // a multiple of 8
  int top_k;
  DType dtype;
};

struct CombineBackwardParams {
  const void* grad_output;     // [T, H] of dtype
  const void* rows;            // [S, H] of dtype
  const float* topk_weights;   // [T, K]
  const int32_t* sorted_rows;  // [S]
  const int32_t* row_of_slot;  // [T, K]
  void* grad_rows;             // [S, H] of dtype; rows without an expert become 0
  float* grad_topk_weights;    // [T, K]
  int64_t num_tokens;
  int hidden_size;
  int top_k;
  DType dtype;
};

struct PermuteParams {
  const void* hidden_states;   // [T, H] of dtype
  const int32_t* sorted_rows;  // [S]
  const int32_t* row_of_slot;  // [T, K]
  void* rows;                  // [S, H] of dtype; rows without an expert become 0
  int64_t num_tokens;
  int hidden_size;
  int top_k;
  DType dtype;
};

// out[e] = sum over the rows r of expert e, ascending, of weight(r) * grad(r).
struct BiasGradParams {
  const void* grad;           // [T, N] when sorted_rows is given (row r reads token sorted_rows[r] / K), else [S, N]
  const float* topk_weights;  // [T, K] or null: 1
  const int32_t* expert_offsets;  // [E + 1]
  const int32_t* sorted_rows;     // [S] or null
  void* output;                   // [E, N] of dtype
  int num_experts;
  int width;  // N, a multiple of 8
  int top_k;
  DType dtype;
};

// grad_topk_weights[t, k] = sum over p of partials[row_of_slot[t, k], p] (+ dot(grad_output[t],
// down_bias[e])).
struct RoutingGradParams {
  const float* partials;          // [S, num_partials]; a row without an expert is never read
  const int32_t* row_of_slot;     // [T, K]
  const void* grad_output;        // [T, H] of dtype, read only with down_bias
  const void* down_bias;          // [E, H] of dtype or null
  const int32_t* expert_offsets;  // [E + 1], read only with down_bias: finds the expert of a row
  float* grad_topk_weights;       // [T, K]; 0 for a slot without a row
  int64_t num_tokens;
  int num_partials;
  int num_experts;
  int hidden_size;
  int top_k;
  DType dtype;
};

// pre[r] = hidden_states[sorted_rows[r] / K] @ gate_up_proj[e].T (+ gate_up_bias[e]); rows[r] = act(pre[r]).
// Transposed: @ gate_up_proj[e]; not concatenated: gate and up take turns in the W columns.
struct UpProjParams {
  const void* hidden_states;  // [T, H] of dtype
  const void* gate_up_proj;   // [E, W, H]; gated: the I gate rows first, then the I up rows; [E, H, W] transposed
  const void* gate_up_bias;   // [E, W] or null
  Plan plan;                  // row_of_slot is not read
  void* rows;                 // [S, I]; rows without an expert become 0, here and in every output of S rows
  void* pre_activation;       // [S, W] or null: not kept
  int64_t num_rows;           // S
  int num_experts;
  int hidden_size;
  int intermediate_size;
  int top_k;
  DType dtype;
  Activation activation;
  float swiglu_limit;  // infinity: none
  float swiglu_alpha;  // of swiglu_oai
  bool is_transposed;
  bool is_concatenated;
};

// c[r] = a[r] @ b[e].T (+ bias[e]) or a[r] @ b[e]: the down projection, the input gradient of the up projection,
// grouped_mm.
struct GroupedMmParams {
  const void* a;                  // [S, k] of dtype
  const void* b;                  // [E, n, k] when transpose_b, else [E, k, n]
  const void* bias;               // [E, n] or null
  const int32_t* expert_offsets;  // [E + 1]
  void* c;                        // [S, n]
  int64_t num_rows;
  int num_experts;
  int n;
  int k;
  bool transpose_b;
  DType dtype;
};

// u[r] = grad_output[t] @ down_proj[e], kept in fp32 registers; then, with a and its derivatives from
// pre_activation[r]: grad_pre[r] = w * u * act'(pre), weighted_rows[r] = w * a, partials[r, p] = dot(a, u) over 16
// columns.
struct DownProjBackwardParams {
  const void* grad_output;     // [T, H] of dtype
  const float* topk_weights;   // [T, K]
  const void* down_proj;       // [E, H, I]; [E, I, H] transposed
  const void* pre_activation;  // [S, W]
  Plan plan;                   // row_of_slot is not read
  void* grad_pre_activation;   // [S, W]
  void* weighted_rows;         // [S, I]
  float* partials;             // [S, routing_grad_partials(I)]
  int64_t num_rows;
  int num_experts;
  int hidden_size;
  int intermediate_size;
  int top_k;
  DType dtype;
  Activation activation;
  float swiglu_limit;
  float swiglu_alpha;
  bool is_transposed;
  bool is_concatenated;
};

// Columns of I behind one partial sum of the routing-weight gradient. One number for every tile, so that no tile
// changes a bit.
constexpr int kRoutingGradColumns = 16;
inline int routing_grad_partials(int intermediate_size) {
  return (intermediate_size + kRoutingGradColumns - 1) / kRoutingGradColumns;
}

// out[e] = sum over the rows r of expert e, ascending, of outer(grad(r), a(r)), or out[e] += that sum. A side with
// sorted_rows gathers: row r reads row sorted_rows[r] / K of its tensor.
struct WeightGradParams {
  const void* grad;                 // [S or T, n] of dtype
  const void* a;                    // [S or T, k] of dtype
  const int32_t* expert_offsets;    // [E + 1]
  const int32_t* grad_sorted_rows;  // [S] or null
  const int32_t* a_sorted_rows;     // [S] or null
  void* output;  // [E, n, k] of dtype, exactly 0 for an expert without rows; or of fp32 when accumulating
  bool accumulate;
  int64_t num_rows;  // S
  int num_experts;
  int n;
  int k;
  int top_k;
  DType dtype;
};

void launch_gate(const GateParams& params, cudaStream_t stream);
void launch_gate_backward(const GateBackwardParams& params, cudaStream_t stream);
int64_t plan_workspace_bytes(int64_t num_slots, int num_experts);
void launch_plan(const PlanParams& params, cudaStream_t stream);
void launch_combine(const CombineParams& params, cudaStream_t stream);
void launch_combine_backward(const CombineBackwardParams& params, cudaStream_t stream);
void launch_up_proj(const UpProjParams& params, cudaStream_t stream);
void launch_grouped_mm(const GroupedMmParams& params, cudaStream_t stream);
void launch_down_proj_backward(const DownProjBackwardParams& params, cudaStream_t stream);
void launch_weight_grad(const WeightGradParams& params, cudaStream_t stream);
void launch_permute(const PermuteParams& params, cudaStream_t stream);
void launch_bias_grad(const BiasGradParams& params, cudaStream_t stream);
void launch_routing_grad(const RoutingGradParams& params, cudaStream_t stream);

}  // namespace moe
