#include "batch_norm_formula.h"
#include "batch_norm_relu.h"
#include "vec_loop.h"

namespace tscnc::TSCNC_ISA {
namespace {

// Rows whose sums are kept in the arithmetic type before they join the double ones.
constexpr int64_t kRowTile = 128;

// One number per column of a block; whole vectors of it may be read and written.
template <class T>
struct Row {
  alignas(64) Compute<T> entries[kBatchNormColumns] = {};

  Vec<T> load(int64_t i) const { return TSCNC_ISA::load(entries + i); }
  void store(int64_t i, Vec<T> value) { TSCNC_ISA::store(entries + i, value); }
  void add(int64_t i, Vec<T> value) { store(i, load(i) + value); }
};

template <class T>
struct Columns {
  Row<T> center, scale, offset, slope, level;

  Columns(BatchNormShape shape, BatchNormBlock block, const BatchNormChannel* how) {
    for (int64_t column = block.column_begin; column < block.column_end; ++column) {
      const int64_t j = column - block.column_begin;
      const auto f = formula<Compute<T>>(how[column / shape.length]);
      center.entries[j] = f.center;
      scale.entries[j] = f.scale;
      offset.entries[j] = f.offset;
      slope.entries[j] = f.slope;
      level.entries[j] = f.level;
    }
  }
  Formula<Vec<T>> at(int64_t i) const {
    return {center.load(i), scale.load(i), offset.load(i), slope.load(i), level.load(i)};
  }
};

// Calls visit(start, i, memory) for every vector of rows [begin, end) of a block.
template <class T, class Visit>
void for_rows(BatchNormShape shape, BatchNormBlock block, int64_t begin, int64_t end,
              const Visit& visit) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * shape.columns() + block.column_begin;
    for_vectors<T>(block.column_end - block.column_begin,
                   [&](int64_t i, auto memory) { visit(start + i, i, memory); });
  }
}

template <class Tile>
void for_tiles(BatchNormBlock block, const Tile& tile) {
  for (int64_t begin = block.row_begin; begin < block.row_end; begin += kRowTile) {
    tile(begin, begin + kRowTile < block.row_end ? begin + kRowTile : block.row_end);
  }
}

}  // namespace

template <class T>
void batch_norm_row_statistics(const T* input, BatchNormShape shape, BatchNormBlock block,
                               BatchNormSums* sums) {
  using S = Compute<T>;
  const int64_t width = block.column_end - block.column_begin;
  Row<T> shift;
  for_tiles(block, [&](int64_t begin, int64_t end) {
    const double count = static_cast<double>(end - begin);
    if (begin == block.row_begin) {
      for_rows<T>(shape, block, begin, end, [&](int64_t at, int64_t i, auto memory) {
        shift.add(i, memory.load(input + at));
      });
      for (int64_t j = 0; j < width; ++j) {
        sums[j] = {static_cast<double>(shift.entries[j]) / count, 0};
        shift.entries[j] = static_cast<S>(sums[j].first);
      }
    }
    Row<T> first, second;
    for_rows<T>(shape, block, begin, end, [&](int64_t at, int64_t i, auto memory) {
      const Vec<T> deviation = memory.load(input + at) - shift.load(i);
      first.add(i, deviation);
      second.add(i, deviation * deviation);
    });
    const double before = static_cast<double>(begin - block.row_begin);
    for (int64_t j = 0; j < width; ++j) {
      join(sums[j], before, count, shift.entries[j], first.entries[j], second.entries[j]);
      shift.entries[j] = static_cast<S>(sums[j].first);
    }
  });
}

template <class T>
void batch_norm_row_output(const T* input, T* output, BatchNormShape shape, BatchNormBlock block,
                           const BatchNormChannel* how) {
  const Columns<T> columns(shape, block, how);
  with_flag(how->relu, [&](auto relu) {
    for_rows<T>(
        shape, block, block.row_begin, block.row_end, [&](int64_t at, int64_t i, auto memory) {
          const Vec<T> x = memory.load(input + at);
          memory.store(output + at, columns.at(i).template output<decltype(relu)::value>(x));
        });
  });
}

template <class T>
void batch_norm_row_sums(const T* grad_output, const T* input, BatchNormShape shape,
                         BatchNormBlock block, const BatchNormChannel* how, BatchNormSums* sums) {
  const int64_t width = block.column_end - block.column_begin;
  const Columns<T> columns(shape, block, how);
  for (int64_t j = 0; j < width; ++j) sums[j] = {0, 0};
  for_tiles(block, [&](int64_t begin, int64_t end) {
    Row<T> first, second;
    with_flag(how->relu, [&](auto relu) {
      for_rows<T>(shape, block, begin, end, [&](int64_t at, int64_t i, auto memory) {
        const Formula<Vec<T>> f = columns.at(i);
        const Vec<T> deviation = memory.load(input + at) - f.center;
        const Vec<T> passed =
            f.template through<decltype(relu)::value>(memory.load(grad_output + at), deviation);
        first.add(i, passed);
        second.add(i, passed * deviation);
      });
    });
    for (int64_t j = 0; j < width; ++j) {
      sums[j].first += first.entries[j];
      sums[j].second += second.entries[j];
    }
  });
  for (int64_t j = 0; j < width; ++j) {
    const BatchNormChannel& channel = how[(block.column_begin + j) / shape.length];
    sums[j].second -= rest_of_mean<Compute<T>>(channel) * sums[j].first;
  }
}

template <class T>
void batch_norm_row_gradient(const T* grad_output, const T* input, T* grad_input,
                             BatchNormShape shape, BatchNormBlock block,
                             const BatchNormChannel* how) {
  const Columns<T> columns(shape, block, how);
  with_flag(how->relu, [&](auto relu) {
    for_rows<T>(shape, block, block.row_begin, block.row_end,
                [&](int64_t at, int64_t i, auto memory) {
                  const Formula<Vec<T>> f = columns.at(i);
                  const Vec<T> deviation = memory.load(input + at) - f.center;
                  const Vec<T> g = memory.load(grad_output + at);
                  const Vec<T> passed = f.template through<decltype(relu)::value>(g, deviation);
                  memory.store(grad_input + at, f.input(passed, deviation));
                });
  });
}

#define TSCNC_INSTANTIATE(T)                                                                       \
  template void batch_norm_row_statistics<T>(const T*, BatchNormShape, BatchNormBlock,             \
                                             BatchNormSums*);                                      \
  template void batch_norm_row_output<T>(const T*, T*, BatchNormShape, BatchNormBlock,             \
                                         const BatchNormChannel*);                                 \
  template void batch_norm_row_sums<T>(const T*, const T*, BatchNormShape, BatchNormBlock,         \
                                       const BatchNormChannel*, BatchNormSums*);                   \
  template void batch_norm_row_gradient<T>(const T*, const T*, T*, BatchNormShape, BatchNormBlock, \
                                           const BatchNormChannel*);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
