// Threads: those of the OpenMP runtime that torch has loaded, never a second one's.
//
// The extension is not linked to an OpenMP runtime. It finds the one in the process (`use_openmp`) and calls the entry
// point that GCC's own outlined loops call. So there is one pool of threads, as many as torch.set_num_threads() says;
// without a runtime, one thread.
#pragma once

#include <cstdint>

namespace icon2 {

// Work that is worth another thread, in multiply-adds or elements moved: about 20 µs, some four times what it takes to
// wake one.
constexpr int64_t kWorkPerThread = 1 << 16;

// Look for the runtime among the loaded libraries, one whose path begins with `preferred` first. False: none there.
bool use_openmp(const char* preferred);
const char* openmp_path();  // "" without one
int max_threads();

// body(begin, end) over [0, n) in as many consecutive ranges as the work (n · work_each) is worth threads.
void run_parallel(int64_t n, int64_t work_each, void (*body)(void*, int64_t, int64_t), void* data);

template <class F>
void parallel_for(int64_t n, int64_t work_each, F f) {
  run_parallel(n, work_each, [](void* data, int64_t begin, int64_t end) { (*static_cast<F*>(data))(begin, end); }, &f);
}

}  // namespace icon2
