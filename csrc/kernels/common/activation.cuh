// The activations and their derivatives, in fp32.
//
//   gated    a = f(gate) * up     f = silu (swiglu), gelu by erf (geglu) or tanh (geglu_tanh), relu (reglu)
//            a = gate * sigmoid(alpha * gate) * (up + 1)     swiglu_oai
//   ungated  a = f(x)             f = silu, gelu by erf, relu, relu squared
//
// swiglu and swiglu_oai with a limit L clamp first: gate = min(gate, L), up = clamp(up, -L, L); the derivative of a
// clamp is 1 inside and at the limit, 0 outside. Without a limit L is infinity. Source: Shazeer, GLU Variants Improve
// Transformer (2020); the limit: DeepSeek-V4; swiglu_oai: gpt-oss.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.h"
#include "ptx.cuh"

namespace moe {

struct ActivationParams {
  Activation kind;
  float limit;  // of swiglu and swiglu_oai; infinity: none
  float alpha;  // of swiglu_oai
};

struct ValueAndSlope {
  float value, slope;
};

__device__ __forceinline__ ValueAndSlope silu(float x) {
  const float sigmoid = reciprocal_approx(1.0f + exp_approx(-x));
  const float value = x * sigmoid;
  return {value, sigmoid + value * (1.0f - sigmoid)};
}

// x * sigmoid(alpha * x)
__device__ __forceinline__ ValueAndSlope scaled_silu(float x, float alpha) {
  const float sigmoid = reciprocal_approx(1.0f + exp_approx(-alpha * x));
  const float value = x * sigmoid;
  return {value, sigmoid + alpha * value * (1.0f - sigmoid)};
}

__device__ __forceinline__ ValueAndSlope gelu_erf(float x) {
  const float cdf = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
  const float density = 0.39894228040143268f * __expf(-0.5f * x * x);
  return {x * cdf, cdf + x * density};
}

__device__ __forceinline__ ValueAndSlope gelu_tanh(float x) {
  const float scale = 0.79788456080286536f;
  const float cubic = 0.044715f;
  const float t = tanhf(scale * (x + cubic * x * x * x));
  const float inner_slope = scale * (1.0f + 3.0f * cubic * x * x);
  return {0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner_slope};
}

// NaN must pass through relu, as it does in torch; hence the comparison and not fmaxf.
__device__ __forceinline__ ValueAndSlope relu(float x) { return {x <= 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f}; }

__device__ __forceinline__ ValueAndSlope relu_squared(float x) {
  const float positive = relu(x).value;
  return {positive * positive, 2.0f * positive};
}

template <Activation kKind>
__device__ __forceinline__ ValueAndSlope activate_one(float x) {
  if constexpr (kKind == Activation::kSwiGLU || kKind == Activation::kSiLU) return silu(x);
  if constexpr (kKind == Activation::kGeGLU || kKind == Activation::kGELU) return gelu_erf(x);
  if constexpr (kKind == Activation::kGeGLUTanh) return gelu_tanh(x);
  if constexpr (kKind == Activation::kReGLU || kKind == Activation::kReLU) return relu(x);
  if constexpr (kKind == Activation::kReLU2) return relu_squared(x);
}

// Of the gate of a gated activation.
template <Activation kKind>
__device__ __forceinline__ ValueAndSlope activate_gate(const ActivationParams& params, float gate) {
  if constexpr (kKind == Activation::kSwiGLUOai) return scaled_silu(gate, params.alpha);
  else return activate_one<kKind>(gate);
}

// What the gate's activation is multiplied by.
template <Activation kKind>
__device__ __forceinline__ float up_factor(float up) {
  return kKind == Activation::kSwiGLUOai ? up + 1.0f : up;
}

// Which activations a kernel is built for: swiglu alone (a quarter of the code), without a limit or with one; swiglu
// and swiglu_oai; all gated ones; all ungated ones.
enum class ActivationSet { kSwiGLUWithoutLimit, kSwiGLU, kSwiGLUs, kGated, kUngated };

constexpr bool is_gated(ActivationSet set) { return set != ActivationSet::kUngated; }
constexpr bool has_limit(ActivationSet set) { return is_gated(set) && set != ActivationSet::kSwiGLUWithoutLimit; }

// Comparisons let NaN through; fminf and fmaxf would hide it.
template <ActivationSet kSet>
__device__ __forceinline__ float gate_limited(const ActivationParams& params, float gate) {
  return has_limit(kSet) && gate > params.limit ? params.limit : gate;
}
template <ActivationSet kSet>
__device__ __forceinline__ float up_limited(const ActivationParams& params, float up) {
  if constexpr (!has_limit(kSet)) return up;
  return up > params.limit ? params.limit : (up < -params.limit ? -params.limit : up);
}

// Calls body(integral constant of the kind): one uniform branch outside the loop over elements.
template <Activation kKind>
struct ActivationTag {
  static constexpr Activation kind = kKind;
};

template <ActivationSet kSet, typename Body>
__device__ __forceinline__ void dispatch_activation(Activation kind, Body&& body) {
  if constexpr (kSet == ActivationSet::kSwiGLU || kSet == ActivationSet::kSwiGLUWithoutLimit) {
    body(ActivationTag<Activation::kSwiGLU>{});
  } else if constexpr (kSet == ActivationSet::kSwiGLUs) {
    if (kind == Activation::kSwiGLUOai) body(ActivationTag<Activation::kSwiGLUOai>{});
    else body(ActivationTag<Activation::kSwiGLU>{});
  } else if constexpr (kSet == ActivationSet::kGated) {
    switch (kind) {
      case Activation::kSwiGLUOai:
        return body(ActivationTag<Activation::kSwiGLUOai>{});
      case Activation::kGeGLU:
        return body(ActivationTag<Activation::kGeGLU>{});
      case Activation::kGeGLUTanh:
        return body(ActivationTag<Activation::kGeGLUTanh>{});
      case Activation::kReGLU:
        return body(ActivationTag<Activation::kReGLU>{});
      default:
        return body(ActivationTag<Activation::kSwiGLU>{});
    }
  } else {
    switch (kind) {
      case Activation::kGELU:
        return body(ActivationTag<Activation::kGELU>{});
      case Activation::kReLU:
        return body(ActivationTag<Activation::kReLU>{});
      case Activation::kReLU2:
        return body(ActivationTag<Activation::kReLU2>{});
      default:
        return body(ActivationTag<Activation::kSiLU>{});
    }
  }
}

// activated[i] = act(gate[i], up[i]); `up` is not read when ungated.
template <ActivationSet kSet>
__device__ __forceinline__ void activate8(const ActivationParams& params, const float (&gate)[8], const float (&up)[8],
                                          float (&activated)[8]) {
  dispatch_activation<kSet>(params.kind, [&](auto tag) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (is_gated(kSet)) {
        const float u = up_factor<decltype(tag)::kind>(up_limited<kSet>(params, up[i]));
        activated[i] = activate_gate<decltype(tag)::kind>(params, gate_limited<kSet>(params, gate[i])).value * u;
      } else {
        activated[i] = activate_one<decltype(tag)::kind>(gate[i]).value;
      }
    }
  });
}

struct ActivatedAndSlopes {
  float activated, by_gate, by_up;  // the derivatives of `activated`; by_up is not set when ungated
};

template <ActivationSet kSet, Activation kKind>
__device__ __forceinline__ ActivatedAndSlopes activate_backward(const ActivationParams& params, float gate, float up) {
  if constexpr (is_gated(kSet)) {
    const bool gate_clamped = has_limit(kSet) && gate > params.limit;
    const bool up_clamped = has_limit(kSet) && (up > params.limit || up < -params.limit);
    const float factor = up_factor<kKind>(up_limited<kSet>(params, up));
    const ValueAndSlope f = activate_gate<kKind>(params, gate_limited<kSet>(params, gate));
    return {f.value * factor, gate_clamped ? 0.0f : f.slope * factor, up_clamped ? 0.0f : f.value};
  } else {
    const ValueAndSlope f = activate_one<kKind>(gate);
    return {f.value, f.slope, 0.0f};
  }
}

}  // namespace moe
