// Division of 31-bit numbers by a number known on the host: a multiplication and a shift where a division takes 25
// instructions.
#pragma once

#include <cstdint>

namespace moe {

class Divisor {
 public:
  Divisor() = default;
  // divisor: 1 .. 2^31 - 1
  explicit Divisor(int divisor) {
    int bits = 0;  // ceil(log2(divisor))
    while ((int64_t{1} << bits) < divisor) ++bits;
    shift_ = 31 + bits;
    // ceil(2^shift / divisor) <= 2^32 - 1, and exact for numerators below 2^31: its error, times 2^31, stays below
    // 2^shift / divisor
    const uint64_t power = uint64_t{1} << shift_;
    multiplier_ = static_cast<uint32_t>((power + divisor - 1) / divisor);
  }
#ifdef __CUDACC__
  __host__ __device__
#endif
      int divide(int numerator) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(numerator)) * multiplier_ >> shift_);
  }

 private:
  uint32_t multiplier_ = 0;
  int shift_ = 0;
};

}  // namespace moe
