// The kernels in plain C++, for any CPU.
#include "kernels.h"

#include "vec_portable.h"

#include "kernels_rows.h"

#include "kernels_linear.h"

#include "kernels_attention.h"

#include "kernels_table.h"

const Kernels* kernels_portable() {
  static const Kernels table = {"portable", {model_kernels<Float32Model>(), model_kernels<BFloat16Model>()}};
  return &table;
}
