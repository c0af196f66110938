// What happens to a tile's fp32 outputs: eight neighbouring columns of one row at a time.
//
// Every epilogue has `kGated` (a tile has a gate and an up column for each output column: half gate, half up, or with
// `kInterleaved` in turn), `columns` (output columns in all) and is called by all lanes of a warp at once with: the
// row, the first of the 8 columns, the expert (num_experts: none), whether the place exists, and the 8 outputs
// (`second`: those of the up half of a gated tile).
#pragma once

#include <cstdint>

#include "../common/activation.cuh"
#include "../common/vector.cuh"

namespace moe {

struct OutputPlace {
  int64_t row;
  int column;
  int expert;
  bool exists;      // inside the output
  bool has_expert;  // else the output is 0
};

template <typename Element>
__device__ __forceinline__ void add_bias8(const Element* bias, float (&values)[8]) {
  float added[8];
  load8_readonly(bias, added);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] += added[i];
}

// 16 columns in turn are 8 columns of gate and 8 of up.
__device__ __forceinline__ void deinterleave(const float (&low)[8], const float (&high)[8], float (&gate)[8],
                                             float (&up)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    gate[i] = low[2 * i], up[i] = low[2 * i + 1];
    gate[i + 4] = high[2 * i], up[i + 4] = high[2 * i + 1];
  }
}

// Gate and up of 8 columns, from where those of the first column are when they take turns.
template <typename Element>
__device__ __forceinline__ void load8_interleaved(const Element* from, float (&gate)[8], float (&up)[8]) {
  float low[8], high[8];
  load8_readonly(from, low);
  load8_readonly(from + 8, high);
  deinterleave(low, high, gate, up);
}

template <typename Element>
__device__ __forceinline__ void store8_interleaved(Element* to, const float (&gate)[8], const float (&up)[8]) {
  float low[8], high[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low[2 * i] = gate[i], low[2 * i + 1] = up[i];
    high[2 * i] = gate[i + 4], high[2 * i + 1] = up[i + 4];
  }
  store8(to, low);
  store8(to + 8, high);
}

// c[row] = outputs (+ bias[expert])
template <typename Element>
struct StoreEpilogue {
  static constexpr bool kGated = false, kInterleaved = false;
  const Element* bias;  // [E, columns] or null
  Element* output;      // [S, columns]
  int columns;

  __device__ void operator()(const OutputPlace& place, float (&values)[8], const float (&)[8]) const {
    if (!place.exists) return;
    if (bias != nullptr && place.has_expert) {
      add_bias8(bias + static_cast<int64_t>(place.expert) * columns + place.column, values);
    }
    store8(output + place.row * columns + place.column, values);
  }
};

// output[row] += outputs
struct AccumulateEpilogue {
  static constexpr bool kGated = false, kInterleaved = false;
  float* output;  // [rows, columns]
  int columns;

  __device__ void operator()(const OutputPlace& place, float (&values)[8], const float (&)[8]) const {
    if (!place.exists) return;
    float4* low = reinterpret_cast<float4*>(output + place.row * columns + place.column);
    float4 sums[2] = {low[0], low[1]};
    sums[0].x += values[0], sums[0].y += values[1], sums[0].z += values[2], sums[0].w += values[3];
    sums[1].x += values[4], sums[1].y += values[5], sums[1].z += values[6], sums[1].w += values[7];
    low[0] = sums[0], low[1] = sums[1];
  }
};

// rows[row] = act(outputs (+ bias[expert])), the outputs kept as pre_activation for training.
template <typename Element, ActivationSet kSet, bool kInterleavedColumns = false>
struct ActivateEpilogue {
  static constexpr bool kGated = is_gated(kSet), kInterleaved = kInterleavedColumns;
  static constexpr int kHalves = kGated ? 2 : 1;
  const Element* bias;      // [E, kHalves * columns] or null
  Element* rows;            // [S, columns]
  Element* pre_activation;  // [S, kHalves * columns] or null
  int columns;              // I
  ActivationParams activation;

  __device__ void operator()(const OutputPlace& place, float (&gate)[8], float (&up)[8]) const {
    if (!place.exists) return;
    const int64_t width = static_cast<int64_t>(kHalves) * columns;
    const int column = (kInterleaved ? 2 : 1) * place.column;
    if (bias != nullptr && place.has_expert) {
      const Element* expert_bias = bias + place.expert * width + column;
      if constexpr (kInterleaved) {
        float gate_bias[8], up_bias[8];
        load8_interleaved(expert_bias, gate_bias, up_bias);
#pragma unroll
        for (int i = 0; i < 8; ++i) gate[i] += gate_bias[i], up[i] += up_bias[i];
      } else {
        add_bias8(expert_bias, gate);
        if constexpr (kGated) add_bias8(expert_bias + columns, up);
      }
    }
    if (pre_activation != nullptr) {
      Element* pre = pre_activation + place.row * width + column;
      if constexpr (kInterleaved) {
        store8_interleaved(pre, gate, up);
      } else {
        store8(pre, gate);
        if constexpr (kGated) store8(pre + columns, up);
      }
    }
    float activated[8];
    activate8<kSet>(activation, gate, up, activated);
    store8(rows + place.row * columns + place.column, activated);
  }
};

// The outputs are u = grad_output @ down_proj; see DownProjBackwardParams.
template <typename Element, ActivationSet kSet, bool kInterleavedColumns = false>
struct ActivateBackwardEpilogue {
  static constexpr bool kGated = false, kInterleaved = false;  // the tile itself has one kind of column
  static constexpr bool kGatedActivation = is_gated(kSet);
  static constexpr int kHalves = kGatedActivation ? 2 : 1;
  const float* topk_weights;      // [T * K]
  const int32_t* sorted_rows;     // [S]
  const Element* pre_activation;  // [S, kHalves * columns]
  Element* grad_pre_activation;   // [S, kHalves * columns]
  Element* weighted_rows;         // [S, columns]
  float* partials;                // [S, num_partials]
  int columns;                    // I
  int num_partials;
  ActivationParams activation;

  __device__ void operator()(const OutputPlace& place, float (&u)[8], const float (&)[8]) const {
    float activated[8] = {};
    if (place.exists && place.has_expert) gradients(place, u, activated);
    else if (place.exists) zeros(place);
    else
#pragma unroll
      for (int i = 0; i < 8; ++i) u[i] = -0.0f;  // 0 * -0 changes no sum, not even one of -0
    const float sum = sum_of_16(activated, u);
    if (place.exists && place.has_expert && place.column % kRoutingGradColumns == 0) {
      partials[place.row * num_partials + place.column / kRoutingGradColumns] = sum;
    }
  }

 private:
  // The sum of activated * u. 2 neighbouring lanes hold the 16 columns of one partial sum (kRoutingGradColumns). To the
  // product of column q that of column q + 8 is added first, in one rounding, the even lane's q being 0 .. 3, the odd
  // lane's 4 .. 7: as the sm_90a engine has them.
  __device__ static float sum_of_16(const float (&activated)[8], const float (&u)[8]) {
    const bool is_odd = threadIdx.x % 2 == 1;
    float sums[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float given = is_odd ? activated[i] : __fmul_rn(activated[4 + i], u[4 + i]);
      const float taken = __shfl_xor_sync(~0u, given, 1), taken_u = __shfl_xor_sync(~0u, u[i], 1);
      sums[i] = is_odd ? __fmaf_rn(activated[4 + i], u[4 + i], taken)
                       : __fmaf_rn(taken, taken_u, __fmul_rn(activated[i], u[i]));
    }
    const float half = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return half + __shfl_xor_sync(~0u, half, 1);
  }

  // Stores the row's gradients.
  __device__ void gradients(const OutputPlace& place, const float (&u)[8], float (&activated)[8]) const {
    const int64_t pre_offset = place.row * kHalves * columns + (kInterleavedColumns ? 2 : 1) * place.column;
    // Read-only loads: the compiler may start those of the next rows before the stores of this one.
    const float weight = __ldg(topk_weights + __ldg(sorted_rows + place.row));
    float gate[8], up[8], weighted[8], by_gate[8], by_up[8];
    if constexpr (kInterleavedColumns) {
      load8_interleaved(pre_activation + pre_offset, gate, up);
    } else {
      load8_readonly(pre_activation + pre_offset, gate);
      if constexpr (kGatedActivation) load8_readonly(pre_activation + pre_offset + columns, up);
    }
    dispatch_activation<kSet>(activation.kind, [&](auto tag) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const auto of = activate_backward<kSet, decltype(tag)::kind>(activation, gate[i], up[i]);
        activated[i] = of.activated, by_gate[i] = of.by_gate, by_up[i] = of.by_up;
      }
    });
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      by_gate[i] *= weight * u[i];
      if constexpr (kGatedActivation) by_up[i] *= weight * u[i];
      weighted[i] = activated[i] * weight;
    }
    store_gradients(pre_offset, by_gate, by_up);
    store8(weighted_rows + place.row * columns + place.column, weighted);
  }

  __device__ void store_gradients(int64_t offset, const float (&by_gate)[8], const float (&by_up)[8]) const {
    if constexpr (kInterleavedColumns) {
      store8_interleaved(grad_pre_activation + offset, by_gate, by_up);
    } else {
      store8(grad_pre_activation + offset, by_gate);
      if constexpr (kGatedActivation) store8(grad_pre_activation + offset + columns, by_up);
    }
  }

  __device__ void zeros(const OutputPlace& place) const {
    const int64_t pre_offset = place.row * kHalves * columns + (kInterleavedColumns ? 2 : 1) * place.column;
    const float nothing[8] = {};
    store_gradients(pre_offset, nothing, nothing);
    store8(weighted_rows + place.row * columns + place.column, nothing);
  }
};

}  // namespace moe
