#include "phases.h"

#include <algorithm>

namespace {

// Rows of a linear's input that stay in a core's second-level cache while weights stream past: measured on a
// core with 2 MiB, half of it.
constexpr std::size_t kRowBlockBytes = std::size_t{1} << 20;
constexpr int kRowBlockMultiple = 12;  // of the tallest register tile

// Panels of 32 columns: [K / 2][32][2] of two bytes, or [K][32] of four. Either way four bytes of a row stay
// together.
void pack_panel(const std::uint32_t* const* rows, std::size_t num_words, std::uint32_t* to) {
  constexpr std::size_t kStrip = 64;  // four cache lines of each row at a time
  for (std::size_t start = 0; start < num_words; start += kStrip) {
    const std::size_t stop = std::min(start + kStrip, num_words);
    for (int column = 0; column < kPanel; ++column) {
      const std::uint32_t* row = rows[column];
      if (row == nullptr) continue;  // beyond the matrix: the memory is zeroed
      for (std::size_t k = start; k < stop; ++k) to[k * kPanel + column] = row[k];
    }
  }
}

}  // namespace

std::size_t packed_bytes(int dtype, int N, int K) {
  return static_cast<std::size_t>(ceil_div(N, kPanel)) * kPanel * K * (dtype == GE_BFLOAT16 ? 2 : 4);
}

void pack(Workers& workers, int dtype, const Unpacked& matrix, char* to) {
  const std::size_t value_bytes = dtype == GE_BFLOAT16 ? 2 : 4;
  std::vector<const void*> rows;
  for (int s = 0; s < matrix.num_sources; ++s) {
    for (std::int64_t r = 0; r < matrix.num_rows[s]; ++r) {
      rows.push_back(static_cast<const char*>(matrix.sources[s]) + r * matrix.K * value_bytes);
    }
  }
  if (matrix.interleaves) {
    const std::vector<const void*> apart = rows;
    const std::size_t half = apart.size() / 2;
    for (std::size_t i = 0; i < half; ++i) {
      const std::size_t place = i / (kPanel / 2) * kPanel + i % (kPanel / 2);
      rows[place] = apart[i];
      rows[place + kPanel / 2] = apart[half + i];
    }
  }
  const int num_panels = ceil_div(static_cast<int>(rows.size()), kPanel);
  rows.resize(static_cast<std::size_t>(num_panels) * kPanel, nullptr);
  const auto pack_one = [&](int panel) {
    char* target = to + static_cast<std::size_t>(panel) * kPanel * matrix.K * value_bytes;
    const void* const* sources = rows.data() + static_cast<std::size_t>(panel) * kPanel;
    pack_panel(reinterpret_cast<const std::uint32_t* const*>(sources), matrix.K * value_bytes / 4,
               reinterpret_cast<std::uint32_t*>(target));
  };
  const auto body = [&](int) { for_each(workers.team, num_panels, pack_one); };
  workers.team.run([](void* b, int thread) { (*static_cast<decltype(body)*>(b))(thread); },
                   const_cast<void*>(static_cast<const void*>(&body)));
}

std::vector<RowTile> row_tiles(const HeadShape& shape, const std::int32_t* cu_seqlens, int num_streams,
                               const std::int64_t* positions) {
  const int step = attention_rows(shape);
  std::vector<RowTile> tiles;
  for (int stream = 0; stream < num_streams; ++stream) {
    for (int row = cu_seqlens[stream]; row < cu_seqlens[stream + 1]; row += step) {
      tiles.push_back({stream, row, std::min(row + step, cu_seqlens[stream + 1])});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [&](const RowTile& a, const RowTile& b) {
    return positions[a.last_row - 1] * (a.last_row - a.first_row) >
           positions[b.last_row - 1] * (b.last_row - b.first_row);
  });
  return tiles;
}

void run_linear(Workers& workers, const ModelKernels& kernels, const LinearTask& task, int num_rows) {
  const int threads = workers.team.size();
  const std::size_t row_bytes = static_cast<std::size_t>(task.K) * kernels.act_bytes;
  const int most_rows =
      std::max(1, static_cast<int>(kRowBlockBytes / row_bytes) / kRowBlockMultiple) * kRowBlockMultiple;
  const int num_blocks = ceil_div(num_rows, most_rows);
  const int num_panels = ceil_div(task.N, kPanel);
  const int portion = std::max(1, num_panels * std::min(num_blocks, 4) / (4 * threads));
  const int num_portions = ceil_div(num_panels, portion);
  for_each_ahead(workers.team, num_blocks * num_portions, [&](int item, int next) {
    const int block = item / num_portions, first_panel = item % num_portions * portion;
    const int first_row = static_cast<int>(static_cast<std::int64_t>(num_rows) * block / num_blocks);
    const int last_row = static_cast<int>(static_cast<std::int64_t>(num_rows) * (block + 1) / num_blocks);
    kernels.linear(task, first_row, last_row, first_panel, std::min(first_panel + portion, num_panels),
                   next % num_portions * portion);
  });
}

void run_attention(Workers& workers, const ModelKernels& kernels, int kv_dtype, const AttentionTask& task,
                   const std::vector<RowTile>& tiles, const std::int32_t* block_tables, int blocks_per_table,
                   float* scratch) {
  const int num_kv_heads = task.shape.num_kv_heads;
  for_each(workers.team, static_cast<int>(tiles.size()) * num_kv_heads, [&](int item) {
    const RowTile& tile = tiles[item / num_kv_heads];
    const std::int32_t* block_table =
        block_tables + static_cast<std::ptrdiff_t>(tile.stream) * blocks_per_table;
    kernels.attention[kv_dtype](task, block_table, tile.first_row, tile.last_row, item % num_kv_heads,
                                scratch);
  });
}
