// How logits are stored: element types, their conversion to the accumulation type, and row
// addresses.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ops.h"

namespace mpg {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

MPG_HOST_DEVICE float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MPG_HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

MPG_HOST_DEVICE double to_float(double x) { return x; }
MPG_HOST_DEVICE float to_float(float x) { return x; }
MPG_HOST_DEVICE float to_float(BFloat16 x) { return float_from_bits(uint32_t(x.bits) << 16); }
MPG_HOST_DEVICE float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  // Move the fields into place and correct the exponent bias by a multiplication, which also
  // normalises subnormals; only inf and NaN need their exponent set by hand.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  const uint32_t bits = bits_of(float_from_bits(magnitude) * 0x1p112f);
  return float_from_bits(bits | special | uint32_t(x.bits & 0x8000) << 16);
#endif
}

// The nearest number that T holds; among two the even one.
template <class T>
MPG_HOST_DEVICE T to_stored(double x) {
  return T(x);
}
template <class T>
MPG_HOST_DEVICE T to_stored(float x) {
  const uint32_t bits = bits_of(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const bool is_nan = magnitude > 0x7f800000u;
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return {uint16_t(is_nan ? 0x7fffu : rounded)};
  } else {
    // Moves the exponent's bias by 112 and rounds; adding 1/2 leaves the bits of a subnormal number
    // in the low ones. What rounds to 2^16 or more is infinite.
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    const uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t rounded = magnitude >= (143u << 23) ? 0x7c00u : finite;
    return {uint16_t((is_nan ? 0x7fffu : rounded) | sign >> 16)};
  }
}

// Calls f with a value of the type that `dtype` names, one of those that go with accumulation in A.
template <class A, class F>
auto with_logit_type(DType dtype, F f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    return f(double{});
  } else {
    switch (dtype) {
      case DType::kFloat16:
        return f(Half{});
      case DType::kBFloat16:
        return f(BFloat16{});
      default:
        return f(float{});
    }
  }
}

// First element of a row, see ModelLogits. T is the type that logits.dtype names.
template <class T>
MPG_HOST_DEVICE const T* row_data(const ModelLogits& logits, int64_t model, int64_t b, int64_t k) {
  const bool is_attribute = model >= 1 && model <= logits.N;
  const LogitRows& rows =
      is_attribute ? logits.attributes : (model == 0 ? logits.anchor : logits.base);
  return static_cast<const T*>(rows.data) + (is_attribute ? model - 1 : 0) * rows.stride_model +
         b * rows.stride_sequence + k * rows.stride_position;
}

template <class T>
MPG_HOST_DEVICE const T* row_data(const ModelLogits& logits, int64_t row) {
  return row_data<T>(logits, row / (logits.K * logits.B), row / logits.K % logits.B,
                     row % logits.K);
}

MPG_HOST_DEVICE bool is_active(const ModelLogits& logits, int64_t row) {
  return logits.active == nullptr || logits.active[row / logits.K % logits.B];
}

}  // namespace mpg
