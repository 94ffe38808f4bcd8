// Temperature, top-k, top-p and min-p.
//
// Grid (rows, slices) throughout, so that a single row has the whole GPU. A cut is found without
// sorting, in four passes over the row: a histogram over the distance from the largest value, which
// spreads what rows of a model hold, then three over the bits of the values in the bin that the cut
// goes through. Masses are added as integers, whose sums do not depend on the order, so atomics
// leave every call the same. Every block works out by itself where the pass before has led; the
// first of a row notes it for the passes to come. Launches: two, four and one for each cut, one.
#include "launch.cuh"

namespace mpg::cuda {
namespace {

enum Cut { kTopK, kTopP };
constexpr int kDigits = 4;
constexpr int kBins = 2048;
constexpr float kBinsPerFactor = 64;  // of e: the first histogram reaches down to exp(-32)
static_assert(kWarpWords == 2 * kDigits * (kBins + 2) + 2);

// Bits that order as the numbers do; adding 0 makes -0 and 0 equal.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = bits_of(x + 0.f);
  return bits >> 31 ? ~bits : bits | uint32_t(1) << 31;
}

// Where a pass has led: to the tokens with this bin of the first histogram, or these first bits of
// a rank, among which the cut leaves `left` of its budget.
struct Choice {
  uint64_t prefix, left;
};

// A row and what the passes note of it.
struct Row {
  const WarpRows<float>& args;
  const WarpOptions options;
  const float* log_rows;
  float* masses;  // 1 for the largest; in the end probabilities
  uint64_t* scratch;

  __device__ __forceinline__ explicit Row(const WarpRows<float>& args)
      : args(args),
        options(args.options_of(blockIdx.x)),
        log_rows(args.log_rows + blockIdx.x * args.V),
        masses(args.probs + blockIdx.x * args.V),
        scratch(args.scratch + blockIdx.x * (kWarpWords + kWarpSliceWords * args.num_slices)) {}

  __device__ __forceinline__ bool has(Cut cut) const {
    return cut == kTopP ? options.top_p < 1 : options.top_k > 0 && options.top_k < args.V;
  }
  // The sums of tokens kept so far are those after so many cuts.
  __device__ __forceinline__ int num_stages(int cuts) const {
    return cuts == 2 && has(kTopP) ? 2 : (cuts >= 1 && has(kTopK) ? 1 : 0);
  }

  __device__ __forceinline__ uint64_t* histogram(Cut cut, int digit) const {
    return scratch + (cut * kDigits + digit) * kBins;
  }
  __device__ __forceinline__ Choice& choice(Cut cut, int digit) const {
    uint64_t* words = scratch + 2 * kDigits * kBins + 2 * (cut * kDigits + digit);
    return *reinterpret_cast<Choice*>(words);
  }
  __device__ __forceinline__ uint64_t& is_done() const { return scratch[kWarpWords - 2]; }
  __device__ __forceinline__ uint64_t& max_bits() const { return scratch[kWarpWords - 1]; }
  __device__ __forceinline__ uint64_t* of_slices(int number) const {
    return scratch + kWarpWords + number * args.num_slices;
  }
  // The preferred token of each slice, the numbers that are none; then of a stage the mass of the
  // tokens above the cut, and the number and mass of those at it.
  __device__ __forceinline__ uint64_t* tops() const { return of_slices(0); }
  __device__ __forceinline__ uint64_t* invalid() const { return of_slices(1); }
  __device__ __forceinline__ uint64_t* above(int stage) const { return of_slices(2 + 3 * stage); }
  __device__ __forceinline__ uint64_t* ties(int stage) const { return of_slices(3 + 3 * stage); }
  __device__ __forceinline__ uint64_t* at_cut(int stage) const { return of_slices(4 + 3 * stage); }

  // Calls f(y) for the tokens of this block's slice.
  template <class F>
  __device__ __forceinline__ void for_tokens(F f) const {
    const int64_t begin = blockIdx.y * args.slice_size, end = begin + args.slice_size;
    for (int64_t y = begin + threadIdx.x; y < end && y < args.V; y += kThreads) f(y);
  }

  // Small where a token is preferred.
  __device__ __forceinline__ uint32_t rank_of(int64_t y) const {
    return ~ordered_bits(log_rows[y]);
  }
  __device__ __forceinline__ uint32_t first_bin_of(int64_t y, float max, float scale) const {
    const float distance = (max - log_rows[y]) * scale;
    return distance < kBins - 1 ? uint32_t(distance) : kBins - 1;
  }
  // Of all V together less than 2^63.
  __device__ __forceinline__ uint64_t units_of(float mass) const {
    return uint64_t(mass * args.mass_unit);
  }
};

// The bits of a rank after those of a digit: 11, 11 and 10 bits after the first histogram.
__device__ __forceinline__ int bits_after(int digit) {
  return digit == 1 ? 21 : (digit == 2 ? 10 : 0);
}

// Of all slices up to `count`.
__device__ __forceinline__ uint64_t sum_slices(const uint64_t* of_slices, int64_t count) {
  uint64_t sum = 0;
  for (int64_t s = threadIdx.x; s < count; s += kThreads) sum += of_slices[s];
  return sum_block(sum);
}

// The bin where the cumulated weight reaches `budget`, which is 1 at least and all at most.
__device__ __forceinline__ Choice choose(const uint64_t* histogram, uint64_t budget) {
  constexpr int kRun = kBins / kThreads;
  uint64_t weights[kRun], sum = 0;
#pragma unroll
  for (int i = 0; i < kRun; ++i) sum += weights[i] = histogram[threadIdx.x * kRun + i];
  uint64_t cumulated = scan_block(sum) - sum;
  __shared__ uint64_t bin, left;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (cumulated < budget && budget <= cumulated + weights[i]) {
      bin = threadIdx.x * kRun + i;
      left = budget - cumulated;
    }
    cumulated += weights[i];
  }
  __syncthreads();  // all threads read what one wrote
  return {bin, left};
}

// What a stage keeps: all tokens of a lower rank than `cut`, and so many of those at it.
struct Kept {
  uint64_t cut, num_ties, num_ties_kept, mass;
};

__device__ __forceinline__ Kept kept_after(const Row& row, int stage) {
  const int64_t num_slices = row.args.num_slices;
  const uint64_t above = sum_slices(row.above(stage), num_slices);
  if (stage == 0) return {uint64_t(1) << 32, 0, 0, above};
  const Cut cut = stage == 1 ? kTopK : kTopP;
  const Choice last = row.choice(cut, kDigits - 1);
  const uint64_t num_ties = sum_slices(row.ties(stage), num_slices);
  const uint64_t weight = row.histogram(cut, kDigits - 1)[last.prefix % 1024] / num_ties;
  const uint64_t num_kept = (last.left + weight - 1) / weight;
  const uint64_t at_cut = sum_slices(row.at_cut(stage), num_slices) / num_ties;
  return {last.prefix, num_ties, num_kept, above + num_kept * at_cut};
}

__global__ void __launch_bounds__(kThreads) find_max_kernel(const WarpRows<float> args) {
  const Row row(args);
  for (int64_t i = blockIdx.y * kThreads + threadIdx.x; i < 2 * kDigits * kBins;
       i += args.num_slices * kThreads) {
    row.scratch[i] = 0;
  }
  uint64_t top = 0, num_invalid = 0;
  row.for_tokens([&](int64_t y) {
    const uint64_t code = uint64_t(ordered_bits(row.log_rows[y])) << 32 | (0xffffffff - y);
    top = code > top ? code : top;
    num_invalid += !(row.log_rows[y] < INFINITY);  // NaN or +inf
  });
  top = reduce_block(top, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  num_invalid = sum_block(num_invalid);
  if (threadIdx.x != 0) return;
  row.tops()[blockIdx.y] = top;
  row.invalid()[blockIdx.y] = num_invalid;
}

// Masses, unless the row is simple.
__global__ void __launch_bounds__(kThreads) exponentiate_kernel(const WarpRows<float> args) {
  const Row row(args);
  uint64_t top = 0;
  for (int64_t s = threadIdx.x; s < args.num_slices; s += kThreads) {
    top = row.tops()[s] > top ? row.tops()[s] : top;
  }
  top = reduce_block(top, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  const int64_t preferred = 0xffffffff - int64_t(top & 0xffffffff);
  const float max = row.log_rows[preferred];
  const bool is_invalid =
      sum_slices(row.invalid(), args.num_slices) != 0 || !row.options.is_valid();
  const bool is_done = is_invalid || max == -INFINITY || row.options.temperature == 0;
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    row.is_done() = is_done;
    row.max_bits() = bits_of(max);
  }
  if (is_done) {
    row.for_tokens([&](int64_t y) {
      const bool is_one = y == preferred && max != -INFINITY;
      row.masses[y] = is_invalid ? NAN : (is_one ? 1 : 0);
    });
    return;
  }
  const double scale = row.options.scale(), min_p = row.num_stages(2) == 0 ? row.options.min_p : 0;
  uint64_t sum = 0;
  row.for_tokens([&](int64_t y) {
    const float mass = std::exp(float((double(row.log_rows[y]) - max) * scale));
    row.masses[y] = mass;
    if (mass >= min_p) sum += row.units_of(mass);
  });
  sum = sum_block(sum);
  if (threadIdx.x == 0) row.above(0)[blockIdx.y] = sum;
}

// The weight of the tokens to keep.
__device__ __forceinline__ uint64_t budget_of(const Row& row, Cut cut) {
  if (cut == kTopK) return row.options.top_k;
  const uint64_t mass = kept_after(row, row.num_stages(1)).mass;
  const double share = std::ceil(row.options.top_p * double(mass));
  return share < 1 ? 1 : (share < double(mass) ? uint64_t(share) : mass);
}

// From the histogram of a digit, after the first, among the tokens that the one before has led to.
__device__ __forceinline__ Choice choose_next(const Row& row, Cut cut, int digit) {
  const Choice before = row.choice(cut, digit - 1);
  Choice chosen = choose(row.histogram(cut, digit), before.left);
  if (digit > 1) chosen.prefix |= before.prefix << (bits_after(digit - 1) - bits_after(digit));
  return chosen;
}

// One histogram, of the tokens in the bins that the passes before have chosen.
__global__ void __launch_bounds__(kThreads)
    count_digit_kernel(const WarpRows<float> args, Cut cut, int digit) {
  const Row row(args);
  if (row.is_done() || !row.has(cut)) return;
  Choice chosen = {0, 0};
  if (digit == 1) {
    chosen = choose(row.histogram(cut, 0), budget_of(row, cut));
  } else if (digit > 1) {
    chosen = choose_next(row, cut, digit - 1);
  }
  if (digit > 0 && blockIdx.y == 0 && threadIdx.x == 0) row.choice(cut, digit - 1) = chosen;
  const uint64_t first_bin = digit > 1 ? row.choice(cut, 0).prefix : chosen.prefix;
  const float max = float_from_bits(uint32_t(row.max_bits()));
  const float scale = float(row.options.scale()) * kBinsPerFactor;
  __shared__ uint32_t low[kBins], high[kBins];  // 64-bit atomics of shared memory are loops
  for (int i = threadIdx.x; i < kBins; i += kThreads) low[i] = high[i] = 0;
  __syncthreads();  // before others add
  row.for_tokens([&](int64_t y) {
    const uint32_t first = row.first_bin_of(y, max, scale), rank = row.rank_of(y);
    if (digit > 0 && first != first_bin) return;
    if (digit > 1 && rank >> bits_after(digit - 1) != chosen.prefix) return;
    const uint32_t bin =
        digit == 0 ? first : rank >> bits_after(digit) & (digit == 3 ? 1023 : 2047);
    const uint64_t weight = cut == kTopK ? 1 : row.units_of(row.masses[y]);
    const uint32_t before = atomicAdd(&low[bin], uint32_t(weight));
    const uint32_t carry = before + uint32_t(weight) < before;
    if (const uint32_t rest = uint32_t(weight >> 32) + carry) atomicAdd(&high[bin], rest);
  });
  __syncthreads();  // all threads read what all added
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    const uint64_t sum = uint64_t(high[i]) << 32 | low[i];
    using Word = unsigned long long;
    if (sum != 0) atomicAdd(reinterpret_cast<Word*>(row.histogram(cut, digit) + i), Word(sum));
  }
}

// What is above and at a cut.
__global__ void __launch_bounds__(kThreads) weigh_kernel(const WarpRows<float> args, Cut cut) {
  const Row row(args);
  if (row.is_done() || !row.has(cut)) return;
  const Choice last = choose_next(row, cut, kDigits - 1);
  if (blockIdx.y == 0 && threadIdx.x == 0) row.choice(cut, kDigits - 1) = last;
  const uint32_t rank_of_cut = uint32_t(last.prefix);
  const int stage = cut == kTopK ? 1 : 2;
  const double min_p = row.num_stages(2) == stage ? row.options.min_p : 0;
  uint64_t above = 0, ties = 0, at_cut = 0;
  row.for_tokens([&](int64_t y) {
    const uint32_t rank = row.rank_of(y);
    const uint64_t units = row.masses[y] >= min_p ? row.units_of(row.masses[y]) : 0;
    if (rank < rank_of_cut) above += units;
    ties += rank == rank_of_cut;
    if (rank == rank_of_cut) at_cut += units;
  });
  above = sum_block(above);
  ties = sum_block(ties);
  at_cut = sum_block(at_cut);
  if (threadIdx.x != 0) return;
  row.above(stage)[blockIdx.y] = above;
  row.ties(stage)[blockIdx.y] = ties;
  row.at_cut(stage)[blockIdx.y] = at_cut;
}

__global__ void __launch_bounds__(kThreads) normalize_kernel(const WarpRows<float> args) {
  const Row row(args);
  if (row.is_done()) return;
  const int stage = row.num_stages(2);
  const Kept kept = kept_after(row, stage);
  // Of equal values the first are kept: threads take neighbouring tokens, and count.
  uint64_t num_before = stage == 0 ? 0 : sum_slices(row.ties(stage), blockIdx.y);
  const bool is_split = kept.num_ties_kept < kept.num_ties;
  const float scale = float(double(args.mass_unit) / double(kept.mass));
  const int64_t begin = blockIdx.y * args.slice_size;
  for (int64_t first = begin; first < begin + args.slice_size && first < args.V;
       first += kThreads) {
    const int64_t y = first + threadIdx.x;
    const bool is_token = y < args.V && y < begin + args.slice_size;
    const uint64_t rank = is_token ? row.rank_of(y) : ~0ull;
    bool is_kept = rank <= kept.cut;
    if (is_split) {
      const uint64_t number = scan_block(uint64_t(rank == kept.cut));  // with this one
      if (rank == kept.cut) is_kept = num_before + number <= kept.num_ties_kept;
      num_before += sum_block(uint64_t(rank == kept.cut));
    }
    if (!is_token) continue;
    is_kept = is_kept && row.masses[y] >= row.options.min_p;
    row.masses[y] = is_kept ? row.masses[y] * scale : 0;
  }
}

}  // namespace

void warp_rows(const WarpRows<float>& args, void* stream) {
  const dim3 grid(unsigned(args.R), unsigned(args.num_slices));
  MPG_LAUNCH(find_max_kernel, grid, kThreads, 0, stream, args);
  MPG_LAUNCH(exponentiate_kernel, grid, kThreads, 0, stream, args);
  for (const Cut cut : {kTopK, kTopP}) {
    const bool is_asked = cut == kTopK ? args.options.top_k > 0 || args.top_ks != nullptr
                                       : args.options.top_p < 1 || args.top_ps != nullptr;
    if (!is_asked) continue;
    for (int digit = 0; digit < kDigits; ++digit) {
      MPG_LAUNCH(count_digit_kernel, grid, kThreads, 0, stream, args, cut, digit);
    }
    MPG_LAUNCH(weigh_kernel, grid, kThreads, 0, stream, args, cut);
  }
  MPG_LAUNCH(normalize_kernel, grid, kThreads, 0, stream, args);
}

}  // namespace mpg::cuda
