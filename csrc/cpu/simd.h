// How the CPU side vectorises: plain loops over blocks that stay in the first-level cache, with
// `#pragma omp simd` where a sum or a maximum may be taken in lanes, and an exp and a log that such
// loops can contain. `at_level<f>(arguments...)` calls f as compiled for AVX-512, for AVX2 or for
// any machine, whichever this process uses; f and what it calls are MPG_INLINE, so that they are
// compiled with it. Logits in float64 are for tests, and added in the order of their twins.
#pragma once

#include <cstring>
#include <utility>

#include "../numerics.h"

#define MPG_INLINE inline __attribute__((always_inline))

namespace mpg::cpu {

enum class Level { kPortable, kAvx2, kAvx512 };

// See simd.cpp. Throws std::invalid_argument where MPG_CPU_CAPABILITY cannot be had.
Level level();

#if defined(__x86_64__)
template <auto f, class... Args>
__attribute__((target("avx2,fma"))) auto at_avx2(Args... args) {
  return f(args...);
}
template <auto f, class... Args>
__attribute__((target("avx512f"))) auto at_avx512(Args... args) {
  return f(args...);
}
#endif

template <auto avx512, auto avx2, auto portable, class... Args>
auto at_levels(Args... args) {
#if defined(__x86_64__)
  if (level() == Level::kAvx512) return at_avx512<avx512>(args...);
  if (level() == Level::kAvx2) return at_avx2<avx2>(args...);
#endif
  return portable(args...);
}

template <auto f, class... Args>
auto at_level(Args... args) {
  return at_levels<f, f, f>(args...);
}

constexpr int64_t kBlock = 2048;  // 8 KiB of floats: half of a small first-level cache

// exp(x) for x <= 0, relative error below 2e-7; 0 below -87.3 (no subnormals); NaN stays NaN.
MPG_INLINE float exp_nonpositive(float x) {
  const float clamped = x < -87.3f ? 0 : x;
  // x = n log 2 + r with |r| <= log(2) / 2; adding 1.5 * 2^23 rounds n into the low mantissa bits.
  const float shifted = clamped * 1.44269504f + 0x1.8p23f;
  const float n = shifted - 0x1.8p23f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts
  float p = r * 1.9875691500e-4f + 1.3981999507e-3f;                  // minimax (Cephes expf)
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const float power = float_from_bits((bits_of(shifted) + 127) << 23);  // 2^n, from its exponent
  return x < -87.3f ? 0 : p * power;
}

MPG_INLINE float exp_of(float x) { return exp_nonpositive(x); }
MPG_INLINE double exp_of(double x) { return std::exp(x); }

// log(x) of positive, finite, normal numbers, relative error below 2e-7; NaN stays NaN.
MPG_INLINE float log_positive(float x) {
  // x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)): n is the exponent of x / sqrt(1/2).
  const int32_t bits = int32_t(bits_of(x)), exponent = (bits - 0x3f3504f3) >> 23;
  const float n = float(exponent);
  const float f = float_from_bits(uint32_t(bits - exponent * (1 << 23))) - 1.f;
  float p = f * 7.0376836292e-2f - 1.1514610310e-1f;  // minimax (Cephes logf)
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = (p * f * f * f - n * 2.12194440e-4f) - f * f * 0.5f;
  return x == x ? (p + f) + n * 0.693359375f : x;  // log 2 in two parts
}

// out: in every four lanes the sums of a's two pairs there, then those of b's. `lane...` are all.
template <int kLanes, class Vector, int... lane>
MPG_INLINE void add_pairs(const Vector& a, const Vector& b, Vector& out,
                          std::integer_sequence<int, lane...>) {
  constexpr auto pair = [](int i) { return i / 4 * 4 + i % 2 * 2 + (i % 4 < 2 ? 0 : kLanes); };
#if defined(__clang__)
  out = __builtin_shufflevector(a, b, pair(lane)...) +
        __builtin_shufflevector(a, b, pair(lane) + 1 ...);
#else
  typedef decltype(a < b) Places;  // integers of the same size
  out = __builtin_shuffle(a, b, Places{pair(lane)...}) +
        __builtin_shuffle(a, b, Places{pair(lane) + 1 ...});
#endif
}

// The sums of four vectors, whose lanes are added together: in three steps, not in two for each.
template <int kLanes, class A>
MPG_INLINE void sum_lanes(const A (*vectors)[kLanes], A* sums) {
  typedef A Vector __attribute__((vector_size(kLanes * sizeof(A))));
  constexpr std::make_integer_sequence<int, kLanes> all;
  Vector v[4];
  std::memcpy(v, vectors, sizeof(v));
  add_pairs<kLanes>(v[0], v[1], v[0], all);
  add_pairs<kLanes>(v[2], v[3], v[2], all);
  add_pairs<kLanes>(v[0], v[2], v[0], all);
  for (int i = 0; i < 4; ++i) sums[i] = v[0][i];
  for (int lane = 4; lane < kLanes; ++lane) sums[lane % 4] += v[0][lane];
}

// Products of a tile of rows, whose sums stay in registers while they are added to. A sum and the
// order it is taken in depend on nothing but its own numbers.
constexpr int kOthers = 4;
template <int lanes, int rows>
struct Tile {
  static constexpr int kLanes = lanes, kRows = rows;
};
using WideTile = Tile<16, 4>;   // of 32 registers of 16 floats
using NarrowTile = Tile<8, 2>;  // of 16 of 8
using SmallTile = Tile<4, 2>;   // of 16 of 4

// sums[r][i]: the sum of products of rows[r] and the i-th of kCount others, `stride` apart, all of
// `size` numbers.
template <int kLanes, int kRows, int kCount, class A, class T>
MPG_INLINE void multiply_rows(const T* const (&rows)[kRows], const T* others, int64_t stride,
                              int64_t size, A (&sums)[kRows][kOthers]) {
  A lanes[kRows][kOthers][kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= size; c += kLanes) {
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kCount; ++i) {
#pragma omp simd
        for (int j = 0; j < kLanes; ++j)
          lanes[r][i][j] += A(to_float(rows[r][c + j])) * to_float(others[i * stride + c + j]);
      }
    }
  }
  for (int j = 0; c < size; ++c, ++j) {
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kCount; ++i)
        lanes[r][i][j] += A(to_float(rows[r][c])) * to_float(others[i * stride + c]);
    }
  }
  for (int r = 0; r < kRows; ++r) sum_lanes(lanes[r], sums[r]);
}

// kWidth numbers from c on, of what `add_products` adds.
template <int kWidth, int kRows, class A, class W, class T>
MPG_INLINE void add_tile(const W* const (&weights)[kRows], int64_t count, const T* values,
                         int64_t stride, int64_t c, A* const (&sums)[kRows]) {
  A tile[kRows][kWidth];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kWidth; ++j) tile[r][j] = sums[r][c + j];
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int r = 0; r < kRows; ++r) {
      const A weight = to_float(weights[r][i]);
#pragma omp simd
      for (int j = 0; j < kWidth; ++j) tile[r][j] += weight * to_float(values[i * stride + c + j]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kWidth; ++j) sums[r][c + j] = tile[r][j];
  }
}

// Adds to sums[r] (size) for each i < count the i-th row of values, `stride` apart, times
// weights[r][i].
template <int kLanes, int kRows, class A, class W, class T>
MPG_INLINE void add_products(const W* const (&weights)[kRows], int64_t count, const T* values,
                             int64_t stride, int64_t size, A* const (&sums)[kRows]) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= size; c += 4 * kLanes)
    add_tile<4 * kLanes>(weights, count, values, stride, c, sums);
  for (; c + kLanes <= size; c += kLanes) add_tile<kLanes>(weights, count, values, stride, c, sums);
  for (; c < size; ++c) add_tile<1>(weights, count, values, stride, c, sums);
}

// Asks for rows of `size` numbers, `stride` apart, that will be read soon.
template <class T>
MPG_INLINE void prefetch(const T* rows, int64_t count, int64_t stride, int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(rows + r * stride + i, 0, 2);
  }
}

}  // namespace mpg::cpu
