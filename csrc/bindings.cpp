// The only file that sees torch: checks arguments, allocates, picks the device, calls. What the ops
// compute is in ops.h; what they promise to Python is in mpg_ext/ops.py.
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
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

// "B, N" as messages have it.
std::string shape_string(std::string_view letters) {
  return "(" + std::string(letters) + (letters.find(',') == letters.npos ? ",)" : ")");
}

// An argument and the sizes it has to have, named by their letters: MPG_ARG(weights, B, N).
#define MPG_ARG(tensor, ...) \
  #tensor, tensor, #__VA_ARGS__, { __VA_ARGS__ }

void check(const char* name, const Tensor& tensor, const char* letters, at::IntArrayRef sizes,
           at::ScalarType dtype, at::Device device) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " must be ", shape_string(letters), " = ",
                    shape_string(sizes), ", got ", shape_string(tensor.sizes()));
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, name, " must be ", dtype_name(dtype), ", got ",
                    dtype_name(tensor.scalar_type()));
  TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on ", device, ", got ",
                    tensor.device());
}

// Whether a size is one that its letter can stand for.
void check_size(const char* name, const Tensor& tensor, char letter, int64_t size) {
  const bool is_some = size >= 1;
  TORCH_CHECK_VALUE(is_some || letter != 'N',
                    "N, the number of attribute models, must be at least 1, got ", size);
  TORCH_CHECK_VALUE(is_some || letter != 'V', name,
                    " must have a vocabulary of at least 1 token, got ",
                    shape_string(tensor.sizes()));
  TORCH_CHECK_VALUE(is_some || letter != 'W', name, " must hold at least 1 score, got ",
                    shape_string(tensor.sizes()));
  TORCH_CHECK_VALUE(is_some || letter != 'i', name, " must have at least 1 feature, got ",
                    shape_string(tensor.sizes()));
  if (letter != 'K' && letter != 'P') return;
  const int64_t most = letter == 'K' ? 32 : 33;  // P: of the draft and the one after it
  TORCH_CHECK_VALUE(is_some && size <= most, letter, " must be between 1 and ", most, ", got ",
                    size);
}

// The values of the letters of an argument, from which an op takes all but those that are `known`.
template <size_t kDims>
std::array<int64_t, kDims> check_dims(const char* name, const Tensor& tensor,
                                      std::string_view letters, char known = 0) {
  TORCH_CHECK_VALUE(tensor.dim() == kDims, name, " must be ", shape_string(letters), ", got ",
                    shape_string(tensor.sizes()));
#if !MPG_WITH_CUDA
  TORCH_CHECK_VALUE(!tensor.is_cuda(), "tensors are on ", tensor.device(),
                    ", but mpg was built without CUDA; rebuild with a CUDA torch and nvcc");
#endif
  std::array<int64_t, kDims> values;
  for (size_t d = 0, at = 0; d < kDims; ++d, at = letters.find(", ", at) + 2) {
    values[d] = tensor.size(d) - letters.substr(at + 1).starts_with(" + 1");
    if (letters[at] != known) check_size(name, tensor, letters[at], values[d]);
  }
  return values;
}

template <size_t kDims>
std::array<int64_t, kDims> check_stored(const char* name, const Tensor& tensor, const char* letters,
                                        char known = 0) {
  const auto sizes = check_dims<kDims>(name, tensor, letters, known);
  const auto dtype = tensor.scalar_type();
  const bool has_double = tensor.is_cpu();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 ||
                        (dtype == at::kDouble && has_double),
                    name, " must be float32, float16",
                    has_double ? ", bfloat16 or float64" : " or bfloat16", " on ", tensor.device(),
                    ", got ", dtype_name(dtype));
  return sizes;
}

template <size_t kDims>
std::array<int64_t, kDims> check_logits(const char* name, const Tensor& logits, const char* letters,
                                        char known = 0) {
  const auto sizes = check_stored<kDims>(name, logits, letters, known);
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

mpg::Score score_of(std::string_view name, const char* argument = "score") {
  TORCH_CHECK_VALUE(name == "arithmetic" || name == "geometric", argument,
                    " must be 'arithmetic' or 'geometric', got '", name, "'");
  return name == "arithmetic" ? mpg::Score::kArithmetic : mpg::Score::kGeometric;
}

// Logits are multiplied by its inverse: both have to be normal numbers in float32.
void check_temperature(double temperature) {
  TORCH_CHECK_VALUE(temperature >= 0x1p-126 && temperature <= 0x1p126,
                    "temperature must be in [2^-126, 2^126], got ", temperature);
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

  // The same, of the dtype that logits or tokens are stored in.
  const void* stored(const char* name, const Tensor& tensor, const char* letters,
                     at::IntArrayRef sizes, at::ScalarType dtype) {
    check(name, tensor, letters, sizes, dtype, device_);
    return (tensor.is_contiguous() ? tensor : kept_.emplace_back(tensor.contiguous()))
        .const_data_ptr();
  }

  // Rows of tokens, copied only where the features of a token are not neighbours.
  mpg::TokenRows<const void*> tokens(const char* name, const Tensor& tensor, const char* letters,
                                     at::IntArrayRef sizes, at::ScalarType dtype) {
    check(name, tensor, letters, sizes, dtype, device_);
    const Tensor& rows = tensor.stride(2) == 1 ? tensor : kept_.emplace_back(tensor.contiguous());
    return {rows.const_data_ptr(), rows.stride(0), rows.stride(1)};
  }

  // Heads of rows, copied only where the features of a position are not neighbours.
  mpg::HeadRows heads(const char* name, const Tensor& tensor, const char* letters,
                      at::IntArrayRef sizes, at::ScalarType dtype) {
    check(name, tensor, letters, sizes, dtype, device_);
    const Tensor& rows = tensor.stride(3) == 1 ? tensor : kept_.emplace_back(tensor.contiguous());
    return {rows.const_data_ptr(), rows.stride(0), rows.stride(1), rows.stride(2)};
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

  // What the CUDA side keeps of the slices of rows; null where the CPU side works.
  template <class T>
  T* slice_scratch(int64_t num_rows, int64_t V, int64_t slice_size = mpg::kSliceSize) {
    return uses_kernels(device_) ? scratch<T>(num_rows * mpg::num_slices(V, slice_size)) : nullptr;
  }

  // The same of the rows of logits.
  template <class A>
  mpg::LogSum<A>* partials(int64_t num_rows, int64_t V) {
    return slice_scratch<mpg::LogSum<A>>(num_rows, V, mpg::slice_size_of(num_rows, V));
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
  const int64_t N = check_logits<kDims>("attribute_logits", attribute_logits, letters, 'K')[0];
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
  const int64_t W = check_dims<2>("window", bound[0], "B, W")[1];
  return mpg::Bound<A>(memory.in_place<A>("window", bound[0], "B, W", {B, W}),
                       memory.in_place<int64_t>("num_scores", bound[1], "B", {B}),
                       memory.in_place<int64_t>("num_rounds", bound[2], "B", {B}),
                       memory.in_place<A>("log_bound", bound[3], "B", {B}),
                       memory.in_place<bool>("frozen", bound[4], "B", {B}), W, A(constants[0]),
                       A(constants[1]), A(constants[2]));
}

// A drafted block, as verify_block and draw_residual take it.
template <class A>
mpg::Block<A> block_of(Memory& memory, const Tensor& target_probs,
                       const std::optional<Tensor>& draft_probs, const Tensor& tokens,
                       const Tensor& lengths, int64_t B, int64_t K, int64_t V) {
  return mpg::Block<A>(
      memory.input<A>(MPG_ARG(target_probs, B, K + 1, V)),
      draft_probs ? memory.input<A>("draft_probs", *draft_probs, "B, K, V", {B, K, V}) : nullptr,
      memory.input<int64_t>(MPG_ARG(tokens, B, K)), memory.input<int64_t>(MPG_ARG(lengths, B)), B,
      K, V);
}

// ---- Where the work is done.

// The CPU and the CUDA side of an op of ops.h, the latter in a build that has it.
#if MPG_WITH_CUDA
#define MPG_SIDES(op) mpg::cpu::op, mpg::cuda::op
#else
#define MPG_SIDES(op) mpg::cpu::op, nullptr
#endif

// Over threads, each of which is worth waking for about 32,000 elements of work.
template <class Args>
void split(int64_t items, int64_t work_per_item, const Args& args,
           void (*op)(const Args&, int64_t, int64_t)) {
  at::parallel_for(0, items, std::max<int64_t>(1, 32768 / work_per_item),
                   [&](int64_t begin, int64_t end) { op(args, begin, end); });
}

// Does an op on the side that its tensors are on, on the CPU after `prepare`; float64 has no
// launcher.
template <class Args, class Launcher, class F = void (*)()>
void run(
    const Memory& memory, int64_t items, int64_t work_per_item, const Args& args,
    void (*op)(const Args&, int64_t, int64_t), Launcher launcher, F prepare = [] {}) {
  if (items * work_per_item == 0) return;
  if constexpr (std::is_invocable_v<Launcher, const Args&, void*>) {
    if (const at::Device device = memory.device(); uses_kernels(device)) {
      const c10::DeviceGuard guard(device);
      const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
      launcher(args, device.is_cuda() ? stream.native_handle() : nullptr);
      const char* error = mpg::cuda::launch_error();
      TORCH_CHECK(error == nullptr, "mpg: CUDA kernel launch failed: ", error);
      return;
    }
  }
  prepare();
  split(items, work_per_item, args, op);
}

// ---- The ops.

Tensor gather_logprobs(const Tensor& logits, const Tensor& tokens, double temperature) {
  const auto [R, K, V] = check_logits<3>("logits", logits, "R, K, V");
  check_temperature(temperature);

  Tensor logprobs;
  with_accumulation_type(logits, [&]<class A>(Memory& memory) {
    const mpg::GatherLogprobs<A> args(
        {storage_of(logits), rows_of(logits, false, true), {}, 0, R, K, V, nullptr},
        memory.input<int64_t>(MPG_ARG(tokens, R, K)), A(temperature),
        memory.output<A>(logprobs, {R, K}), memory.partials<A>(R * K, V));
    run(memory, R * K, V, args, MPG_SIDES(gather_logprobs));
  });
  return logprobs;
}

std::tuple<Tensor, Tensor> score_prefixes(const Tensor& attribute_logprobs,
                                          const Tensor& anchor_logprobs, const Tensor& weights,
                                          std::string_view score) {
  const auto [N, B, K] = check_accumulated<3>("attribute_logprobs", attribute_logprobs, "N, B, K");

  Tensor log_ratios, scores;
  with_accumulation_type(attribute_logprobs, [&]<class A>(Memory& memory) {
    const mpg::ScorePrefixes<A> args(memory.input<A>(MPG_ARG(attribute_logprobs, N, B, K)),
                                     memory.input<A>(MPG_ARG(anchor_logprobs, B, K)),
                                     memory.input<A>(MPG_ARG(weights, B, N)), score_of(score), N, B,
                                     K, memory.output<A>(log_ratios, {N, B, K}),
                                     memory.output<A>(scores, {B, K}));
    run(memory, B, N * K * K, args, MPG_SIDES(score_prefixes));
  });
  return {log_ratios, scores};
}

Tensor accept_prefixes(const Tensor& scores, const Tensor& log_bound, const Tensor& uniforms,
                       const Tensor& lengths) {
  const auto [B, K] = check_accumulated<2>("scores", scores, "B, K");

  Tensor accepted;
  with_accumulation_type(scores, [&]<class A>(Memory& memory) {
    const mpg::AcceptPrefixes<A> args(
        memory.input<A>(MPG_ARG(scores, B, K)), memory.input<A>(MPG_ARG(log_bound, B)),
        memory.input<double>(MPG_ARG(uniforms, B, K)), memory.input<int64_t>(MPG_ARG(lengths, B)),
        B, K, memory.output<int64_t>(accepted, {B}));
    run(memory, B, K, args, MPG_SIDES(accept_prefixes));
  });
  return accepted;
}

void update_bound_(at::TensorList bound, const Tensor& scores, const Tensor& active,
                   at::ArrayRef<double> constants) {
  const auto [B, P] = check_accumulated<2>("scores", scores, "B, P");

  with_accumulation_type(scores, [&]<class A>(Memory& memory) {
    const mpg::UpdateBound<A> args(bound_of<A>(memory, bound, constants, B),
                                   memory.input<A>(MPG_ARG(scores, B, P)),
                                   memory.input<bool>(MPG_ARG(active, B)), B, P);
    run(memory, B, args.bound.W + P, args, MPG_SIDES(update_bound));
  });
}

std::tuple<Tensor, Tensor, Tensor> verify_chunks(const Tensor& anchor_logits,
                                                 const Tensor& attribute_logits,
                                                 const Tensor& tokens, const Tensor& lengths,
                                                 const Tensor& weights, const Tensor& uniforms,
                                                 at::TensorList bound, std::string_view score,
                                                 at::ArrayRef<double> constants) {
  const auto [B, K, V] = check_logits<3>("anchor_logits", anchor_logits, "B, K, V");
  const int64_t N = check_attributes<4>(attribute_logits, "N, B, K, V", anchor_logits);

  Tensor log_ratios, scores, accepted;
  with_accumulation_type(anchor_logits, [&]<class A>(Memory& memory) {
    const mpg::GatherLogprobs<A> gather(
        model_logits(anchor_logits, attribute_logits), memory.input<int64_t>(MPG_ARG(tokens, B, K)),
        A(1), memory.scratch<A>((1 + N) * B * K), memory.partials<A>((1 + N) * B * K, V));
    const mpg::ScorePrefixes<A> scoring(gather.logprobs + B * K, gather.logprobs,
                                        memory.input<A>(MPG_ARG(weights, B, N)), score_of(score), N,
                                        B, K, memory.output<A>(log_ratios, {N, B, K}),
                                        memory.output<A>(scores, {B, K}));
    const mpg::Bound<A> state = bound_of<A>(memory, bound, constants, B);
    const mpg::AcceptPrefixes<A> acceptance(
        scoring.scores, state.log_bound, memory.input<double>(MPG_ARG(uniforms, B, K)),
        memory.input<int64_t>(MPG_ARG(lengths, B)), B, K, memory.output<int64_t>(accepted, {B}));
    const mpg::VerifyChunks<A> args(gather, scoring, acceptance, state);
    run(memory, B, N * K * K, args, MPG_SIDES(verify_chunks),
        [&] { split((1 + N) * B * K, V, gather, mpg::cpu::gather_logprobs<A>); });
  });
  return {log_ratios, scores, accepted};
}

std::tuple<Tensor, Tensor, Tensor> draw_fallback(const Tensor& anchor_logits,
                                                 const Tensor& attribute_logits,
                                                 const Tensor& draft_probs, const Tensor& weights,
                                                 const Tensor& log_bound, const Tensor& uniforms,
                                                 const Tensor& active, std::string_view score) {
  const auto [B, V] = check_logits<2>("anchor_logits", anchor_logits, "B, V");
  const int64_t N = check_attributes<3>(attribute_logits, "N, B, V", anchor_logits);

  Tensor tokens, scores, accept_probs;
  with_accumulation_type(anchor_logits, [&]<class A>(Memory& memory) {
    const mpg::DrawFallback<A> args(
        {model_logits(anchor_logits, attribute_logits, memory.input<bool>(MPG_ARG(active, B))),
         memory.scratch<mpg::Normalizer<A>>((1 + N) * B), memory.partials<A>((1 + N) * B, V)},
        memory.input<A>(MPG_ARG(draft_probs, B, V)), memory.input<A>(MPG_ARG(weights, B, N)),
        memory.input<A>(MPG_ARG(log_bound, B)), memory.input<double>(MPG_ARG(uniforms, B)),
        score_of(score), memory.output<int64_t>(tokens, {B}), memory.output<A>(scores, {B}),
        memory.output<A>(accept_probs, {B}), memory.slice_scratch<double>(B, V));
    run(memory, B, V, args, MPG_SIDES(draw_fallback),
        [&] { split((1 + N) * B, V, args.rows, mpg::cpu::normalize_rows<A>); });
  });
  return {tokens, scores, accept_probs};
}

Tensor draw_uniforms(const Tensor& seeds, const Tensor& rounds, int64_t purpose, int64_t count,
                     int64_t first) {
  const auto [B] = check_dims<1>("seeds", seeds, "B");
  constexpr int64_t kWords = int64_t(1) << 32;
  TORCH_CHECK_VALUE(purpose >= 0 && purpose < kWords, "purpose must be in [0, 2^32), got ",
                    purpose);
  TORCH_CHECK_VALUE(count >= 0 && count < kWords, "count must be in [0, 2^32), got ", count);
  TORCH_CHECK_VALUE(first >= 0 && first <= kWords - count,
                    "first must be in [0, 2^32 - count], got ", first);

  Tensor uniforms;
  with_accumulation_type(seeds, [&]<class A>(Memory& memory) {
    const mpg::DrawUniforms args(
        memory.input<int64_t>(MPG_ARG(seeds, B)), memory.input<int64_t>(MPG_ARG(rounds, B)),
        uint32_t(purpose), uint32_t(first), B, count, memory.output<double>(uniforms, {B, count}));
    run(memory, B, count, args, MPG_SIDES(draw_uniforms));
  });
  return uniforms;
}

std::tuple<Tensor, Tensor> combine_rows(const Tensor& attribute_logits, const Tensor& weights,
                                        const std::optional<Tensor>& base_logits,
                                        const std::optional<Tensor>& anchor_logits,
                                        std::string_view target,
                                        std::optional<double> temperature) {
  const auto [N, B, P, V] = check_logits<4>("attribute_logits", attribute_logits, "N, B, P, V");
  const mpg::Score kind = score_of(target, "target");
  if (temperature) check_temperature(*temperature);
  const bool has_anchor = anchor_logits.has_value();
  TORCH_CHECK_VALUE(base_logits.has_value() == has_anchor,
                    "base_logits and anchor_logits must both be given or both be None");
  TORCH_CHECK_VALUE(has_anchor || kind == mpg::Score::kArithmetic,
                    "the geometric target needs base_logits and anchor_logits, got None");
  for (const auto& [name, logits] :
       {std::pair("base_logits", &base_logits), std::pair("anchor_logits", &anchor_logits)}) {
    if (!logits->has_value()) continue;
    check_logits<3>(name, **logits, "B, P, V", 'P');
    check(name, **logits, "B, P, V", {B, P, V}, attribute_logits.scalar_type(),
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
    // On the CPU always the same, so that a row's numbers do not depend on the others.
    const int64_t slice_size =
        uses_kernels(memory.device()) ? mpg::slice_size_of(B * P, V) : mpg::kSliceSize;
    const int64_t num_rows = logits.num_rows(), num_slices = mpg::num_slices(V, slice_size);
    const mpg::CombineRows<A> args(
        {logits, memory.scratch<mpg::Normalizer<A>>(num_rows), memory.partials<A>(num_rows, V)},
        has_anchor, N, logits.has_base ? N + 1 : 0, memory.input<A>(MPG_ARG(weights, B, P, N)),
        kind, A(1 / temperature.value_or(1)), temperature.has_value(),
        memory.output<A>(log_rows, {B, P, V}), memory.output<A>(log_totals, {B, P}), slice_size,
        memory.scratch<mpg::LogSum<A>>(B * P * num_slices));
    const int64_t slices = B * P * num_slices, work = std::min(V, slice_size);
    run(memory, slices, work, args, MPG_SIDES(combine_rows), [&] {
      split(num_rows, V, args.rows, mpg::cpu::normalize_rows<A>);
      split(slices, N * work, args, mpg::cpu::combine_slices<A>);
    });
  });
  return {log_rows, log_totals};
}

Tensor warp_rows(const Tensor& log_rows, double temperature, int64_t top_k, double top_p,
                 double min_p, const std::optional<Tensor>& temperatures,
                 const std::optional<Tensor>& top_ks, const std::optional<Tensor>& top_ps,
                 const std::optional<Tensor>& min_ps) {
  const auto [R, V] = check_accumulated<2>("log_rows", log_rows, "R, V");
  TORCH_CHECK_VALUE(std::isfinite(temperature) && temperature >= 0,
                    "temperature must be finite and not negative, got ", temperature);
  TORCH_CHECK_VALUE(top_k >= 0, "top_k must not be negative, got ", top_k);
  TORCH_CHECK_VALUE(top_p > 0 && top_p <= 1, "top_p must be in (0, 1], got ", top_p);
  TORCH_CHECK_VALUE(min_p >= 0 && min_p <= 1, "min_p must be in [0, 1], got ", min_p);
  Tensor probs;
  with_accumulation_type(log_rows, [&]<class A>(Memory& memory) {
    mpg::WarpRows<A> args = {};
    args.log_rows = memory.input<A>(MPG_ARG(log_rows, R, V));
    args.R = R;
    args.V = V;
    args.options = {temperature, top_k, top_p, min_p};
    const auto of_rows = [&]<class T>(const char* name, const std::optional<Tensor>& values, T) {
      return values ? memory.input<T>(name, *values, "R", {R}) : nullptr;
    };
    args.temperatures = of_rows("temperature", temperatures, double());
    args.top_ks = of_rows("top_k", top_ks, int64_t());
    args.top_ps = of_rows("top_p", top_ps, double());
    args.min_ps = of_rows("min_p", min_ps, double());
    args.probs = memory.output<A>(probs, {R, V});
    if (uses_kernels(memory.device())) {
      args.slice_size = mpg::slice_size_of(R, V);
      args.num_slices = mpg::num_slices(V, args.slice_size);
      args.mass_unit = std::ldexp(1.f, 63 - int(std::bit_width(uint64_t(V))));
      args.scratch =
          memory.scratch<uint64_t>(R * (mpg::kWarpWords + mpg::kWarpSliceWords * args.num_slices));
    }
    run(memory, R, V, args, MPG_SIDES(warp_rows));
  });
  return probs;
}

Tensor draw_tokens(const Tensor& probs, const Tensor& uniforms) {
  const auto [B, V] = check_accumulated<2>("probs", probs, "B, V");

  Tensor tokens;
  with_accumulation_type(probs, [&]<class A>(Memory& memory) {
    const mpg::DrawResidual<A> args(  // of no drafted tokens: the target's row alone
        {memory.input<A>(MPG_ARG(probs, B, V)), nullptr, nullptr, nullptr, B, 0, V}, nullptr,
        nullptr, memory.input<double>(MPG_ARG(uniforms, B)), memory.output<int64_t>(tokens, {B}),
        memory.slice_scratch<double>(2 * B, V));
    run(memory, B, V, args, MPG_SIDES(draw_residual));
  });
  return tokens;
}

std::tuple<Tensor, Tensor> verify_block(const Tensor& target_probs,
                                        const std::optional<Tensor>& draft_probs,
                                        const Tensor& tokens, const Tensor& lengths,
                                        const Tensor& uniforms) {
  const auto [B, K, V] = check_accumulated<3>("target_probs", target_probs, "B, K + 1, V");

  Tensor accepted, carry;
  with_accumulation_type(target_probs, [&]<class A>(Memory& memory) {
    const mpg::VerifyBlock<A> args(
        block_of<A>(memory, target_probs, draft_probs, tokens, lengths, B, K, V),
        memory.input<double>(MPG_ARG(uniforms, B, K)), memory.output<int64_t>(accepted, {B}),
        memory.output<A>(carry, {B}), memory.slice_scratch<double>(B * K, V));
    run(memory, B, K * V, args, MPG_SIDES(verify_block));
  });
  return {accepted, carry};
}

Tensor draw_residual(const Tensor& target_probs, const std::optional<Tensor>& draft_probs,
                     const Tensor& tokens, const Tensor& lengths, const Tensor& accepted,
                     const Tensor& carry, const Tensor& uniforms) {
  const auto [B, K, V] = check_accumulated<3>("target_probs", target_probs, "B, K + 1, V");

  Tensor drawn;
  with_accumulation_type(target_probs, [&]<class A>(Memory& memory) {
    const mpg::DrawResidual<A> args(
        block_of<A>(memory, target_probs, draft_probs, tokens, lengths, B, K, V),
        memory.input<int64_t>(MPG_ARG(accepted, B)), memory.input<A>(MPG_ARG(carry, B)),
        memory.input<double>(MPG_ARG(uniforms, B)), memory.output<int64_t>(drawn, {B}),
        memory.slice_scratch<double>(2 * B, V));
    run(memory, B, 2 * V, args, MPG_SIDES(draw_residual));
  });
  return drawn;
}

Tensor count_usable_(at::TensorList rows, const Tensor& lengths, const Tensor& limits,
                     const Tensor& eos_token_ids, const Tensor& chunk,
                     const std::optional<Tensor>& draft_probs, const std::optional<Tensor>& most) {
  TORCH_CHECK_VALUE(rows.size() == 2, "rows must be the 2 tensors active and unusable, got ",
                    rows.size());
  const auto [B, K] = check_dims<2>("chunk", chunk, "B, K");
  const auto [E] = check_dims<1>("eos_token_ids", eos_token_ids, "E");
  const int64_t V =
      draft_probs ? check_accumulated<3>("draft_probs", *draft_probs, "B, K, V")[2] : 0;

  Tensor num_usable;
  with_accumulation_type(draft_probs.value_or(chunk), [&]<class A>(Memory& memory) {
    const mpg::CountUsable<A> args(
        memory.in_place<bool>("active", rows[0], "B", {B}),
        memory.in_place<bool>("unusable", rows[1], "B", {B}),
        memory.input<int64_t>(MPG_ARG(lengths, B)), memory.input<int64_t>(MPG_ARG(limits, B)),
        memory.input<int64_t>(MPG_ARG(eos_token_ids, E)),
        memory.input<int64_t>(MPG_ARG(chunk, B, K)),
        draft_probs ? memory.input<A>("draft_probs", *draft_probs, "B, K, V", {B, K, V}) : nullptr,
        most ? memory.input<int64_t>("most", *most, "B", {B}) : nullptr, B, E, K, V,
        memory.output<int64_t>(num_usable, {B}));
    run(memory, B, K, args, MPG_SIDES(count_usable));
  });
  return num_usable;
}

Tensor commit_block_(at::TensorList rows, const Tensor& limits, const Tensor& eos_token_ids,
                     const Tensor& chunk, const Tensor& accepted,
                     const std::optional<Tensor>& token, const std::optional<Tensor>& log_totals) {
  TORCH_CHECK_VALUE(rows.size() == 7, "rows must be the 7 tensors tokens, lengths, last_tokens, ",
                    "rounds, active, unusable and empty, got ", rows.size());
  const auto [B, C] = check_dims<2>("tokens", rows[0], "B, C");
  const auto [chunk_rows, L] = check_dims<2>("chunk", chunk, "B, L");
  const auto [E] = check_dims<1>("eos_token_ids", eos_token_ids, "E");
  if (log_totals) check_accumulated<2>("log_totals", *log_totals, "B, L + 1");

  Tensor done;
  with_accumulation_type(log_totals.value_or(chunk), [&]<class A>(Memory& memory) {
    const auto numbers = [&](const char* name, const Tensor& values) {
      return memory.in_place<int64_t>(name, values, "B", {B});
    };
    const auto flags = [&](const char* name, const Tensor& values) {
      return memory.in_place<bool>(name, values, "B", {B});
    };
    const mpg::CommitBlock<A> args(
        memory.in_place<int64_t>("tokens", rows[0], "B, C", {B, C}), numbers("lengths", rows[1]),
        numbers("last_tokens", rows[2]), numbers("rounds", rows[3]), flags("active", rows[4]),
        flags("unusable", rows[5]), flags("empty", rows[6]),
        memory.input<int64_t>(MPG_ARG(limits, B)), memory.input<int64_t>(MPG_ARG(eos_token_ids, E)),
        memory.input<int64_t>(MPG_ARG(chunk, B, L)), memory.input<int64_t>(MPG_ARG(accepted, B)),
        token ? memory.input<int64_t>("token", *token, "B", {B}) : nullptr,
        log_totals ? memory.input<A>("log_totals", *log_totals, "B, L + 1", {B, L + 1}) : nullptr,
        B, C, E, L, memory.output<int64_t>(done, {B, mpg::kDoneFlags + L + 1}));
    run(memory, B, L + 1, args, MPG_SIDES(commit_block));
  });
  return done;
}

// Multiply-adds of a run of rows in 16 bits from which torch's products are faster than ours,
// though they take longer to start (measured: 20 us).
constexpr int64_t kGemmWork = 1 << 20;

// Calls f(row, count, group) for every run of `count` rows of one group, where the CPU side works
// in 16 bits and runs are long enough for torch's products; whether it did. In more bits ours take
// .7 to 1.5 of the time, and give a row what they give it alone.
template <class F>
bool with_long_runs(const mpg::AdapterRows& rows, int64_t size, at::Device device, F f) {
  const bool is_of_16_bits =
      rows.dtype == mpg::DType::kFloat16 || rows.dtype == mpg::DType::kBFloat16;
  if (!is_of_16_bits || uses_kernels(device)) return false;
  if (rows.R * rows.q * rows.rank * size < kGemmWork) return false;
  int64_t num_runs = 1;
  for (int64_t i = 1; i < rows.R; ++i) num_runs += rows.groups[i] != rows.groups[i - 1];
  if (rows.R * rows.q * rows.rank * size / num_runs < kGemmWork) return false;
  const at::AutoDispatchBelowADInplaceOrView no_graph;
  for (int64_t row = 0, end = 0; row < rows.R; row = end) {
    while (end < rows.R && rows.groups[end] == rows.groups[row]) ++end;
    f(row, end - row, rows.groups[row]);
  }
  return true;
}

Tensor lora_shrink(const Tensor& x, const Tensor& down, const Tensor& groups) {
  const auto [R, q, in] = check_stored<3>("x", x, "R, q, in");
  const auto [G, r, size] = check_dims<3>("down", down, "G, r, in");
  const auto dtype = x.scalar_type();

  Tensor hidden = at::empty({R, q, r}, x.options());
  with_accumulation_type(x, [&]<class A>(Memory& memory) {
    const mpg::LoraShrink<A> args(
        {storage_of(x), memory.input<int64_t>("groups", groups, "R", {R}), R, q, G, r},
        memory.tokens("x", x, "R, q, in", {R, q, in}, dtype),
        memory.stored("down", down, "G, r, in", {G, r, in}, dtype), in,
        {hidden.mutable_data_ptr(), q * r, r});
    const bool is_done = with_long_runs(
        args.rows, in, memory.device(), [&](int64_t row, int64_t count, int64_t group) {
          const Tensor to = hidden.narrow(0, row, count);
          if (!args.rows.has_adapter(group)) {
            to.zero_();
            return;
          }
          Tensor tokens = to.view({count * q, r});
          at::mm_out(tokens, x.narrow(0, row, count).reshape({count * q, in}), down[group].t());
        });
    if (is_done) return;
    constexpr int64_t kPart = mpg::cpu::kRankPart;
    run(memory, (r + kPart - 1) / kPart * R, q * in * kPart, args, MPG_SIDES(lora_shrink));
  });
  return hidden;
}

// The ranks and outputs of an up factor's blocks; `given`: three numbers of each, none for a single
// block.
std::vector<mpg::RankBlock> rank_blocks(at::IntArrayRef given, int64_t rank, int64_t size) {
  if (given.empty()) return {{rank, 0, size}};
  std::vector<mpg::RankBlock> blocks;
  bool is_valid = given.size() % 3 == 0;
  int64_t num_ranks = 0;
  for (size_t i = 0; is_valid && i < given.size(); i += 3) {
    blocks.push_back({given[i], given[i + 1], given[i + 2]});
    const auto& [count, begin, end] = blocks.back();
    is_valid = 0 <= count && count <= rank - num_ranks && 0 <= begin && begin <= end && end <= size;
    num_ranks += count;
  }
  TORCH_CHECK_VALUE(is_valid && num_ranks == rank,
                    "blocks must be ranks, first and end of the outputs of each block of all ",
                    rank, " ranks and ", size, " outputs, got ", shape_string(given));
  return blocks;
}

void lora_expand_(const Tensor& out, const Tensor& hidden, const Tensor& up, const Tensor& groups,
                  at::IntArrayRef blocks) {
  const auto [R, q, size] = check_stored<3>("out", out, "R, q, out");
  const auto [G, r, columns] = check_dims<3>("up", up, "G, r, out");
  const auto parts = rank_blocks(blocks, r, size);
  const auto dtype = out.scalar_type();
  TORCH_CHECK_VALUE(out.stride(2) == 1 || size == 1,
                    "out is written in place and must have unit stride in its last dimension, got ",
                    out.stride(2));
  TORCH_CHECK_VALUE(at::has_internal_overlap(out) != at::MemOverlap::Yes,
                    "out is written in place and must have memory of its own for every number");

  const bool is_of_all = hidden.dim() == 3 && hidden.size(2) == G * r;
  const int64_t step = is_of_all ? r : 0;
  with_accumulation_type(out, [&]<class A>(Memory& memory) {
    const mpg::LoraExpand<A> args(
        {storage_of(out), memory.input<int64_t>("groups", groups, "R", {R}), R, q, G, r},
        memory.tokens("hidden", hidden, "R, q, r", {R, q, is_of_all ? G * r : r}, dtype),
        memory.stored("up", up, "G, r, out", {G, r, size}, dtype), size,
        {out.mutable_data_ptr(), out.stride(0), out.stride(1)}, step, parts.data(),
        int64_t(parts.size()));
    const bool has_tokens_in_line = out.stride(0) == q * out.stride(1);
    const bool is_done =
        has_tokens_in_line &&
        with_long_runs(args.rows, size, memory.device(),
                       [&](int64_t row, int64_t count, int64_t group) {
                         if (!args.rows.has_adapter(group)) return;
                         const Tensor own = hidden.narrow(0, row, count).narrow(2, group * step, r);
                         out.narrow(0, row, count)
                             .view({count * q, size})
                             .addmm_(own.reshape({count * q, r}), up[group]);
                       });
    if (is_done) return;
    constexpr int64_t kPart = mpg::cpu::kOutputPart;
    run(memory, (size + kPart - 1) / kPart * R, q * r * std::min(size, kPart), args,
        MPG_SIDES(lora_expand));
  });
}

Tensor attend_rows(const Tensor& query, const Tensor& key, const Tensor& value,
                   const Tensor& positions, std::optional<double> scale) {
  const auto [R, heads, q, D] = check_stored<4>("query", query, "R, heads, q, D");
  const auto [rows, H, S, features] = check_dims<4>("key", key, "R, H, S, D");
  const auto [also_rows, also_heads, also_S, E] = check_dims<4>("value", value, "R, H, S, E");
  const auto dtype = query.scalar_type();
  TORCH_CHECK_VALUE(query.is_cpu(), "query must be on the CPU, where this op alone is, got ",
                    query.device());
  TORCH_CHECK_VALUE(D >= 1, "query must have at least 1 feature, got ",
                    shape_string(query.sizes()));
  TORCH_CHECK_VALUE(S >= 1, "key must have at least 1 position, got ", shape_string(key.sizes()));
  TORCH_CHECK_VALUE(H >= 1 && heads % H == 0, "query must have a multiple of the key's ", H,
                    " heads, got ", heads);

  Tensor out = at::empty({R, q, heads, E}, query.options());
  with_accumulation_type(query, [&]<class A>(Memory& memory) {
    const mpg::AttendRows<A> args(
        storage_of(query), memory.heads("query", query, "R, heads, q, D", {R, heads, q, D}, dtype),
        memory.heads("key", key, "R, H, S, D", {R, H, S, D}, dtype),
        memory.heads("value", value, "R, H, S, E", {R, H, S, E}, dtype),
        memory.input<int64_t>(MPG_ARG(positions, R, q)), R, H, heads / H, q, S, D, E,
        A(scale.value_or(1 / std::sqrt(double(D)))), out.mutable_data_ptr());
    run(memory, R * H, S * (D + E) * args.G * q, args, mpg::cpu::attend_rows<A>, nullptr);
  });
  return out;
}

Tensor linear_panels(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& down, const std::optional<Tensor>& up,
                     const std::optional<Tensor>& groups, std::optional<int64_t> out_features,
                     at::IntArrayRef blocks) {
  const auto [num_panels, in, width] = check_dims<3>("panels", panels, "T, in, 16");
  const int64_t size = out_features.value_or(num_panels * mpg::kPanel);
  TORCH_CHECK_VALUE(x.is_cpu(), "x must be on the CPU, where this op alone is, got ", x.device());
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must be (..., in), got ", shape_string(x.sizes()));
  TORCH_CHECK_VALUE(down.has_value() == groups.has_value() && up.has_value() == groups.has_value(),
                    "down, up and groups must all be there, or none of them");
  TORCH_CHECK_VALUE(size >= 0 && (size + mpg::kPanel - 1) / mpg::kPanel == num_panels,
                    "out_features must be a number that fills ", num_panels, " panels of ",
                    mpg::kPanel, ", the last one perhaps in part, got ", size);

  Tensor out;
  with_accumulation_type(x, [&]<class A>(Memory& memory) {
    at::DimVector sizes(x.sizes());
    sizes.back() = in;
    const float* features = memory.input<float>("x", x, "..., in", sizes);
    sizes.back() = size;
    const mpg::LinearPanels args{
        features,
        memory.input<float>("panels", panels, "T, in, 16", {num_panels, in, mpg::kPanel}),
        bias ? memory.input<float>("bias", *bias, "out", {size}) : nullptr,
        x.numel() / in,
        in,
        size,
        num_panels,
        memory.output<float>(out, sizes)};
    // eight products take what an element of other ops does
    run(memory, num_panels, in * args.R * (mpg::kPanel / 8), args, mpg::cpu::linear_panels,
        nullptr);
  });
  if (groups) {
    const auto [R] = check_dims<1>("groups", *groups, "R");
    const int64_t num_tokens = x.numel() / in, q = R > 0 ? num_tokens / R : 0;
    TORCH_CHECK_VALUE(R * q == num_tokens,
                      "x must be (..., in) of as many tokens for each of R = ", R, " rows, got ",
                      shape_string(x.sizes()));
    const at::AutoDispatchBelowADInplaceOrView no_graph;
    const Tensor hidden = lora_shrink(x.reshape({R, q, in}), *down, *groups);
    lora_expand_(out.view({R, q, size}), hidden, *up, *groups, blocks);
  }
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset,
                bool rounds_first) {
  const auto [size] = check_stored<1>("weight", weight, "in");
  TORCH_CHECK_VALUE(x.is_cpu(), "x must be on the CPU, where this op alone is, got ", x.device());
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must be (..., in), got ", shape_string(x.sizes()));
  const auto dtype = weight.scalar_type();
  at::DimVector sizes(x.sizes());
  sizes.back() = size;
  Tensor out = at::empty(sizes, weight.options());
  with_accumulation_type(weight, [&]<class A>(Memory& memory) {
    const mpg::RmsNorm<A> args(storage_of(weight), memory.stored("x", x, "..., in", sizes, dtype),
                               memory.stored("weight", weight, "in", {size}, dtype),
                               x.numel() / size, size, A(eps), A(offset), rounds_first,
                               out.mutable_data_ptr());
    run(memory, args.R, size, args, mpg::cpu::rms_norm<A>, nullptr);
  });
  return out;
}

// Calls f with every op: its name, what does it, and its schema.
template <class F>
void for_each_op(F f) {
  f("gather_logprobs", gather_logprobs,
    "(Tensor logits, Tensor tokens, *, float temperature=1.0) -> Tensor");
  f("score_prefixes", score_prefixes,
    "(Tensor attribute_logprobs, Tensor anchor_logprobs, Tensor weights, *, str score) "
    "-> (Tensor, Tensor)");
  f("accept_prefixes", accept_prefixes,
    "(Tensor scores, Tensor log_bound, Tensor uniforms, Tensor lengths) -> Tensor");
  f("update_bound_", update_bound_,
    "(Tensor(a!)[] bound, Tensor scores, Tensor active, *, float[] constants) -> ()");
  f("verify_chunks", verify_chunks,
    "(Tensor anchor_logits, Tensor attribute_logits, Tensor tokens, Tensor lengths, "
    "Tensor weights, Tensor uniforms, Tensor(a!)[] bound, *, str score, float[] constants) "
    "-> (Tensor, Tensor, Tensor)");
  f("draw_fallback", draw_fallback,
    "(Tensor anchor_logits, Tensor attribute_logits, Tensor draft_probs, Tensor weights, "
    "Tensor log_bound, Tensor uniforms, Tensor active, *, str score) -> (Tensor, Tensor, Tensor)");
  f("draw_uniforms", draw_uniforms,
    "(Tensor seeds, Tensor rounds, *, int purpose, int count, int first=0) -> Tensor");
  f("combine_rows", combine_rows,
    "(Tensor attribute_logits, Tensor weights, Tensor? base_logits, Tensor? anchor_logits, *, "
    "str target, float? temperature=None) -> (Tensor, Tensor)");
  f("warp_rows", warp_rows,
    "(Tensor log_rows, *, float temperature=1.0, int top_k=0, float top_p=1.0, float min_p=0.0, "
    "Tensor? temperatures=None, Tensor? top_ks=None, Tensor? top_ps=None, Tensor? min_ps=None) "
    "-> Tensor");
  f("draw_tokens", draw_tokens, "(Tensor probs, Tensor uniforms) -> Tensor");
  f("verify_block", verify_block,
    "(Tensor target_probs, Tensor? draft_probs, Tensor tokens, Tensor lengths, Tensor uniforms) "
    "-> (Tensor, Tensor)");
  f("draw_residual", draw_residual,
    "(Tensor target_probs, Tensor? draft_probs, Tensor tokens, Tensor lengths, Tensor accepted, "
    "Tensor carry, Tensor uniforms) -> Tensor");
  f("count_usable_", count_usable_,
    "(Tensor(a!)[] rows, Tensor lengths, Tensor limits, Tensor eos_token_ids, Tensor chunk, "
    "Tensor? draft_probs=None, Tensor? most=None) -> Tensor");
  f("commit_block_", commit_block_,
    "(Tensor(a!)[] rows, Tensor limits, Tensor eos_token_ids, Tensor chunk, Tensor accepted, "
    "Tensor? token=None, Tensor? log_totals=None) -> Tensor");
  f("lora_shrink", lora_shrink, "(Tensor x, Tensor down, Tensor groups) -> Tensor");
  f("lora_expand_", lora_expand_,
    "(Tensor(a!) out, Tensor hidden, Tensor up, Tensor groups, *, int[] blocks=[]) -> ()");
  f("attend_rows", attend_rows,
    "(Tensor query, Tensor key, Tensor value, Tensor positions, *, float? scale=None) -> Tensor");
  f("linear_panels", linear_panels,
    "(Tensor x, Tensor panels, Tensor? bias=None, Tensor? down=None, Tensor? up=None, "
    "Tensor? groups=None, *, int? out_features=None, int[] blocks=[]) -> Tensor");
  f("rms_norm", rms_norm,
    "(Tensor x, Tensor weight, float eps, float offset=0.0, bool rounds_first=False) -> Tensor");
}

void register_ops(torch::Library& library) {
  for_each_op([&](const char* name, auto op, const char*) { library.impl(name, op); });
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
  for_each_op(
      [&](std::string name, auto, const char* schema) { library.def((name + schema).c_str()); });
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
