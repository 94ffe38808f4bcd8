// One online pass over a row: blocks that stay in the first-level cache are converted to float,
// then their maximum and their sum of exponentials are taken in lanes, and merged. The sum over a
// long row is built from short ones.
#include "logsumexp.h"

#include "simd.h"

namespace mpg::cpu {
namespace {

MPG_MULTIVERSION LogSum<float> block_log_sum(const float* x, int64_t size, float inv_temperature) {
  float max = -INFINITY, sum = 0;
#pragma omp simd reduction(max : max)
  for (int64_t v = 0; v < size; ++v) max = x[v] > max ? x[v] : max;
  // With an infinite maximum x - max is NaN: wrong for a block of -inf, right for one with +inf.
  const float shift = max == -INFINITY ? 0 : max;
#pragma omp simd reduction(+ : sum)
  for (int64_t v = 0; v < size; ++v) sum += exp_nonpositive((x[v] - shift) * inv_temperature);
  return {max, sum};
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
