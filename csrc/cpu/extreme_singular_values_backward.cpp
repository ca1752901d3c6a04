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
      write(static_cast<std::remove_pointer_t<decltype(tag)>*>(gradient));
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

  template <class T>
  void write(T* gradient) {
    using C = Compute<T>;
    const int64_t stride = work_.right_stride;
    C* rights = reinterpret_cast<C*>(work_.rights);
    for (int64_t t = 0; t < count_; ++t) {
      for (int64_t j = 0; j < stride; ++j) {
        rights[t * stride + j] = j < source_.cols ? static_cast<C>(terms_[t].right[j]) : 0;
      }
    }
    for (int64_t row = 0; row < source_.rows; ++row) {
      C scale[2 * kMaxTies];
      find_scales(row, scale);
      write_row(row, scale, rights, gradient + row * source_.cols);
    }
  }

  template <class C>
  void find_scales(int64_t row, C* scale) const {
    for (int64_t t = 0; t < count_; ++t) {
      scale[t] = static_cast<C>(terms_[t].weight * terms_[t].left[row]);
    }
  }

  // `sum` where the mask keeps the first `count` elements at `at`, zero elsewhere.
  template <class T>
  Vec<T> keep(Vec<T> sum, int64_t at, int64_t count) const {
    using Bytes __attribute__((vector_size(kLanes<T>))) = uint8_t;
    using Lanes = decltype(sum < sum);
    if (source_.mask == nullptr) return sum;
    Bytes bytes = {};
    if (count >= kLanes<T>) {
      std::memcpy(&bytes, source_.mask + at, sizeof(bytes));
    } else {
      std::memcpy(&bytes, source_.mask + at, static_cast<size_t>(count));
    }
    return __builtin_convertvector(bytes, Lanes) != 0 ? sum : Vec<T>{};
  }

  // Four vectors of one row share each term's scale.
  template <class T>
  void write_row(int64_t row, const Compute<T>* scale, const Compute<T>* rights, T* target) const {
    constexpr int64_t kStep = kLanes<T>;
    for (int64_t j = 0; j < source_.cols; j += 4 * kStep) {
      Vec<T> sum[4] = {};
      for (int64_t t = 0; t < count_; ++t) {
        const Compute<T>* right = rights + t * work_.right_stride + j;
        const Vec<T> weight = broadcast(scale[t]);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) sum[q] += weight * load(right + q * kStep);
      }
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const int64_t at = j + q * kStep, left = source_.cols - at;
        if (left <= 0) break;
        const Vec<T> kept_sum = keep<T>(sum[q], row * source_.cols + at, left);
        if (left >= kStep) {
          store(target + at, kept_sum);
        } else {
          store_partial(target + at, kept_sum, left);
        }
      }
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
