// How the operations of a step are shared out among threads. Always over outputs, never within a sum, so
// results do not depend on the number of threads.
#pragma once

#include <vector>

#include "kernels.h"
#include "team.h"

// What every entry point of the library works with: an instruction set's kernels and the threads to run them.
struct Workers {
  const Kernels* kernels;
  Team team;
};

// Distance between rows of n activations. The extra 32 keep rows of 1024 floats out of each other's cache
// lines' sets: twelve rows at a distance of 4 KiB all fall into one.
inline std::size_t row_stride(int n) { return (static_cast<std::size_t>(n) + 31) / 32 * 32 + 32; }

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

std::size_t packed_bytes(int dtype, int N, int K);

// A matrix to pack: rows of K values, from one matrix or several (query, key, value). With `interleaves` the
// first of two goes into the first halves of the panels and the second into the second halves (gate, up).
struct Unpacked {
  const void* const* sources;
  const std::int64_t* num_rows;
  int num_sources;
  int K;
  bool interleaves;
};

// `to` is zeroed memory of packed_bytes.
void pack(Workers& workers, int dtype, const Unpacked& matrix, char* to);

// The rows of one stream that attention takes in one call.
struct RowTile {
  int stream, first_row, last_row;
};

// Longest first: the threads then finish at about the same time.
std::vector<RowTile> row_tiles(const HeadShape& shape, const std::int32_t* cu_seqlens, int num_streams,
                               const std::int64_t* positions);

// Inside Team::run(), each followed by a barrier.
void run_linear(Workers& workers, const ModelKernels& kernels, const LinearTask& task, int num_rows);
void run_attention(Workers& workers, const ModelKernels& kernels, int kv_dtype, const AttentionTask& task,
                   const std::vector<RowTile>& tiles, const std::int32_t* block_tables, int blocks_per_table,
                   float* scratch);

// body(i) for each i in 0 .. num_rows - 1, in portions.
template <class Body>
void for_rows(Team& team, int num_rows, const Body& body) {
  const int portion = num_rows > 0 ? ceil_div(num_rows, 4 * team.size()) : 1;
  for_each(team, ceil_div(num_rows, portion), [&](int p) {
    const int last = (p + 1) * portion < num_rows ? (p + 1) * portion : num_rows;
    for (int i = p * portion; i < last; ++i) body(i);
  });
}
