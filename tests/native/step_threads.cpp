// Steps of a small random model on several threads, for ThreadSanitizer, which python cannot run under: the same
// bits come out for any number of threads, and every access to shared memory is ordered.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "step.h"

namespace {

constexpr int kLayers = 2, kHidden = 64, kHeads = 4, kKvHeads = 2, kHeadDim = 32, kInner = 96, kGuard = 32;
constexpr int kResponse = 11, kQuery = 12, kVocab = 50, kBlockSize = 4, kTokens = 37, kStreams = 3;

// Numbers that depend on nothing but the seed.
std::vector<float> numbers(std::size_t count, std::uint32_t seed, float scale, float offset = 0) {
  std::vector<float> out(count);
  for (float& value : out) {
    seed = seed * 1664525u + 1013904223u;
    value = (static_cast<float>(seed >> 8) / 16777216.0f - 0.5f) * scale + offset;
  }
  return out;
}

void pack(void* model, int matrix, int layer, int num_sources, int rows, int columns) {
  std::vector<std::vector<float>> parts;
  std::vector<const void*> sources;
  for (int i = 0; i < num_sources; ++i) {
    parts.push_back(numbers(static_cast<std::size_t>(rows) * columns, 7 * matrix + 31 * layer + i, 0.3f));
  }
  for (const auto& part : parts) sources.push_back(part.data());
  const std::vector<std::int64_t> num_rows(num_sources, rows);
  ge_model_pack(model, matrix, layer, sources.data(), num_rows.data(), num_sources);
}

std::vector<float> logits_on(const char* isa, int num_threads) {
  const auto embed = numbers(kVocab * kHidden, 1, 2), final_norm = numbers(kHidden, 2, 0.2f, 1);
  const auto layer_norms = numbers(kLayers * (2 * kHidden + 2 * kHeadDim), 3, 0.2f, 1);
  const auto guard_norms = numbers(2 * kGuard, 4, 0.2f, 1);
  std::vector<float> cos_sin;
  for (int p = 0; p < kTokens; ++p) {
    for (int half = 0; half < 2; ++half) {
      for (int j = 0; j < kHeadDim / 2; ++j) {
        const float angle = static_cast<float>(p) * 0.1f / static_cast<float>(j + 1);
        cos_sin.push_back(half == 0 ? std::cos(angle) : std::sin(angle));
      }
    }
  }
  void* workers = ge_workers_create(isa, num_threads, nullptr);
  GeModelConfig config = {};
  config.num_layers = kLayers;
  config.hidden = kHidden;
  config.num_heads = kHeads;
  config.num_kv_heads = kKvHeads;
  config.head_dim = kHeadDim;
  config.intermediate = kInner;
  config.guard_inner = kGuard;
  config.response_logits = kResponse;
  config.query_logits = kQuery;
  config.dtype = config.kv_dtype = GE_FLOAT32;
  config.block_size = kBlockSize;
  config.eps = 1e-6f;
  config.embed = embed.data();
  config.layer_norms = layer_norms.data();
  config.final_norm = final_norm.data();
  config.guard_norms = guard_norms.data();
  config.cos_sin = cos_sin.data();
  void* model = ge_model_create(workers, &config);
  for (int layer = 0; layer < kLayers; ++layer) {
    pack(model, GE_QKV, layer, 1, (kHeads + 2 * kKvHeads) * kHeadDim, kHidden);
    pack(model, GE_O, layer, 1, kHidden, kHeads * kHeadDim);
    pack(model, GE_GATE_UP, layer, 2, kInner, kHidden);
    pack(model, GE_DOWN, layer, 1, kHidden, kInner);
  }
  pack(model, GE_PRE, 0, 1, 2 * kGuard, kHidden);
  pack(model, GE_RESPONSE, 0, 1, kResponse, kGuard);
  pack(model, GE_QUERY, 0, 1, kQuery, kGuard);

  // Stream s is fed kTokens tokens in several steps, all streams in each step.
  constexpr int kBlocks = (kTokens + kBlockSize - 1) / kBlockSize;
  std::vector<float> cache(static_cast<std::size_t>(kStreams) * kBlocks * kLayers * 2 * kKvHeads * kBlockSize *
                           kHeadDim);
  std::vector<std::int32_t> tables;
  for (int i = 0; i < kStreams * kBlocks; ++i) tables.push_back(i);
  std::vector<float> all;
  const int chunks[] = {20, 1, 1, 15};
  int done = 0;
  for (const int chunk : chunks) {
    std::vector<std::int64_t> ids, positions, slots, label_index;
    std::vector<std::int32_t> bounds = {0};
    for (int s = 0; s < kStreams; ++s) {
      for (int p = done; p < done + chunk; ++p) {
        label_index.push_back(static_cast<std::int64_t>(ids.size()));
        ids.push_back((p * 7 + s * 13) % kVocab);
        positions.push_back(p);
        slots.push_back(static_cast<std::int64_t>(s) * kBlocks * kBlockSize + p);
      }
      bounds.push_back(static_cast<std::int32_t>(ids.size()));
    }
    const auto count = static_cast<std::int32_t>(ids.size());
    std::vector<float> logits(static_cast<std::size_t>(count) * (kResponse + kQuery));
    GeBatch batch = {};
    batch.num_tokens = batch.num_labels = count;
    batch.num_streams = kStreams;
    batch.blocks_per_table = kBlocks;
    batch.input_ids = ids.data();
    batch.positions = batch.label_positions = positions.data();
    batch.cu_seqlens = batch.label_cu_seqlens = bounds.data();
    batch.slot_mapping = slots.data();
    batch.block_tables = tables.data();
    batch.label_index = label_index.data();
    batch.kv_cache = cache.data();
    batch.out = logits.data();
    if (ge_step(model, &batch) != 0) std::puts("a step found no memory");
    all.insert(all.end(), logits.begin(), logits.end());
    done += chunk;
  }
  ge_model_destroy(model);
  ge_workers_destroy(workers);
  return all;
}

}  // namespace

int main() {
  for (const char* isa : {"avx2", "portable"}) {
    if (std::strstr(ge_kernel_isas(), isa) == nullptr) continue;
    const std::vector<float> alone = logits_on(isa, 1);
    for (const float value : alone) {
      if (!std::isfinite(value)) return std::printf("%s: a logit is not finite\n", isa), 1;
    }
    for (int num_threads = 2; num_threads <= 5; ++num_threads) {
      if (logits_on(isa, num_threads) != alone) {
        return std::printf("%s: %d threads have other logits\n", isa, num_threads), 1;
      }
    }
  }
  std::puts("any number of threads has the same logits");
}
