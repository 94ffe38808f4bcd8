// Temperature, top-k, top-p and min-p.
//
// One block per row, one launch: the search for a cut takes a pass over the row for every two bits
// of the preference code, each waiting for the sum before, and the row stays in the second-level
// cache throughout; split over blocks every pass would be a launch. Sums are made by shuffles in a
// fixed order: floating-point atomics would let equal calls keep different tokens.
#include "launch.cuh"

namespace mpg::cuda {
namespace {

// As many as a block may have: the passes wait for memory.
constexpr int kRowThreads = 1024;

// Bits that order as the numbers do; adding 0 makes -0 and 0 equal.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = bits_of(x + 0.f);
  return bits >> 31 ? ~bits : bits | uint32_t(1) << 31;
}

// The tokens of one row as numbers: a greater code is preferred, by larger value and among equals
// by lower token, and no two are equal. So a cut between kept and dropped tokens is a number too,
// found digit by digit without sorting.
struct Preference {
  const float* row;
  int64_t V;
  int token_bits;  // enough for V - 1

  __device__ __forceinline__ Preference(const float* row, int64_t V)
      : row(row), V(V), token_bits(0) {
    while ((V - 1) >> token_bits != 0) ++token_bits;
  }
  __device__ __forceinline__ int num_bits() const { return 32 + token_bits; }
  __device__ __forceinline__ uint64_t operator()(int64_t y) const {
    return uint64_t(ordered_bits(row[y])) << token_bits | uint64_t(V - 1 - y);
  }
};

// The greatest code from which up the tokens weigh at least `budget`; 0 if all together do not. So
// a token is kept, code >= cut, if those preferred to it weigh less than the budget. Two bits a
// pass.
template <class F>
__device__ __forceinline__ uint64_t find_cut(const Preference& preference, double budget,
                                             F weight_of) {
  uint64_t cut = 0;
  for (int shift = (preference.num_bits() - 1) / 2 * 2; shift >= 0; shift -= 2) {
    const uint64_t first = cut >> shift;
    double weight1 = 0, weight2 = 0, weight3 = 0;  // of the codes from first + 1, 2, 3 up
    for (int64_t y = threadIdx.x; y < preference.V; y += kRowThreads) {
      const uint64_t code = preference(y) >> shift;
      if (code <= first) continue;
      const double weight = weight_of(y);
      weight1 += weight;
      if (code > first + 1) weight2 += weight;
      if (code > first + 2) weight3 += weight;
    }
    uint64_t digit = 0;
    if (sum_block<kRowThreads>(weight1) >= budget) digit = 1;
    if (sum_block<kRowThreads>(weight2) >= budget) digit = 2;
    if (sum_block<kRowThreads>(weight3) >= budget) digit = 3;
    cut |= digit << shift;
  }
  return cut;
}

__global__ void __launch_bounds__(kRowThreads) warp_rows_kernel(const WarpRows<float> args) {
  const int64_t V = args.V;
  const float* row = args.log_rows + blockIdx.x * V;
  float* probs = args.probs + blockIdx.x * V;
  const Preference preference(row, V);

  uint64_t top = 0;
  int num_invalid = 0;
  for (int64_t y = threadIdx.x; y < V; y += kRowThreads) {
    const uint64_t code = preference(y);
    top = code > top ? code : top;
    num_invalid += !(row[y] < INFINITY);  // NaN or +inf
  }
  top = reduce_block<kRowThreads>(top, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  num_invalid = sum_block<kRowThreads>(num_invalid);
  const int64_t preferred = V - 1 - int64_t(top & ((uint64_t(1) << preference.token_bits) - 1));
  const float max = row[preferred];
  if (num_invalid != 0 || max == -INFINITY || args.temperature == 0) {
    for (int64_t y = threadIdx.x; y < V; y += kRowThreads) {
      const bool is_one = y == preferred && max != -INFINITY;
      probs[y] = num_invalid != 0 ? NAN : (is_one ? 1 : 0);
    }
    return;
  }

  // Masses at first, 1 for the largest. A thread reads back only what it wrote itself.
  for (int64_t y = threadIdx.x; y < V; y += kRowThreads) {
    probs[y] = std::exp(float((double(row[y]) - max) / args.temperature));
  }
  uint64_t cut = 0;
  const auto mass_of = [&](int64_t y) { return preference(y) < cut ? 0 : double(probs[y]); };
  const auto mass_of_thread = [&] {
    double mass = 0;
    for (int64_t y = threadIdx.x; y < V; y += kRowThreads) mass += mass_of(y);
    return mass;
  };
  if (args.top_k > 0 && args.top_k < V) {
    cut = find_cut(preference, double(args.top_k), [](int64_t) { return 1; });
  }
  if (args.top_p < 1) {
    cut = find_cut(preference, args.top_p * sum_block<kRowThreads>(mass_of_thread()), mass_of);
  }
  for (int64_t y = threadIdx.x; y < V; y += kRowThreads) {
    if (mass_of(y) < args.min_p) probs[y] = 0;
  }
  const double total = sum_block<kRowThreads>(mass_of_thread());
  for (int64_t y = threadIdx.x; y < V; y += kRowThreads) probs[y] = float(mass_of(y) / total);
}

}  // namespace

void warp_rows(const WarpRows<float>& args, void* stream) {
  MPG_LAUNCH(warp_rows_kernel, dim3(unsigned(args.R)), kRowThreads, 0, stream, args);
}

}  // namespace mpg::cuda
