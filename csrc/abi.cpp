// What Python mirrors of this library, for it to compare: a library of another version must not be called.

#include <string>

#include "kernels.h"
#include "probe.h"
#include "step.h"

namespace {

std::string describe() {
  std::string facts;
  const auto add = [&facts](const char* name, std::size_t number) {
    facts += (facts.empty() ? "" : " ") + std::string(name) + "=" + std::to_string(number);
  };
  // Bytes of structs.
  add("GeModelConfig", sizeof(GeModelConfig));
  add("GeBatch", sizeof(GeBatch));
  add("GeCache", sizeof(GeCache));
  // Values of enums.
  add("GeDtype", GE_NUM_DTYPES);
  add("GeFormat", GE_NUM_FORMATS);
  add("GeMatrix", GE_NUM_MATRICES);
  add("GePeak", GE_NUM_PEAKS);
  add("GeStatus", GE_OK - GE_NO_THREADS + 1);  // from 0 down
  // Limits.
  add("kKeyGroup", kKeyGroup);
  add("kMaxGroup", kMaxGroup);
  add("kMaxHeadDim", kMaxHeadDim);
  add("kMaxInner", kMaxInner);
  return facts;
}

}  // namespace

GE_API const char* ge_abi(void) {
  static const std::string facts = describe();
  return facts.c_str();
}
