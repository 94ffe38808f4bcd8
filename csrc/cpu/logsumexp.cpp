// One online pass over a row: blocks that stay in the first-level cache are converted to float,
// then their maximum and their sum of exponentials are taken in lanes, and merged. The sum over a
// long row is built from short ones.
#include "logsumexp.h"

#include "simd.h"

namespace mpg::cpu {
namespace {

MPG_INLINE float larger(float a, float b) { return b > a ? b : a; }

// Four at a time, since each maximum of a single chain would wait for the one before it.
MPG_INLINE float max_of(const float* x, int64_t size) {
  const int64_t part = size / 4;
  float a = -INFINITY, b = a, c = a, d = a;
#pragma omp simd reduction(max : a, b, c, d)
  for (int64_t v = 0; v < part; ++v) {
    a = larger(a, x[v]);
    b = larger(b, x[v + part]);
    c = larger(c, x[v + 2 * part]);
    d = larger(d, x[v + 3 * part]);
  }
  for (int64_t v = 4 * part; v < size; ++v) a = larger(a, x[v]);
  return larger(larger(a, b), larger(c, d));
}

// 2^t for t <= 0 as a term of a sum that has a term 1: relative error below 2e-7, and 2^-126 stands
// for all that is smaller. NaN stays NaN. exp_nonpositive with all its digits takes half as long
// again.
MPG_INLINE float exp2_term(float t) {
  const float clamped = t < -126.f ? -126.f : t;
  // t = n + r with |r| <= 1/2; adding 1.5 * 2^23 + 127 rounds n and leaves the exponent of 2^n in
  // the low mantissa bits.
  const float shifted = clamped + (0x1.8p23f + 127), n = shifted - (0x1.8p23f + 127);
  const float r = clamped - n;
  float p = r * 1.3264727253e-3f + 9.6715127858e-3f;  // minimax for 2^r
  p = p * r + 5.5507337445e-2f;
  p = p * r + 2.4022242083e-1f;
  p = p * r + 6.9314697760e-1f;
  p = p * r + 1.f;
  return p * float_from_bits(bits_of(shifted) << 23);
}

MPG_INLINE LogSum<float> block_log_sum(const float* x, int64_t size, float inv_temperature) {
  const float max = max_of(x, size), scale = inv_temperature * 1.44269504f;
  float sum = 0;
  // With an infinite maximum x - max is NaN: wrong for a block of -inf, right for one with +inf.
  const float shift = max == -INFINITY ? 0 : max;
#pragma omp simd reduction(+ : sum)
  for (int64_t v = 0; v < size; ++v) sum += exp2_term((x[v] - shift) * scale);
  return {max, max == -INFINITY && sum == sum ? 0 : sum};
}

template <class T>
MPG_INLINE void convert(const T* from, float* to, int64_t size) {
  for (int64_t v = 0; v < size; ++v) to[v] = to_float(from[v]);
}

}  // namespace

template <class T>
LogSum<float> row_log_sum(const T* row, int64_t V, float inv_temperature) {
  LogSum<float> total;
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t size = V - begin < kBlock ? V - begin : kBlock;
    if constexpr (sizeof(T) == sizeof(float)) {
      total.merge(at_level<block_log_sum>(row + begin, size, inv_temperature), inv_temperature);
    } else {
      float block[kBlock];
      at_level<convert<T>>(row + begin, block, size);
      total.merge(at_level<block_log_sum>(block, size, inv_temperature), inv_temperature);
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
  with_logit_type<A>(logits.dtype, [&]<class T>(T) {
    for (int64_t row = begin; row < end; ++row) {
      if (!is_active(logits, row)) continue;
      args.normalizers[row] = row_log_sum(row_data<T>(logits, row), logits.V, A(1)).normalizer();
    }
  });
}

MPG_INSTANTIATE(normalize_rows, NormalizeRows);
template LogSum<float> row_log_sum(const float*, int64_t, float);
template LogSum<float> row_log_sum(const Half*, int64_t, float);
template LogSum<float> row_log_sum(const BFloat16*, int64_t, float);

}  // namespace mpg::cpu
