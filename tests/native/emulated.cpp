// Only in the emulated library: how a caller can tell it from the shipped one.
#include "bf16.h"

// The instruction sets in ge_kernel_isas that are AVX2 code here, separated by spaces.
GE_API const char* ge_emulated_isas(void) { return "avx512bf16 avx512"; }
