// Low-rank updates of rows that each run an adapter of their own: hidden[i] = x[i] down^T of the
// row's group, and out[i] += hidden[i] up.
//
// For decoding: few tokens, so that the factors are what has to be read. A block takes a tile of up
// to kTokens tokens of neighbouring rows of one group, and reads its slice of the group's factor
// once for all of them. The grid has a block for every row, since only the device knows the groups;
// the first row of a tile does the work, and the others leave. Shrink: grid (rows, slices of the
// rank, positions), a block's threads share the features. Expand: grid (rows, slices of the
// outputs, positions), each thread has outputs of its own.
#include "launch.cuh"
#include "packed.cuh"

namespace mpg::cuda {
namespace {

constexpr int kTokens = 8;               // whose sums fit in registers
constexpr int kRanks = kWarp / kTokens;  // of a slice: one sum for each lane of a warp
constexpr int kExpandThreads = 64;       // few: short rows still give every multiprocessor a block
constexpr int kStaged = 32;              // ranks of the hidden tokens that a block holds at a time

MPG_HOST_DEVICE int64_t rows_of_tile(int64_t q) { return q < kTokens ? kTokens / q : 1; }

// The tokens of a block; none where another block has them.
struct Tile {
  int64_t row, position, num_positions, group;
  int count;

  __device__ __forceinline__ explicit Tile(const AdapterRows& rows)
      : row(blockIdx.x), position(int64_t(blockIdx.z) * kTokens), group(rows.groups[row]) {
    const int64_t most_rows = rows_of_tile(rows.q), left = rows.q - position;
    num_positions = left < kTokens ? left : kTokens;
    const auto continues = [&](int64_t i) {  // the tile of the row before
      return i % most_rows != 0 && rows.groups[i - 1] == rows.groups[i];
    };
    int64_t end = row + 1;
    while (end < rows.R && continues(end)) ++end;
    count = continues(row) ? 0 : int((end - row) * num_positions);
  }

  template <class T, class Pointer>
  __device__ __forceinline__ T* token(const TokenRows<Pointer>& rows, int t) const {
    return static_cast<T*>(rows.data) + (row + t / num_positions) * rows.stride_row +
           (position + t % num_positions) * rows.stride_position;
  }
};

// Sums over the lanes of a warp: lane l returns that of x[l]. At each step a lane keeps the half of
// its numbers that are for lanes on its side, and gives the others away.
template <int kCount>
__device__ __forceinline__ float sum_over_lanes(const float (&x)[kCount]) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    constexpr int kHalf = kCount / 2;
    const int lane = threadIdx.x % kWarp;
    float sums[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const bool is_upper = (lane & kHalf) != 0;
      const float given = is_upper ? x[i] : x[i + kHalf];
      const float kept = is_upper ? x[i + kHalf] : x[i];
      sums[i] = kept + __shfl_sync(kAllLanes, given, lane ^ kHalf);
    }
    return sum_over_lanes(sums);
  }
}

template <class T, int kSize>
__global__ void __launch_bounds__(kThreads) lora_shrink_kernel(const LoraShrink<float> args) {
  const Tile tile(args.rows);
  if (tile.count == 0) return;
  const int64_t rank = args.rows.rank, first = int64_t(blockIdx.y) * kRanks, in = args.in;
  float sums[kWarp] = {};  // of token t and rank first + j at t * kRanks + j
  if (args.rows.has_adapter(tile.group)) {
    using P = Packed<T, kSize>;
    const T *x[kTokens], *down[kRanks];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) x[t] = tile.token<const T>(args.x, t < tile.count ? t : 0);
#pragma unroll
    for (int j = 0; j < kRanks; ++j) {  // the last one again where there are fewer
      const int64_t factor = first + j < rank ? first + j : rank - 1;
      down[j] = static_cast<const T*>(args.down) + (tile.group * rank + factor) * in;
    }
    for (int64_t f = int64_t(threadIdx.x) * kSize; f < in; f += kThreads * kSize) {
      P factors[kRanks];
#pragma unroll
      for (int j = 0; j < kRanks; ++j) factors[j] = load_packed<P>(down[j] + f);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t >= tile.count) break;
        const P features = load_packed<P>(x[t] + f);
#pragma unroll
        for (int j = 0; j < kRanks; ++j) {
#pragma unroll
          for (int e = 0; e < kSize; ++e) {
            sums[t * kRanks + j] += to_float(features.element[e]) * to_float(factors[j].element[e]);
          }
        }
      }
    }
  }
  __shared__ float of_warp[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  of_warp[warp][lane] = sum_over_lanes(sums);
  __syncthreads();  // warp 0 reads what all warps wrote
  const int t = lane / kRanks;
  const int64_t j = first + lane % kRanks;
  if (warp != 0 || t >= tile.count || j >= rank) return;
  float total = 0;
  for (int w = 0; w < kWarps; ++w) total += of_warp[w][lane];
  tile.token<T>(args.hidden, t)[j] = to_stored<T>(total);
}

template <class T, int kSize>
__global__ void __launch_bounds__(kExpandThreads) lora_expand_kernel(const LoraExpand<float> args) {
  const Tile tile(args.rows);
  if (tile.count == 0 || !args.rows.has_adapter(tile.group)) return;
  using P = Packed<T, kSize>;
  const int64_t rank = args.rows.rank, size = args.size, own = tile.group * args.step;
  const int64_t c = (int64_t(blockIdx.y) * kExpandThreads + threadIdx.x) * kSize;
  const T* up = static_cast<const T*>(args.up) + tile.group * rank * size + c;
  float sums[kTokens][kSize] = {};
  for (int64_t first = 0; first < rank; first += kStaged) {
    const int num_staged = int(rank - first < kStaged ? rank - first : kStaged);
    __shared__ float staged[kStaged][kTokens];
    __syncthreads();  // what was staged before has been read
    for (int i = threadIdx.x; i < tile.count * num_staged; i += kExpandThreads) {
      const int t = i / num_staged, j = i % num_staged;
      staged[j][t] = to_float(tile.token<const T>(args.hidden, t)[own + first + j]);
    }
    __syncthreads();  // all threads read what each wrote
    if (c >= size) continue;
#pragma unroll 4
    for (int j = 0; j < num_staged; ++j) {
      const P factors = load_packed<P>(up + (first + j) * size);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t >= tile.count) break;
#pragma unroll
        for (int e = 0; e < kSize; ++e) sums[t][e] += staged[j][t] * to_float(factors.element[e]);
      }
    }
  }
  if (c >= size) return;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t >= tile.count) break;
    T* out = tile.token<T>(args.out, t) + c;
    P packed = load_packed<P>(out);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      packed.element[e] = to_stored<T>(to_float(packed.element[e]) + sums[t][e]);
    }
    *reinterpret_cast<P*>(out) = packed;
  }
}

dim3 grid_of(const AdapterRows& rows, int64_t size, int64_t size_of_block) {
  return dim3(unsigned(rows.R), blocks_for(size, size_of_block), blocks_for(rows.q, kTokens));
}

// Whether tokens and factors, rows of `size` elements, lie on 16 bytes.
template <class T, class Pointer>
bool is_aligned(const TokenRows<Pointer>& tokens, const void* factors, int64_t size) {
  const auto address =
      reinterpret_cast<uintptr_t>(tokens.data) | reinterpret_cast<uintptr_t>(factors);
  const int64_t strides = tokens.stride_row | tokens.stride_position | size;
  return address % 16 == 0 && strides % (16 / int64_t(sizeof(T))) == 0;
}

}  // namespace

void lora_shrink(const LoraShrink<float>& args, void* stream) {
  const dim3 grid = grid_of(args.rows, args.rows.rank, kRanks);
  with_logit_type<float>(args.rows.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kSize = 16 / sizeof(T);
    if (is_aligned<T>(args.x, args.down, args.in)) {
      MPG_LAUNCH((lora_shrink_kernel<T, kSize>), grid, kThreads, 0, stream, args);
    } else {
      MPG_LAUNCH((lora_shrink_kernel<T, 1>), grid, kThreads, 0, stream, args);
    }
  });
}

void lora_expand(const LoraExpand<float>& args, void* stream) {
  with_logit_type<float>(args.rows.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kSize = 16 / sizeof(T);
    if (is_aligned<T>(args.out, args.up, args.size)) {
      const dim3 grid = grid_of(args.rows, args.size, kExpandThreads * kSize);
      MPG_LAUNCH((lora_expand_kernel<T, kSize>), grid, kExpandThreads, 0, stream, args);
    } else {
      const dim3 grid = grid_of(args.rows, args.size, kExpandThreads);
      MPG_LAUNCH((lora_expand_kernel<T, 1>), grid, kExpandThreads, 0, stream, args);
    }
  });
}

}  // namespace mpg::cuda
