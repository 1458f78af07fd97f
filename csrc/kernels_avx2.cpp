// The kernels for AVX2 and FMA.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// From here on the compiler may use the instructions anywhere, so nothing of std:: follows: other files
// would share it.
#pragma GCC target("avx2,fma")
// In this order: the rest is written in terms of the first.
// clang-format off
#include "vec_avx2.h"
#include "kernels_table.h"
// clang-format on

const Kernels* kernels_avx2() {
  static const Kernels table = {"avx2", {model_kernels<Float32Model>(), model_kernels<BFloat16Model>()}};
  return &table;
}
#else
const Kernels* kernels_avx2() { return nullptr; }
#endif
