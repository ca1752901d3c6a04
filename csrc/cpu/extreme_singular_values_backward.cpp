#include "extreme_singular_values.h"
#include "spectral_workspace.h"

namespace tscnc::TSCNC_ISA {
namespace {

// One term weight * left right' of the gradient.
struct OuterProduct {
  double weight;
  const double *left, *right;
};

class Gradient {
 public:
  Gradient(const SpectralMatrix& source, const SpectralResult& result, double* workspace)
      : source_(source), result_(result), work_(source, workspace) {
    a_.source = &source;
    a_.transposed = source.rows < source.cols;
    a_.m = a_.transposed ? source.cols : source.rows;
    a_.n = a_.transposed ? source.rows : source.cols;
    a_.scale = 1;
  }

  void run(const double* grad_sigma, void* gradient) {
    for (int end = 0; end < 2; ++end) {
      // The left vector of a vanishing singular value is zero, and so is its gradient.
      if (grad_sigma[end] == 0 || result_.sigma[end] == 0) continue;
      if (result_.ties[end] == 1) {
        terms_[count_++] = {grad_sigma[end], result_.left[end], result_.right[end]};
      } else {
        add_tied(end, grad_sigma[end]);
      }
    }
    dispatch_dtype(source_.dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      for (int64_t row = 0; row < source_.rows; ++row) {
        accumulate(row);
        write_row(static_cast<T*>(gradient) + row * source_.cols);
      }
    });
  }

 private:
  // The tied vectors of the small side with their partners A v / |A v|, four at a time.
  void add_tied(int end, double grad_sigma) {
    const int64_t ties = result_.ties[end], stride = work_.long_stride;
    for (int64_t first = 0; first < ties; first += 4) {
      const int64_t some = ties - first < 4 ? ties - first : 4;
      const double* block = result_.block + (end * kMaxTies + first) * result_.block_stride;
      zero(work_.x, 4 * work_.ld);
      for (int64_t q = 0; q < some; ++q) {
        copy(work_.x + q * work_.ld, block + q * result_.block_stride, a_.n);
      }
      double* images = work_.partners + (end * kMaxTies + first) * stride;
      zero(images, 4 * stride);
      multiply_both(a_, work_.x, images, stride, work_.z, work_.ld, work_.panel);
      for (int64_t q = 0; q < some; ++q) {
        double* image = images + q * stride;
        normalise(image, stride);
        const double* vector = block + q * result_.block_stride;
        const double weight = grad_sigma / static_cast<double>(ties);
        terms_[count_++] = {weight, a_.transposed ? vector : image, a_.transposed ? image : vector};
      }
    }
  }

  void accumulate(int64_t row) {
    double* sum = work_.row;
    zero(sum, source_.cols);
    for (int64_t t = 0; t < count_; ++t) {
      const double scale = terms_[t].weight * terms_[t].left[row];
      for (int64_t j = 0; j < source_.cols; ++j) sum[j] += scale * terms_[t].right[j];
    }
    if (source_.mask == nullptr) return;
    const bool* mask = source_.mask + row * source_.cols;
    for (int64_t j = 0; j < source_.cols; ++j) sum[j] = mask[j] ? sum[j] : 0;
  }

  template <class T>
  void write_row(T* target) {
    for (int64_t j = 0; j < source_.cols; ++j) target[j] = static_cast<T>(work_.row[j]);
  }
  void write_row(bf16* target) { write_half_row(target); }
  void write_row(fp16* target) { write_half_row(target); }

  template <class T>
  void write_half_row(T* target) {
    constexpr int64_t kStep = kLanes<T>;
    for (int64_t j = 0; j < source_.cols; j += kStep) {
      const int64_t count = source_.cols - j < kStep ? source_.cols - j : kStep;
      float buffer[kStep] = {};
      for (int64_t c = 0; c < count; ++c) buffer[c] = static_cast<float>(work_.row[j + c]);
      store_partial(target + j, load(buffer), count);
    }
  }

  const SpectralMatrix& source_;
  const SpectralResult& result_;
  BackwardWorkspace work_;
  TallMatrix a_ = {};
  OuterProduct terms_[2 * kMaxTies];
  int64_t count_ = 0;
};

}  // namespace

void extreme_singular_values_backward(const SpectralMatrix& matrix, const SpectralResult& result,
                                      const double* grad_sigma, double* workspace, void* gradient) {
  Gradient(matrix, result, workspace).run(grad_sigma, gradient);
}

}  // namespace tscnc::TSCNC_ISA
