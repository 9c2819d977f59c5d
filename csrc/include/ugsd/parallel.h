// How rows and vocabulary blocks are spread over threads. What is computed never depends on it.
#pragma once

#include "ugsd/types.h"

namespace ugsd::detail {

// Under this many columns a thread, starting one costs more than it saves.
constexpr int64_t kColumnsPerThread = 64 * 1024;

static inline int useful_threads(int64_t columns, int threads) {
  const int64_t useful = columns / kColumnsPerThread;
  return useful < 1 ? 1 : threads < useful ? threads : static_cast<int>(useful);
}

// Calls block(j) for every block of one row.
template <class Block>
void for_each_block(int64_t blocks, int threads, const Block& block) {
  if (threads == 1) {
    for (int64_t j = 0; j < blocks; ++j) block(j);
  } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t j = 0; j < blocks; ++j) block(j);
  }
}

// Calls block(row, j, partial) for every block of every row and then finish(row, partials) for every row.
// Many rows are split by row, few by block; a row's partials reach `finish` in column order either way.
template <class Partial, class Block, class Finish>
void for_blocks_of(int64_t rows, int64_t blocks, int threads, const Block& block, const Finish& finish,
                   int64_t block_columns = kBlock) {
  threads = useful_threads(rows * blocks * block_columns, threads);
  const auto partials_of = [&](int64_t r) {
    return static_cast<Partial*>(scratch(0, static_cast<size_t>(r * blocks) * sizeof(Partial)));
  };
  const auto whole_row = [&](int64_t r, Partial* partials) {
    for (int64_t j = 0; j < blocks; ++j) block(r, j, partials[j]);
    finish(r, partials);
  };
  if (threads == 1) {
    Partial* partials = partials_of(1);
    for (int64_t r = 0; r < rows; ++r) whole_row(r, partials);
  } else if (rows >= 4 * threads) {
#pragma omp parallel num_threads(threads)
    {
      Partial* partials = partials_of(1);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r) whole_row(r, partials);
    }
  } else {
    Partial* partials = partials_of(rows);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < rows * blocks; ++i) block(i / blocks, i % blocks, partials[i]);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r) finish(r, partials + r * blocks);
    }
  }
}

}  // namespace ugsd::detail
