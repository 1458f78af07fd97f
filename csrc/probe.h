// What this machine can do at most: memory read bandwidth and arithmetic peaks, for judging kernels against.
//
// A plain C ABI, used through ctypes. The functions start their own threads, keep nothing afterwards and may be
// called from any thread. Results are per second, all threads together.
#pragma once

#include <cstddef>

#define GE_API extern "C" __attribute__((visibility("default")))

enum GeStatus {
  GE_OK = 0,
  GE_BAD_ARGUMENT = -1,
  GE_NO_MEMORY = -2,
  GE_NO_THREADS = -3,
};

enum GePeak {
  GE_PEAK_FP32 = 0,  // fused multiply-add; a multiplication and an addition are two operations
  GE_PEAK_BF16 = 1,  // AVX512-BF16 dot products into fp32
  GE_PEAK_INT8 = 2,  // VNNI dot products u8 x s8 into int32; AVX2: s16 x s16, which int8 are widened to
  GE_NUM_PEAKS = 3,
};

// The instruction sets found that matter here, e.g. "x86-64 avx2 fma avx512f avx512_bf16 avx512_vnni".
// The string lives as long as the library.
GE_API const char* ge_isa(void);

// Bytes per second of reading `num_bytes` once from end to end, each thread its own slice, fastest and median of
// `repeats` passes. For memory, num_bytes must be at least twice the last-level cache: a pass from end to end then
// leaves nothing cached that the next one could use. (Flushing instead takes half a microsecond a line in a VM.)
// Requires: num_threads 1..1024, num_bytes >= 4096 per thread, repeats 1..1000.
GE_API int ge_probe_read(int num_threads, std::size_t num_bytes, int repeats, double* best, double* median);

// Operations per second of `kind` (GePeak) from registers only, the fastest of four rounds of `seconds` / 4 each.
// 0.0 when this CPU lacks the instructions. AMX is not probed.
// Requires: num_threads 1..1024, seconds > 0 and <= 10.
GE_API int ge_probe_peak(int kind, int num_threads, double seconds, double* ops_per_s);
