// The only file that sees torch: checks arguments, allocates, picks the device, calls. What the ops
// compute is in ops.h; what they promise to Python is in mpg_ext/ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>

#include "numerics.h"

namespace {

using at::Tensor;

// ---- Checks. Messages say what was wanted and what came.

std::string shape_string(at::IntArrayRef sizes) {
  std::string text = "(";
  for (size_t d = 0; d < sizes.size(); ++d) {
    text += (d > 0 ? ", " : "") + std::to_string(sizes[d]) + (sizes.size() == 1 ? "," : "");
  }
  return text + ")";
}

std::string dtype_name(at::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);
}

// `letters` names the sizes, as in "(B, N)".
void check(const char* name, const Tensor& tensor, const char* letters, at::IntArrayRef sizes,
           at::ScalarType dtype, at::Device device) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " must be ", letters, " = ", shape_string(sizes),
                    ", got ", shape_string(tensor.sizes()));
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, name, " must be ", dtype_name(dtype), ", got ",
                    dtype_name(tensor.scalar_type()));
  TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on ", device, ", got ",
                    tensor.device());
}

// The sizes of the argument from which an op takes the letters.
template <size_t kDims>
std::array<int64_t, kDims> check_dims(const char* name, const Tensor& tensor, const char* letters) {
  TORCH_CHECK_VALUE(tensor.dim() == kDims, name, " must be ", letters, ", got ",
                    shape_string(tensor.sizes()));
#if !MPG_WITH_CUDA
  TORCH_CHECK_VALUE(!tensor.is_cuda(), "tensors are on ", tensor.device(),
                    ", but mpg was built without CUDA; rebuild with a CUDA torch and nvcc");
#endif
  std::array<int64_t, kDims> sizes;
  std::copy(tensor.sizes().begin(), tensor.sizes().end(), sizes.begin());
  return sizes;
}

void check_vocabulary(const char* name, const Tensor& rows) {
  TORCH_CHECK_VALUE(rows.size(-1) >= 1, name, " must have a vocabulary of at least 1 token, got ",
                    shape_string(rows.sizes()));
}

template <size_t kDims>
std::array<int64_t, kDims> check_logits(const char* name, const Tensor& logits,
                                        const char* letters) {
  const auto sizes = check_dims<kDims>(name, logits, letters);
  const auto dtype = logits.scalar_type();
  const bool has_double = logits.is_cpu();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 ||
                        (dtype == at::kDouble && has_double),
                    name, " must be float32, float16",
                    has_double ? ", bfloat16 or float64" : " or bfloat16", " on ", logits.device(),
                    ", got ", dtype_name(dtype));
  check_vocabulary(name, logits);
  TORCH_CHECK_VALUE(logits.stride(-1) == 1 || logits.size(-1) == 1, name,
                    " must have unit stride in the vocabulary, got ", logits.stride(-1));
  return sizes;
}

template <size_t kDims>
std::array<int64_t, kDims> check_accumulated(const char* name, const Tensor& tensor,
                                             const char* letters) {
  const auto sizes = check_dims<kDims>(name, tensor, letters);
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || (dtype == at::kDouble && tensor.is_cpu()), name,
                    " must be float32", tensor.is_cpu() ? " or float64" : "", " on ",
                    tensor.device(), ", got ", dtype_name(dtype));
  return sizes;
}

void check_positions(const char* letter, int64_t count, int64_t most = 32) {
  TORCH_CHECK_VALUE(count >= 1 && count <= most, letter, " must be between 1 and ", most, ", got ",
                    count);
}

void check_models(int64_t N) {
  TORCH_CHECK_VALUE(N >= 1, "N, the number of attribute models, must be at least 1, got ", N);
}

mpg::Score score_of(std::string_view name, const char* argument = "score") {
  TORCH_CHECK_VALUE(name == "arithmetic" || name == "geometric", argument,
                    " must be 'arithmetic' or 'geometric', got '", name, "'");
  return name == "arithmetic" ? mpg::Score::kArithmetic : mpg::Score::kGeometric;
}

// ---- From tensors to the structs of ops.h.

// Whether the CUDA side does the work; in the kernel tests (tests/simt) it does on CPU tensors too.
bool uses_kernels([[maybe_unused]] at::Device device) {
#if defined(MPG_SIMT)
  return true;
#else
  return device.is_cuda();
#endif
}

// The memory of one call, which lives until the work on it has been launched.
class Memory {
 public:
  explicit Memory(at::Device device) : device_(device) {}
  at::Device device() const { return device_; }

  // The elements of an argument that is as it has to be, contiguous.
  template <class T>
  const T* input(const char* name, const Tensor& tensor, const char* letters,
                 at::IntArrayRef sizes) {
    check(name, tensor, letters, sizes, c10::CppTypeToScalarType<T>::value, device_);
    if (tensor.is_contiguous()) return tensor.const_data_ptr<T>();
    return kept_.emplace_back(tensor.contiguous()).template const_data_ptr<T>();
  }

  // What an op writes in place is never copied first, so it has to be contiguous as it is.
  template <class T>
  T* in_place(const char* name, const Tensor& tensor, const char* letters, at::IntArrayRef sizes) {
    check(name, tensor, letters, sizes, c10::CppTypeToScalarType<T>::value, device_);
    TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " is written in place and must be contiguous");
    return tensor.mutable_data_ptr<T>();
  }

  template <class T>
  T* output(Tensor& tensor, at::IntArrayRef sizes) const {
    tensor = at::empty(sizes, at::device(device_).dtype(c10::CppTypeToScalarType<T>::value));
    return tensor.mutable_data_ptr<T>();
  }

  template <class T>
  T* scratch(int64_t count) {
    return reinterpret_cast<T*>(
        output<uint8_t>(kept_.emplace_back(), {count * int64_t(sizeof(T))}));
  }

  // Null where the CPU side works.
  template <class T>
  T* kernel_scratch(int64_t count) {
    return uses_kernels(device_) ? scratch<T>(count) : nullptr;
  }

 private:
  at::Device device_;
  c10::SmallVector<Tensor, 4> kept_;
};

mpg::DType storage_of(const Tensor& logits) {
  using enum mpg::DType;
  const auto dtype = logits.scalar_type();
  if (dtype == at::kHalf) return kFloat16;
  if (dtype == at::kBFloat16) return kBFloat16;
  return dtype == at::kDouble ? kFloat64 : kFloat32;
}

// Calls f for the type in which an op accumulates what it reads of `tensor`.
template <class F>
void with_accumulation_type(const Tensor& tensor, F f) {
  Memory memory(tensor.device());
  tensor.scalar_type() == at::kDouble ? f.template operator()<double>(memory)
                                      : f.template operator()<float>(memory);
}

// Rows (B, V), (B, K, V), or of several models (N, B, V) or (N, B, K, V).
mpg::LogitRows rows_of(const Tensor& logits, bool has_models, bool has_positions) {
  return {logits.const_data_ptr(), has_models ? logits.stride(0) : 0, logits.stride(has_models),
          has_positions ? logits.stride(has_models + 1) : 0};
}

// The logits of anchor and attribute models, (B, K, V) and (N, B, K, V) or without K.
mpg::ModelLogits model_logits(const Tensor& anchor, const Tensor& attributes,
                              const bool* active = nullptr) {
  const bool has_positions = anchor.dim() == 3;
  return {storage_of(anchor),
          rows_of(anchor, false, has_positions),
          rows_of(attributes, true, has_positions),
          attributes.size(0),
          anchor.size(0),
          has_positions ? anchor.size(1) : 1,
          anchor.size(-1),
          active};
}

// out: N
template <size_t kDims>
int64_t check_attributes(const Tensor& attribute_logits, const char* letters,
                         const Tensor& anchor) {
  const int64_t N = check_logits<kDims>("attribute_logits", attribute_logits, letters)[0];
  check_models(N);
  at::DimVector sizes(anchor.sizes());
  sizes.insert(sizes.begin(), N);
  check("attribute_logits", attribute_logits, letters, sizes, anchor.scalar_type(),
        anchor.device());
  return N;
}

// The bound of B sequences, as verify_chunks and update_bound_ take it.
template <class A>
mpg::Bound<A> bound_of(Memory& memory, at::TensorList bound, at::ArrayRef<double> constants,
                       int64_t B) {
  TORCH_CHECK_VALUE(bound.size() == 5, "bound must be the 5 tensors window, num_scores, ",
                    "num_rounds, log_bound and frozen, got ", bound.size());
  TORCH_CHECK_VALUE(constants.size() == 3, "constants must be the 3 numbers log_initial_bound, ",
                    "log_gamma and tau, got ", constants.size());
  const int64_t W = check_dims<2>("window", bound[0], "(B, W)")[1];
  TORCH_CHECK_VALUE(W >= 1, "window must hold at least 1 score, got ",
                    shape_string(bound[0].sizes()));
  return mpg::Bound<A>(memory.in_place<A>("window", bound[0], "(B, W)", {B, W}),
                       memory.in_place<int64_t>("num_scores", bound[1], "(B,)", {B}),
                       memory.in_place<int64_t>("num_rounds", bound[2], "(B,)", {B}),
                       memory.in_place<A>("log_bound", bound[3], "(B,)", {B}),
                       memory.in_place<bool>("frozen", bound[4], "(B,)", {B}), W, A(constants[0]),
                       A(constants[1]), A(constants[2]));
}

std::array<int64_t, 3> check_target(const Tensor& target_probs) {
  const auto [B, rows, V] = check_accumulated<3>("target_probs", target_probs, "(B, K + 1, V)");
  check_vocabulary("target_probs", target_probs);
  check_positions("K", rows - 1);
  return {B, rows - 1, V};
}

// A drafted block, as verify_block and draw_residual take it.
template <class A>
mpg::Block<A> block_of(Memory& memory, const Tensor& target_probs,
                       const std::optional<Tensor>& draft_probs, const Tensor& tokens,
                       const Tensor& lengths, int64_t B, int64_t K, int64_t V) {
  return mpg::Block<A>(
      memory.input<A>("target_probs", target_probs, "(B, K + 1, V)", {B, K + 1, V}),
      draft_probs ? memory.input<A>("draft_probs", *draft_probs, "(B, K, V)", {B, K, V}) : nullptr,
      memory.input<int64_t>("tokens", tokens, "(B, K)", {B, K}),
      memory.input<int64_t>("lengths", lengths, "(B,)", {B}), B, K, V);
}

// ---- Where the work is done.

#if MPG_WITH_CUDA
#define MPG_CUDA(op) mpg::cuda::op
#else
#define MPG_CUDA(op) nullptr
#endif

// Has the CUDA side do the work if it is its to do; float64 has no launcher. True where nothing is
// left to do.
template <class Args, class Launcher>
bool launch(const Memory& memory, int64_t items, const Args& args, Launcher launcher) {
  if (items == 0) return true;
  if constexpr (std::is_invocable_v<Launcher, const Args&, void*>) {
    const at::Device device = memory.device();
    if (!uses_kernels(device)) return false;
    const c10::DeviceGuard guard(device);
    const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
    const int status = launcher(args, device.is_cuda() ? stream.native_handle() : nullptr);
    TORCH_CHECK(status == 0, "mpg: CUDA kernel launch failed: ", mpg::cuda::error_string(status));
    return true;
  }
  return false;
}

// Over threads, each of which is worth waking for about 32,000 elements of work.
template <class Args>
void split(int64_t items, int64_t work_per_item, const Args& args,
           void (*op)(const Args&, int64_t, int64_t)) {
  at::parallel_for(0, items, std::max<int64_t>(1, 32768 / work_per_item),
                   [&](int64_t begin, int64_t end) { op(args, begin, end); });
}

// ---- The ops.

Tensor gather_logprobs(const Tensor& logits, const Tensor& tokens, double temperature) {
  const auto [R, K, V] = check_logits<3>("logits", logits, "(R, K, V)");
  check_positions("K", K);
  // Logits are multiplied by its inverse: both have to be normal numbers in float32.
  TORCH_CHECK_VALUE(temperature >= 0x1p-126 && temperature <= 0x1p126,
                    "temperature must be in [2^-126, 2^126], got ", temperature);

  Tensor logprobs;
  with_accumulation_type(logits, [&]<class A>(Memory& memory) {
    const mpg::GatherLogprobs<A> args(
        {storage_of(logits), rows_of(logits, false, true), {}, 0, R, K, V, nullptr},
        memory.input<int64_t>("tokens", tokens, "(R, K)", {R, K}), A(temperature),
        memory.output<A>(logprobs, {R, K}),
        memory.kernel_scratch<mpg::LogSum<A>>(R * K * mpg::num_slices(V)));
    if (launch(memory, R, args, MPG_CUDA(gather_logprobs))) return;
    split(R * K, V, args, mpg::cpu::gather_logprobs<A>);
  });
  return logprobs;
}

std::tuple<Tensor, Tensor> score_prefixes(const Tensor& attribute_logprobs,
                                          const Tensor& anchor_logprobs, const Tensor& weights,
                                          std::string_view score) {
  const auto [N, B, K] =
      check_accumulated<3>("attribute_logprobs", attribute_logprobs, "(N, B, K)");
  check_models(N);
  check_positions("K", K);

  Tensor log_ratios, scores;
  with_accumulation_type(attribute_logprobs, [&]<class A>(Memory& memory) {
    const mpg::ScorePrefixes<A> args(
        memory.input<A>("attribute_logprobs", attribute_logprobs, "(N, B, K)", {N, B, K}),
        memory.input<A>("anchor_logprobs", anchor_logprobs, "(B, K)", {B, K}),
        memory.input<A>("weights", weights, "(B, N)", {B, N}), score_of(score), N, B, K,
        memory.output<A>(log_ratios, {N, B, K}), memory.output<A>(scores, {B, K}));
    if (launch(memory, B, args, MPG_CUDA(score_prefixes))) return;
    split(B, N * K * K, args, mpg::cpu::score_prefixes<A>);
  });
  return {log_ratios, scores};
}

Tensor accept_prefixes(const Tensor& scores, const Tensor& log_bound, const Tensor& uniforms,
                       const Tensor& lengths) {
  const auto [B, K] = check_accumulated<2>("scores", scores, "(B, K)");
  check_positions("K", K);

  Tensor accepted;
  with_accumulation_type(scores, [&]<class A>(Memory& memory) {
    const mpg::AcceptPrefixes<A> args(memory.input<A>("scores", scores, "(B, K)", {B, K}),
                                      memory.input<A>("log_bound", log_bound, "(B,)", {B}),
                                      memory.input<double>("uniforms", uniforms, "(B, K)", {B, K}),
                                      memory.input<int64_t>("lengths", lengths, "(B,)", {B}), B, K,
                                      memory.output<int64_t>(accepted, {B}));
    if (launch(memory, B, args, MPG_CUDA(accept_prefixes))) return;
    split(B, K, args, mpg::cpu::accept_prefixes<A>);
  });
  return accepted;
}

void update_bound_(at::TensorList bound, const Tensor& scores, const Tensor& active,
                   at::ArrayRef<double> constants) {
  const auto [B, P] = check_accumulated<2>("scores", scores, "(B, P)");
  check_positions("P", P, 33);  // a score per prefix and the fallback's

  with_accumulation_type(scores, [&]<class A>(Memory& memory) {
    const mpg::UpdateBound<A> args(bound_of<A>(memory, bound, constants, B),
                                   memory.input<A>("scores", scores, "(B, P)", {B, P}),
                                   memory.input<bool>("active", active, "(B,)", {B}), B, P);
    if (launch(memory, B, args, MPG_CUDA(update_bound))) return;
    split(B, args.bound.W + P, args, mpg::cpu::update_bound<A>);
  });
}

std::tuple<Tensor, Tensor, Tensor> verify_chunks(const Tensor& anchor_logits,
                                                 const Tensor& attribute_logits,
                                                 const Tensor& tokens, const Tensor& lengths,
                                                 const Tensor& weights, const Tensor& uniforms,
                                                 at::TensorList bound, std::string_view score,
                                                 at::ArrayRef<double> constants) {
  const auto [B, K, V] = check_logits<3>("anchor_logits", anchor_logits, "(B, K, V)");
  const int64_t N = check_attributes<4>(attribute_logits, "(N, B, K, V)", anchor_logits);
  check_positions("K", K);

  Tensor log_ratios, scores, accepted;
  with_accumulation_type(anchor_logits, [&]<class A>(Memory& memory) {
    const mpg::GatherLogprobs<A> gather(
        model_logits(anchor_logits, attribute_logits),
        memory.input<int64_t>("tokens", tokens, "(B, K)", {B, K}), A(1),
        memory.scratch<A>((1 + N) * B * K),
        memory.kernel_scratch<mpg::LogSum<A>>((1 + N) * B * K * mpg::num_slices(V)));
    const mpg::ScorePrefixes<A> scoring(
        gather.logprobs + B * K, gather.logprobs,
        memory.input<A>("weights", weights, "(B, N)", {B, N}), score_of(score), N, B, K,
        memory.output<A>(log_ratios, {N, B, K}), memory.output<A>(scores, {B, K}));
    const mpg::Bound<A> state = bound_of<A>(memory, bound, constants, B);
    const mpg::AcceptPrefixes<A> acceptance(
        scoring.scores, state.log_bound,
        memory.input<double>("uniforms", uniforms, "(B, K)", {B, K}),
        memory.input<int64_t>("lengths", lengths, "(B,)", {B}), B, K,
        memory.output<int64_t>(accepted, {B}));
    const mpg::VerifyChunks<A> args(gather, scoring, acceptance, state);
    if (launch(memory, B, args, MPG_CUDA(verify_chunks))) return;
    split((1 + N) * B * K, V, gather, mpg::cpu::gather_logprobs<A>);
    split(B, N * K * K, args, mpg::cpu::verify_chunks<A>);
  });
  return {log_ratios, scores, accepted};
}

std::tuple<Tensor, Tensor, Tensor> draw_fallback(const Tensor& anchor_logits,
                                                 const Tensor& attribute_logits,
                                                 const Tensor& draft_probs, const Tensor& weights,
                                                 const Tensor& log_bound, const Tensor& uniforms,
                                                 const Tensor& active, std::string_view score) {
  const auto [B, V] = check_logits<2>("anchor_logits", anchor_logits, "(B, V)");
  const int64_t N = check_attributes<3>(attribute_logits, "(N, B, V)", anchor_logits);

  Tensor tokens, scores, accept_probs;
  with_accumulation_type(anchor_logits, [&]<class A>(Memory& memory) {
    const mpg::DrawFallback<A> args(
        {model_logits(anchor_logits, attribute_logits,
                      memory.input<bool>("active", active, "(B,)", {B})),
         memory.scratch<mpg::Normalizer<A>>((1 + N) * B),
         memory.kernel_scratch<mpg::LogSum<A>>((1 + N) * B * mpg::num_slices(V))},
        memory.input<A>("draft_probs", draft_probs, "(B, V)", {B, V}),
        memory.input<A>("weights", weights, "(B, N)", {B, N}),
        memory.input<A>("log_bound", log_bound, "(B,)", {B}),
        memory.input<double>("uniforms", uniforms, "(B,)", {B}), score_of(score),
        memory.output<int64_t>(tokens, {B}), memory.output<A>(scores, {B}),
        memory.output<A>(accept_probs, {B}), memory.kernel_scratch<double>(B * mpg::num_slices(V)));
    if (launch(memory, B, args, MPG_CUDA(draw_fallback))) return;
    split((1 + N) * B, V, args.rows, mpg::cpu::normalize_rows<A>);
    split(B, V, args, mpg::cpu::draw_fallback<A>);
  });
  return {tokens, scores, accept_probs};
}

Tensor draw_uniforms(const Tensor& seeds, const Tensor& rounds, int64_t purpose, int64_t count,
                     int64_t first) {
  const auto [B] = check_dims<1>("seeds", seeds, "(B,)");
  constexpr int64_t kWords = int64_t(1) << 32;
  TORCH_CHECK_VALUE(purpose >= 0 && purpose < kWords, "purpose must be in [0, 2^32), got ",
                    purpose);
  TORCH_CHECK_VALUE(count >= 0 && count < kWords, "count must be in [0, 2^32), got ", count);
  TORCH_CHECK_VALUE(first >= 0 && first <= kWords - count,
                    "first must be in [0, 2^32 - count], got ", first);

  Tensor uniforms;
  with_accumulation_type(seeds, [&]<class A>(Memory& memory) {
    const mpg::DrawUniforms args(memory.input<int64_t>("seeds", seeds, "(B,)", {B}),
                                 memory.input<int64_t>("rounds", rounds, "(B,)", {B}),
                                 uint32_t(purpose), uint32_t(first), B, count,
                                 memory.output<double>(uniforms, {B, count}));
    if (launch(memory, B * count, args, MPG_CUDA(draw_uniforms))) return;
    split(B, count, args, mpg::cpu::draw_uniforms);
  });
  return uniforms;
}

std::tuple<Tensor, Tensor> combine_rows(const Tensor& attribute_logits, const Tensor& weights,
                                        const std::optional<Tensor>& base_logits,
                                        const std::optional<Tensor>& anchor_logits,
                                        std::string_view target) {
  const auto [N, B, P, V] = check_logits<4>("attribute_logits", attribute_logits, "(N, B, P, V)");
  check_models(N);
  check_positions("P", P, 33);  // of the draft and the one after it
  const mpg::Score kind = score_of(target, "target");
  const bool has_anchor = anchor_logits.has_value();
  TORCH_CHECK_VALUE(base_logits.has_value() == has_anchor,
                    "base_logits and anchor_logits must both be given or both be None");
  TORCH_CHECK_VALUE(has_anchor || kind == mpg::Score::kArithmetic,
                    "the geometric target needs base_logits and anchor_logits, got None");
  for (const auto& [name, logits] :
       {std::pair("base_logits", &base_logits), std::pair("anchor_logits", &anchor_logits)}) {
    if (!logits->has_value()) continue;
    check_logits<3>(name, **logits, "(B, P, V)");
    check(name, **logits, "(B, P, V)", {B, P, V}, attribute_logits.scalar_type(),
          attribute_logits.device());
  }

  Tensor log_rows, log_totals;
  with_accumulation_type(attribute_logits, [&]<class A>(Memory& memory) {
    // Without an anchor the first attribute model takes its place as model 0.
    mpg::ModelLogits logits =
        has_anchor ? model_logits(*anchor_logits, attribute_logits)
                   : model_logits(attribute_logits.select(0, 0), attribute_logits.slice(0, 1));
    if (has_anchor && !(base_logits->const_data_ptr() == anchor_logits->const_data_ptr() &&
                        base_logits->strides() == anchor_logits->strides())) {
      logits.base = rows_of(*base_logits, false, true);
      logits.has_base = true;
    }
    const int64_t num_rows = logits.num_rows(), num_slices = mpg::num_slices(V);
    const mpg::CombineRows<A> args({logits, memory.scratch<mpg::Normalizer<A>>(num_rows),
                                    memory.kernel_scratch<mpg::LogSum<A>>(num_rows * num_slices)},
                                   has_anchor, N, logits.has_base ? N + 1 : 0,
                                   memory.input<A>("weights", weights, "(B, P, N)", {B, P, N}),
                                   kind, memory.output<A>(log_rows, {B, P, V}),
                                   memory.output<A>(log_totals, {B, P}),
                                   memory.scratch<mpg::LogSum<A>>(B * P * num_slices));
    if (launch(memory, B, args, MPG_CUDA(combine_rows))) return;
    split(num_rows, V, args.rows, mpg::cpu::normalize_rows<A>);
    const int64_t slices = B * P * num_slices, slice_size = std::min(V, mpg::kSliceSize);
    split(slices, N * slice_size, args, mpg::cpu::combine_slices<A>);
    split(slices, slice_size, args, mpg::cpu::combine_rows<A>);
  });
  return {log_rows, log_totals};
}

Tensor warp_rows(const Tensor& log_rows, double temperature, int64_t top_k, double top_p,
                 double min_p) {
  const auto [R, V] = check_accumulated<2>("log_rows", log_rows, "(R, V)");
  check_vocabulary("log_rows", log_rows);
  TORCH_CHECK_VALUE(std::isfinite(temperature) && temperature >= 0,
                    "temperature must be finite and not negative, got ", temperature);
  TORCH_CHECK_VALUE(top_k >= 0, "top_k must not be negative, got ", top_k);
  TORCH_CHECK_VALUE(top_p > 0 && top_p <= 1, "top_p must be in (0, 1], got ", top_p);
  TORCH_CHECK_VALUE(min_p >= 0 && min_p <= 1, "min_p must be in [0, 1], got ", min_p);

  Tensor probs;
  with_accumulation_type(log_rows, [&]<class A>(Memory& memory) {
    const mpg::WarpRows<A> args(memory.input<A>("log_rows", log_rows, "(R, V)", {R, V}), R, V,
                                temperature, top_k, top_p, min_p, memory.output<A>(probs, {R, V}));
    if (launch(memory, R, args, MPG_CUDA(warp_rows))) return;
    split(R, V, args, mpg::cpu::warp_rows<A>);
  });
  return probs;
}

Tensor draw_tokens(const Tensor& probs, const Tensor& uniforms) {
  const auto [B, V] = check_accumulated<2>("probs", probs, "(B, V)");
  check_vocabulary("probs", probs);

  Tensor tokens;
  with_accumulation_type(probs, [&]<class A>(Memory& memory) {
    const mpg::DrawTokens<A> args(memory.input<A>("probs", probs, "(B, V)", {B, V}),
                                  memory.input<double>("uniforms", uniforms, "(B,)", {B}), B, V,
                                  memory.output<int64_t>(tokens, {B}),
                                  memory.kernel_scratch<double>(B * mpg::num_slices(V)));
    if (launch(memory, B, args, MPG_CUDA(draw_tokens))) return;
    split(B, V, args, mpg::cpu::draw_tokens<A>);
  });
  return tokens;
}

std::tuple<Tensor, Tensor> verify_block(const Tensor& target_probs,
                                        const std::optional<Tensor>& draft_probs,
                                        const Tensor& tokens, const Tensor& lengths,
                                        const Tensor& uniforms) {
  const auto [B, K, V] = check_target(target_probs);

  Tensor accepted, carry;
  with_accumulation_type(target_probs, [&]<class A>(Memory& memory) {
    const mpg::VerifyBlock<A> args(
        block_of<A>(memory, target_probs, draft_probs, tokens, lengths, B, K, V),
        memory.input<double>("uniforms", uniforms, "(B, K)", {B, K}),
        memory.output<int64_t>(accepted, {B}), memory.output<A>(carry, {B}),
        memory.kernel_scratch<double>(B * K * mpg::num_slices(V)));
    if (launch(memory, B, args, MPG_CUDA(verify_block))) return;
    split(B, K * V, args, mpg::cpu::verify_block<A>);
  });
  return {accepted, carry};
}

Tensor draw_residual(const Tensor& target_probs, const std::optional<Tensor>& draft_probs,
                     const Tensor& tokens, const Tensor& lengths, const Tensor& accepted,
                     const Tensor& carry, const Tensor& uniforms) {
  const auto [B, K, V] = check_target(target_probs);

  Tensor drawn;
  with_accumulation_type(target_probs, [&]<class A>(Memory& memory) {
    const mpg::DrawResidual<A> args(
        block_of<A>(memory, target_probs, draft_probs, tokens, lengths, B, K, V),
        memory.input<int64_t>("accepted", accepted, "(B,)", {B}),
        memory.input<A>("carry", carry, "(B,)", {B}),
        memory.input<double>("uniforms", uniforms, "(B,)", {B}), memory.output<int64_t>(drawn, {B}),
        memory.kernel_scratch<double>(2 * B * mpg::num_slices(V)));
    if (launch(memory, B, args, MPG_CUDA(draw_residual))) return;
    split(B, 2 * V, args, mpg::cpu::draw_residual<A>);
  });
  return drawn;
}

void register_ops(torch::Library& library) {
  library.impl("gather_logprobs", gather_logprobs);
  library.impl("score_prefixes", score_prefixes);
  library.impl("accept_prefixes", accept_prefixes);
  library.impl("update_bound_", update_bound_);
  library.impl("verify_chunks", verify_chunks);
  library.impl("draw_fallback", draw_fallback);
  library.impl("draw_uniforms", draw_uniforms);
  library.impl("combine_rows", combine_rows);
  library.impl("warp_rows", warp_rows);
  library.impl("draw_tokens", draw_tokens);
  library.impl("verify_block", verify_block);
  library.impl("draw_residual", draw_residual);
}

}  // namespace

#if defined(MPG_SIMT)
// Loaded beside the real module, and in place of its CPU side while an object of this class lives.
struct KernelsOnCpu {
  torch::Library library = {torch::Library::IMPL, "mpg", c10::DispatchKey::CPU, __FILE__, __LINE__};
  KernelsOnCpu() { register_ops(library); }
};

PYBIND11_MODULE(_C, module) {
  pybind11::class_<KernelsOnCpu>(module, "KernelsOnCpu").def(pybind11::init());
}
#else
TORCH_LIBRARY(mpg, library) {
  library.def("gather_logprobs(Tensor logits, Tensor tokens, *, float temperature=1.0) -> Tensor");
  library.def(
      "score_prefixes(Tensor attribute_logprobs, Tensor anchor_logprobs, Tensor weights, *, "
      "str score) -> (Tensor, Tensor)");
  library.def(
      "accept_prefixes(Tensor scores, Tensor log_bound, Tensor uniforms, Tensor lengths) -> "
      "Tensor");
  library.def(
      "update_bound_(Tensor(a!)[] bound, Tensor scores, Tensor active, *, float[] constants) -> "
      "()");
  library.def(
      "verify_chunks(Tensor anchor_logits, Tensor attribute_logits, Tensor tokens, Tensor lengths, "
      "Tensor weights, Tensor uniforms, Tensor(a!)[] bound, *, str score, float[] constants) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "draw_fallback(Tensor anchor_logits, Tensor attribute_logits, Tensor draft_probs, "
      "Tensor weights, Tensor log_bound, Tensor uniforms, Tensor active, *, str score) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "draw_uniforms(Tensor seeds, Tensor rounds, *, int purpose, int count, int first=0) "
      "-> Tensor");
  library.def(
      "combine_rows(Tensor attribute_logits, Tensor weights, Tensor? base_logits, "
      "Tensor? anchor_logits, *, str target) -> (Tensor, Tensor)");
  library.def(
      "warp_rows(Tensor log_rows, *, float temperature, int top_k=0, float top_p=1.0, "
      "float min_p=0.0) -> Tensor");
  library.def("draw_tokens(Tensor probs, Tensor uniforms) -> Tensor");
  library.def(
      "verify_block(Tensor target_probs, Tensor? draft_probs, Tensor tokens, Tensor lengths, "
      "Tensor uniforms) -> (Tensor, Tensor)");
  library.def(
      "draw_residual(Tensor target_probs, Tensor? draft_probs, Tensor tokens, Tensor lengths, "
      "Tensor accepted, Tensor carry, Tensor uniforms) -> Tensor");
}

TORCH_LIBRARY_IMPL(mpg, CPU, library) { register_ops(library); }
// Registered in every build: without CUDA the ops say what to do instead of "no kernel".
TORCH_LIBRARY_IMPL(mpg, CUDA, library) { register_ops(library); }

PYBIND11_MODULE(_C, module) {
  module.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = MPG_TORCH_VERSION;
    info["cuda"] = bool(MPG_WITH_CUDA);
    info["cuda_version"] = MPG_CUDA_VERSION;
    info["archs"] = MPG_CUDA_ARCHS;
    info["compiler"] = MPG_COMPILER;
    info["cpu_capability"] = mpg::cpu::capability();
    return info;
  });
}
#endif
