// What the ops compute, on raw pointers: the interface that the CPU and the CUDA side both
// implement, attend_rows, linear_panels and rms_norm the CPU alone. Knows no torch and no CUDA
// type; shapes and dtypes have been checked by bindings.cpp.
//
// Sizes: B sequences, K draft tokens, P positions, N attribute models, V vocabulary, W window of
// the bound; R rows of q tokens, H heads of S keys, D and E features. A is the accumulation type:
// double for float64 logits (CPU only), else float. Unless a stride is given, tensors are
// contiguous. Out and in-place members are the non-const pointers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MPG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MPG_HOST_DEVICE inline
#endif

namespace mpg {

enum class DType { kFloat32, kFloat16, kBFloat16, kFloat64 };
enum class Score { kArithmetic, kGeometric };

// The part of a row that one CUDA block reduces. 8192 elements keep 256 threads busy with 16-byte
// loads and still give a single sequence's few rows enough blocks to fill a GPU.
constexpr int64_t kSliceSize = 8192;
MPG_HOST_DEVICE int64_t num_slices(int64_t V, int64_t slice_size = kSliceSize) {
  return (V + slice_size - 1) / slice_size;
}

// A quarter where rows are too few to give each of 132 multiprocessors two blocks.
MPG_HOST_DEVICE int64_t slice_size_of(int64_t num_rows, int64_t V) {
  return num_rows * num_slices(V) < 264 ? kSliceSize / 4 : kSliceSize;
}

// Element v of row (i, b, k) lies at data[i * stride_model + b * stride_sequence + k *
// stride_position + v].
struct LogitRows {
  const void* data;
  int64_t stride_model, stride_sequence, stride_position;
};

// The logits of the anchor, model 0, of the N attribute models, models 1..N, and where there is one
// of a base of its own, model N + 1, at the same K positions of B sequences. Rows are counted
// model-major: row = (model * B + b) * K + k.
struct ModelLogits {
  DType dtype;
  LogitRows anchor, attributes;
  int64_t N, B, K, V;
  const bool* active;  // (B): rows of other sequences need not be read; null means all are active
  LogitRows base = {};
  bool has_base = false;

  MPG_HOST_DEVICE int64_t num_models() const { return 1 + N + has_base; }
  MPG_HOST_DEVICE int64_t num_rows() const { return num_models() * B * K; }
  MPG_HOST_DEVICE int64_t slice_size() const { return slice_size_of(num_rows(), V); }
  MPG_HOST_DEVICE int64_t num_slices() const { return mpg::num_slices(V, slice_size()); }
};

// One row's softmax normaliser: log softmax(x / temperature) = (x - max) / temperature - log_sum.
template <class A>
struct Normalizer {
  A max, log_sum;
};

// What a part of a row adds to its normaliser, see numerics.h.
template <class A>
struct LogSum;

// Rows and where their normalisers go.
template <class A>
struct NormalizeRows {
  ModelLogits logits;
  Normalizer<A>* normalizers;  // (rows)
  LogSum<A>* partials;         // (rows, logits.num_slices()) scratch, CUDA only
};

template <class A>
struct GatherLogprobs {
  ModelLogits logits;
  const int64_t* tokens;  // (B, K)
  A temperature;
  A* logprobs;          // (1 + N, B, K)
  LogSum<A>* partials;  // (rows, logits.num_slices()) scratch, CUDA only
};

template <class A>
struct ScorePrefixes {
  const A* attribute_logprobs;  // (N, B, K)
  const A* anchor_logprobs;     // (B, K)
  const A* weights;             // (B, N)
  Score score;
  int64_t N, B, K;
  A* log_ratios;  // (N, B, K)
  A* scores;      // (B, K)
};

template <class A>
struct AcceptPrefixes {
  const A* scores;         // (B, K)
  const A* log_bound;      // (B)
  const double* uniforms;  // (B, K)
  const int64_t* lengths;  // (B)
  int64_t B, K;
  int64_t* accepted;  // (B)
};

// The three-phase bound of B sequences (section 3.3) and its constants.
template <class A>
struct Bound {
  A* window;            // (B, W) ring buffer of the last W pushed scores
  int64_t* num_scores;  // (B) scores pushed so far
  int64_t* num_rounds;  // (B)
  A* log_bound;         // (B)
  bool* frozen;         // (B)
  int64_t W;
  A log_initial_bound, log_gamma, tau;
};

template <class A>
struct UpdateBound {
  Bound<A> bound;
  const A* scores;     // (B, P)
  const bool* active;  // (B)
  int64_t B, P;
};

// The four above in sequence; scoring reads what gather wrote, acceptance what scoring wrote.
template <class A>
struct VerifyChunks {
  GatherLogprobs<A> gather;
  ScorePrefixes<A> scoring;
  AcceptPrefixes<A> acceptance;
  Bound<A> bound;
};

template <class A>
struct DrawFallback {
  NormalizeRows<A> rows;   // K = 1; active sequences are those that draw; normalizers are scratch
  const A* draft_probs;    // (B, V)
  const A* weights;        // (B, N)
  const A* log_bound;      // (B)
  const double* uniforms;  // (B)
  Score score;
  int64_t* tokens;       // (B)
  A* scores;             // (B)
  A* accept_probs;       // (B)
  double* slice_masses;  // (B, num_slices) scratch, CUDA only
};

struct DrawUniforms {
  const int64_t* seeds;   // (B)
  const int64_t* rounds;  // (B)
  uint32_t purpose, first;
  int64_t B, count;
  double* uniforms;  // (B, count)
};

// Combined rows. `rows` has P positions for its K, and either an anchor and the attribute models
// after it, or with neither base nor anchor nothing but the attribute models from model 0 on.
template <class A>
struct CombineRows {
  NormalizeRows<A> rows;  // normalizers are scratch
  bool has_anchor;
  int64_t N, base;   // the model that is the base: 0 where it is the anchor itself
  const A* weights;  // (B, P, N)
  Score target;
  A inv_temperature;  // all v are raised to it
  bool has_probs;     // what comes out is exp of log_rows
  A* log_rows;        // (B, P, V)
  A* log_totals;      // (B, P)
  int64_t slice_size;
  LogSum<A>* row_partials;  // (B, P, num_slices of slice_size) scratch
};

struct WarpOptions {
  double temperature;
  int64_t top_k;
  double top_p, min_p;

  MPG_HOST_DEVICE bool is_valid() const { return temperature >= 0 && temperature <= 0x1.fffp1023; }
  // 1 / temperature, but finite: 0 times it is 0.
  MPG_HOST_DEVICE double scale() const {
    return temperature < 0x1p-1023 ? 0x1p1023 : 1 / temperature;
  }
};

// Words that the CUDA side of warp_rows notes of a row, and of each of its slices.
constexpr int64_t kWarpWords = 8 * (2048 + 2) + 2, kWarpSliceWords = 11;

template <class A>
struct WarpRows {
  const A* log_rows;  // (R, V)
  int64_t R, V;
  WarpOptions options;            // of all rows, but where they have one each:
  const double* temperatures;     // (R) or null
  const int64_t* top_ks;          // (R) or null
  const double *top_ps, *min_ps;  // (R) or null
  A* probs;                       // (R, V)
  // CUDA only
  int64_t slice_size, num_slices;
  float mass_unit;    // masses are added in units of its inverse, all V below 2^63 of them
  uint64_t* scratch;  // (R, kWarpWords + kWarpSliceWords * num_slices)

  MPG_HOST_DEVICE WarpOptions options_of(int64_t row) const {
    WarpOptions own = options;
    if (temperatures != nullptr) own.temperature = temperatures[row];
    if (top_ks != nullptr) own.top_k = top_ks[row];
    if (top_ps != nullptr) own.top_p = top_ps[row];
    if (min_ps != nullptr) own.min_p = min_ps[row] > 1 ? 1 : (min_ps[row] > 0 ? min_ps[row] : 0);
    return own;
  }
};

// A drafted block and the rows around it; a K of 0, without tokens and lengths, is a row alone.
template <class A>
struct Block {
  const A* target_probs;   // (B, K + 1, V)
  const A* draft_probs;    // (B, K, V); null where each token was the draft's only choice
  const int64_t* tokens;   // (B, K)
  const int64_t* lengths;  // (B)
  int64_t B, K, V;
};

template <class A>
struct VerifyBlock {
  Block<A> block;
  const double* uniforms;  // (B, K)
  int64_t* accepted;       // (B)
  A* carry;                // (B)
  double* slice_sums;      // (B, K, num_slices) scratch, CUDA only
};

template <class A>
struct DrawResidual {
  Block<A> block;
  const int64_t* accepted;  // (B), unless the block is a row alone
  const A* carry;           // (B), likewise
  const double* uniforms;   // (B)
  int64_t* tokens;          // (B)
  double* slice_masses;     // (2, B, num_slices) scratch, CUDA only
};

// What draw_fallback gives for a token where none can be drawn, and where masses are NaN.
constexpr int64_t kNoToken = -1, kInvalidToken = -2;

template <class A>
struct CountUsable {
  bool *active, *unusable;          // (B)
  const int64_t *lengths, *limits;  // (B)
  const int64_t* eos_token_ids;     // (E)
  const int64_t* chunk;             // (B, K)
  const A* draft_probs;             // (B, K, V) or null
  const int64_t* most;              // (B) or null
  int64_t B, E, K, V;
  int64_t* num_usable;  // (B)
};

// Numbers of a sequence in `done` before its tokens: how many count, and the flags.
constexpr int64_t kDoneFlags = 4;

template <class A>
struct CommitBlock {
  int64_t* tokens;                          // (B, C)
  int64_t *lengths, *last_tokens, *rounds;  // (B)
  bool *active, *unusable, *empty;          // (B)
  const int64_t* limits;                    // (B)
  const int64_t* eos_token_ids;             // (E)
  const int64_t* chunk;                     // (B, L)
  const int64_t* accepted;                  // (B)
  const int64_t* token;                     // (B) or null
  const A* log_totals;                      // (B, L + 1) or null
  int64_t B, C, E, L;
  int64_t* done;  // (B, kDoneFlags + L + 1)
};

// Token (i, p) of R rows of q tokens: feature c lies at data[i * stride_row + p * stride_position +
// c].
template <class Pointer>
struct TokenRows {
  Pointer data;
  int64_t stride_row, stride_position;
};

// Rows that each run an adapter of their own, row i that of groups[i]. Those of another group than
// 1..G - 1 run none.
struct AdapterRows {
  DType dtype;            // of tokens and factors
  const int64_t* groups;  // (R)
  int64_t R, q, G, rank;

  MPG_HOST_DEVICE bool has_adapter(int64_t group) const { return group >= 1 && group < G; }
};

template <class A>
struct LoraShrink {
  AdapterRows rows;
  TokenRows<const void*> x;  // (R, q, in)
  const void* down;          // (G, rank, in)
  int64_t in;
  TokenRows<void*> hidden;  // (R, q, rank)
};

// The outputs [begin, end) that some ranks lead to.
struct RankBlock {
  int64_t num_ranks, begin, end;
};

template <class A>
struct LoraExpand {
  AdapterRows rows;
  TokenRows<const void*> hidden;  // (R, q, rank), or (R, q, G * rank): each row uses its group's
  const void* up;                 // (G, rank, size)
  int64_t size;
  TokenRows<void*> out;  // (R, q, size), added to
  int64_t step;          // in hidden from one group's ranks to the next one's: 0 or rank
  // CPU: one after another, of all ranks; elsewhere `up` is zero, and not read.
  const RankBlock* blocks;
  int64_t num_blocks;
};

// Feature c of position s of a head of row r lies at data[r * stride_row + head * stride_head + s *
// stride_position + c].
struct HeadRows {
  const void* data;
  int64_t stride_row, stride_head, stride_position;
};

// G heads of queries share each of H heads of keys and values.
template <class A>
struct AttendRows {
  DType dtype;
  HeadRows query, key, value;  // (R, H * G, q, D), (R, H, S, D), (R, H, S, E)
  const int64_t* positions;    // (R, q)
  int64_t R, H, G, q, S, D, E;
  A scale;
  void* out;  // (R, q, H * G, E)

  // Keys that a query in this position attends to.
  int64_t length(int64_t position) const {
    return (position < 0 ? 0 : (position < S ? position : S - 1)) + 1;
  }
};

// A linear layer, whose weight lies in panels of kPanel outputs: those of one feature are
// neighbours, and then come those of the next one.
struct LinearPanels {
  const float* x;       // (R, in)
  const float* panels;  // (num_panels, in, kPanel)
  const float* bias;    // (size,) or null
  int64_t R, in, size, num_panels;
  float* out;  // (R, size)
};
constexpr int64_t kPanel = 16;

// Rows over their root mean square, times offset + weight.
template <class A>
struct RmsNorm {
  DType dtype;
  const void *x, *weight;  // (R, size), (size,)
  int64_t R, size;
  A eps, offset;
  bool rounds_first;  // to the dtype, before a row is multiplied
  void* out;          // (R, size)
};

// The two sides of an op. CPU: does the items [begin, end), so that the caller can split them over
// threads. CUDA: launches on `stream`, a cudaStream_t.
#define MPG_OP(op, Args)                                    \
  namespace cpu {                                           \
  template <class A>                                        \
  void op(const Args<A>& args, int64_t begin, int64_t end); \
  }                                                         \
  namespace cuda {                                          \
  void op(const Args<float>& args, void* stream);           \
  }
MPG_OP(gather_logprobs, GatherLogprobs)  // items are rows
MPG_OP(score_prefixes, ScorePrefixes)    // sequences
MPG_OP(accept_prefixes, AcceptPrefixes)  // sequences
MPG_OP(update_bound, UpdateBound)        // sequences
MPG_OP(verify_chunks, VerifyChunks)      // sequences, gathered
MPG_OP(normalize_rows, NormalizeRows)    // rows
MPG_OP(draw_fallback, DrawFallback)      // sequences, normalized
MPG_OP(combine_rows, CombineRows)        // slices, combined
MPG_OP(warp_rows, WarpRows)              // rows
MPG_OP(verify_block, VerifyBlock)        // sequences
MPG_OP(draw_residual, DrawResidual)      // sequences
MPG_OP(count_usable, CountUsable)        // sequences
MPG_OP(commit_block, CommitBlock)        // sequences
MPG_OP(lora_shrink, LoraShrink)          // rows, for each part of the rank
MPG_OP(lora_expand, LoraExpand)          // rows, for each part of the outputs
#undef MPG_OP

namespace cpu {
// In the file that defines the CPU side of an op.
#define MPG_INSTANTIATE(op, Args)                         \
  template void op(const Args<float>&, int64_t, int64_t); \
  template void op(const Args<double>&, int64_t, int64_t)

// Ranks and outputs of a part, see lora.cpp.
constexpr int64_t kRankPart = 4, kOutputPart = 512;

const char* capability();  // the level that this process uses; throws std::invalid_argument
template <class A>
void combine_slices(const CombineRows<A>& args, int64_t begin, int64_t end);  // slices, normalized
void draw_uniforms(const DrawUniforms& args, int64_t begin, int64_t end);     // sequences
template <class A>
void attend_rows(const AttendRows<A>& args, int64_t begin, int64_t end);   // heads; CPU alone
void linear_panels(const LinearPanels& args, int64_t begin, int64_t end);  // panels; CPU alone
template <class A>
void rms_norm(const RmsNorm<A>& args, int64_t begin, int64_t end);  // rows; CPU alone
}  // namespace cpu

namespace cuda {
void draw_uniforms(const DrawUniforms& args, void* stream);
const char* launch_error();  // of all launches since the last call; null without one
}  // namespace cuda

}  // namespace mpg
