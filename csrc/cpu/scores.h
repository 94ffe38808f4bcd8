// Scores of a block of tokens, each a prefix of its own, in float: token_logprob, log_ratio and
// ScoreSum of numerics.h as loops without branches.
#pragma once

#include "simd.h"

namespace mpg::cpu {

// The models' rows at position k of sequence b, from token `begin` on.
template <class T>
struct ModelRows {
  const NormalizeRows<float>& rows;
  int64_t b, k, begin;

  MPG_INLINE const T* logits(int64_t model) const {
    return row_data<T>(rows.logits, model, b, k) + begin;
  }
  MPG_INLINE Normalizer<float> normalizer(int64_t model) const {
    return rows.normalizers[(model * rows.logits.B + b) * rows.logits.K + k];
  }
  MPG_INLINE void logprobs(int64_t model, int64_t size, float* out) const {
    const T* x = logits(model);
    const Normalizer<float> normalizer = this->normalizer(model);
    for (int64_t y = 0; y < size; ++y) out[y] = logprob(to_float(x[y]), normalizer, 1.f);
  }
};

class ScoreSums {
 public:
  MPG_INLINE ScoreSums(Score score, int64_t size) : score_(score), size_(size) {
    for (int64_t y = 0; y < size; ++y) {
      max_[y] = -0x1p127f;  // finite: nothing is infinitely far from it but -inf
      positive_[y] = negative_[y] = 0;
    }
  }

  // One model: its logits, and the anchor's log-probabilities or, for no ratio, zeros.
  template <class T>
  MPG_INLINE void add(float weight, const T* logits, Normalizer<float> normalizer,
                      const float* anchor) {
    if (weight == 0) return;
    if (score_ == Score::kGeometric) {
      const float of_excluded = weight < 0 ? kLeastLogRatio : -INFINITY;
      for (int64_t y = 0; y < size_; ++y) {
        const float ratio = log_ratio(to_float(logits[y]), normalizer, anchor[y]);
        positive_[y] += weight * (ratio == -INFINITY ? of_excluded : ratio);
      }
      return;
    }
    float* sums = weight > 0 ? positive_ : negative_;
    float* others = weight > 0 ? negative_ : positive_;
    const float magnitude = std::fabs(weight);
#pragma omp simd
    for (int64_t y = 0; y < size_; ++y) {
      const float ratio = log_ratio(to_float(logits[y]), normalizer, anchor[y]);
      const float above = ratio - max_[y];
      const float smaller = exp_nonpositive(above > 0 ? -above : above);  // over the larger one
      const float rescale = above > 0 ? smaller : 1;
      sums[y] = sums[y] * rescale + magnitude * (above > 0 ? 1 : smaller);
      others[y] *= rescale;
      max_[y] = above > 0 ? ratio : max_[y];
    }
  }

  MPG_INLINE void values(float* scores) const {
    if (score_ == Score::kGeometric) {
      for (int64_t y = 0; y < size_; ++y) scores[y] = positive_[y];
      return;
    }
    for (int64_t y = 0; y < size_; ++y) {
      const float total = positive_[y] + negative_[y], difference = positive_[y] - negative_[y];
      const bool is_zero = difference <= kNoise<float> * total;
      scores[y] = is_zero ? -INFINITY : max_[y] + log_positive(difference);
    }
  }

 private:
  // As in numerics.h. Log-probabilities are never +inf here: a ratio of +inf is an invalid one.
  MPG_INLINE static float log_ratio(float logit, Normalizer<float> normalizer, float anchor) {
    const float attribute = (logit - normalizer.max) - normalizer.log_sum;
    const float ratio = attribute - anchor;
    const float of_excluded = anchor == -INFINITY ? 0 : ratio;
    return attribute == -INFINITY ? of_excluded : (ratio == INFINITY ? NAN : ratio);
  }

  Score score_;
  int64_t size_;
  float max_[kBlock], positive_[kBlock], negative_[kBlock];
};

}  // namespace mpg::cpu
