// The kernels in plain C++, for any CPU.
#include "kernels.h"
// In this order: the rest is written in terms of the first.
// clang-format off
#include "vec_portable.h"
#include "kernels_table.h"
// clang-format on

const Kernels* kernels_portable() {
  static const Kernels table = {"portable", {model_kernels<Float32Model>(), model_kernels<BFloat16Model>()}};
  return &table;
}
