// Working memory of one thread, kept between calls: fresh pages on every call would cost more than
// a small kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace tscnc {

class Scratch {
 public:
  // Room for `count` elements, aligned to a cache line; contents are undefined.
  template <class T>
  T* reserve(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(::operator new(bytes, kAlignment));
      size_ = bytes;
    }
    return static_cast<T*>(data_.get());
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Release {
    void operator()(void* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<void, Release> data_;
  size_t size_ = 0;
};

inline Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace tscnc
