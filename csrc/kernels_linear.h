// out = x wᵀ on packed weights. Each output is the sum, in ascending order, of sums over kSumLength k in
// ascending order: the number of rows and columns that are computed together changes nothing but the speed.
#pragma once

#include "kernels_rows.h"

namespace {

// How far ahead weights are fetched into the first-level cache: best of 1, 2, 4, 8 and 16 KiB for 4 to 48
// rows, on Sapphire Rapids. Where several tiles of rows share a panel, the next one comes into the second
// level meanwhile.
constexpr int kPrefetchBytes = 4096;
constexpr int kPasses = kPanel / (kLanes * kTileVecs);

// A single sum over thousands of k loses digits: at 3072 it had five times the error of torch's.
constexpr int kSumLength = 256;

// What to fetch for later, `step` bytes further with every k (or pair of k).
struct Ahead {
  const char* next;
  std::size_t step;
};

inline void add_to(float* sums, Vec a) { store(sums, add(load(sums), a)); }

inline void fetch_ahead(const void* weights, Ahead& ahead) {
  const char* later = static_cast<const char*>(weights) + kPrefetchBytes;
  prefetch(later);
  if (kTileVecs * kLanes == kPanel) prefetch(later + 64);
  prefetch_second_level(ahead.next);
  ahead.next += ahead.step;
}

// sums [R][32] += x [R] · panel, columns of one pass.
template <int R>
inline void multiply(const float* x, std::size_t ldx, const BF16* panel, int K, Ahead ahead, float* sums) {
  Vec acc[R][kTileVecs];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kTileVecs; ++c) acc[r][c] = zero();
  }
  for (int k = 0; k < K; k += 2) {
    Vec even[kTileVecs], odd[kTileVecs];
    fetch_ahead(panel, ahead);
#pragma GCC unroll 2
    for (int c = 0; c < kTileVecs; ++c) load_pairs(panel + 2 * kLanes * c, even[c], odd[c]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec a = set1(x[r * ldx + k]), b = set1(x[r * ldx + k + 1]);
#pragma GCC unroll 2
      for (int c = 0; c < kTileVecs; ++c) acc[r][c] = fma(b, odd[c], fma(a, even[c], acc[r][c]));
    }
    panel += 2 * kPanel;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kTileVecs; ++c) add_to(sums + r * kPanel + kLanes * c, acc[r][c]);
  }
}

template <int R>
inline void multiply(const float* x, std::size_t ldx, const float* panel, int K, Ahead ahead, float* sums) {
  Vec acc[R][kTileVecs];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kTileVecs; ++c) acc[r][c] = zero();
  }
  for (int k = 0; k < K; ++k) {
    Vec w[kTileVecs];
    fetch_ahead(panel, ahead);
#pragma GCC unroll 2
    for (int c = 0; c < kTileVecs; ++c) w[c] = load(panel + kLanes * c);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec a = set1(x[r * ldx + k]);
#pragma GCC unroll 2
      for (int c = 0; c < kTileVecs; ++c) acc[r][c] = fma(a, w[c], acc[r][c]);
    }
    panel += kPanel;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kTileVecs; ++c) add_to(sums + r * kPanel + kLanes * c, acc[r][c]);
  }
}

#if defined(GE_BF16_DOT)
// Pairs of products into fp32 in one instruction.
template <int R>
inline void multiply(const BF16* x, std::size_t ldx, const BF16* panel, int K, Ahead ahead, float* sums) {
  Vec acc[R][kTileVecs];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kTileVecs; ++c) acc[r][c] = zero();
  }
  for (int k = 0; k < K; k += 2) {
    __m512i w[kTileVecs];
    fetch_ahead(panel, ahead);
#pragma GCC unroll 2
    for (int c = 0; c < kTileVecs; ++c) w[c] = _mm512_loadu_si512(panel + 2 * kLanes * c);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int pair;
      __builtin_memcpy(&pair, x + r * ldx + k, sizeof pair);
      const __m512i a = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
      // C-style casts: __m512bh is a vector of short in older compilers and of __bf16 in newer ones.
      for (int c = 0; c < kTileVecs; ++c)
        acc[r][c] = _mm512_dpbf16_ps(acc[r][c], (__m512bh)w[c], (__m512bh)a);
    }
    panel += 2 * kPanel;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kTileVecs; ++c) add_to(sums + r * kPanel + kLanes * c, acc[r][c]);
  }
}
#endif

template <class Model>
void finish_row(const LinearTask& task, const float* sums, int row, int panel) {
  using Act = typename Model::Act;
  Act* out = static_cast<Act*>(task.out) + row * task.ldo;
  switch (task.epilogue) {
    case kStore:
      for (int c = 0; c < kPanel; c += kLanes) put<Model::kRounds>(out + panel * kPanel + c, load(sums + c));
      return;
    case kStoreFloat: {
      float* target = static_cast<float*>(task.out) + row * task.ldo + panel * kPanel;
      const int count = task.N - panel * kPanel < kPanel ? task.N - panel * kPanel : kPanel;
      for (int c = 0; c < count; ++c) target[c] = sums[c];
      return;
    }
    case kAddResidual:
      for (int c = 0; c < kPanel; c += kLanes) {
        Act* place = out + panel * kPanel + c;
        put<Model::kRounds>(place, add(rounded<Model::kRounds>(load(sums + c)), load(place)));
      }
      return;
    case kSiluMul:
      for (int c = 0; c < kPanel / 2; c += kLanes) {
        const Vec gate = rounded<Model::kRounds>(load(sums + c)),
                  up = rounded<Model::kRounds>(load(sums + kPanel / 2 + c));
        put<Model::kRounds>(out + panel * (kPanel / 2) + c, mul(silu(gate), up));
      }
      return;
  }
}

template <class Model, int R>
void multiply_rows(const LinearTask& task, int row, int panel, Ahead ahead) {
  using Weight = typename Model::Weight;
  constexpr int kPairs = sizeof(Weight) == 2 ? 2 : 1;  // values of one column that lie together
  alignas(64) float sums[R * kPanel] = {};
  const auto* x = static_cast<const typename Model::Act*>(task.x) + row * task.ldx;
  const Weight* weight =
      static_cast<const Weight*>(task.weight) + static_cast<std::size_t>(panel) * kPanel * task.K;
  for (int k = 0; k < task.K; k += kSumLength) {
    const int length = task.K - k < kSumLength ? task.K - k : kSumLength;
    for (int pass = 0; pass < kPasses; ++pass) {
      const int column = pass * kLanes * kTileVecs;
      multiply<R>(x + k, task.ldx, weight + kPairs * column, length, ahead, sums + column);
    }
    weight += static_cast<std::size_t>(kSumLength) * kPanel;
    ahead.next += kSumLength / kPairs * ahead.step;
  }
  for (int r = 0; r < R; ++r) finish_row<Model>(task, sums + r * kPanel, row + r, panel);
}

template <class Model>
void linear(const LinearTask& task, int first_row, int last_row, int first_panel, int last_panel,
            int next_panel) {
  using Multiply = void (*)(const LinearTask&, int, int, Ahead);
  static constexpr Multiply kByRows[] = {
      nullptr,
      multiply_rows<Model, 1>,
      multiply_rows<Model, 2>,
#if GE_TILE_ROWS > 2
      multiply_rows<Model, 3>,
      multiply_rows<Model, 4>,
      multiply_rows<Model, 5>,
#endif
#if GE_TILE_ROWS > 5
      multiply_rows<Model, 6>,
      multiply_rows<Model, 7>,
      multiply_rows<Model, 8>,
      multiply_rows<Model, 9>,
      multiply_rows<Model, 10>,
      multiply_rows<Model, 11>,
      multiply_rows<Model, 12>,
#endif
  };
  static_assert(sizeof kByRows / sizeof kByRows[0] == kTileRows + 1, "one for every number of rows");
  const std::size_t panel_bytes = sizeof(typename Model::Weight) * kPanel * static_cast<std::size_t>(task.K);
  // Tiles as equal as can be: 13 rows are 7 and 6, not 12 and 1.
  const int num_rows = last_row - first_row, num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  const std::size_t share = num_tiles > 1 ? panel_bytes / num_tiles : 0;
  const std::size_t steps = static_cast<std::size_t>(task.K) / (sizeof(typename Model::Weight) == 2 ? 2 : 1);
  for (int panel = first_panel; panel < last_panel; ++panel) {
    const int next = panel + 1 < last_panel ? panel + 1 : next_panel;
    Ahead ahead{static_cast<const char*>(task.weight) + next * panel_bytes, share / steps};
    int row = first_row;
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int count = (num_rows - (row - first_row)) / (num_tiles - tile);
      kByRows[count](task, row, panel, ahead);
      row += count;
      ahead.next += share;
    }
  }
}

}  // namespace
