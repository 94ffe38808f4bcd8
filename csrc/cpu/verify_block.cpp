// Block verification, the draw that follows it, and the plain draw from a row.
#include "../block.h"

namespace mpg::cpu {
namespace {

template <class F>
double sum_over(int64_t V, F mass_of) {
  double total = 0;
  for (int64_t y = 0; y < V; ++y) total += mass_of(y);
  return total;
}

// By inverting the cumulated mass in token order; 0 without mass or with NaN.
template <class F>
int64_t draw(int64_t V, double total, double uniform, F mass_of) {
  double target = uniform * total;
  return total > 0 ? pick(V, target, mass_of) : 0;
}

}  // namespace

template <class A>
void draw_tokens(const DrawTokens<A>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const A* probs = args.probs + b * args.V;
    const auto mass_of = [probs](int64_t y) { return double(probs[y]); };
    args.tokens[b] = draw(args.V, sum_over(args.V, mass_of), args.uniforms[b], mass_of);
  }
}

template <class A>
void verify_block(const VerifyBlock<A>& args, int64_t begin, int64_t end) {
  const Block<A>& block = args.block;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t length = num_drafted(block, b);
    double carry = 1;
    args.accepted[b] = 0;
    args.carry[b] = 1;
    for (int64_t i = 1; i <= length && carry != 0; ++i) {
      carry = next_carry(block, b, i - 1, carry);
      double accept_prob = carry;
      if (i < length && carry != 0) {
        const auto mass_of = [&](int64_t y) { return residual_mass(block, b, i, carry, y); };
        accept_prob = prefix_accept_prob(carry, sum_over(block.V, mass_of));
      }
      if (is_nan(accept_prob)) {
        args.accepted[b] = -1;
        args.carry[b] = A(NAN);
        break;
      }
      if (args.uniforms[b * block.K + i - 1] < accept_prob) {  // the longest such prefix stays
        args.accepted[b] = i;
        args.carry[b] = A(carry);
      }
    }
  }
}

template <class A>
void draw_residual(const DrawResidual<A>& args, int64_t begin, int64_t end) {
  const Block<A>& block = args.block;
  const int64_t V = block.V;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t position = next_position(args, b);
    args.tokens[b] = 0;
    if (position < 0) continue;
    const auto residual = [&](int64_t y) {
      return residual_mass(block, b, position, args.carry[b], y);
    };
    const double residual_total = position < num_drafted(block, b) ? sum_over(V, residual) : 0;
    if (residual_total != 0) {
      args.tokens[b] = draw(V, residual_total, args.uniforms[b], residual);
      continue;
    }
    const auto target = [&](int64_t y) { return target_prob(block, b, position, y); };
    args.tokens[b] = draw(V, sum_over(V, target), args.uniforms[b], target);
  }
}

template void draw_tokens(const DrawTokens<float>&, int64_t, int64_t);
template void draw_tokens(const DrawTokens<double>&, int64_t, int64_t);
template void verify_block(const VerifyBlock<float>&, int64_t, int64_t);
template void verify_block(const VerifyBlock<double>&, int64_t, int64_t);
template void draw_residual(const DrawResidual<float>&, int64_t, int64_t);
template void draw_residual(const DrawResidual<double>&, int64_t, int64_t);

}  // namespace mpg::cpu
