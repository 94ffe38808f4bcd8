// The bookkeeping of a round, see round.h.
#include "../round.h"

namespace mpg::cpu {
namespace {

int64_t of_one_lane(int64_t x) { return x; }

}  // namespace

template <class A>
void count_usable(const CountUsable<A>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) count_usable_tokens(args, b, 0, 1, of_one_lane);
}

template <class A>
void commit_block(const CommitBlock<A>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) commit_sequence(args, b, 0, 1, of_one_lane);
}

MPG_INSTANTIATE(count_usable, CountUsable);
MPG_INSTANTIATE(commit_block, CommitBlock);

}  // namespace mpg::cpu
