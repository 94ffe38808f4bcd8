// The scalar mathematics of the ops, written once for CPU and CUDA: log-sum-exp, scores of
// prefixes, acceptance, the three-phase bound, combined rows, draws. Equation numbers are those of
// arXiv 2511.01891.
#pragma once

#include <cmath>

#include "storage.h"

namespace mpg {

// The log-ratio of an impossible token under a negative geometric weight, where it would be worth
// +inf.
constexpr float kLeastLogRatio = -80;

// What a difference of sums leaves below this share of them is noise of a few roundings: it counts
// as 0.
template <class A>
constexpr A kNoise = 8 * (sizeof(A) == sizeof(float) ? A(0x1p-23) : A(0x1p-52));

template <class A>
MPG_HOST_DEVICE bool is_nan(A x) {
  return x != x;
}

// A running sum of exp(x / temperature), held as sum * exp(max / temperature). Once NaN the sum
// stays NaN; rows that are all -inf end as (-inf, 0).
template <class A>
struct LogSum {
  A max = -A(INFINITY);
  A sum = 0;

  MPG_HOST_DEVICE void add(A x, A inv_temperature) {
    if (x > max) {
      sum = sum * std::exp((max - x) * inv_temperature) + 1;
      max = x;
    } else if (x != -A(INFINITY)) {  // true for NaN
      sum += std::exp((x - max) * inv_temperature);
    }
  }

  MPG_HOST_DEVICE void merge(LogSum other, A inv_temperature) {
    const A new_max = other.max > max ? other.max : max;
    if (new_max == -A(INFINITY)) {  // (-inf) - (-inf) would be NaN for rows that may still be valid
      sum += other.sum;
      return;
    }
    sum = sum * std::exp((max - new_max) * inv_temperature) +
          other.sum * std::exp((other.max - new_max) * inv_temperature);
    max = new_max;
  }

  MPG_HOST_DEVICE Normalizer<A> normalizer() const {
    return {max, max == A(INFINITY) ? A(NAN) : std::log(sum)};
  }
};

// NaN for a row with NaN or +inf and for a row that is all -inf, where max - max is NaN.
template <class A>
MPG_HOST_DEVICE A logprob(A logit, Normalizer<A> normalizer, A inv_temperature) {
  return (logit - normalizer.max) * inv_temperature - normalizer.log_sum;
}

// log pi_i - log anchor of one token (a factor of Eq. 15). A token impossible under both counts as
// ratio 1; one possible only under the attribute model means that it was not trained against this
// anchor, so the ratio is NaN like that of any invalid input.
template <class A>
MPG_HOST_DEVICE A log_ratio(A attribute_logprob, A anchor_logprob) {
  const A inf = A(INFINITY);
  if (attribute_logprob == inf || anchor_logprob == inf) return A(NAN);
  if (anchor_logprob == -inf && !is_nan(attribute_logprob)) {
    return attribute_logprob == -inf ? A(0) : A(NAN);
  }
  return attribute_logprob - anchor_logprob;
}

// The score of one prefix, built from one log-ratio per attribute model.
//   arithmetic (Eq. 13-16, 18-19): log sum_i weight_i exp(log_ratio_i), -inf where that sum is <= 0
//   geometric (Eq. 7, reverse KL): sum_i weight_i log_ratio_i
// A weight of exactly 0 removes its model before any arithmetic.
template <class A>
class ScoreSum {
 public:
  MPG_HOST_DEVICE explicit ScoreSum(Score score = Score::kArithmetic) : score_(score) {}

  // A token's log-ratio as this score sums it over a prefix.
  MPG_HOST_DEVICE A term(A weight, A token_log_ratio) const {
    const bool capped =
        score_ == Score::kGeometric && weight < 0 && token_log_ratio == -A(INFINITY);
    return capped ? A(kLeastLogRatio) : token_log_ratio;
  }

  MPG_HOST_DEVICE void add(A weight, A prefix_log_ratio) {
    if (weight == 0) return;
    if (score_ == Score::kGeometric) {
      positive_ += weight * prefix_log_ratio;
      return;
    }
    const A x = prefix_log_ratio;
    if (x == -A(INFINITY)) return;
    A magnitude = std::fabs(weight);
    if (x > max_) {
      const A rescale = std::exp(max_ - x);
      positive_ *= rescale;
      negative_ *= rescale;
      max_ = x;
    } else {
      magnitude *= std::exp(x - max_);
    }
    (weight > 0 ? positive_ : negative_) += magnitude;
  }

  MPG_HOST_DEVICE A value() const {
    if (score_ == Score::kGeometric) return positive_;
    const A total = positive_ + negative_, difference = positive_ - negative_;
    if (is_nan(total)) return total;
    if (difference <= kNoise<A> * total) return -A(INFINITY);
    return max_ + std::log(difference);
  }

 private:
  Score score_;
  A max_ = -A(INFINITY);  // the sums are in units of exp(max_); unused by the geometric score
  A positive_ = 0, negative_ = 0;
};

// Writes the log-ratios at position k of sequence b and the score of the prefix that ends there.
// Every prefix is summed from its start: K <= 32 additions, in the same order on every backend.
template <class A>
MPG_HOST_DEVICE void score_prefix(const ScorePrefixes<A>& args, int64_t b, int64_t k) {
  ScoreSum<A> sum(args.score);
  for (int64_t i = 0; i < args.N; ++i) {
    const A weight = args.weights[b * args.N + i];
    const int64_t first = (i * args.B + b) * args.K;
    A prefix = 0, ratio = 0;
    for (int64_t t = 0; t <= k; ++t) {
      ratio = log_ratio(args.attribute_logprobs[first + t], args.anchor_logprobs[b * args.K + t]);
      prefix += sum.term(weight, ratio);
    }
    args.log_ratios[first + k] = ratio;
    sum.add(weight, prefix);
  }
  args.scores[b * args.K + k] = sum.value();
}

// The acceptance test of Eq. 14 in logs; in double, so that every backend draws the same line.
template <class A>
MPG_HOST_DEVICE bool is_accepted(A score, A log_bound, double uniform) {
  return std::log(uniform) < double(score) - double(log_bound);
}

// One round of the three-phase bound for sequence b: push `count` scores, then set the bound.
template <class A>
MPG_HOST_DEVICE void update_bound(const Bound<A>& bound, int64_t b, const A* scores,
                                  int64_t count) {
  A* window = bound.window + b * bound.W;
  // No caller has pushed fewer than none; such a count would write outside the window.
  int64_t num_scores = bound.num_scores[b] < 0 ? 0 : bound.num_scores[b];
  for (int64_t p = 0; p < count; ++p) {
    if (scores[p] == -A(INFINITY) || is_nan(scores[p])) continue;
    window[num_scores % bound.W] = scores[p];
    ++num_scores;
  }
  const int64_t num_rounds = bound.num_rounds[b] + 1;
  bound.num_scores[b] = num_scores;
  bound.num_rounds[b] = num_rounds;

  if (num_rounds <= bound.W || num_scores < 2) {  // warm-up
    bound.log_bound[b] = bound.log_initial_bound;
    bound.frozen[b] = false;
    return;
  }
  const int64_t size = num_scores < bound.W ? num_scores : bound.W;
  A max = window[0], mean = 0, variance = 0;
  for (int64_t w = 0; w < size; ++w) {
    max = window[w] > max ? window[w] : max;
    mean += window[w] / A(size);
  }
  for (int64_t w = 0; w < size; ++w) {
    variance += (window[w] - mean) * (window[w] - mean) / A(size);
  }
  if (!bound.frozen[b]) bound.log_bound[b] = max + bound.log_gamma;  // estimation
  bound.frozen[b] = variance < bound.tau;                            // stabilisation
}

// The log-probability of token y in a normalised row of logits of type T.
template <class T, class A>
MPG_HOST_DEVICE A token_logprob(const NormalizeRows<A>& rows, int64_t model, int64_t b, int64_t k,
                                int64_t y) {
  const ModelLogits& logits = rows.logits;
  const Normalizer<A> normalizer = rows.normalizers[(model * logits.B + b) * logits.K + k];
  return logprob(A(to_float(row_data<T>(logits, model, b, k)[y])), normalizer, A(1));
}

// The single-token score S_1 of token y for sequence b, from logits of type T.
template <class T, class A>
MPG_HOST_DEVICE A token_score(const DrawFallback<A>& args, int64_t b, int64_t y) {
  const int64_t N = args.rows.logits.N;
  const A anchor = token_logprob<T>(args.rows, 0, b, 0, y);
  ScoreSum<A> sum(args.score);
  for (int64_t i = 0; i < N; ++i) {
    const A weight = args.weights[b * N + i];
    if (weight == 0) continue;
    const A attribute = token_logprob<T>(args.rows, i + 1, b, 0, y);
    sum.add(weight, sum.term(weight, log_ratio(attribute, anchor)));
  }
  return sum.value();
}

// Probability that one try of the fallback loop proposes token y and accepts it.
template <class T, class A>
MPG_HOST_DEVICE A token_mass(const DrawFallback<A>& args, int64_t b, int64_t y) {
  const A draft_prob = args.draft_probs[b * args.rows.logits.V + y];
  // Other tokens need no score, and may not have one where the anchor excludes them.
  if (draft_prob <= 0) return 0;
  const A score = token_score<T>(args, b, y);
  if (score == -A(INFINITY)) return draft_prob * 0;  // whatever the bound, but NaN stays NaN
  const A excess = score - args.log_bound[b];
  return excess > 0 ? draft_prob : draft_prob * std::exp(excess);
}

// log v of token y at position p of sequence b, before the row is normalised.
//   arithmetic (Eq. 10-11, 13): v = base * [sum_i weight_i pi_i / anchor]_+,
//     or without base and anchor [sum_i weight_i pi_i]_+
//   geometric (Eq. 7, reverse KL, token by token): v = base * prod_i (pi_i / anchor)^weight_i
template <class T, class A>
MPG_HOST_DEVICE A combined_log_mass(const CombineRows<A>& args, int64_t b, int64_t p, int64_t y) {
  A base = 0, anchor = 0;
  if (args.has_anchor) {
    base = token_logprob<T>(args.rows, args.base, b, p, y);
    if (base == -A(INFINITY)) return base;  // excluded, whatever the ratios
    anchor = args.base == 0 ? base : token_logprob<T>(args.rows, 0, b, p, y);
    if (is_nan(anchor)) return anchor;  // even where no weight asks for it
  }
  const A* weights = args.weights + (b * args.rows.logits.K + p) * args.N;
  ScoreSum<A> sum(args.target);
  for (int64_t i = 0; i < args.N; ++i) {
    const A weight = weights[i];
    if (weight == 0) continue;
    const A attribute = token_logprob<T>(args.rows, i + args.has_anchor, b, p, y);
    const A ratio = args.has_anchor ? log_ratio(attribute, anchor) : attribute;
    sum.add(weight, sum.term(weight, ratio));
  }
  return base + sum.value();
}

// Index of the item that lifts the cumulated mass above `target`, or the last item with mass where
// rounding leaves the target above them all; 0 without any, so that it is always one to read. Takes
// the mass before that item off the target.
template <class F>
MPG_HOST_DEVICE int64_t pick(int64_t count, double& target, F mass_of) {
  int64_t picked = 0;
  double cumulated = 0, before = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double mass = mass_of(i);
    if (mass == 0) continue;
    picked = i;
    before = cumulated;
    cumulated += mass;
    if (cumulated > target) break;
  }
  target -= before;
  return picked;
}

}  // namespace mpg
