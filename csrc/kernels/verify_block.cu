// Block verification, and the draw that follows it: two launches each, grid (rows, slices) for sums
// over slices of the vocabulary, then one warp (verification) or block (draws) per sequence.
#include "../block.h"
#include "inverse_cdf.cuh"

namespace mpg::cuda {
namespace {

// S_i of one slice, for i = 1..K - 1. Every block works out P_i by itself, from 2 i numbers.
__global__ void __launch_bounds__(kThreads) slice_sums_kernel(const VerifyBlock<float> args) {
  const Block<float>& block = args.block;
  const int64_t b = blockIdx.x / block.K, i = blockIdx.x % block.K;
  if (i == 0 || i >= num_drafted(block, b))
    return;  // no test needs S_0, nor S_k of the whole block
  double carry = 1;
  for (int64_t j = 0; j < i; ++j) carry = next_carry(block, b, j, carry);
  if (carry == 0) return;  // the rows after it may hold anything
  const double sum =
      slice_mass(block.V, [&](int64_t y) { return residual_mass(block, b, i, carry, y); });
  if (threadIdx.x == 0) {
    args.slice_sums[int64_t(blockIdx.x) * num_slices(block.V) + blockIdx.y] = sum;
  }
}

// One warp per sequence: lane i - 1 makes the test of the prefix of i tokens.
__global__ void verify_block_kernel(const VerifyBlock<float> args) {
  const Block<float>& block = args.block;
  const int64_t b = blockIdx.x, i = threadIdx.x + 1, length = num_drafted(block, b);
  const bool counts = i <= length;
  double carry = 1;
  for (int64_t j = 0; counts && j < i; ++j) carry = next_carry(block, b, j, carry);
  double accept_prob = counts ? carry : 0;
  if (i < length && carry != 0) {
    const double* sums = args.slice_sums + (b * block.K + i) * num_slices(block.V);
    accept_prob = prefix_accept_prob(carry, total_mass(block.V, sums));
  }
  const bool accepts = counts && args.uniforms[b * block.K + i - 1] < accept_prob;
  const unsigned accepting = __ballot_sync(kAllLanes, accepts);
  const unsigned invalid = __ballot_sync(kAllLanes, is_nan(accept_prob));
  const int64_t accepted = kWarp - __clz(int(accepting));
  const double accepted_carry = __shfl_sync(kAllLanes, carry, accepted > 0 ? int(accepted) - 1 : 0);
  if (threadIdx.x != 0) return;
  args.accepted[b] = invalid != 0 ? -1 : accepted;
  args.carry[b] = invalid != 0 ? NAN : (accepted == 0 ? 1 : float(accepted_carry));
}

// Mass of one slice of the residual, then of the target's row in case the residual has none.
__global__ void __launch_bounds__(kThreads) residual_masses_kernel(const DrawResidual<float> args) {
  const Block<float>& block = args.block;
  const int64_t b = blockIdx.x, position = next_position(args, b);
  if (position < 0) return;
  const bool has_residual = position < num_drafted(block, b);
  const double carry = has_residual ? args.carry[b] : 0;
  double residual = 0, target = 0;
  for_slice(block.V, [&](int64_t y) {
    target += target_prob(block, b, position, y);
    if (has_residual) residual += residual_mass(block, b, position, carry, y);
  });
  residual = sum_block(residual);
  target = sum_block(target);
  if (threadIdx.x != 0) return;
  double* slice_masses = args.slice_masses + b * num_slices(block.V) + blockIdx.y;
  slice_masses[0] = residual;
  slice_masses[block.B * num_slices(block.V)] = target;
}

__global__ void __launch_bounds__(kThreads) draw_residual_kernel(const DrawResidual<float> args) {
  const Block<float>& block = args.block;
  const int64_t b = blockIdx.x, V = block.V, position = next_position(args, b);
  if (threadIdx.x == 0) args.tokens[b] = 0;
  if (position < 0) return;
  const double* slice_masses = args.slice_masses + b * num_slices(V);
  double total = total_mass(V, slice_masses);
  const bool has_residual = total != 0;
  const double carry = has_residual ? args.carry[b] : 0;
  if (!has_residual) {
    slice_masses += block.B * num_slices(V);
    total = total_mass(V, slice_masses);
  }
  if (!(total > 0)) return;
  const int64_t y = draw(V, slice_masses, args.uniforms[b] * total, [&](int64_t y) {
    return has_residual ? residual_mass(block, b, position, carry, y)
                        : target_prob(block, b, position, y);
  });
  if (threadIdx.x == 0) args.tokens[b] = y;
}

}  // namespace

void verify_block(const VerifyBlock<float>& args, void* stream) {
  const Block<float>& block = args.block;
  const dim3 slices(unsigned(block.B * block.K), unsigned(num_slices(block.V)));
  MPG_LAUNCH(slice_sums_kernel, slices, kThreads, 0, stream, args);
  MPG_LAUNCH(verify_block_kernel, dim3(unsigned(block.B)), kWarp, 0, stream, args);
}

void draw_residual(const DrawResidual<float>& args, void* stream) {
  const Block<float>& block = args.block;
  const dim3 slices(unsigned(block.B), unsigned(num_slices(block.V)));
  MPG_LAUNCH(residual_masses_kernel, slices, kThreads, 0, stream, args);
  MPG_LAUNCH(draw_residual_kernel, dim3(unsigned(block.B)), kThreads, 0, stream, args);
}

}  // namespace mpg::cuda
