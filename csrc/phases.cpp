#include "phases.h"

#include <algorithm>
#include <numeric>

namespace {

// Rows of a linear's input that stay in a core's second-level cache while weights stream past: measured on a
// core with 2 MiB, half of it.
constexpr std::size_t kRowBlockBytes = std::size_t{1} << 20;
constexpr int kRowBlockMultiple = 12;  // of the tallest register tile

// Bytes of weights that a thread takes at a time: few enough that the last ones to finish differ by little.
constexpr std::size_t kPortionBytes = std::size_t{1} << 17;

// Finds streams whose block tables begin alike, so that their common keys are read once.
class SharedPrefixes {
 public:
  SharedPrefixes(const HeadShape& shape, const RaggedRows& rows) : shape_(shape), rows_(rows) {}

  // Streams that have rows, those with equal beginnings next to each other.
  std::vector<int> order() const {
    std::vector<int> streams;
    for (int b = 0; b < rows_.num_streams; ++b) {
      if (num_rows(b) > 0) streams.push_back(b);
    }
    std::stable_sort(streams.begin(), streams.end(), [&](int a, int b) {
      return std::lexicographical_compare(table(a), table(a) + num_blocks(a), table(b), table(b) + num_blocks(b));
    });
    return streams;
  }

  // Keys that all rows of both streams see in the same blocks, in whole tiles.
  int shared_keys(int a, int b) const {
    const int most = std::min(num_blocks(a), num_blocks(b));
    const int same = static_cast<int>(std::mismatch(table(a), table(a) + most, table(b)).first - table(a));
    return std::min({same * shape_.block_size, first_length(a), first_length(b)}) / kKeyTile * kKeyTile;
  }

  const std::int32_t* table(int b) const {
    return rows_.block_tables + static_cast<std::ptrdiff_t>(b) * rows_.blocks_per_table;
  }
  int num_rows(int b) const { return rows_.cu_seqlens[b + 1] - rows_.cu_seqlens[b]; }

 private:
  // Of the keys that the stream's first row sees; and the blocks of those that the last one sees.
  int first_length(int b) const { return static_cast<int>(rows_.positions[rows_.cu_seqlens[b]]) + 1; }
  int num_blocks(int b) const {
    return ceil_div(static_cast<int>(rows_.positions[rows_.cu_seqlens[b + 1] - 1]) + 1, shape_.block_size);
  }

  const HeadShape& shape_;
  const RaggedRows& rows_;
};

}  // namespace

void pack(Workers& workers, int dtype, int format, const Unpacked& matrix, char* to) {
  const ModelKernels& kernels = workers.kernels->model[dtype];
  const std::size_t row_bytes = static_cast<std::size_t>(matrix.K) * (dtype == GE_BFLOAT16 ? 2 : 4);
  std::vector<const void*> rows;
  for (int s = 0; s < matrix.num_sources; ++s) {
    for (std::int64_t r = 0; r < matrix.num_rows[s]; ++r) {
      rows.push_back(static_cast<const char*>(matrix.sources[s]) + r * row_bytes);
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
  const std::size_t panel_bytes = kernels.panel_bytes[format](matrix.K);
  const auto pack_one = [&](int panel) {
    kernels.pack_panel[format](rows.data() + static_cast<std::size_t>(panel) * kPanel, matrix.K,
                               to + panel * panel_bytes);
  };
  const auto body = [&](int) { for_each(workers.team, num_panels, pack_one); };
  workers.team.run([](void* b, int thread) { (*static_cast<decltype(body)*>(b))(thread); },
                   const_cast<void*>(static_cast<const void*>(&body)));
}

RowTiles row_tiles(const HeadShape& shape, const RaggedRows& rows) {
  const int most_rows = attention_rows(shape);
  const SharedPrefixes prefixes(shape, rows);
  const std::vector<int> order = prefixes.order();
  RowTiles out;
  out.segments.reserve(rows.num_streams + rows.cu_seqlens[rows.num_streams] / most_rows + 1);  // tiles point into it
  for (std::size_t i = 0; i < order.size();) {
    const int stream = order[i];
    std::size_t next = i + 1;
    int num_rows = prefixes.num_rows(stream), shared = 0;
    // One more stream joins as long as that saves reading: what is shared once for all, over what was before.
    for (; next < order.size() && num_rows + prefixes.num_rows(order[next]) <= most_rows; ++next) {
      const int count = static_cast<int>(next - i), common = prefixes.shared_keys(stream, order[next]);
      const int least = count == 1 ? common : std::min(shared, common);
      if (static_cast<std::int64_t>(count) * least <= static_cast<std::int64_t>(count - 1) * shared) break;
      shared = least;
      num_rows += prefixes.num_rows(order[next]);
    }
    if (next - i == 1) {
      for (int row = rows.cu_seqlens[stream]; row < rows.cu_seqlens[stream + 1]; row += most_rows) {
        const int last = std::min(row + most_rows, rows.cu_seqlens[stream + 1]);
        out.segments.push_back({prefixes.table(stream), row, last});
        out.tiles.push_back({&out.segments.back(), 1, last - row, 0});
      }
    } else {
      for (std::size_t j = i; j < next; ++j) {
        const int b = order[j];
        out.segments.push_back({prefixes.table(b), rows.cu_seqlens[b], rows.cu_seqlens[b + 1]});
      }
      const int count = static_cast<int>(next - i);
      out.tiles.push_back({&out.segments.back() - (count - 1), count, num_rows, shared});
    }
    i = next;
  }
  const auto work = [&](const RowTile& tile) {
    std::int64_t keys = 0;
    for (int s = 0; s < tile.num_segments; ++s) {
      const Segment& segment = tile.segments[s];
      keys += rows.positions[segment.last_row - 1] * (segment.last_row - segment.first_row);
    }
    return keys;
  };
  std::stable_sort(out.tiles.begin(), out.tiles.end(),
                   [&](const RowTile& a, const RowTile& b) { return work(a) > work(b); });
  return out;
}

void run_linear(Workers& workers, const ModelKernels& kernels, int format, const LinearTask& task, int num_rows) {
  const std::size_t value_bytes = format == GE_W8A8 ? kernels.quantized_bytes : kernels.act_bytes;
  const std::size_t row_bytes = static_cast<std::size_t>(task.K) * value_bytes;
  const int most_rows =
      std::max(1, static_cast<int>(kRowBlockBytes / row_bytes) / kRowBlockMultiple) * kRowBlockMultiple;
  const int num_blocks = ceil_div(num_rows, most_rows);
  const int num_panels = ceil_div(task.N, kPanel);
  const int portion = std::max(1, static_cast<int>(kPortionBytes / kernels.panel_bytes[format](task.K)));
  const int num_portions = ceil_div(num_panels, portion);
  for_each_ahead(workers.team, num_blocks * num_portions, [&](int item, int next) {
    const int block = item / num_portions, first_panel = item % num_portions * portion;
    const int first_row = static_cast<int>(static_cast<std::int64_t>(num_rows) * block / num_blocks);
    const int last_row = static_cast<int>(static_cast<std::int64_t>(num_rows) * (block + 1) / num_blocks);
    kernels.linear[format](task, first_row, last_row, first_panel, std::min(first_panel + portion, num_panels),
                           next % num_portions * portion);
  });
}

void run_attention(Workers& workers, const ModelKernels& kernels, int kv_dtype, const AttentionTask& task,
                   const RowTiles& tiles, float* scratch) {
  const int num_kv_heads = task.shape.num_kv_heads;
  for_each(workers.team, static_cast<int>(tiles.tiles.size()) * num_kv_heads, [&](int item) {
    kernels.attention[kv_dtype](task, tiles.tiles[item / num_kv_heads], item % num_kv_heads, scratch);
  });
}
