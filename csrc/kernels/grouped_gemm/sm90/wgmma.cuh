// wgmma: the asynchronous product of a warpgroup (128 threads), operands in shared memory, outputs in registers.
//
//   d [64, N] += a [64, 16] * b [16, N], fp32 accumulation; both operands in the 128-byte swizzle of TMA.
//
// A thread holds, of row 16 warp + lane / 4, columns 8 j + 2 (lane % 4) and the next in d[4 j], d[4 j + 1]; in d[4 j +
// 2], d[4 j + 3] the same of the row 8 below. Source: PTX ISA 9.0, section Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace moe::sm90 {

constexpr int kDepth = 64;           // of the contraction a stage: one swizzle period of 128 bytes
constexpr int kSteps = kDepth / 16;  // products a stage
constexpr int kMnChunkBytes = 8192;  // MN-major: [64 of the contraction][64 columns], chunk after chunk

// Descriptor of an operand whose stage begins at a 1024-aligned shared address, for its first 16 of the contraction.
//   K-major   [rows][64 of the contraction]; rows r and up: + r * 128, r a multiple of 8; the next 16: + 32 bytes
//   MN-major  chunks of [64 of the contraction][64 rows]; the next chunk: + kMnChunkBytes; the next 16: + 2048 bytes
template <bool kKMajor>
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t shared) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kStride = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kLeading = kKMajor ? 0 : uint64_t{kMnChunkBytes >> 4} << 16;
  return kSwizzle128 | kStride | kLeading | ((shared & 0x3FFFF) >> 4);
}

// Between descriptors of neighbouring steps.
template <bool kKMajor>
constexpr uint64_t kDescriptorStep = (kKMajor ? 32 : 2048) >> 4;

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving one of the first kCount registers of a product in flight.
template <int kCount, int kAll>
__device__ __forceinline__ void pin(float (&d)[kAll]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Lists for asm statements: the names and the operands of the first n / 2 outputs, n columns.
#define MOE_NAMES_8 "%0, %1, %2, %3"
#define MOE_NAMES_16 MOE_NAMES_8 ", %4, %5, %6, %7"
#define MOE_NAMES_24 MOE_NAMES_16 ", %8, %9, %10, %11"
#define MOE_NAMES_32 MOE_NAMES_24 ", %12, %13, %14, %15"
#define MOE_NAMES_40 MOE_NAMES_32 ", %16, %17, %18, %19"
#define MOE_NAMES_48 MOE_NAMES_40 ", %20, %21, %22, %23"
#define MOE_NAMES_56 MOE_NAMES_48 ", %24, %25, %26, %27"
#define MOE_NAMES_64 MOE_NAMES_56 ", %28, %29, %30, %31"
#define MOE_NAMES_72 MOE_NAMES_64 ", %32, %33, %34, %35"
#define MOE_NAMES_80 MOE_NAMES_72 ", %36, %37, %38, %39"
#define MOE_NAMES_88 MOE_NAMES_80 ", %40, %41, %42, %43"
#define MOE_NAMES_96 MOE_NAMES_88 ", %44, %45, %46, %47"
#define MOE_NAMES_104 MOE_NAMES_96 ", %48, %49, %50, %51"
#define MOE_NAMES_112 MOE_NAMES_104 ", %52, %53, %54, %55"
#define MOE_NAMES_120 MOE_NAMES_112 ", %56, %57, %58, %59"
#define MOE_NAMES_128 MOE_NAMES_120 ", %60, %61, %62, %63"
#define MOE_NAMES_136 MOE_NAMES_128 ", %64, %65, %66, %67"
#define MOE_NAMES_144 MOE_NAMES_136 ", %68, %69, %70, %71"
#define MOE_NAMES_152 MOE_NAMES_144 ", %72, %73, %74, %75"
#define MOE_NAMES_160 MOE_NAMES_152 ", %76, %77, %78, %79"
#define MOE_NAMES_168 MOE_NAMES_160 ", %80, %81, %82, %83"
#define MOE_NAMES_176 MOE_NAMES_168 ", %84, %85, %86, %87"
#define MOE_NAMES_184 MOE_NAMES_176 ", %88, %89, %90, %91"
#define MOE_NAMES_192 MOE_NAMES_184 ", %92, %93, %94, %95"
#define MOE_NAMES_256                                                                                          \
  MOE_NAMES_192                                                                                                \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
  "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MOE_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOE_OUTPUTS_8 MOE_FOUR(0)
#define MOE_OUTPUTS_16 MOE_OUTPUTS_8, MOE_FOUR(4)
#define MOE_OUTPUTS_24 MOE_OUTPUTS_16, MOE_FOUR(8)
#define MOE_OUTPUTS_32 MOE_OUTPUTS_24, MOE_FOUR(12)
#define MOE_OUTPUTS_40 MOE_OUTPUTS_32, MOE_FOUR(16)
#define MOE_OUTPUTS_48 MOE_OUTPUTS_40, MOE_FOUR(20)
#define MOE_OUTPUTS_56 MOE_OUTPUTS_48, MOE_FOUR(24)
#define MOE_OUTPUTS_64 MOE_OUTPUTS_56, MOE_FOUR(28)
#define MOE_OUTPUTS_72 MOE_OUTPUTS_64, MOE_FOUR(32)
#define MOE_OUTPUTS_80 MOE_OUTPUTS_72, MOE_FOUR(36)
#define MOE_OUTPUTS_88 MOE_OUTPUTS_80, MOE_FOUR(40)
#define MOE_OUTPUTS_96 MOE_OUTPUTS_88, MOE_FOUR(44)
#define MOE_OUTPUTS_104 MOE_OUTPUTS_96, MOE_FOUR(48)
#define MOE_OUTPUTS_112 MOE_OUTPUTS_104, MOE_FOUR(52)
#define MOE_OUTPUTS_120 MOE_OUTPUTS_112, MOE_FOUR(56)
#define MOE_OUTPUTS_128 MOE_OUTPUTS_120, MOE_FOUR(60)
#define MOE_OUTPUTS_136 MOE_OUTPUTS_128, MOE_FOUR(64)
#define MOE_OUTPUTS_144 MOE_OUTPUTS_136, MOE_FOUR(68)
#define MOE_OUTPUTS_152 MOE_OUTPUTS_144, MOE_FOUR(72)
#define MOE_OUTPUTS_160 MOE_OUTPUTS_152, MOE_FOUR(76)
#define MOE_OUTPUTS_168 MOE_OUTPUTS_160, MOE_FOUR(80)
#define MOE_OUTPUTS_176 MOE_OUTPUTS_168, MOE_FOUR(84)
#define MOE_OUTPUTS_184 MOE_OUTPUTS_176, MOE_FOUR(88)
#define MOE_OUTPUTS_192 MOE_OUTPUTS_184, MOE_FOUR(92)
#define MOE_OUTPUTS_256                                                                                     \
  MOE_OUTPUTS_192, MOE_FOUR(96), MOE_FOUR(100), MOE_FOUR(104), MOE_FOUR(108), MOE_FOUR(112), MOE_FOUR(116), \
      MOE_FOUR(120), MOE_FOUR(124)

// a .. tb: the numbers of the operands behind the outputs.
#define MOE_WGMMA(type, n, a_name, b_name, accumulate_name, ta, tb)                                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_name ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n     \
               "k16.f32." type "." type " {" MOE_NAMES_##n "}, " a_name ", " b_name ", p, 1, 1, " ta ", " tb ";\n}" \
               : MOE_OUTPUTS_##n                                                                                    \
               : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB))
#define MOE_WGMMA_CASE(n, a, b, accumulate, ta, tb)                                                       \
  if constexpr (kColumns == n) {                                                                          \
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) MOE_WGMMA("bf16", n, a, b, accumulate, ta, tb); \
    else MOE_WGMMA("f16", n, a, b, accumulate, ta, tb);                                                   \
  }

// d [64, kColumns] = a * b (+ d if accumulate), in the first kColumns / 2 registers. A transposed operand is MN-major.
template <typename Element, bool kTransposeA, bool kTransposeB, int kColumns, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kColumns / 2 <= kCount);
  static_assert((kColumns % 8 == 0 && kColumns <= 192) || kColumns == 256, "spelled out below are these alone");
  MOE_WGMMA_CASE(8, "%4", "%5", "%6", "%7", "%8")
  MOE_WGMMA_CASE(16, "%8", "%9", "%10", "%11", "%12")
  MOE_WGMMA_CASE(24, "%12", "%13", "%14", "%15", "%16")
  MOE_WGMMA_CASE(32, "%16", "%17", "%18", "%19", "%20")
  MOE_WGMMA_CASE(40, "%20", "%21", "%22", "%23", "%24")
  MOE_WGMMA_CASE(48, "%24", "%25", "%26", "%27", "%28")
  MOE_WGMMA_CASE(56, "%28", "%29", "%30", "%31", "%32")
  MOE_WGMMA_CASE(64, "%32", "%33", "%34", "%35", "%36")
  MOE_WGMMA_CASE(72, "%36", "%37", "%38", "%39", "%40")
  MOE_WGMMA_CASE(80, "%40", "%41", "%42", "%43", "%44")
  MOE_WGMMA_CASE(88, "%44", "%45", "%46", "%47", "%48")
  MOE_WGMMA_CASE(96, "%48", "%49", "%50", "%51", "%52")
  MOE_WGMMA_CASE(104, "%52", "%53", "%54", "%55", "%56")
  MOE_WGMMA_CASE(112, "%56", "%57", "%58", "%59", "%60")
  MOE_WGMMA_CASE(120, "%60", "%61", "%62", "%63", "%64")
  MOE_WGMMA_CASE(128, "%64", "%65", "%66", "%67", "%68")
  MOE_WGMMA_CASE(136, "%68", "%69", "%70", "%71", "%72")
  MOE_WGMMA_CASE(144, "%72", "%73", "%74", "%75", "%76")
  MOE_WGMMA_CASE(152, "%76", "%77", "%78", "%79", "%80")
  MOE_WGMMA_CASE(160, "%80", "%81", "%82", "%83", "%84")
  MOE_WGMMA_CASE(168, "%84", "%85", "%86", "%87", "%88")
  MOE_WGMMA_CASE(176, "%88", "%89", "%90", "%91", "%92")
  MOE_WGMMA_CASE(184, "%92", "%93", "%94", "%95", "%96")
  MOE_WGMMA_CASE(192, "%96", "%97", "%98", "%99", "%100")
  MOE_WGMMA_CASE(256, "%128", "%129", "%130", "%131", "%132")
}

#undef MOE_WGMMA_CASE
#undef MOE_WGMMA

}  // namespace moe::sm90
