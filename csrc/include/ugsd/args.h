// What each op is called with, on any device: tensors as pointers, strides and element types, settings as numbers or as
// one a row.
#pragma once

#include "ugsd/types.h"

namespace ugsd {

struct TokenStatsArgs {
  Rows logits;
  PerRow<float> temperature;
  StatsOut out;
  int threads;
};

struct LogprobRankArgs {
  Rows logits;
  const int64_t* tokens;
  PerRow<float> temperature;
  const float* logsumexp;  // null: computed here
  float* logprob;
  int64_t* rank;
  int threads;
};

struct Filters {
  PerRow<int64_t> top_k;
  PerRow<float> top_p, min_p;
};

// The filters of one row.
struct RowFilter {
  int64_t top_k;  // 0: off
  float top_p;    // >= 1: off
  float min_p;    // 0: off

  UGSD_INLINE RowFilter(const Filters& filters, int64_t r, int64_t columns)
      : top_k(filters.top_k[r]), top_p(filters.top_p[r]), min_p(filters.min_p[r]) {
    if (top_k < 0 || top_k >= columns) top_k = 0;
    if (!(min_p > 0)) min_p = 0;
    if (min_p > 1) min_p = 1;
  }
  UGSD_INLINE bool any() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

struct FilterLogitsArgs {
  Rows logits;
  PerRow<float> temperature;
  Filters filters;
  float* out;  // [rows, columns], contiguous
  int threads;
};

struct SampleArgs {
  Rows logits;
  PerRow<float> temperature;
  Filters filters;
  PerRow<int64_t> seed, offset;
  int64_t* tokens;
  float* logprob;
  StatsOut out;
  int threads;
};

enum class Reduction : int { kMax = 0, kMean = 1, kFirst = 2 };

struct GateBlockArgs {
  const float* entropy;  // [batch, block]
  int64_t batch, block, batch_stride, block_stride;
  const int64_t* lengths;  // null: all of the block
  PerRow<float> threshold;
  Reduction reduce;
  float* uncertainty;
  bool* escalate;
};

enum class Rule : int { kGreedy = 0, kRank = 1, kExact = 2, kBlock = 3, kTypical = 4, kRelaxed = 5 };

struct AcceptBlockArgs {
  Rows target;            // [batch, block + 1, columns]
  Rows draft;             // [batch, block, columns]; data is null where the drafter was certain
  const int64_t* tokens;  // [batch, block]
  int64_t batch, block;
  Rule rule;
  const int64_t* lengths;        // [batch], or null
  PerRow<double> limit, slack;   // (rank, -), (epsilon, delta), (top n, delta)
  const float* draft_logsumexp;  // [batch, block], or null
  bool bonus;
  PerRow<int64_t> seed, offset;
  const double* uniforms;  // [batch, block + 1] in place of the generator's, or null
  int64_t* num_accepted;
  int64_t* next_token;
  float* accept_prob;  // [batch, block]
  int threads;
};

// No two elements share memory, neither in one tensor nor in two of a call.
struct KvTensor {
  char* data;
  int64_t heads;
  int64_t batch_stride, head_stride, slot_stride, row_bytes;  // bytes
};

enum class Align : int { kLeft = 0, kRight = 1 };

struct KvCompactArgs {
  const KvTensor* tensors;
  int64_t tensor_count, batch, slots;
  const bool* keep;  // [batch, slots] with this stride, or null
  int64_t keep_stride;
  const int64_t* lengths;  // [batch]: leading slots that stay, where keep is null
  Align align;
  int64_t* kept;
  int threads;
};

struct LmHeadStatsArgs {
  Rows hidden;  // [rows, width]
  Rows weight;  // [vocabulary, width]
  const void* bias;
  PerRow<float> temperature;
  StatsOut out;
  int threads;
};

}  // namespace ugsd
