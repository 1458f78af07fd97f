// The kernels for AVX-512 with bf16 and int8 dot products and byte permutes (AMD from Zen 4, Intel from Sapphire
// Rapids).
#include "kernels.h"

#if defined(GE_EMULATE_AVX512)
#include "avx512_on_simde.h"  // of tests/native
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__x86_64__)
// Of g++ 12 about its own headers, which leave registers undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

// From here on the compiler may use the instructions anywhere, so nothing of std:: follows: other files
// would share it.
#if !defined(GE_EMULATE_AVX512)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni,avx512vbmi")
#endif
#define GE_DOT
// In this order: the rest is written in terms of the first.
// clang-format off
#include "vec_avx512.h"
#include "kernels_table.h"
// clang-format on

const Kernels* kernels_avx512bf16() {
  static const Kernels table = {"avx512bf16",
                                {model_kernels<Float32Model>(), model_kernels<BFloat16Model>()}};
  return &table;
}
#else
const Kernels* kernels_avx512bf16() { return nullptr; }
#endif
