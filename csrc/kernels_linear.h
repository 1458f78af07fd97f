// out = x wᵀ on packed weights. Each output is the sum, in ascending order, of the sums of its blocks of k (each in
// ascending order): the number of rows and columns that are computed together changes nothing but the speed.
//
// A panel is its blocks one after another, each a header and then kPanel columns of weights:
//   GE_FULL          blocks of kSumLength k, no header
//   GE_INT8_WEIGHTS  blocks of kGroup k; header: a scale for every column
//   GE_W8A8          one block; header: a scale for every column, and the sum of its weights
#pragma once

#include "kernels_formats.h"
#include "kernels_rows.h"

namespace {

// How far ahead weights are fetched into the first-level cache: best of 1, 2, 4, 8 and 16 KiB for 4 to 48
// rows, on Sapphire Rapids. Where several tiles of rows share a panel, the next one comes into the second
// level meanwhile.
constexpr int kPrefetchBytes = 4096;

// A single sum over thousands of k loses digits: at 3072 it had five times the error of torch's.
constexpr int kSumLength = 256;

template <class F>
struct FullMatrix {
  using Format = F;
  static constexpr int kBlock = kSumLength, kHeader = 0, kRows = F::kStep == 2 ? kPairTileRows : kTileRows;
  static constexpr bool kScalesRows = false;
  // sums += acc, the columns' part of the header at hand
  static void finish(const Vec& acc, const float*, float* sums) { store(sums, add(load(sums), acc)); }
};

template <class F>
struct Int8Matrix {
  using Format = F;
  static constexpr int kBlock = kGroup, kHeader = kPanel * 4, kRows = kTileRows;
  static constexpr bool kScalesRows = false;
  static void finish(const Vec& acc, const float* scales, float* sums) {
    store(sums, fma(acc, load(scales), load(sums)));
  }
};

template <class F>
struct W8A8Matrix {
  using Format = F;
  static constexpr int kBlock = kMaxInner, kHeader = 2 * kPanel * 4, kRows = kTileRows;
  static constexpr bool kScalesRows = true;
  static void finish(const IVec& acc, const float* scales, float* sums) {
    const IVec excess = load_int(reinterpret_cast<const std::int32_t*>(scales + kPanel));
    store(sums, mul(int_to_float(sub(acc, excess)), load(scales)));
  }
};

#if defined(GE_DOT)
using W8A8 = W8A8Matrix<VnniFormat>;
#else
using W8A8 = W8A8Matrix<Int8PairFormat>;
#endif

inline void store_quantized(std::int16_t* to, Vec a) { store(to, to_int(a)); }
inline void store_quantized(std::uint8_t* to, Vec a) {
  store(reinterpret_cast<std::int8_t*>(to), to_int(add(a, set1(128.0f))));
}

template <class Model>
float quantize_row(const void* x, int n, void* out) {
  using X = W8A8::Format::X;
  const auto* row = static_cast<const typename Model::Act*>(x);
  auto* target = static_cast<X*>(out);
  const int padded = (n + kLanes - 1) / kLanes * kLanes;  // x is zero there
  const Magnitude magnitude = magnitude_of(row, padded);
  const Vec inverse = set1(magnitude.inverse);
  for (int i = 0; i < padded; i += kLanes) store_quantized(target + i, nearest(mul(load(row + i), inverse)));
  return magnitude.scale;
}

// The matrices of a model: what multiplies its dtype and its activations.
template <class Model>
struct Matrices;

template <>
struct Matrices<Float32Model> {
  using Full = FullMatrix<Float32Format>;
  using Int8 = Int8Matrix<Int8Format>;
};

template <>
struct Matrices<BFloat16Model> {
#if defined(GE_DOT)
  using Full = FullMatrix<BF16DotFormat>;
  using Int8 = Int8Matrix<Int8DotFormat>;
#else
  using Full = FullMatrix<BF16Format>;
  using Int8 = Int8Matrix<Int8Format>;
#endif
};

template <class Matrix>
std::size_t panel_bytes(int K) {
  const std::size_t num_blocks = (static_cast<std::size_t>(K) + Matrix::kBlock - 1) / Matrix::kBlock;
  return num_blocks * Matrix::kHeader + static_cast<std::size_t>(K) * kPanel * sizeof(typename Matrix::Format::Value);
}

// Fetches the lines of this step some bytes further on, and, `step` bytes further with every step, the panel to
// come. Only the first pass over the columns of a block fetches its lines: later passes find them in the cache.
template <int kLines>
struct PanelAhead {
  const char* later;
  const char* next;
  std::size_t step;

  void operator()(std::size_t offset) {
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i) prefetch(later + offset + 64 * i);
    prefetch_second_level(next);
    next += step;
  }
};

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

template <class Matrix, class Model, int R>
void multiply_rows(const LinearTask& task, int row, int panel, const char* next, std::size_t next_step) {
  using F = typename Matrix::Format;
  constexpr int kWanted = R <= 2 ? kWideTileVecs : kTileVecs;
  constexpr int C = kWanted < F::kColumnVecs ? F::kColumnVecs : kWanted;  // registers of columns in a pass
  constexpr int kColumns = C / F::kColumnVecs, kPasses = kPanel / (kLanes * C);
  constexpr std::size_t kStepBytes = kPanel * F::kStep * sizeof(typename F::Value);
  constexpr int kLines = kStepBytes > 64 ? kStepBytes / 64 : 1;

  alignas(64) float sums[R * kPanel] = {};
  const auto* x = static_cast<const typename F::X*>(task.x) + row * task.ldx;
  const char* block = static_cast<const char*>(task.weight) + panel * panel_bytes<Matrix>(task.K);
  for (int k = 0; k < task.K; k += Matrix::kBlock) {
    const int length = task.K - k < Matrix::kBlock ? task.K - k : Matrix::kBlock;
    const char* weights = block + Matrix::kHeader;
    for (int pass = 0; pass < kPasses; ++pass) {
      typename F::Acc acc[R][C];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = zero_like(&acc[r][c]);
      }
      const char* columns[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) columns[c] = weights + (pass * kColumns + c) * F::kColumnBytes;
      if (pass == 0) {
        PanelAhead<kLines> ahead{weights + kPrefetchBytes, next, next_step};
        multiply<F, R, C>(x + k, task.ldx, columns, kStepBytes, length, ahead, acc);
        next = ahead.next;
      } else {
        NoAhead ahead;
        multiply<F, R, C>(x + k, task.ldx, columns, kStepBytes, length, ahead, acc);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const int column = (pass * C + c) * kLanes;
          Matrix::finish(acc[r][c], reinterpret_cast<const float*>(block) + column, sums + r * kPanel + column);
        }
      }
    }
    block = weights + static_cast<std::size_t>(length) * kPanel * sizeof(typename F::Value);
  }
  for (int r = 0; r < R; ++r) {
    if constexpr (Matrix::kScalesRows) {
      const Vec scale = set1(task.x_scales[row + r]);
      for (int c = 0; c < kPanel; c += kLanes) store(sums + r * kPanel + c, mul(load(sums + r * kPanel + c), scale));
    }
    finish_row<Model>(task, sums + r * kPanel, row + r, panel);
  }
}

// multiply_rows for `count` rows, 1 .. R.
template <class Matrix, class Model, int R>
inline void multiply_count(int count, const LinearTask& task, int row, int panel, const char* next, std::size_t step) {
  if constexpr (R > 1) {
    if (count < R) return multiply_count<Matrix, Model, R - 1>(count, task, row, panel, next, step);
  }
  multiply_rows<Matrix, Model, R>(task, row, panel, next, step);
}

template <class Matrix, class Model>
void linear(const LinearTask& task, int first_row, int last_row, int first_panel, int last_panel,
            int next_panel) {
  const std::size_t num_bytes = panel_bytes<Matrix>(task.K);
  // Tiles as equal as can be: 13 rows are 7 and 6, not 12 and 1.
  const int num_rows = last_row - first_row, num_tiles = (num_rows + Matrix::kRows - 1) / Matrix::kRows;
  const std::size_t share = num_tiles > 1 ? num_bytes / num_tiles : 0;
  const std::size_t steps = static_cast<std::size_t>(task.K) / Matrix::Format::kStep;
  for (int panel = first_panel; panel < last_panel; ++panel) {
    const int later = panel + 1 < last_panel ? panel + 1 : next_panel;
    const char* next = static_cast<const char*>(task.weight) + later * num_bytes;
    int row = first_row;
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int count = (num_rows - (row - first_row)) / (num_tiles - tile);
      multiply_count<Matrix, Model, Matrix::kRows>(count, task, row, panel, next, share / steps);
      row += count;
      next += share;
    }
  }
}

}  // namespace
