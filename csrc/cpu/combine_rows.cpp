// Combined rows: log v of every token, then the row's log-sum-exp taken off.
#include "logsumexp.h"

namespace mpg::cpu {

template <class A>
void combine_rows(const CombineRows<A>& args, int64_t begin, int64_t end) {
  const ModelLogits& logits = args.rows.logits;
  with_logit_type<A>(logits.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      A* log_row = args.log_rows + row * logits.V;
      for (int64_t y = 0; y < logits.V; ++y) {
        log_row[y] = combined_log_mass<T>(args, row / logits.K, row % logits.K, y);
      }
      const Normalizer<A> normalizer = row_log_sum(log_row, logits.V, A(1)).normalizer();
      for (int64_t y = 0; y < logits.V; ++y) {
        log_row[y] = normalized_log_mass(log_row[y], normalizer);
      }
      args.log_totals[row] = normalizer.max + normalizer.log_sum;
    }
  });
}

template void combine_rows(const CombineRows<float>&, int64_t, int64_t);
template void combine_rows(const CombineRows<double>&, int64_t, int64_t);

}  // namespace mpg::cpu
