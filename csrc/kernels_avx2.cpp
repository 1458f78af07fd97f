// The kernels for AVX2 and FMA.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// From here on the compiler may use the instructions anywhere, so nothing of std:: that other files share follows.
#pragma GCC target("avx2,fma")
#include "vec_avx2.h"

#include "kernels_rows.h"

#include "kernels_linear.h"

#include "kernels_attention.h"

#include "kernels_table.h"

const Kernels* kernels_avx2() {
  static const Kernels table = {"avx2", {model_kernels<Float32Model>(), model_kernels<BFloat16Model>()}};
  return &table;
}
#else
const Kernels* kernels_avx2() { return nullptr; }
#endif
