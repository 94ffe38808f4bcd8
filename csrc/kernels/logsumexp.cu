// sum_v exp(x_v / temperature) of slices of rows: the one pass over the logits that scoring needs.
//
// Grid (rows of a model, slices, models). A row is split because a single sequence has only (1 + N)
// * K rows, too few blocks to draw the memory's bandwidth. Each thread reads 16 bytes at a time and
// keeps an online (max, sum); rows that do not start on 16 bytes have their ends peeled off.
#include "logsumexp.cuh"
#include "packed.cuh"

namespace mpg::cuda {
namespace {

template <class T>
__device__ __forceinline__ LogSum<float> packed_log_sum(Packed<T> packed, float inv_temperature) {
  float x[Packed<T>::kSize];
  LogSum<float> sum;
  for (int e = 0; e < Packed<T>::kSize; ++e) {
    x[e] = to_float(packed.element[e]);
    sum.max = x[e] > sum.max ? x[e] : sum.max;
  }
  // Elements that are all -inf have a sum of 0, not the NaN of (-inf) - (-inf).
  const float shift = sum.max == -INFINITY ? 0 : sum.max;
  for (int e = 0; e < Packed<T>::kSize; ++e) sum.sum += std::exp((x[e] - shift) * inv_temperature);
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    reduce_slices_kernel(const ModelLogits logits, float inv_temperature, LogSum<float>* partials) {
  const unsigned model = blockIdx.z, b = blockIdx.x / unsigned(logits.K);
  if (logits.active != nullptr && !logits.active[b]) return;
  const int64_t slice_size = logits.slice_size(), begin = blockIdx.y * slice_size;
  const int64_t size = logits.V - begin < slice_size ? logits.V - begin : slice_size;
  const T* x = row_data<T>(logits, model, b, blockIdx.x % unsigned(logits.K)) + begin;

  constexpr int64_t kSize = Packed<T>::kSize;
  const int64_t misaligned = reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T);
  int64_t head = misaligned == 0 ? 0 : kSize - misaligned;
  head = head < size ? head : size;
  const int64_t num_packed = (size - head) / kSize;

  LogSum<float> sum;
  const Packed<T>* packed = reinterpret_cast<const Packed<T>*>(x + head);
  for (int64_t p = threadIdx.x; p < num_packed; p += kThreads) {
    sum.merge(packed_log_sum(packed[p], inv_temperature), inv_temperature);
  }
  // Both ends together are fewer elements than threads.
  const int64_t end = threadIdx.x < head ? threadIdx.x : threadIdx.x + num_packed * kSize;
  if (end < size) sum.add(to_float(x[end]), inv_temperature);

  sum = reduce_block(sum, Merge{inv_temperature});
  if (threadIdx.x != 0) return;
  partials[(model * logits.B * logits.K + blockIdx.x) * logits.num_slices() + blockIdx.y] = sum;
}

__global__ void __launch_bounds__(kThreads) normalize_rows_kernel(const NormalizeRows<float> args) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= args.logits.num_rows() || !is_active(args.logits, row)) return;
  const Normalizer<float> normalizer =
      merge_slices(args.partials, row, args.logits.num_slices(), 1.f);
  if (threadIdx.x % kWarp == 0) args.normalizers[row] = normalizer;
}

}  // namespace

void reduce_slices(const ModelLogits& logits, float inv_temperature, LogSum<float>* partials,
                   void* stream) {
  const dim3 grid(unsigned(logits.B * logits.K), unsigned(logits.num_slices()),
                  unsigned(logits.num_models()));
  with_logit_type<float>(logits.dtype, [&](auto type) {
    using T = decltype(type);
    MPG_LAUNCH(reduce_slices_kernel<T>, grid, kThreads, 0, stream, logits, inv_temperature,
               partials);
  });
}

void normalize_rows(const NormalizeRows<float>& args, void* stream) {
  reduce_slices(args.logits, 1.f, args.partials, stream);
  const dim3 grid(blocks_for(args.logits.num_rows(), kWarps));
  MPG_LAUNCH(normalize_rows_kernel, grid, kThreads, 0, stream, args);
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mpg::cuda
