// Packing a panel of weights from kPanel rows of stored values; null rows are zeros. Runs once, at load.
#pragma once

#include "kernels_linear.h"

namespace {

// Words of four bytes: a float, or two neighbouring bf16, stay together.
template <class Matrix>
void pack_full_panel(const void* const* rows, int K, char* to) {
  constexpr int kStrip = 64;  // four cache lines of each row at a time
  const int num_words = K * static_cast<int>(sizeof(typename Matrix::Format::Value)) / 4;
  auto* target = reinterpret_cast<std::uint32_t*>(to);
  for (int start = 0; start < num_words; start += kStrip) {
    const int stop = start + kStrip < num_words ? start + kStrip : num_words;
    for (int column = 0; column < kPanel; ++column) {
      const auto* row = static_cast<const std::uint32_t*>(rows[column]);
      for (int k = start; k < stop; ++k) target[k * kPanel + column] = row == nullptr ? 0 : row[k];
    }
  }
}

template <class Matrix, class Value>
void pack_int8_panel(const void* const* rows, int K, char* to) {
  using F = typename Matrix::Format;
  std::int8_t rounded[Matrix::kBlock];
  for (int start = 0; start < K; start += Matrix::kBlock) {
    const int length = K - start < Matrix::kBlock ? K - start : Matrix::kBlock;
    auto* scales = reinterpret_cast<float*>(to);
    auto* weights = reinterpret_cast<std::int8_t*>(to + Matrix::kHeader);
    for (int column = 0; column < kPanel; ++column) {
      if (rows[column] == nullptr) {
        scales[column] = 0;
        for (int k = 0; k < length; ++k) weights[F::place(k, column, kPanel)] = 0;
        continue;
      }
      scales[column] = quantize(static_cast<const Value*>(rows[column]) + start, length, rounded);
      if constexpr (Matrix::kScalesRows) {
        std::int32_t sum = 0;
        for (int k = 0; k < length; ++k) {
          weights[F::place(k, column, kPanel)] = rounded[k];
          sum += rounded[k];
        }
        reinterpret_cast<std::int32_t*>(scales + kPanel)[column] = sum * F::kZero;
      } else {
        for (int k = 0; k < length; ++k) weights[F::place(k, column, kPanel)] = F::encode(rounded[k]);
      }
    }
    to += Matrix::kHeader + static_cast<std::size_t>(length) * kPanel;
  }
}

}  // namespace
