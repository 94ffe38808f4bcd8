// Block verification, and the draw that follows it.
#include "../block.h"
#include "inverse_cdf.h"
#include "simd.h"

namespace mpg::cpu {
namespace {

template <class A>
MPG_INLINE void widen(const A* row, int64_t size, double* masses) {
  for (int64_t y = 0; y < size; ++y) masses[y] = row[y];
}

template <class A>
MPG_INLINE void subtract(const A* target, const A* draft, double carry, int64_t size,
                         double* masses) {
  for (int64_t y = 0; y < size; ++y) masses[y] = positive_part(carry * target[y] - draft[y]);
}

template <class A>
const A* target_row(const Block<A>& block, int64_t b, int64_t position) {
  return block.target_probs + (b * (block.K + 1) + position) * block.V;
}

template <class A>
InverseCdf<A> target_cdf(const Block<A>& block, int64_t b, int64_t position) {
  const A* row = target_row(block, b, position);
  return {block.V, [row](int64_t begin, int64_t size, double* masses) {
            at_level<widen<A>>(row + begin, size, masses);
          }};
}

// Of (carry p - q)_+, see residual_mass.
template <class A>
InverseCdf<A> residual_cdf(const Block<A>& block, int64_t b, int64_t position, double carry) {
  return {block.V, [=, &block](int64_t begin, int64_t size, double* masses) {
            if (block.draft_probs == nullptr) {
              for (int64_t y = 0; y < size; ++y) {
                masses[y] = residual_mass(block, b, position, carry, begin + y);
              }
              return;
            }
            const A* target = target_row(block, b, position) + begin;
            const A* draft = block.draft_probs + (b * block.K + position) * block.V + begin;
            if constexpr (sizeof(A) == sizeof(float)) {
              at_level<subtract<A>>(target, draft, carry, size, masses);
            } else {  // without the fused multiply-adds of AVX-512, as the twins
              subtract(target, draft, carry, size, masses);
            }
          }};
}

}  // namespace

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
        accept_prob = prefix_accept_prob(carry, residual_cdf(block, b, i, carry).total());
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
  for (int64_t b = begin; b < end; ++b) {
    const int64_t position = next_position(args, b);
    args.tokens[b] = 0;
    if (position < 0) continue;
    if (position < num_drafted(block, b)) {
      auto residual = residual_cdf(block, b, position, args.carry[b]);
      if (residual.total() != 0) {
        args.tokens[b] = residual.draw(args.uniforms[b]);
        continue;
      }
    }
    args.tokens[b] = target_cdf(block, b, position).draw(args.uniforms[b]);
  }
}

MPG_INSTANTIATE(verify_block, VerifyBlock);
MPG_INSTANTIATE(draw_residual, DrawResidual);

}  // namespace mpg::cpu
