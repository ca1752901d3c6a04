// The extreme singular values of matrices of any size from those of matrices close to them, all in
// one launch: a few passes over each matrix, by many blocks where it is large.
//
// The blocks take tickets: first a start for every matrix, then the chunks of all matrices in their
// first pass, their second one, and so on, then the chunks once more for the vectors of the long
// side. A block waits for what came before in its matrix, and leaves at once where that was enough.
// Bound: device memory, a read per pass.
#include "extreme_singular_values.h"
#include "launch.cuh"
#include "spectral_warm.cuh"

namespace tscnc::cuda {

namespace {

// Counters of a matrix: passes that may run (kReadyForGood for none), groups of chunks that have
// arrived, chunks of each group that have; the first one's also: tickets taken. kSettled is last.
constexpr int kReady = 0, kArrived = 1, kGroups = 2, kTickets = kGroups + kMostGroups;
static_assert(kTickets < kSettled && kSettled < kWarmCounters);
// Less the size of the space.
constexpr int kReadyForGood = 1000;

struct WarmCall {
  SpectralSettings settings;
  SpectralOutputs out;
  const double* warm;
  double* workspace;
  int32_t* counters;
};

// A launch's matrices, and the first of each one's chunks among those of all.
struct WarmTable {
  SpectralTable matrices;
  int first_chunk[kMaxSpectralJobs];
  int chunks;
};

__device__ __forceinline__ WarmTask take_task(const WarmTable& table, const WarmCall& call) {
  const SpectralTable& matrices = table.matrices;
  int32_t* tickets = call.counters + matrices.first.index * kWarmCounters + kTickets;
  const int ticket = atomicAdd(tickets, 1);
  WarmTask task = {ticket, -1, 0, {}};
  if (ticket < matrices.count) return task;
  const int work = ticket - matrices.count, chunk = work % table.chunks;
  task.phase = work / table.chunks;
  task.job = 0;
  while (task.job + 1 < matrices.count && table.first_chunk[task.job + 1] <= chunk) ++task.job;
  task.chunk = chunk - table.first_chunk[task.job];
  return task;
}

// out := the sum of blocks of shares, in their order.
template <int kBlock>
TSCNC_CALLED void add_shares(const double* shares, int count, int64_t stride, int64_t n,
                             double* out) {
  for (int64_t i = threadIdx.x; i < n * kBlock; i += kSpectralThreads) {
    double sum = shares[i];
    for (int k = 1; k < count; ++k) sum += shares[k * stride * n * kBlock + i];
    out[i] = sum;
  }
  __syncthreads();
}

// One chunk of one pass; the last block to finish goes on with what all have found.
template <int kWanted>
TSCNC_CALLED void run_pass(const SpectralJob& job, int32_t* counters, WarmShared<kWanted>* shared,
                           WarmSolver<kWanted>& solver) {
  constexpr int kBlock = WarmSizes<kWanted>::kBlock;
  const WarmTask& task = shared->task;
  const WarmWorkspace<kWanted>& at = shared->at;
  const int64_t n = smaller_side(job);
  if (threadIdx.x == 0) {
    const int64_t m = larger_side(job), lines = chunk_lines(job), begin = task.chunk * lines;
    shared->pass = {begin, min(begin + lines, m), at.basis + task.phase * n * kBlock,
                    at.lines + task.phase * m * kBlock, at.shares + task.chunk * n * kBlock};
  }
  __syncthreads();
  pass_over_chunk<kBlock>(job, shared->pass, shared->lines, shared->parts);
  const ShareTree tree(job);
  const int group = task.chunk / tree.group, members = tree.members(group);
  if (!arrives_last(counters + kGroups + group, members, &shared->is_last)) return;
  double* sum = at.shares + group * tree.group * n * kBlock;
  add_shares<kBlock>(sum, members, 1, n, sum);
  if (!arrives_last(counters + kArrived, tree.groups, &shared->is_last)) return;
  add_shares<kBlock>(at.shares, tree.groups, tree.group, n, at.images + task.phase * n * kBlock);
  const Verdict verdict = solver.judge(task.phase);
  if (threadIdx.x == 0) counters[kSettled] = verdict == Verdict::settled;
  const int size = (task.phase + 1) * kBlock;
  publish(counters + kReady, verdict == Verdict::goes_on ? task.phase + 2 : kReadyForGood + size);
}

template <int kWanted>
__global__ void __launch_bounds__(kSpectralThreads, 2)
    warm_singular_values_kernel(const __grid_constant__ WarmTable table,
                                const __grid_constant__ WarmCall call) {
  auto* shared = dynamic_shared<WarmShared<kWanted>>();
  WarmTask& task = shared->task;
  if (threadIdx.x == 0) task = take_task(table, call);
  __syncthreads();
  const SpectralJob& job = table.matrices.jobs[task.job];
  int32_t* counters = call.counters + (table.matrices.first.index + task.job) * kWarmCounters;
  const bool is_last = task.phase == WarmSizes<kWanted>::kMostPasses;
  int seen = 0;
  if (task.phase >= 0) {
    seen = wait_for(counters + kReady, is_last ? kReadyForGood : task.phase + 1, &shared->seen);
    if (is_last ? counters[kSettled] == 0 : seen >= kReadyForGood) return;
  }
  if (threadIdx.x == 0) {
    task.place = place_of(table.matrices, task.job, WarmWorkspace<kWanted>::size);
    shared->at.place(job, call.workspace + task.place.workspace);
  }
  __syncthreads();
  const SpectralTarget target = {call.out, task.place, job, false};
  WarmSolver<kWanted> solver(job, call.settings, target, shared);
  if (task.phase < 0) {
    const bool starts = solver.start(call.warm);
    publish(counters + kReady, starts ? 1 : kReadyForGood);
  } else if (is_last) {
    const int64_t lines = chunk_lines(job), begin = task.chunk * lines;
    solver.write_lines(begin, min(begin + lines, larger_side(job)), seen - kReadyForGood);
  } else {
    run_pass(job, counters, shared, solver);
  }
}

template <int kWanted>
cudaError_t launch_tables(const SpectralJob* jobs, const WarmCall& call, cudaStream_t stream) {
  return for_each_table(
      jobs, call.out.count, WarmWorkspace<kWanted>::size, [&](const SpectralTable& table) {
        WarmTable tasks = {table, {}, 0};
        for (int i = 0; i < table.count; ++i) {
          tasks.first_chunk[i] = tasks.chunks;
          tasks.chunks += chunk_count(table.jobs[i]);
        }
        const int phases = WarmSizes<kWanted>::kMostPasses + 1;
        return launch(warm_singular_values_kernel<kWanted>,
                      dim3(unsigned(table.count + phases * tasks.chunks)), dim3(kSpectralThreads),
                      sizeof(WarmShared<kWanted>), stream, tasks, call);
      });
}

}  // namespace

int64_t warm_singular_values_workspace(const SpectralJob* jobs, int64_t count) {
  int64_t size = 0;
  for (int64_t i = 0; i < count; ++i) size += WarmWorkspace<kEnds>::size(jobs[i]);
  return size;
}

cudaError_t launch_warm_singular_values(const SpectralJob* jobs, const SpectralSettings& settings,
                                        const double* warm, const SpectralOutputs& outputs,
                                        double* workspace, int32_t* counters, cudaStream_t stream) {
  const WarmCall call = {settings, outputs, warm, workspace, counters};
  const size_t bytes = size_t(outputs.count) * kWarmCounters * sizeof(int32_t);
  const cudaError_t error = cudaMemsetAsync(counters, 0, bytes, stream);
  if (error != cudaSuccess) return error;
  return settings.largest_only ? launch_tables<1>(jobs, call, stream)
                               : launch_tables<2>(jobs, call, stream);
}

}  // namespace tscnc::cuda
