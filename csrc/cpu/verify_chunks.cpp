// Scores of prefixes, their acceptance, the bound update, and the three in sequence.
#include "../numerics.h"

namespace mpg::cpu {

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

template void score_prefixes(const ScorePrefixes<float>&, int64_t, int64_t);
template void score_prefixes(const ScorePrefixes<double>&, int64_t, int64_t);
template void accept_prefixes(const AcceptPrefixes<float>&, int64_t, int64_t);
template void accept_prefixes(const AcceptPrefixes<double>&, int64_t, int64_t);
template void update_bound(const UpdateBound<float>&, int64_t, int64_t);
template void update_bound(const UpdateBound<double>&, int64_t, int64_t);
template void verify_chunks(const VerifyChunks<float>&, int64_t, int64_t);
template void verify_chunks(const VerifyChunks<double>&, int64_t, int64_t);

}  // namespace mpg::cpu
