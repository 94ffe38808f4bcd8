// The scalar mathematics of block verification (Sun et al., "Block verification accelerates
// speculative decoding", 2024), in double for every storage type. Position j, counted from 0, is
// that of the drafted token C_j+1 and of the rows p_j+1 and q_j+1.
#pragma once

#include "numerics.h"

namespace mpg {

// NaN stays NaN.
MPG_HOST_DEVICE double positive_part(double x) { return x <= 0 ? 0 : x; }

template <class A>
MPG_HOST_DEVICE int64_t num_drafted(const Block<A>& block, int64_t b) {
  const int64_t length = block.K == 0 ? 0 : block.lengths[b];
  return length < 0 ? 0 : (length > block.K ? block.K : length);
}

template <class A>
MPG_HOST_DEVICE double target_prob(const Block<A>& block, int64_t b, int64_t position, int64_t y) {
  return block.target_probs[(b * (block.K + 1) + position) * block.V + y];
}

template <class A>
MPG_HOST_DEVICE double draft_prob(const Block<A>& block, int64_t b, int64_t position, int64_t y) {
  const int64_t row = b * block.K + position;
  if (block.draft_probs == nullptr) return y == block.tokens[row];
  return block.draft_probs[row * block.V + y];
}

// One token's mass in (P p - q)_+.
template <class A>
MPG_HOST_DEVICE double residual_mass(const Block<A>& block, int64_t b, int64_t position,
                                     double carry, int64_t y) {
  return positive_part(carry * target_prob(block, b, position, y) -
                       draft_prob(block, b, position, y));
}

// P_j+1 from P_j: min(1, P_j p / q) of the drafted token at `position`; 0 once it is 0, and for a
// token outside the vocabulary. A token that the draft excludes cannot have been drafted: q = 0
// counts as a ratio of infinity.
template <class A>
MPG_HOST_DEVICE double next_carry(const Block<A>& block, int64_t b, int64_t position,
                                  double carry) {
  const int64_t token = block.tokens[b * block.K + position];
  if (carry == 0 || token < 0 || token >= block.V) return 0;
  const double scaled = carry * target_prob(block, b, position, token);
  const double draft = draft_prob(block, b, position, token);
  if (scaled == 0) return 0;
  return scaled >= draft ? 1 : scaled / draft;
}

// Position of the token to draw after the accepted prefix; negative where there is none.
template <class A>
MPG_HOST_DEVICE int64_t next_position(const DrawResidual<A>& args, int64_t b) {
  if (args.block.K == 0) return 0;
  return args.accepted[b] > args.block.K ? args.block.K : args.accepted[b];
}

// h_i of a prefix that is not the whole block, from P_i and S_i = sum_v (P_i p_i+1 - q_i+1)_+.
MPG_HOST_DEVICE double prefix_accept_prob(double carry, double residual_sum) {
  if (carry == 0) return 0;
  if (carry == 1 && residual_sum == 0) return 1;
  return residual_sum / (residual_sum + (1 - carry));
}

}  // namespace mpg
