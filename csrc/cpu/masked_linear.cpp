#include "masked_linear.h"

#include "panel.h"
#include "vec.h"

namespace tscnc::TSCNC_ISA {
namespace {

// Vectors in a full panel: with two sums each they fill half of the registers, and a panel of 2048
// features (256 KiB with AVX2) stays in a second-level cache.
constexpr int kPanelVecs = 4;
// Results transposed together: several cache lines of a row-major output.
constexpr int64_t kTileRows = 64;

template <class T, int kVecs>
void product_tile(const MaskedProduct<T>& call, int64_t row, int64_t rows, int64_t sample,
                  int64_t count, const Compute<T>* panel, Compute<T>* tile) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kWidth = kVecs * kW;
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t begin = call.structure.pointers[row + r];
    const int32_t end = call.structure.pointers[row + r + 1];
    const C bias = call.bias == nullptr ? C(0) : load_partial(call.bias + row + r, 1)[0];
    Vec<C> sum[kVecs];
    for (int v = 0; v < kVecs; ++v) sum[v] = broadcast(bias);
    add_row_product<C, kVecs>(call.values + begin, call.structure.columns + begin, end - begin,
                              panel, sum);
    for (int v = 0; v < kVecs; ++v) store(tile + r * kWidth + v * kW, sum[v]);
  }
  finish_tile<T, kVecs>(tile, row, rows, sample, count, call.activation, call.preactivation,
                        call.output);
}

}  // namespace

template <class T>
int64_t masked_linear_lanes() {
  return kPanelVecs * kLanes<T>;
}

template <class T>
int64_t masked_linear_scratch(int64_t width) {
  return (width + kTileRows) * kPanelVecs * kLanes<T>;
}

template <class T>
void masked_linear_product(const MaskedProduct<T>& call, int64_t begin, int64_t end,
                           Working<T>* scratch) {
  const int64_t lanes = masked_linear_lanes<T>();
  Compute<T>* tile = scratch;
  Compute<T>* panel = scratch + kTileRows * lanes;
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / call.row_splits * lanes, split = item % call.row_splits;
    const int64_t left = call.input.count - sample, count = left < lanes ? left : lanes;
    const int64_t row_begin = row_split(call.structure, split, call.row_splits);
    const int64_t row_end = row_split(call.structure, split + 1, call.row_splits);
    with_panel_width<T, kPanelVecs>(count, [&](auto width) {
      constexpr int kVecs = decltype(width)::value;
      if (packed != sample) {
        pack<T, kVecs>(call.input, sample, count, 0, call.structure.width, panel);
      }
      for (int64_t row = row_begin; row < row_end; row += kTileRows) {
        const int64_t rows = row_end - row < kTileRows ? row_end - row : kTileRows;
        product_tile<T, kVecs>(call, row, rows, sample, count, panel, tile);
      }
    });
    packed = sample;
  }
}

template <class T>
void masked_linear_weight_gradient(const MaskedWeightGradient<T>& call, int64_t begin, int64_t end,
                                   Working<T>* scratch) {
  using C = Compute<T>;
  const int64_t lanes = masked_linear_lanes<T>();
  const int32_t* pointers = call.structure.pointers;
  const bool products = call.values_gradient != nullptr && pointers[begin] < pointers[end];
  Compute<T>* tile = scratch;
  Compute<T>* panel = scratch + kTileRows * lanes;
  for (int64_t sample = 0; sample < call.input.count; sample += lanes) {
    const int64_t left = call.input.count - sample, count = left < lanes ? left : lanes;
    with_panel_width<T, kPanelVecs>(count, [&](auto width) {
      constexpr int kVecs = decltype(width)::value, kWidth = kVecs * kLanes<T>;
      if (products) pack<T, kVecs>(call.input, sample, count, 0, call.structure.width, panel);
      for (int64_t first = begin; first < end; first += kTileRows) {
        const int64_t last = end - first < kTileRows ? end : first + kTileRows;
        pack<T, kVecs>(call.gradient, sample, count, first, last, tile);
        if (call.bias_gradient != nullptr) {
          add_row_sums<C, kVecs>(tile, last - first, call.bias_gradient + first);
        }
        for (int64_t row = first; products && row < last; ++row) {
          const int32_t start = pointers[row];
          row_inner_products<C, kVecs>(tile + (row - first) * kWidth,
                                       call.structure.columns + start, pointers[row + 1] - start,
                                       panel, call.values_gradient + start);
        }
      }
    });
  }
}

#define TSCNC_INSTANTIATE(T)                                                                       \
  template int64_t masked_linear_lanes<T>();                                                       \
  template int64_t masked_linear_scratch<T>(int64_t);                                              \
  template void masked_linear_product<T>(const MaskedProduct<T>&, int64_t, int64_t, Working<T>*);  \
  template void masked_linear_weight_gradient<T>(const MaskedWeightGradient<T>&, int64_t, int64_t, \
                                                 Working<T>*);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
