// y := A x and z := A'y for a few vectors in one read of the stored matrix, the only thing that a
// warm start has to pay for. Half types and fp32 are multiplied in fp32 lanes, fp64 in fp64; what
// is summed over many rows is fp64.
//
// Storage of the tall orientation is read row by row: a row gives its products with x and is then
// added to z. Wide storage is read in panels of columns that stay in a cache between their two
// uses. Under a pattern of few entries both walk the compressed rows.
#pragma once

#include "tall_matrix.h"

namespace tscnc::TSCNC_ISA {

// Rows whose products are summed in the lanes' own type.
constexpr int64_t kLaneRows = 256;
// Panels of wide storage. Read where they lie, long runs of a row matter more than that the second
// use finds all of it in the second-level cache; copied ones have to stay there.
constexpr int64_t kPanelBytes = 2 << 20, kStagedBytes = 384 << 10;
constexpr int64_t kLeastPanel = 32, kMostPanel = 2048;

// Lane vectors are read whole: length with zeros behind the last element.
inline int64_t lane_length(int64_t n) { return (n + 15) / 16 * 16; }

inline int64_t panel_width(int64_t bytes, int64_t n, int64_t element) {
  const int64_t fitting = bytes / (n * element) / 16 * 16;
  return fitting < kLeastPanel ? kLeastPanel : fitting > kMostPanel ? kMostPanel : fitting;
}

// sums[r][v] := row r of w times vector v of x.
template <class L, int R, int V>
inline void dot_rows(const L* w, int64_t w_stride, const L* x, int64_t x_stride, int64_t count,
                     L sums[R][V]) {
  Vec<L> inner[R][V] = {};
  for (int64_t j = 0; j < count; j += kLanes<L>) {
    Vec<L> row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = load(w + r * w_stride + j);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<L> element = load(x + v * x_stride + j);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) inner[r][v] += row[r] * element;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = sum_lanes<L>(inner[r][v]);
  }
}

// z_v += sum over r of scale[r][v] times row r of w.
template <class L, int R, int V>
inline void add_rows(const L* w, int64_t w_stride, const L scale[R][V], int64_t count, L* z,
                     int64_t z_stride) {
  Vec<L> factor[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) factor[r][v] = broadcast(scale[r][v]);
  }
  for (int64_t j = 0; j < count; j += kLanes<L>) {
    Vec<L> row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = load(w + r * w_stride + j);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec<L> sum = load(z + v * z_stride + j);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum += factor[r][v] * row[r];
      store(z + v * z_stride + j, sum);
    }
  }
}

// The kept entries of the stored matrix, row by row.
template <class L>
struct KeptEntry {
  int32_t column;
  L value;
};

// T: storage type, L its lane type.
template <class T, int V>
class FusedPass {
 public:
  using L = Compute<T>;
  static constexpr int kRows = 8 / V;

  // Lane elements of scratch.
  static int64_t scratch_size(const SpectralMatrix& a) {
    const bool wide = a.rows < a.cols;
    const int64_t n = wide ? a.rows : a.cols;
    const int64_t staged =
        wide ? n * (panel_width(kStagedBytes, n, sizeof(L)) + 16) : kRows * lane_length(a.cols);
    return staged + V * lane_length(n) + V * lane_length(a.cols);
  }

  // entries: as kept_entries() fills them, or null for dense storage.
  FusedPass(const SpectralMatrix& a, const KeptEntry<L>* entries, L* scratch)
      : a_(a), entries_(entries), wide_(a.rows < a.cols), n_(wide_ ? a.rows : a.cols) {
    partial_ = scratch;
    spread_ = partial_ + V * lane_length(n_);
    staged_ = spread_ + V * lane_length(a.cols);
    direct_ = std::is_same_v<T, L> && a.mask == nullptr && a.cols % kLanes<L> == 0;
  }

  // x: V rows of stride lane_length(n), zero behind n. y: V rows of stride y_stride =
  // lane_length(m). z: V rows of stride z_stride.
  void run(const L* x, L* y, int64_t y_stride, double* z, int64_t z_stride) const {
    for (int v = 0; v < V; ++v) {
      for (int64_t j = 0; j < z_stride; ++j) z[v * z_stride + j] = 0;
    }
    if (entries_ != nullptr)
      return wide_ ? sparse_wide(x, y, y_stride, z, z_stride)
                   : sparse_tall(x, y, y_stride, z, z_stride);
    wide_ ? dense_wide(x, y, y_stride, z, z_stride) : dense_tall(x, y, y_stride, z, z_stride);
  }

 private:
  const T* row(int64_t i) const { return static_cast<const T*>(a_.data) + i * a_.cols; }

  // Columns [first, first + count) of one row as lanes, masked, zero up to a whole vector.
  void stage(int64_t i, int64_t first, int64_t count, L* target) const {
    const T* source = row(i) + first;
    int64_t j = 0;
    for (; j + kLanes<T> <= count; j += kLanes<T>) store(target + j, load(source + j));
    if (j < count) store(target + j, load_partial(source + j, count - j));
    if (a_.mask == nullptr) return;
    const bool* mask = a_.mask + i * a_.cols + first;
    for (j = 0; j < count; ++j) target[j] = mask[j] ? target[j] : 0;
  }

  void add_partial(double* z, int64_t z_stride) const {
    const int64_t ld = lane_length(n_);
    for (int v = 0; v < V; ++v) {
      for (int64_t j = 0; j < n_; ++j) z[v * z_stride + j] += partial_[v * ld + j];
    }
  }

  template <int R>
  void tall_rows(int64_t first, const L* x, L* y, int64_t y_stride) const {
    const int64_t ld = lane_length(n_);
    const L* w = staged_;
    int64_t stride = ld;
    if constexpr (std::is_same_v<T, L>) {
      if (direct_) w = row(first), stride = a_.cols;
    }
    if (!direct_) {
      for (int r = 0; r < R; ++r) stage(first + r, 0, n_, staged_ + r * ld);
    }
    const int64_t count = direct_ ? n_ : (n_ + kLanes<L> - 1) / kLanes<L> * kLanes<L>;
    L sums[R][V];
    dot_rows<L, R, V>(w, stride, x, ld, count, sums);
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) y[v * y_stride + first + r] = sums[r][v];
    }
    add_rows<L, R, V>(w, stride, sums, count, partial_, ld);
  }

  void dense_tall(const L* x, L* y, int64_t y_stride, double* z, int64_t z_stride) const {
    for (int64_t begin = 0; begin < a_.rows; begin += kLaneRows) {
      const int64_t end = begin + kLaneRows < a_.rows ? begin + kLaneRows : a_.rows;
      std::memset(partial_, 0, static_cast<size_t>(V * lane_length(n_)) * sizeof(L));
      int64_t i = begin;
      for (; i + kRows <= end; i += kRows) tall_rows<kRows>(i, x, y, y_stride);
      for (; i < end; ++i) tall_rows<1>(i, x, y, y_stride);
      add_partial(z, z_stride);
    }
  }

  template <int R>
  void panel_down(const L* w, int64_t stride, int64_t i, const L* x, int64_t count, L* y,
                  int64_t y_stride) const {
    L scale[R][V];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) scale[r][v] = x[v * lane_length(n_) + i + r];
    }
    add_rows<L, R, V>(w, stride, scale, count, y, y_stride);
  }

  template <int R>
  void panel_up(const L* w, int64_t stride, int64_t i, const L* y, int64_t y_stride, int64_t count,
                double* z, int64_t z_stride) const {
    L sums[R][V];
    dot_rows<L, R, V>(w, stride, y, y_stride, count, sums);
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) z[v * z_stride + i + r] += sums[r][v];
    }
  }

  void dense_wide(const L* x, L* y, int64_t y_stride, double* z, int64_t z_stride) const {
    const int64_t width = panel_width(direct_ ? kPanelBytes : kStagedBytes, n_, sizeof(L));
    std::memset(y, 0, static_cast<size_t>(V * y_stride) * sizeof(L));
    for (int64_t first = 0; first < a_.cols; first += width) {
      const int64_t some = a_.cols - first < width ? a_.cols - first : width;
      const int64_t count = (some + kLanes<L> - 1) / kLanes<L> * kLanes<L>;
      const L* w = staged_;
      int64_t stride = width + 16;
      if constexpr (std::is_same_v<T, L>) {
        if (direct_) w = row(0) + first, stride = a_.cols;
      }
      int64_t i = 0;
      for (; i + kRows <= n_; i += kRows) {
        for (int r = 0; r < kRows && !direct_; ++r) {
          stage(i + r, first, some, staged_ + (i + r) * stride);
        }
        panel_down<kRows>(w + i * stride, stride, i, x, count, y + first, y_stride);
      }
      for (; i < n_; ++i) {
        if (!direct_) stage(i, first, some, staged_ + i * stride);
        panel_down<1>(w + i * stride, stride, i, x, count, y + first, y_stride);
      }
      for (i = 0; i + kRows <= n_; i += kRows) {
        panel_up<kRows>(w + i * stride, stride, i, y + first, y_stride, count, z, z_stride);
      }
      for (; i < n_; ++i) {
        panel_up<1>(w + i * stride, stride, i, y + first, y_stride, count, z, z_stride);
      }
    }
  }

  // V lanes side by side at every index.
  void interleave(const L* x, int64_t stride, int64_t count, L* target) const {
    for (int64_t j = 0; j < count; ++j) {
      for (int v = 0; v < V; ++v) target[V * j + v] = x[v * stride + j];
    }
  }

  // V lanes at a place of the interleaved vectors: one load, one operation, one store.
  typedef L Few __attribute__((vector_size(V * sizeof(L))));
  static void add_product(Few* sum, L factor, const L* source) {
    Few lanes;
    std::memcpy(&lanes, source, sizeof(lanes));
    *sum += factor * lanes;
  }
  static void add_product(L* target, L factor, const Few& lanes) {
    Few sum;
    std::memcpy(&sum, target, sizeof(sum));
    sum += factor * lanes;
    std::memcpy(target, &sum, sizeof(sum));
  }

  void sparse_tall(const L* x, L* y, int64_t y_stride, double* z, int64_t z_stride) const {
    const int64_t ld = lane_length(n_);
    L *by_column = spread_, *sums = partial_;
    interleave(x, ld, n_, by_column);
    for (int64_t begin = 0; begin < a_.rows; begin += kLaneRows) {
      const int64_t end = begin + kLaneRows < a_.rows ? begin + kLaneRows : a_.rows;
      std::memset(sums, 0, static_cast<size_t>(V * ld) * sizeof(L));
      for (int64_t i = begin; i < end; ++i) {
        Few product = {};
        const KeptEntry<L>*from = entries_ + a_.row_begin[i], *to = entries_ + a_.row_begin[i + 1];
        for (const KeptEntry<L>* e = from; e < to; ++e) {
          add_product(&product, e->value, by_column + V * e->column);
        }
        for (const KeptEntry<L>* e = from; e < to; ++e) {
          add_product(sums + V * e->column, e->value, product);
        }
        for (int v = 0; v < V; ++v) y[v * y_stride + i] = product[v];
      }
      for (int v = 0; v < V; ++v) {
        for (int64_t j = 0; j < n_; ++j) z[v * z_stride + j] += sums[V * j + v];
      }
    }
  }

  void sparse_wide(const L* x, L* y, int64_t y_stride, double* z, int64_t z_stride) const {
    const int64_t ld = lane_length(n_);
    L* by_column = spread_;
    std::memset(by_column, 0, static_cast<size_t>(V * a_.cols) * sizeof(L));
    for (int64_t i = 0; i < n_; ++i) {
      Few scale;
      for (int v = 0; v < V; ++v) scale[v] = x[v * ld + i];
      for (int64_t e = a_.row_begin[i]; e < a_.row_begin[i + 1]; ++e) {
        add_product(by_column + V * entries_[e].column, entries_[e].value, scale);
      }
    }
    for (int64_t i = 0; i < n_; ++i) {
      Few even = {}, odd = {};
      int64_t e = a_.row_begin[i];
      const int64_t end = a_.row_begin[i + 1];
      for (; e + 2 <= end; e += 2) {
        add_product(&even, entries_[e].value, by_column + V * entries_[e].column);
        add_product(&odd, entries_[e + 1].value, by_column + V * entries_[e + 1].column);
      }
      if (e < end) add_product(&even, entries_[e].value, by_column + V * entries_[e].column);
      for (int v = 0; v < V; ++v) z[v * z_stride + i] = even[v] + odd[v];
    }
    for (int64_t j = 0; j < a_.cols; ++j) {
      for (int v = 0; v < V; ++v) y[v * y_stride + j] = by_column[V * j + v];
    }
  }

  const SpectralMatrix& a_;
  const KeptEntry<L>* entries_;
  bool wide_, direct_;
  int64_t n_;
  L *partial_, *spread_, *staged_;
};

// The kept entries of a pattern whose compressed rows are at hand, in one pass over them.
template <class T>
inline void kept_entries(const SpectralMatrix& a, KeptEntry<Compute<T>>* entries) {
  const T* data = static_cast<const T*>(a.data);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int32_t e = a.row_begin[i]; e < a.row_begin[i + 1]; ++e) {
      const int32_t column = a.entry_column[e];
      entries[e] = {column, static_cast<Compute<T>>(to_double(data[i * a.cols + column]))};
    }
  }
}

}  // namespace tscnc::TSCNC_ISA
