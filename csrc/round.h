// The bookkeeping of a round of one sequence: what of a drafted chunk could be committed; and at
// its end what is, whether the sequence failed, whether its text is over.
//
// By `lanes` threads of which the caller is number `lane`; `min_of_lanes` gives all of them the
// least of what they hold.
#pragma once

#include "numerics.h"

namespace mpg {

template <class Args>
MPG_HOST_DEVICE bool ends_text(const Args& args, int64_t token) {
  for (int64_t e = 0; e < args.E; ++e) {
    if (token == args.eos_token_ids[e]) return true;
  }
  return false;
}

// The tokens of a chunk's first `count` up to one that ends the text; `count` + 1 without one.
template <class Args, class Min>
MPG_HOST_DEVICE int64_t first_end(const Args& args, const int64_t* chunk, int64_t count, int lane,
                                  int lanes, Min min_of_lanes) {
  int64_t end = count + 1;
  for (int64_t k = lane; k < count && end > count; k += lanes) {
    if (ends_text(args, chunk[k])) end = k + 1;
  }
  return min_of_lanes(end);
}

template <class A, class Min>
MPG_HOST_DEVICE void count_usable_tokens(const CountUsable<A>& args, int64_t b, int lane, int lanes,
                                         Min min_of_lanes) {
  const int64_t* chunk = args.chunk + b * args.K;
  int64_t usable = args.active[b] ? args.limits[b] - args.lengths[b] : 0;
  usable = usable < args.K ? usable : args.K;
  if (args.most != nullptr && args.most[b] < usable) usable = args.most[b];
  if (usable < 0) usable = 0;
  const int64_t end = first_end(args, chunk, usable, lane, lanes, min_of_lanes);
  if (end < usable) usable = end;

  int64_t first_undrawn = usable;
  for (int64_t k = lane; k < usable && args.draft_probs != nullptr; k += lanes) {
    const A* probs = args.draft_probs + (b * args.K + k) * args.V;
    const bool is_drawn = chunk[k] >= 0 && chunk[k] < args.V && probs[chunk[k]] > 0;
    if (!is_drawn && k < first_undrawn) first_undrawn = k;
  }
  const bool fails = min_of_lanes(first_undrawn) < usable;
  if (lane != 0) return;
  args.num_usable[b] = fails ? 0 : usable;
  if (!fails) return;
  args.active[b] = false;
  args.unusable[b] = true;
}

template <class A, class Min>
MPG_HOST_DEVICE void commit_sequence(const CommitBlock<A>& args, int64_t b, int lane, int lanes,
                                     Min min_of_lanes) {
  const int64_t L = args.L;
  const int64_t* chunk = args.chunk + b * L;
  const int64_t length = args.lengths[b], limit = args.limits[b], accepted = args.accepted[b];
  const int64_t token = args.token == nullptr ? 0 : args.token[b];
  const bool was_active = args.active[b];

  // What is kept of the chunk, and whether the text goes on behind it.
  const int64_t end = limit < args.C ? limit : args.C;
  const int64_t room = length >= 0 && length < end ? end - length : 0;
  int64_t kept = accepted < L ? accepted : L;
  kept = kept < 0 ? 0 : (kept < room ? kept : room);
  // behind this nothing is read any more that another lane writes
  const int64_t stop = first_end(args, chunk, kept, lane, lanes, min_of_lanes);
  const bool goes_on = args.token != nullptr && stop > kept && kept < room;
  if (stop < kept) kept = stop;

  const A total = goes_on && args.log_totals != nullptr ? args.log_totals[b * (L + 1) + kept] : 0;
  const bool is_unusable =
      was_active && (accepted < 0 || (goes_on && (token == kInvalidToken || is_nan(total))));
  const bool is_empty = was_active && !is_unusable && goes_on &&
                        (total == -A(INFINITY) || (token == kNoToken && kept == 0));
  const bool commits = was_active && !is_unusable && !is_empty;
  const bool follows = commits && goes_on && token >= 0;
  const int64_t count = commits ? kept + follows : 0;

  int64_t* done = args.done + b * (kDoneFlags + L + 1);
  for (int64_t k = lane; k <= L; k += lanes) {
    int64_t value = k < L ? chunk[k] : (token < 0 ? 0 : token);
    if (follows && k == kept) value = token;
    done[kDoneFlags + k] = value;
    if (k < count) args.tokens[b * args.C + length + k] = value;
  }
  if (lane != 0) return;
  bool has_ended = length + count >= limit;
  if (count > 0) {
    const int64_t last = follows ? token : chunk[kept - 1];
    has_ended = has_ended || ends_text(args, last);
    args.last_tokens[b] = last;
    args.lengths[b] = length + count;
  }
  if (commits) args.rounds[b] += 1;
  if (was_active) args.active[b] = commits && !has_ended;
  if (is_unusable) args.unusable[b] = true;
  if (is_empty) args.empty[b] = true;
  done[0] = count;
  done[1] = args.active[b];
  done[2] = args.unusable[b];
  done[3] = args.empty[b];
}

}  // namespace mpg
