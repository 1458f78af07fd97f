// The table of this file's instruction set. Included last, once, by each kernels_<isa>.cpp.
#pragma once

#include "kernels_attention.h"
#include "kernels_linear.h"
#include "kernels_rows.h"

namespace {

template <class Model>
constexpr ModelKernels model_kernels() {
  return {sizeof(typename Model::Act),
          widen<Model>,
          narrow<Model>,
          rms_norm<Model>,
          silu_mul<Model>,
          linear<Model>,
          {store_kv<Model, float>, store_kv<Model, BF16>},
          {attention<Model, float>, attention<Model, BF16>}};
}

}  // namespace
