// One online pass over a row: blocks that stay in the first-level cache are converted to float,
// then their maximum and their sum of exponentials are taken in 16 independent lanes, and merged.
// The lanes are compiler vectors, so one source serves AVX-512, AVX2 and any other machine, and the
// sum over a long row is built from short ones.
#include "logsumexp.h"

namespace mpg::cpu {
namespace {

#if defined(__x86_64__) && defined(__gnu_linux__)
#define MPG_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MPG_MULTIVERSION
#endif
// Vectors are passed only where they are inlined: no calling convention is involved (-Wno-psabi).
#define MPG_INLINE inline __attribute__((always_inline))

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 2048;  // 8 KiB of floats: half of a small first-level cache
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

// exp(x) for x <= 0, relative error below 2e-7; 0 below -87.3 (no subnormals); NaN stays NaN.
MPG_INLINE Floats exp_nonpositive(Floats x) {
  const Ints is_zero = x < -87.3f;
  x = is_zero ? Floats{} : x;
  // x = n log 2 + r with |r| <= log(2) / 2; adding 1.5 * 2^23 rounds n into the low mantissa bits.
  const Floats shifted = x * 1.44269504f + 0x1.8p23f;
  const Floats n = shifted - 0x1.8p23f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;            // minimax (Cephes expf)
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const Floats scale = (Floats)(((Ints)shifted + 127) << 23);  // 2^n, built from its exponent
  return is_zero ? Floats{} : p * scale;
}

MPG_MULTIVERSION LogSum<float> block_log_sum(const float* x, int64_t size, float inv_temperature) {
  LogSum<float> total;
  const int64_t vectors = size / kLanes;
  const auto load = [x](int64_t i) __attribute__((always_inline)) {
    Floats v;
    std::memcpy(&v, x + i * kLanes, sizeof v);
    return v;
  };
  if (vectors > 0) {
    Floats lane_max = load(0);
    for (int64_t i = 1; i < vectors; ++i) lane_max = load(i) > lane_max ? load(i) : lane_max;
    float max = -INFINITY;
    for (int64_t l = 0; l < kLanes; ++l) max = lane_max[l] > max ? lane_max[l] : max;
    // With an infinite maximum x - max is NaN: wrong for a block of -inf, right for one with +inf.
    const float shift = max == -INFINITY ? 0 : max;
    Floats lane_sum = {};
    for (int64_t i = 0; i < vectors; ++i) {
      lane_sum += exp_nonpositive((load(i) - shift) * inv_temperature);
    }
    total.max = max;
    for (int64_t l = 0; l < kLanes; ++l) total.sum += lane_sum[l];
  }
  for (int64_t v = vectors * kLanes; v < size; ++v) total.add(x[v], inv_temperature);
  return total;
}

MPG_MULTIVERSION void convert(const Half* from, float* to, int64_t size) {
  for (int64_t v = 0; v < size; ++v) to[v] = to_float(from[v]);
}

MPG_MULTIVERSION void convert(const BFloat16* from, float* to, int64_t size) {
  for (int64_t v = 0; v < size; ++v) to[v] = to_float(from[v]);
}

}  // namespace

template <class T>
LogSum<float> row_log_sum(const T* row, int64_t V, float inv_temperature) {
  LogSum<float> total;
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t size = V - begin < kBlock ? V - begin : kBlock;
    if constexpr (sizeof(T) == sizeof(float)) {
      total.merge(block_log_sum(row + begin, size, inv_temperature), inv_temperature);
    } else {
      float block[kBlock];
      convert(row + begin, block, size);
      total.merge(block_log_sum(block, size, inv_temperature), inv_temperature);
    }
  }
  return total;
}

LogSum<double> row_log_sum(const double* row, int64_t V, double inv_temperature) {
  LogSum<double> total;
  for (int64_t v = 0; v < V; ++v) total.add(row[v], inv_temperature);
  return total;
}

template <class A>
void normalize_rows(const NormalizeRows<A>& args, int64_t begin, int64_t end) {
  const ModelLogits& logits = args.logits;
  with_logit_type<A>(logits.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      if (!is_active(logits, row)) continue;
      args.normalizers[row] = row_log_sum(row_data<T>(logits, row), logits.V, A(1)).normalizer();
    }
  });
}

template void normalize_rows(const NormalizeRows<float>&, int64_t, int64_t);
template void normalize_rows(const NormalizeRows<double>&, int64_t, int64_t);
template LogSum<float> row_log_sum(const float*, int64_t, float);
template LogSum<float> row_log_sum(const Half*, int64_t, float);
template LogSum<float> row_log_sum(const BFloat16*, int64_t, float);

}  // namespace mpg::cpu
