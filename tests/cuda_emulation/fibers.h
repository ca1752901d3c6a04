// Runs a grid of CUDA threads on the CPU: blocks one after the other, every thread of a block a
// fiber.
//
// A fiber runs until it waits at a barrier or at a warp operation, then another one is picked. The
// order of threads and blocks is chosen by `order`: 0 lets the lowest thread run as far ahead of
// the others as barriers allow, 1 the highest, any other number seeds random picks. A kernel whose
// result depends on it lacks a barrier. Shared memory is full of 0xff bytes (NaN as float) when a
// block starts. A block in which no thread can go on is reported as an error instead of hanging.
#pragma once

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace tscnc::cuda {
// What `extern __shared__` in launch.cuh refers to. `__shared__` is `thread_local` here: one copy
// for all the fibers, which share an operating system thread.
constexpr size_t kMaxSharedBytes = 227 * 1024;
alignas(128) inline thread_local unsigned char dynamic_shared_memory[kMaxSharedBytes];
}  // namespace tscnc::cuda

namespace emulation {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;

enum class State { ready, at_block_barrier, at_warp_operation, left };

using Payload = std::array<unsigned char, 16>;  // what one lane hands to another

struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf position;
  bool started = false;
  uint3 thread;
  State state;
  int line;       // of the barrier or warp operation it waits at
  unsigned mask;  // the lanes that take part in the warp operation
  int source;     // the lane it wants the payload of
  bool vote;
  Payload sent, received;
  unsigned votes;  // of a warp: one bit per lane; of a block: how many
};

inline int order = 0;
inline std::mt19937 random_picks;
inline std::string error;
inline std::function<void()> kernel_call;
inline std::vector<Fiber> fibers(kMaxThreads);
inline int thread_count, current;
inline jmp_buf scheduler;
inline bool is_running = false;  // a launch, as opposed to host code

// One of `count` candidates, some of which are ready; -1 if none is.
template <typename IsReady>
int pick(int count, IsReady is_ready) {
  const int first = order == 0 ? 0 : order == 1 ? count - 1 : int(random_picks() % count);
  const int step = order == 1 ? -1 : 1;
  for (int i = 0; i < count; ++i) {
    const int candidate = (first + step * i + count) % count;
    if (is_ready(candidate)) return candidate;
  }
  return -1;
}

void fiber_main();

// Fibers switch by jumps: swapcontext would make a system call each time. A fiber outlives its
// block and takes part in the next one.
inline void go_on(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.position, 1);
  fiber.started = true;
  fiber.stack.reset(new char[kStackBytes]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

inline void wait(Fiber& fiber) {
  if (_setjmp(fiber.position) == 0) _longjmp(scheduler, 1);
}

// Ends the launch with an error; host code has nowhere to go on.
[[noreturn]] inline void fail(const char* what, const char* file, unsigned line) {
  error = std::string(file) + ":" + std::to_string(line) + ": " + what;
  if (is_running) _longjmp(scheduler, 1);
  std::fprintf(stderr, "%s\n", error.c_str());
  std::abort();
}

// Lets the block pass its barrier once every thread waits at the same one. A thread that has left
// the kernel keeps the others waiting: CUDA leaves undefined what would happen.
inline void try_release_block() {
  unsigned votes = 0;
  for (int i = 0; i < thread_count; ++i) {
    if (fibers[i].state != State::at_block_barrier || fibers[i].line != fibers[0].line) return;
    votes += fibers[i].vote;
  }
  for (int i = 0; i < thread_count; ++i) {
    fibers[i].votes = votes;
    fibers[i].state = State::ready;
  }
}

// Completes the warp operation that this fiber waits at once all lanes of its mask have arrived;
// lanes that do not exist or have left the kernel are not waited for, and send 0xff bytes.
inline void try_release_warp(int fiber) {
  const unsigned mask = fibers[fiber].mask;
  const int first = fiber - fiber % kWarpSize;
  std::vector<int> lanes;
  unsigned arrived = 0, votes = 0;
  for (int lane = 0; lane < kWarpSize && first + lane < thread_count; ++lane) {
    const Fiber& other = fibers[first + lane];
    if (!(mask >> lane & 1) || other.state == State::left) continue;
    if (other.state != State::at_warp_operation || other.mask != mask ||
        other.line != fibers[fiber].line) {
      return;
    }
    lanes.push_back(first + lane);
    arrived |= 1u << lane;
    votes |= unsigned(other.vote) << lane;
  }
  for (int lane : lanes) {
    Fiber& receiver = fibers[lane];
    receiver.votes = votes;
    receiver.state = State::ready;
    if (arrived >> receiver.source & 1) {
      receiver.received = fibers[first + receiver.source].sent;
    } else {
      receiver.received.fill(0xff);
    }
  }
}

inline Fiber& wait_at_block_barrier(bool vote, int line) {
  Fiber& fiber = fibers[current];
  fiber.state = State::at_block_barrier;
  fiber.vote = vote;
  fiber.line = line;
  try_release_block();
  wait(fiber);
  return fiber;
}

inline Fiber& wait_at_warp_operation(unsigned mask, int source, bool vote, int line) {
  Fiber& fiber = fibers[current];
  fiber.state = State::at_warp_operation;
  fiber.mask = mask;
  fiber.source = source;
  fiber.vote = vote;
  fiber.line = line;
  // A lane outside its own mask stays waiting, and is reported.
  if (mask >> (current % kWarpSize) & 1) try_release_warp(current);
  wait(fiber);
  return fiber;
}

inline void fiber_main() {
  for (;;) {
    try {
      kernel_call();
    } catch (const std::exception& exception) {
      error = exception.what();
    }
    fibers[current].state = State::left;
    const int first = current - current % kWarpSize;
    for (int i = first; i < first + kWarpSize && i < thread_count; ++i) {
      if (fibers[i].state == State::at_warp_operation) try_release_warp(i);
    }
    wait(fibers[current]);
  }
}

// This library's thread-local storage, which holds nothing but shared memory.
inline std::pair<void*, size_t> shared_memory() {
  static_cast<volatile unsigned char&>(tscnc::cuda::dynamic_shared_memory[0]) = 0;  // allocates it
  std::pair<void*, size_t> found{nullptr, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* object, size_t, void* result) {
        const ElfW(Phdr)* storage = nullptr;
        bool is_ours = false;
        for (int i = 0; i < object->dlpi_phnum; ++i) {
          const ElfW(Phdr) & header = object->dlpi_phdr[i];
          const auto begin = object->dlpi_addr + header.p_vaddr;
          const auto here = reinterpret_cast<uintptr_t>(&fiber_main);
          if (header.p_type == PT_TLS) storage = &header;
          if (header.p_type == PT_LOAD && here - begin < header.p_memsz) is_ours = true;
        }
        if (is_ours && storage != nullptr) {
          *static_cast<std::pair<void*, size_t>*>(result) = {object->dlpi_tls_data,
                                                             storage->p_memsz};
        }
        return 0;
      },
      &found);
  return found;
}

inline std::string describe_stuck_block() {
  std::map<std::string, int> counts;
  for (int i = 0; i < thread_count; ++i) {
    const Fiber& fiber = fibers[i];
    const std::string line = std::to_string(fiber.line);
    ++counts[fiber.state == State::left               ? "left the kernel"
             : fiber.state == State::at_block_barrier ? "wait at __syncthreads in line " + line
                                                      : "wait at a warp operation in line " + line];
  }
  std::string text = "no thread of block " + std::to_string(blockIdx.x) + " can go on:";
  for (const auto& [what, count] : counts) text += " " + std::to_string(count) + " " + what + ";";
  return text;
}

inline void run_block(size_t shared_bytes) {
  const auto [storage, storage_bytes] = shared_memory();
  std::memset(storage, 0xff, storage_bytes);
  for (int i = 0; i < thread_count; ++i) {
    Fiber& fiber = fibers[i];
    const unsigned index = unsigned(i);
    fiber.thread = {index % blockDim.x, index / blockDim.x % blockDim.y,
                    index / (blockDim.x * blockDim.y)};
    fiber.state = State::ready;
  }
  const auto is_ready = [](int i) { return fibers[i].state == State::ready; };
  while (error.empty() && (current = pick(thread_count, is_ready)) >= 0) {
    threadIdx = fibers[current].thread;
    go_on(fibers[current]);
  }
  for (int i = 0; i < thread_count && error.empty(); ++i) {
    if (fibers[i].state != State::left) error = describe_stuck_block();
  }
  if (!error.empty()) {
    for (Fiber& fiber : fibers) fiber.started = false;  // abandons those inside of the kernel
  }
  const unsigned char* dynamic = tscnc::cuda::dynamic_shared_memory;
  for (size_t i = shared_bytes; i < tscnc::cuda::kMaxSharedBytes && error.empty(); ++i) {
    if (dynamic[i] != 0xff) error = "the kernel wrote beyond its dynamic shared memory";
  }
}

// Runs `call` once for every thread of the grid; false, with `error` set, if a block got stuck.
inline bool run(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> call) {
  kernel_call = std::move(call);
  error.clear();
  gridDim = grid;
  blockDim = block;
  thread_count = int(block.x * block.y * block.z);
  random_picks.seed(unsigned(order));
  is_running = true;
  const int block_count = int(grid.x * grid.y * grid.z);
  std::vector<char> is_left(block_count, 1);
  for (int i = 0; i < block_count && error.empty(); ++i) {
    const int index = pick(block_count, [&](int candidate) { return is_left[candidate] != 0; });
    is_left[index] = 0;
    blockIdx = {unsigned(index) % grid.x, unsigned(index) / grid.x % grid.y,
                unsigned(index) / (grid.x * grid.y)};
    run_block(shared_bytes);
  }
  is_running = false;
  return error.empty();
}

}  // namespace emulation
