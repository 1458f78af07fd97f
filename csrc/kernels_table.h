// The table of this file's instruction set. Included last, once, by each kernels_<isa>.cpp.
#pragma once

#include "kernels_attention.h"
#include "kernels_linear.h"
#include "kernels_pack.h"
#include "kernels_rows.h"

namespace {

template <class Model>
constexpr ModelKernels model_kernels() {
  using Full = typename Matrices<Model>::Full;
  using Int8 = typename Matrices<Model>::Int8;
  using Value = typename Model::Value;
  return {sizeof(typename Model::Act),
          sizeof(W8A8::Format::X),
          widen<Model>,
          narrow<Model>,
          rms_norm<Model>,
          silu_mul<Model>,
          quantize_row<Model>,
          {panel_bytes<Full>, panel_bytes<Int8>, panel_bytes<W8A8>},
          {pack_full_panel<Full>, pack_int8_panel<Int8, Value>, pack_int8_panel<W8A8, Value>},
          {linear<Full, Model>, linear<Int8, Model>, linear<W8A8, Model>},
          {store_kv<Model, float>, store_kv<Model, BF16>, store_kv<Model, std::int8_t>},
          {attention<Model, float>, attention<Model, BF16>, attention<Model, std::int8_t>}};
}

}  // namespace
