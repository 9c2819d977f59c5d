// kv_compact: the kept cache slots of every sequence move together, in all layers' keys and values, in place.
//
// Bytes moved: each slot that changes place is read once and written once; nothing else is touched. A dropped slot that
// a kept one replaces is read as well where stores go through the caches, which take lines whole.
#pragma once

#include "ugsd/args.h"

namespace ugsd {

// A slot that moves, and the slot to fetch along with it: a dropped one that will be written over, or itself.
struct KvStep {
  int64_t source, fetched;
};

// Step i writes slot `target + i * direction`. Slots move against the direction in which the steps walk, so that none
// is written over before it has been read.
struct KvMoves {
  const KvStep* steps;
  int64_t count, target, direction;
  bool stream;  // past the caches, where rows lie on whole lines
};

// Carries out the moves of sequence b in every head of the tensors [tensors, end), whose rows have the same length.
using MoveSlots = void(const KvTensor* tensors, const KvTensor* end, int64_t b, const KvMoves& moves);

void kv_compact(const KvCompactArgs& args, MoveSlots* move_slots);

}  // namespace ugsd
