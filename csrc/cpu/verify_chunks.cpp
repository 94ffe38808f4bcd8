// Log-probabilities of given tokens, with one online log-sum-exp per row and no probability tensor;
// scores of prefixes, their acceptance, the bound update, and the three in sequence.
#include "logsumexp.h"

namespace mpg::cpu {

template <class A>
void gather_logprobs(const GatherLogprobs<A>& args, int64_t begin, int64_t end) {
  const ModelLogits& logits = args.logits;
  const A inv_temperature = 1 / args.temperature;
  with_logit_type<A>(logits.dtype, [&]<class T>(T) {
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

template <class A>
void score_prefixes(const ScorePrefixes<A>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t k = 0; k < args.K; ++k) score_prefix(args, b, k);
  }
}

template <class A>
void accept_prefixes(const AcceptPrefixes<A>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    int64_t accepted = 0;
    for (int64_t k = 0; k < args.K && k < args.lengths[b]; ++k) {
      const A score = args.scores[b * args.K + k];
      if (is_nan(score)) {
        accepted = -1;
        break;
      }
      if (is_accepted(score, args.log_bound[b], args.uniforms[b * args.K + k])) accepted = k + 1;
    }
    args.accepted[b] = accepted;
  }
}

template <class A>
void update_bound(const UpdateBound<A>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    if (args.active[b]) mpg::update_bound(args.bound, b, args.scores + b * args.P, args.P);
  }
}

template <class A>
void verify_chunks(const VerifyChunks<A>& args, int64_t begin, int64_t end) {
  score_prefixes(args.scoring, begin, end);
  accept_prefixes(args.acceptance, begin, end);
  const int64_t K = args.scoring.K;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t accepted = args.acceptance.accepted[b];
    if (accepted < 1) continue;
    mpg::update_bound(args.bound, b, args.scoring.scores + b * K + accepted - 1, 1);
  }
}

MPG_INSTANTIATE(gather_logprobs, GatherLogprobs);
MPG_INSTANTIATE(score_prefixes, ScorePrefixes);
MPG_INSTANTIATE(accept_prefixes, AcceptPrefixes);
MPG_INSTANTIATE(update_bound, UpdateBound);
MPG_INSTANTIATE(verify_chunks, VerifyChunks);

}  // namespace mpg::cpu
