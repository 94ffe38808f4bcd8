// The only file that sees torch: checks arguments, allocates, picks the device, calls. What the ops
// compute is in ops.h; what they promise to Python is in mpg_ext/ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>

#include "ops.h"

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

void check_dims(const char* name, const Tensor& tensor, const char* letters, int64_t dims) {
  TORCH_CHECK_VALUE(tensor.dim() == dims, name, " must be ", letters, ", got ",
                    shape_string(tensor.sizes()));
}

// What an op writes in place is never copied first, so it has to be contiguous as it is.
void check_filled(const char* name, const Tensor& tensor, const char* letters,
                  at::IntArrayRef sizes, at::ScalarType dtype, at::Device device) {
  check(name, tensor, letters, sizes, dtype, device);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " is written in place and must be contiguous");
}

void check_backend([[maybe_unused]] at::Device device) {
#if !MPG_WITH_CUDA
  TORCH_CHECK_VALUE(!device.is_cuda(), "tensors are on ", device,
                    ", but mpg was built without CUDA; rebuild with a CUDA torch and nvcc");
#endif
}

void check_vocabulary(const char* name, const Tensor& rows) {
  TORCH_CHECK_VALUE(rows.size(-1) >= 1, name, " must have a vocabulary of at least 1 token, got ",
                    shape_string(rows.sizes()));
}

void check_logits(const char* name, const Tensor& logits, const char* letters, int64_t dims) {
  check_dims(name, logits, letters, dims);
  check_backend(logits.device());
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
}

void check_accumulated(const char* name, const Tensor& tensor) {
  check_backend(tensor.device());
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || (dtype == at::kDouble && tensor.is_cpu()), name,
                    " must be float32", tensor.is_cpu() ? " or float64" : "", " on ",
                    tensor.device(), ", got ", dtype_name(dtype));
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

at::ScalarType accumulation_dtype(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor empty(at::IntArrayRef sizes, const Tensor& like, at::ScalarType dtype) {
  return at::empty(sizes, like.options().dtype(dtype));
}

mpg::DType storage_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kHalf:
      return mpg::DType::kFloat16;
    case at::kBFloat16:
      return mpg::DType::kBFloat16;
    case at::kDouble:
      return mpg::DType::kFloat64;
    default:
      return mpg::DType::kFloat32;
  }
}

// Calls f with a zero of the accumulation type.
template <class F>
void with_accumulation_type(at::ScalarType dtype, F f) {
  dtype == at::kDouble ? f(double{}) : f(float{});
}

template <class A>
A* scratch(Tensor& storage, at::IntArrayRef sizes, const Tensor& like) {
  storage = empty(sizes, like, c10::CppTypeToScalarType<A>::value);
  return storage.mutable_data_ptr<A>();
}

template <class A>
mpg::ScorePrefixes<A> scoring_args(const A* attribute_logprobs, const A* anchor_logprobs,
                                   const Tensor& weights, mpg::Score score, int64_t K,
                                   Tensor& log_ratios, Tensor& scores) {
  return {attribute_logprobs,
          anchor_logprobs,
          weights.const_data_ptr<A>(),
          score,
          weights.size(1),
          weights.size(0),
          K,
          log_ratios.mutable_data_ptr<A>(),
          scores.mutable_data_ptr<A>()};
}

template <class A>
mpg::AcceptPrefixes<A> acceptance_args(const A* scores, const A* log_bound, const Tensor& uniforms,
                                       const Tensor& lengths, Tensor& accepted) {
  return {scores,
          log_bound,
          uniforms.const_data_ptr<double>(),
          lengths.const_data_ptr<int64_t>(),
          uniforms.size(0),
          uniforms.size(1),
          accepted.mutable_data_ptr<int64_t>()};
}

// The state of the bound, as verify_chunks and update_bound_ take it.
struct BoundTensors {
  const Tensor &window, &num_scores, &num_rounds, &log_bound, &frozen;
  double log_initial_bound, log_gamma, tau;

  void check_all(int64_t B, at::ScalarType dtype, at::Device device) const {
    check_dims("window", window, "(B, W)", 2);
    const int64_t W = window.size(1);
    TORCH_CHECK_VALUE(W >= 1, "window must hold at least 1 score, got ",
                      shape_string(window.sizes()));
    check_filled("window", window, "(B, W)", {B, W}, dtype, device);
    check_filled("num_scores", num_scores, "(B,)", {B}, at::kLong, device);
    check_filled("num_rounds", num_rounds, "(B,)", {B}, at::kLong, device);
    check_filled("log_bound", log_bound, "(B,)", {B}, dtype, device);
    check_filled("frozen", frozen, "(B,)", {B}, at::kBool, device);
  }

  template <class A>
  mpg::Bound<A> args() const {
    return {window.mutable_data_ptr<A>(),
            num_scores.mutable_data_ptr<int64_t>(),
            num_rounds.mutable_data_ptr<int64_t>(),
            log_bound.mutable_data_ptr<A>(),
            frozen.mutable_data_ptr<bool>(),
            window.size(1),
            A(log_initial_bound),
            A(log_gamma),
            A(tau)};
  }
};

// ---- Where the work is done.

// Items for which a thread is worth waking: about 32,000 elements of work.
int64_t grain_for(int64_t work_per_item) { return std::max<int64_t>(1, 32768 / work_per_item); }

template <class Args>
void split(int64_t items, int64_t work_per_item, const Args& args,
           void (*op)(const Args&, int64_t, int64_t)) {
  at::parallel_for(0, items, grain_for(work_per_item),
                   [&](int64_t begin, int64_t end) { op(args, begin, end); });
}

// Whether the CUDA side does the work; in the kernel tests (tests/simt) it does on CPU tensors too.
bool uses_kernels([[maybe_unused]] at::Device device) {
#if defined(MPG_SIMT)
  return true;
#else
  return device.is_cuda();
#endif
}

#if MPG_WITH_CUDA
template <class Args>
void launch(at::Device device, const Args& args, int (*launcher)(const Args&, void*)) {
  const c10::DeviceGuard guard(device);
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  const int status = launcher(args, device.is_cuda() ? stream.native_handle() : nullptr);
  TORCH_CHECK(status == 0, "mpg: CUDA kernel launch failed: ", mpg::cuda::error_string(status));
}
#define MPG_LAUNCH_IF_CUDA(device, args, op)                              \
  if constexpr (!std::is_same_v<decltype(acc), double>) {                 \
    if (uses_kernels(device)) return launch(device, args, mpg::cuda::op); \
  }
#else
#define MPG_LAUNCH_IF_CUDA(device, args, op)
#endif

// ---- The ops.

Tensor gather_logprobs(const Tensor& logits, const Tensor& tokens, double temperature) {
  check_logits("logits", logits, "(R, K, V)", 3);
  const int64_t R = logits.size(0), K = logits.size(1), V = logits.size(2);
  const at::Device device = logits.device();
  check_positions("K", K);
  check("tokens", tokens, "(R, K)", {R, K}, at::kLong, device);
  // Logits are multiplied by its inverse: both have to be normal numbers in float32.
  TORCH_CHECK_VALUE(temperature >= 0x1p-126 && temperature <= 0x1p126,
                    "temperature must be in [2^-126, 2^126], got ", temperature);

  const auto dtype = accumulation_dtype(logits);
  Tensor logprobs = empty({R, K}, logits, dtype), partials;
  const Tensor contiguous_tokens = tokens.contiguous();
  with_accumulation_type(dtype, [&](auto acc) {
    using A = decltype(acc);
    const mpg::LogitRows rows = {logits.const_data_ptr(), 0, logits.stride(0), logits.stride(1)};
    mpg::GatherLogprobs<A> args = {{storage_of(logits), rows, {}, 0, R, K, V, nullptr},
                                   contiguous_tokens.const_data_ptr<int64_t>(),
                                   A(temperature),
                                   logprobs.mutable_data_ptr<A>(),
                                   nullptr};
    if (R == 0) return;
    if (uses_kernels(device))
      args.partials = scratch<A>(partials, {R, K, mpg::num_slices(V), 2}, logits);
    MPG_LAUNCH_IF_CUDA(device, args, gather_logprobs)
    split(R * K, V, args, mpg::cpu::gather_logprobs<A>);
  });
  return logprobs;
}

std::tuple<Tensor, Tensor> score_prefixes(const Tensor& attribute_logprobs,
                                          const Tensor& anchor_logprobs, const Tensor& weights,
                                          std::string_view score) {
  check_dims("attribute_logprobs", attribute_logprobs, "(N, B, K)", 3);
  check_accumulated("attribute_logprobs", attribute_logprobs);
  const int64_t N = attribute_logprobs.size(0), B = attribute_logprobs.size(1),
                K = attribute_logprobs.size(2);
  const at::Device device = attribute_logprobs.device();
  const auto dtype = attribute_logprobs.scalar_type();
  check_models(N);
  check_positions("K", K);
  check("anchor_logprobs", anchor_logprobs, "(B, K)", {B, K}, dtype, device);
  check("weights", weights, "(B, N)", {B, N}, dtype, device);
  const mpg::Score kind = score_of(score);

  Tensor log_ratios = empty({N, B, K}, weights, dtype), scores = empty({B, K}, weights, dtype);
  const Tensor attribute = attribute_logprobs.contiguous(), anchor = anchor_logprobs.contiguous(),
               contiguous_weights = weights.contiguous();
  with_accumulation_type(dtype, [&](auto acc) {
    using A = decltype(acc);
    if (B == 0) return;
    const auto args = scoring_args(attribute.const_data_ptr<A>(), anchor.const_data_ptr<A>(),
                                   contiguous_weights, kind, K, log_ratios, scores);
    MPG_LAUNCH_IF_CUDA(device, args, score_prefixes)
    split(B, N * K * K, args, mpg::cpu::score_prefixes<A>);
  });
  return {log_ratios, scores};
}

Tensor accept_prefixes(const Tensor& scores, const Tensor& log_bound, const Tensor& uniforms,
                       const Tensor& lengths) {
  check_dims("scores", scores, "(B, K)", 2);
  check_accumulated("scores", scores);
  const int64_t B = scores.size(0), K = scores.size(1);
  const at::Device device = scores.device();
  const auto dtype = scores.scalar_type();
  check_positions("K", K);
  check("log_bound", log_bound, "(B,)", {B}, dtype, device);
  check("uniforms", uniforms, "(B, K)", {B, K}, at::kDouble, device);
  check("lengths", lengths, "(B,)", {B}, at::kLong, device);

  Tensor accepted = empty({B}, scores, at::kLong);
  const Tensor contiguous_scores = scores.contiguous(), bound = log_bound.contiguous(),
               contiguous_uniforms = uniforms.contiguous(),
               contiguous_lengths = lengths.contiguous();
  with_accumulation_type(dtype, [&](auto acc) {
    using A = decltype(acc);
    if (B == 0) return;
    const auto args =
        acceptance_args(contiguous_scores.const_data_ptr<A>(), bound.const_data_ptr<A>(),
                        contiguous_uniforms, contiguous_lengths, accepted);
    MPG_LAUNCH_IF_CUDA(device, args, accept_prefixes)
    split(B, K, args, mpg::cpu::accept_prefixes<A>);
  });
  return accepted;
}

void update_bound_(const Tensor& window, const Tensor& num_scores, const Tensor& num_rounds,
                   const Tensor& log_bound, const Tensor& frozen, const Tensor& scores,
                   const Tensor& active, double log_initial_bound, double log_gamma, double tau) {
  check_dims("scores", scores, "(B, P)", 2);
  check_accumulated("scores", scores);
  const int64_t B = scores.size(0), P = scores.size(1);
  const at::Device device = scores.device();
  check_positions("P", P, 33);  // a score per prefix and the fallback's
  const BoundTensors bound = {window, num_scores,        num_rounds, log_bound,
                              frozen, log_initial_bound, log_gamma,  tau};
  bound.check_all(B, scores.scalar_type(), device);
  check("active", active, "(B,)", {B}, at::kBool, device);

  const Tensor contiguous_scores = scores.contiguous(), contiguous_active = active.contiguous();
  with_accumulation_type(scores.scalar_type(), [&](auto acc) {
    using A = decltype(acc);
    if (B == 0) return;
    const mpg::UpdateBound<A> args = {bound.args<A>(), contiguous_scores.const_data_ptr<A>(),
                                      contiguous_active.const_data_ptr<bool>(), B, P};
    MPG_LAUNCH_IF_CUDA(device, args, update_bound)
    split(B, window.size(1) + P, args, mpg::cpu::update_bound<A>);
  });
}

// The logits of anchor and attribute models, (B, K, V) and (N, B, K, V) or without K.
mpg::ModelLogits model_logits(const Tensor& anchor, const Tensor& attributes, const bool* active) {
  const bool has_positions = anchor.dim() == 3;
  return {storage_of(anchor),
          {anchor.const_data_ptr(), 0, anchor.stride(0), has_positions ? anchor.stride(1) : 0},
          {attributes.const_data_ptr(), attributes.stride(0), attributes.stride(1),
           has_positions ? attributes.stride(2) : 0},
          attributes.size(0),
          anchor.size(0),
          has_positions ? anchor.size(1) : 1,
          anchor.size(-1),
          active};
}

void check_attributes(const Tensor& attribute_logits, const char* letters, const Tensor& anchor) {
  check_logits("attribute_logits", attribute_logits, letters, anchor.dim() + 1);
  check_models(attribute_logits.size(0));
  at::DimVector sizes = {attribute_logits.size(0)};
  sizes.append(anchor.sizes().begin(), anchor.sizes().end());
  check("attribute_logits", attribute_logits, letters, sizes, anchor.scalar_type(),
        anchor.device());
}

std::tuple<Tensor, Tensor, Tensor> verify_chunks(
    const Tensor& anchor_logits, const Tensor& attribute_logits, const Tensor& tokens,
    const Tensor& lengths, const Tensor& weights, const Tensor& uniforms, const Tensor& window,
    const Tensor& num_scores, const Tensor& num_rounds, const Tensor& log_bound,
    const Tensor& frozen, std::string_view score, double log_initial_bound, double log_gamma,
    double tau) {
  check_logits("anchor_logits", anchor_logits, "(B, K, V)", 3);
  check_attributes(attribute_logits, "(N, B, K, V)", anchor_logits);
  const int64_t N = attribute_logits.size(0), B = anchor_logits.size(0), K = anchor_logits.size(1),
                V = anchor_logits.size(2);
  const at::Device device = anchor_logits.device();
  const auto dtype = accumulation_dtype(anchor_logits);
  check_positions("K", K);
  check("tokens", tokens, "(B, K)", {B, K}, at::kLong, device);
  check("lengths", lengths, "(B,)", {B}, at::kLong, device);
  check("weights", weights, "(B, N)", {B, N}, dtype, device);
  check("uniforms", uniforms, "(B, K)", {B, K}, at::kDouble, device);
  const BoundTensors bound = {window, num_scores,        num_rounds, log_bound,
                              frozen, log_initial_bound, log_gamma,  tau};
  bound.check_all(B, dtype, device);
  const mpg::Score kind = score_of(score);

  Tensor log_ratios = empty({N, B, K}, weights, dtype), scores = empty({B, K}, weights, dtype),
         accepted = empty({B}, weights, at::kLong), logprobs, partials;
  const Tensor contiguous_tokens = tokens.contiguous(), contiguous_lengths = lengths.contiguous(),
               contiguous_weights = weights.contiguous(),
               contiguous_uniforms = uniforms.contiguous();
  with_accumulation_type(dtype, [&](auto acc) {
    using A = decltype(acc);
    if (B == 0) return;
    A* gathered = scratch<A>(logprobs, {1 + N, B, K}, weights);
    mpg::VerifyChunks<A> args = {
        {model_logits(anchor_logits, attribute_logits, nullptr),
         contiguous_tokens.const_data_ptr<int64_t>(), A(1), gathered, nullptr},
        scoring_args<A>(gathered + B * K, gathered, contiguous_weights, kind, K, log_ratios,
                        scores),
        acceptance_args<A>(scores.const_data_ptr<A>(), log_bound.const_data_ptr<A>(),
                           contiguous_uniforms, contiguous_lengths, accepted),
        bound.args<A>()};
    if (uses_kernels(device)) {
      args.gather.partials = scratch<A>(partials, {1 + N, B, K, mpg::num_slices(V), 2}, weights);
    }
    MPG_LAUNCH_IF_CUDA(device, args, verify_chunks)
    split((1 + N) * B * K, V, args.gather, mpg::cpu::gather_logprobs<A>);
    split(B, N * K * K, args, mpg::cpu::verify_chunks<A>);
  });
  return {log_ratios, scores, accepted};
}

std::tuple<Tensor, Tensor, Tensor> draw_fallback(const Tensor& anchor_logits,
                                                 const Tensor& attribute_logits,
                                                 const Tensor& draft_probs, const Tensor& weights,
                                                 const Tensor& log_bound, const Tensor& uniforms,
                                                 const Tensor& active, std::string_view score) {
  check_logits("anchor_logits", anchor_logits, "(B, V)", 2);
  check_attributes(attribute_logits, "(N, B, V)", anchor_logits);
  const int64_t N = attribute_logits.size(0), B = anchor_logits.size(0), V = anchor_logits.size(1);
  const at::Device device = anchor_logits.device();
  const auto dtype = accumulation_dtype(anchor_logits);
  check("draft_probs", draft_probs, "(B, V)", {B, V}, dtype, device);
  check("weights", weights, "(B, N)", {B, N}, dtype, device);
  check("log_bound", log_bound, "(B,)", {B}, dtype, device);
  check("uniforms", uniforms, "(B,)", {B}, at::kDouble, device);
  check("active", active, "(B,)", {B}, at::kBool, device);
  const mpg::Score kind = score_of(score);

  Tensor tokens = empty({B}, weights, at::kLong), scores = empty({B}, weights, dtype),
         accept_probs = empty({B}, weights, dtype), normalizers, partials, slice_masses;
  const Tensor probs = draft_probs.contiguous(), contiguous_weights = weights.contiguous(),
               bound = log_bound.contiguous(), contiguous_uniforms = uniforms.contiguous(),
               contiguous_active = active.contiguous();
  with_accumulation_type(dtype, [&](auto acc) {
    using A = decltype(acc);
    if (B == 0) return;
    A* normalizer_pairs = scratch<A>(normalizers, {1 + N, B, 2}, weights);
    mpg::DrawFallback<A> args = {
        {model_logits(anchor_logits, attribute_logits, contiguous_active.const_data_ptr<bool>()),
         reinterpret_cast<mpg::Normalizer<A>*>(normalizer_pairs), nullptr},
        probs.const_data_ptr<A>(),
        contiguous_weights.const_data_ptr<A>(),
        bound.const_data_ptr<A>(),
        contiguous_uniforms.const_data_ptr<double>(),
        kind,
        tokens.mutable_data_ptr<int64_t>(),
        scores.mutable_data_ptr<A>(),
        accept_probs.mutable_data_ptr<A>(),
        nullptr};
    if (uses_kernels(device)) {
      args.rows.partials = scratch<A>(partials, {1 + N, B, mpg::num_slices(V), 2}, weights);
      args.slice_masses = scratch<double>(slice_masses, {B, mpg::num_slices(V)}, weights);
    }
    MPG_LAUNCH_IF_CUDA(device, args, draw_fallback)
    split((1 + N) * B, V, args.rows, mpg::cpu::normalize_rows<A>);
    split(B, V, args, mpg::cpu::draw_fallback<A>);
  });
  return {tokens, scores, accept_probs};
}

Tensor draw_uniforms(const Tensor& seeds, const Tensor& rounds, int64_t purpose, int64_t count,
                     int64_t first) {
  check_dims("seeds", seeds, "(B,)", 1);
  check_backend(seeds.device());
  const int64_t B = seeds.size(0);
  const at::Device device = seeds.device();
  check("seeds", seeds, "(B,)", {B}, at::kLong, device);
  check("rounds", rounds, "(B,)", {B}, at::kLong, device);
  constexpr int64_t kWords = int64_t(1) << 32;
  TORCH_CHECK_VALUE(purpose >= 0 && purpose < kWords, "purpose must be in [0, 2^32), got ",
                    purpose);
  TORCH_CHECK_VALUE(count >= 0 && count < kWords, "count must be in [0, 2^32), got ", count);
  TORCH_CHECK_VALUE(first >= 0 && first <= kWords - count,
                    "first must be in [0, 2^32 - count], got ", first);

  Tensor uniforms = empty({B, count}, seeds, at::kDouble);
  const Tensor contiguous_seeds = seeds.contiguous(), contiguous_rounds = rounds.contiguous();
  with_accumulation_type(at::kFloat, [&]([[maybe_unused]] auto acc) {
    if (B * count == 0) return;
    const mpg::DrawUniforms args = {contiguous_seeds.const_data_ptr<int64_t>(),
                                    contiguous_rounds.const_data_ptr<int64_t>(),
                                    uint32_t(purpose),
                                    uint32_t(first),
                                    B,
                                    count,
                                    uniforms.mutable_data_ptr<double>()};
    MPG_LAUNCH_IF_CUDA(device, args, draw_uniforms)
    split(B, count, args, mpg::cpu::draw_uniforms);
  });
  return uniforms;
}

std::tuple<Tensor, Tensor> combine_rows(const Tensor& attribute_logits, const Tensor& weights,
                                        const std::optional<Tensor>& base_logits,
                                        const std::optional<Tensor>& anchor_logits,
                                        std::string_view target) {
  check_logits("attribute_logits", attribute_logits, "(N, B, P, V)", 4);
  const int64_t N = attribute_logits.size(0), B = attribute_logits.size(1),
                P = attribute_logits.size(2), V = attribute_logits.size(3);
  const at::Device device = attribute_logits.device();
  const auto dtype = accumulation_dtype(attribute_logits);
  check_models(N);
  check_positions("P", P, 33);  // of the draft and the one after it
  check("weights", weights, "(B, P, N)", {B, P, N}, dtype, device);
  const mpg::Score kind = score_of(target, "target");
  const bool has_anchor = anchor_logits.has_value();
  TORCH_CHECK_VALUE(base_logits.has_value() == has_anchor,
                    "base_logits and anchor_logits must both be given or both be None");
  TORCH_CHECK_VALUE(has_anchor || kind == mpg::Score::kArithmetic,
                    "the geometric target needs base_logits and anchor_logits, got None");
  for (const auto& [name, logits] :
       {std::pair("base_logits", &base_logits), std::pair("anchor_logits", &anchor_logits)}) {
    if (!logits->has_value()) continue;
    check_logits(name, **logits, "(B, P, V)", 3);
    check(name, **logits, "(B, P, V)", {B, P, V}, attribute_logits.scalar_type(), device);
  }

  Tensor log_rows = empty({B, P, V}, weights, dtype), log_totals = empty({B, P}, weights, dtype),
         normalizers, partials, row_partials;
  const Tensor contiguous_weights = weights.contiguous();
  with_accumulation_type(dtype, [&](auto acc) {
    using A = decltype(acc);
    if (B == 0) return;
    // Without an anchor the first attribute model takes its place as model 0.
    mpg::ModelLogits logits = has_anchor ? model_logits(*anchor_logits, attribute_logits, nullptr)
                                         : model_logits(attribute_logits.select(0, 0),
                                                        attribute_logits.slice(0, 1), nullptr);
    if (has_anchor && !(base_logits->const_data_ptr() == anchor_logits->const_data_ptr() &&
                        base_logits->strides() == anchor_logits->strides())) {
      logits.base = {base_logits->const_data_ptr(), 0, base_logits->stride(0),
                     base_logits->stride(1)};
      logits.has_base = true;
    }
    const int64_t num_rows = logits.num_rows();
    mpg::CombineRows<A> args = {
        {logits,
         reinterpret_cast<mpg::Normalizer<A>*>(scratch<A>(normalizers, {num_rows, 2}, weights)),
         nullptr},
        has_anchor,
        N,
        logits.has_base ? N + 1 : 0,
        contiguous_weights.const_data_ptr<A>(),
        kind,
        log_rows.mutable_data_ptr<A>(),
        log_totals.mutable_data_ptr<A>(),
        scratch<A>(row_partials, {B, P, mpg::num_slices(V), 2}, weights)};
    if (uses_kernels(device)) {
      args.rows.partials = scratch<A>(partials, {num_rows, mpg::num_slices(V), 2}, weights);
    }
    MPG_LAUNCH_IF_CUDA(device, args, combine_rows)
    split(num_rows, V, args.rows, mpg::cpu::normalize_rows<A>);
    const int64_t slices = B * P * mpg::num_slices(V), slice_size = std::min(V, mpg::kSliceSize);
    split(slices, N * slice_size, args, mpg::cpu::combine_slices<A>);
    split(slices, slice_size, args, mpg::cpu::combine_rows<A>);
  });
  return {log_rows, log_totals};
}

Tensor warp_rows(const Tensor& log_rows, double temperature, int64_t top_k, double top_p,
                 double min_p) {
  check_dims("log_rows", log_rows, "(R, V)", 2);
  check_accumulated("log_rows", log_rows);
  const int64_t R = log_rows.size(0), V = log_rows.size(1);
  check_vocabulary("log_rows", log_rows);
  TORCH_CHECK_VALUE(std::isfinite(temperature) && temperature >= 0,
                    "temperature must be finite and not negative, got ", temperature);
  TORCH_CHECK_VALUE(top_k >= 0, "top_k must not be negative, got ", top_k);
  TORCH_CHECK_VALUE(top_p > 0 && top_p <= 1, "top_p must be in (0, 1], got ", top_p);
  TORCH_CHECK_VALUE(min_p >= 0 && min_p <= 1, "min_p must be in [0, 1], got ", min_p);

  const auto dtype = log_rows.scalar_type();
  Tensor probs = empty({R, V}, log_rows, dtype);
  const Tensor contiguous_rows = log_rows.contiguous();
  with_accumulation_type(dtype, [&](auto acc) {
    using A = decltype(acc);
    if (R == 0) return;
    const mpg::WarpRows<A> args = {
        contiguous_rows.const_data_ptr<A>(), R, V, temperature, top_k, top_p, min_p,
        probs.mutable_data_ptr<A>()};
    MPG_LAUNCH_IF_CUDA(log_rows.device(), args, warp_rows)
    split(R, V, args, mpg::cpu::warp_rows<A>);
  });
  return probs;
}

Tensor draw_tokens(const Tensor& probs, const Tensor& uniforms) {
  check_dims("probs", probs, "(B, V)", 2);
  check_accumulated("probs", probs);
  check_vocabulary("probs", probs);
  const int64_t B = probs.size(0), V = probs.size(1);
  const at::Device device = probs.device();
  check("uniforms", uniforms, "(B,)", {B}, at::kDouble, device);

  Tensor tokens = empty({B}, probs, at::kLong), slice_masses;
  const Tensor contiguous_probs = probs.contiguous(), contiguous_uniforms = uniforms.contiguous();
  with_accumulation_type(probs.scalar_type(), [&](auto acc) {
    using A = decltype(acc);
    if (B == 0) return;
    mpg::DrawTokens<A> args = {contiguous_probs.const_data_ptr<A>(),
                               contiguous_uniforms.const_data_ptr<double>(),
                               B,
                               V,
                               tokens.mutable_data_ptr<int64_t>(),
                               nullptr};
    if (uses_kernels(device)) {
      args.slice_masses = scratch<double>(slice_masses, {B, mpg::num_slices(V)}, probs);
    }
    MPG_LAUNCH_IF_CUDA(device, args, draw_tokens)
    split(B, V, args, mpg::cpu::draw_tokens<A>);
  });
  return tokens;
}

// A drafted block, as verify_block and draw_residual take it.
struct BlockTensors {
  Tensor target_probs, draft_probs, tokens, lengths;  // contiguous; draft_probs may be undefined

  BlockTensors(const Tensor& target, const std::optional<Tensor>& draft, const Tensor& block_tokens,
               const Tensor& block_lengths) {
    check_dims("target_probs", target, "(B, K + 1, V)", 3);
    check_accumulated("target_probs", target);
    check_vocabulary("target_probs", target);
    const int64_t B = target.size(0), K = target.size(1) - 1, V = target.size(2);
    const at::Device device = target.device();
    check_positions("K", K);
    if (draft.has_value()) {
      check("draft_probs", *draft, "(B, K, V)", {B, K, V}, target.scalar_type(), device);
      draft_probs = draft->contiguous();
    }
    check("tokens", block_tokens, "(B, K)", {B, K}, at::kLong, device);
    check("lengths", block_lengths, "(B,)", {B}, at::kLong, device);
    target_probs = target.contiguous();
    tokens = block_tokens.contiguous();
    lengths = block_lengths.contiguous();
  }

  template <class A>
  mpg::Block<A> args() const {
    return {target_probs.const_data_ptr<A>(),
            draft_probs.defined() ? draft_probs.const_data_ptr<A>() : nullptr,
            tokens.const_data_ptr<int64_t>(),
            lengths.const_data_ptr<int64_t>(),
            tokens.size(0),
            tokens.size(1),
            target_probs.size(2)};
  }
};

std::tuple<Tensor, Tensor> verify_block(const Tensor& target_probs,
                                        const std::optional<Tensor>& draft_probs,
                                        const Tensor& tokens, const Tensor& lengths,
                                        const Tensor& uniforms) {
  const BlockTensors block(target_probs, draft_probs, tokens, lengths);
  const int64_t B = tokens.size(0), K = tokens.size(1), V = target_probs.size(2);
  const at::Device device = target_probs.device();
  const auto dtype = target_probs.scalar_type();
  check("uniforms", uniforms, "(B, K)", {B, K}, at::kDouble, device);

  Tensor accepted = empty({B}, target_probs, at::kLong), carry = empty({B}, target_probs, dtype),
         slice_sums;
  const Tensor contiguous_uniforms = uniforms.contiguous();
  with_accumulation_type(dtype, [&](auto acc) {
    using A = decltype(acc);
    if (B == 0) return;
    mpg::VerifyBlock<A> args = {block.args<A>(), contiguous_uniforms.const_data_ptr<double>(),
                                accepted.mutable_data_ptr<int64_t>(), carry.mutable_data_ptr<A>(),
                                nullptr};
    if (uses_kernels(device)) {
      args.slice_sums = scratch<double>(slice_sums, {B, K, mpg::num_slices(V)}, target_probs);
    }
    MPG_LAUNCH_IF_CUDA(device, args, verify_block)
    split(B, K * V, args, mpg::cpu::verify_block<A>);
  });
  return {accepted, carry};
}

Tensor draw_residual(const Tensor& target_probs, const std::optional<Tensor>& draft_probs,
                     const Tensor& tokens, const Tensor& lengths, const Tensor& accepted,
                     const Tensor& carry, const Tensor& uniforms) {
  const BlockTensors block(target_probs, draft_probs, tokens, lengths);
  const int64_t B = tokens.size(0), V = target_probs.size(2);
  const at::Device device = target_probs.device();
  const auto dtype = target_probs.scalar_type();
  check("accepted", accepted, "(B,)", {B}, at::kLong, device);
  check("carry", carry, "(B,)", {B}, dtype, device);
  check("uniforms", uniforms, "(B,)", {B}, at::kDouble, device);

  Tensor drawn = empty({B}, target_probs, at::kLong), slice_masses;
  const Tensor contiguous_accepted = accepted.contiguous(), contiguous_carry = carry.contiguous(),
               contiguous_uniforms = uniforms.contiguous();
  with_accumulation_type(dtype, [&](auto acc) {
    using A = decltype(acc);
    if (B == 0) return;
    mpg::DrawResidual<A> args = {block.args<A>(),
                                 contiguous_accepted.const_data_ptr<int64_t>(),
                                 contiguous_carry.const_data_ptr<A>(),
                                 contiguous_uniforms.const_data_ptr<double>(),
                                 drawn.mutable_data_ptr<int64_t>(),
                                 nullptr};
    if (uses_kernels(device)) {
      args.slice_masses = scratch<double>(slice_masses, {2, B, mpg::num_slices(V)}, target_probs);
    }
    MPG_LAUNCH_IF_CUDA(device, args, draw_residual)
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
      "update_bound_(Tensor(a!) window, Tensor(b!) num_scores, Tensor(c!) num_rounds, "
      "Tensor(d!) log_bound, Tensor(e!) frozen, Tensor scores, Tensor active, *, "
      "float log_initial_bound, float log_gamma, float tau) -> ()");
  library.def(
      "verify_chunks(Tensor anchor_logits, Tensor attribute_logits, Tensor tokens, Tensor lengths, "
      "Tensor weights, Tensor uniforms, Tensor(a!) window, Tensor(b!) num_scores, "
      "Tensor(c!) num_rounds, Tensor(d!) log_bound, Tensor(e!) frozen, *, str score, "
      "float log_initial_bound, float log_gamma, float tau) -> (Tensor, Tensor, Tensor)");
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
    return info;
  });
}
#endif
