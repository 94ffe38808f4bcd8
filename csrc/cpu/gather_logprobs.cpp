// Log-probabilities of given tokens: one online log-sum-exp per row, no probability tensor.
#include "logsumexp.h"

namespace mpg::cpu {

template <class A>
void gather_logprobs(const GatherLogprobs<A>& args, int64_t begin, int64_t end) {
  const ModelLogits& logits = args.logits;
  const A inv_temperature = 1 / args.temperature;
  with_logit_type<A>(logits.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = args.tokens[row % (logits.B * logits.K)];
      if (token < 0 || token >= logits.V) {
        args.logprobs[row] = -A(INFINITY);
        continue;
      }
      const T* x = row_data<T>(logits, row);
      const Normalizer<A> normalizer = row_log_sum(x, logits.V, inv_temperature).normalizer();
      args.logprobs[row] = logprob(A(to_float(x[token])), normalizer, inv_temperature);
    }
  });
}

template void gather_logprobs(const GatherLogprobs<float>&, int64_t, int64_t);
template void gather_logprobs(const GatherLogprobs<double>&, int64_t, int64_t);

}  // namespace mpg::cpu
