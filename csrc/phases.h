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

inline std::size_t packed_bytes(const ModelKernels& kernels, int format, int N, int K) {
  return ceil_div(N, kPanel) * kernels.panel_bytes[format](K);
}

// A matrix to pack: rows of K values, from one matrix or several (query, key, value). With `interleaves` the
// first of two goes into the first halves of the panels and the second into the second halves (gate, up).
struct Unpacked {
  const void* const* sources;
  const std::int64_t* num_rows;
  int num_sources;
  int K;
  bool interleaves;
};

// `dtype` is that of the sources and the model, `to` has packed_bytes.
void pack(Workers& workers, int dtype, int format, const Unpacked& matrix, char* to);

// A batch's rows as attention takes them.
struct RowTiles {
  std::vector<Segment> segments;
  std::vector<RowTile> tiles;  // longest first: the threads then finish at about the same time
};

// A ragged batch's rows: those of stream b are cu_seqlens[b] .. cu_seqlens[b + 1].
struct RaggedRows {
  const std::int32_t* cu_seqlens;
  const std::int64_t* positions;
  int num_streams;
  const std::int32_t* block_tables;
  int blocks_per_table;
};

RowTiles row_tiles(const HeadShape& shape, const RaggedRows& rows);

// Inside Team::run(), each followed by a barrier.
void run_linear(Workers& workers, const ModelKernels& kernels, int format, const LinearTask& task, int num_rows);
void run_attention(Workers& workers, const ModelKernels& kernels, int kv_dtype, const AttentionTask& task,
                   const RowTiles& tiles, float* scratch);

// body(i) for each i in 0 .. num_rows - 1, in portions.
template <class Body>
void for_rows(Team& team, int num_rows, const Body& body) {
  const int portion = num_rows > 0 ? ceil_div(num_rows, 4 * team.size()) : 1;
  for_each(team, ceil_div(num_rows, portion), [&](int p) {
    const int last = (p + 1) * portion < num_rows ? (p + 1) * portion : num_rows;
    for (int i = p * portion; i < last; ++i) body(i);
  });
}
