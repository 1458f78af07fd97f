// Packing a panel of weights from kPanel rows of stored values; null rows are zeros. Runs once, at load.
#pragma once

#include "kernels_linear.h"

namespace {

// Word c of a square of 8 / kUnit words in units of kUnit bytes is column c; afterwards word i has unit i of every
// column. Halves of the square change places across its diagonal, then halves of its quarters.
template <int kUnit>
inline void transpose(std::uint64_t (&words)[8 / kUnit]) {
  constexpr int kCount = 8 / kUnit;
#pragma GCC unroll 3
  for (int half = kCount / 2; half > 0; half /= 2) {
    const int bits = 8 * kUnit * half;
    const std::uint64_t low_halves = ~std::uint64_t{0} / ((std::uint64_t{1} << bits) + 1);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      if (i & half) continue;
      const std::uint64_t change = (words[i] >> bits ^ words[i + half]) & low_halves;
      words[i] ^= change << bits;
      words[i + half] ^= change;
    }
  }
}

// The next `length` values of all columns (a multiple of kStep) into their places in a matrix. A step of a column is
// one unit, and 8 bytes of them belong to neighbouring columns in every format.
template <class Format, class Value, int kLength>
void interleave(const Value (&strip)[kPanel][kLength], int length, char* to) {
  constexpr int kUnit = Format::kStep * sizeof(Value), kCount = 8 / kUnit;
  const int num_units = length / Format::kStep;
  for (int unit = 0; unit < num_units; unit += kCount) {
    const int count = num_units - unit < kCount ? num_units - unit : kCount;
    for (int column = 0; column < kPanel; column += kCount) {
      std::uint64_t words[kCount];
#pragma GCC unroll 8
      for (int c = 0; c < kCount; ++c) __builtin_memcpy(&words[c], strip[column + c] + unit * Format::kStep, 8);
      transpose<kUnit>(words);
      char* target = to + Format::place(unit * Format::kStep, column, kPanel) * sizeof(Value);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        if (i < count) __builtin_memcpy(target + i * kUnit * kPanel, &words[i], 8);
      }
    }
  }
}

template <class Value>
inline void prefetch_strip(const Value* values, int count) {
#pragma GCC unroll 8
  for (int i = 0; i < count; i += 64 / sizeof(Value)) prefetch(values + i);
}

template <class Matrix>
void pack_full_panel(const void* const* rows, int K, char* to) {
  using Value = typename Matrix::Format::Value;
  constexpr int kLength = 256 / sizeof(Value);  // four cache lines of each row at a time
  alignas(64) Value strip[kPanel][kLength] = {};
  for (int start = 0; start < K; start += kLength) {
    const int length = K - start < kLength ? K - start : kLength;
    for (int column = 0; column < kPanel; ++column) {
      if (rows[column] == nullptr) continue;
      const Value* values = static_cast<const Value*>(rows[column]) + start;
      prefetch_strip(values + kLength, kLength);
      __builtin_memcpy(strip[column], values, length * sizeof(Value));
    }
    interleave<typename Matrix::Format>(strip, length, to + static_cast<std::size_t>(start) * kPanel * sizeof(Value));
  }
}

template <class Matrix, class Value>
void pack_int8_panel(const void* const* rows, int K, char* to) {
  using F = typename Matrix::Format;
  static_assert(Matrix::kBlock % kGroup == 0, "a block is whole strips");
  alignas(64) std::int8_t strip[kPanel][kGroup] = {};
  Magnitude magnitudes[kPanel] = {};
  std::int32_t sums[kPanel] = {};
  for (int block = 0; block < K; block += Matrix::kBlock) {
    const int end = K - block < Matrix::kBlock ? K : block + Matrix::kBlock;
    char* header = to;
    to += Matrix::kHeader;
    for (int column = 0; column < kPanel; ++column) {
      if (rows[column] == nullptr) continue;
      magnitudes[column] = magnitude_of(static_cast<const Value*>(rows[column]) + block, end - block);
    }
    for (int start = block; start < end; start += kGroup) {
      const int length = end - start < kGroup ? end - start : kGroup;
      for (int column = 0; column < kPanel; ++column) {
        if (rows[column] == nullptr) continue;
        const Value* values = static_cast<const Value*>(rows[column]) + start;
        std::int8_t* rounded = strip[column];
        prefetch_strip(values + kGroup, kGroup);
        round_to_int8(values, length, magnitudes[column].inverse, rounded);
        if constexpr (Matrix::kScalesRows) {
          for (int k = 0; k < length; ++k) sums[column] += rounded[k];
        } else {
          for (int k = 0; k < length; ++k) rounded[k] = F::encode(rounded[k]);
        }
      }
      interleave<F>(strip, length, to);
      to += static_cast<std::size_t>(length) * kPanel;
    }
    auto* scales = reinterpret_cast<float*>(header);
    for (int column = 0; column < kPanel; ++column) scales[column] = magnitudes[column].scale;
    if constexpr (Matrix::kScalesRows) {
      auto* excess = reinterpret_cast<std::int32_t*>(scales + kPanel);
      for (int column = 0; column < kPanel; ++column) excess[column] = sums[column] * F::kZero;
    }
  }
}

}  // namespace
