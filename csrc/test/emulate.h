// The machine of csrc/cuda/ptx.cuh on a CPU: a host compiler builds the same kernels, and the tests run them where
// there is no GPU. It is as strict as a GPU may be, and slow.
//
// A block's threads are fibers, resumed in a shuffled order that differs from launch to launch; blocks run one after
// another, shuffled too. A barrier or an exchange between lanes waits for all who take part, and a wait that can never
// end aborts. Shared memory is garbage at first, and exactly as large as was asked for. An asynchronous copy is done
// when it is waited for and not before. Under ThreadSanitizer fibers are threads that only barriers order, so that a
// missing one is a race; under AddressSanitizer every allocation is guarded.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/scalar.h"
#include "cuda/kernels.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// CUDA's own names. NOLINTBEGIN(bugprone-reserved-identifier)
#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// NOLINTEND(bugprone-reserved-identifier)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 blockIdx, blockDim, gridDim;

namespace emulate {

// What the scheduler tells the fibers: no access to it orders anything.
template <class V>
struct Told {
  std::atomic<V> value{};
  operator V() const { return value.load(std::memory_order_relaxed); }
  void operator=(V v) { value.store(v, std::memory_order_relaxed); }
};

struct Thread {
  Told<unsigned> x;
};

}  // namespace emulate

inline emulate::Thread threadIdx;

namespace emulate {

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "emulated block (%u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y,
               static_cast<unsigned>(threadIdx.x), what);
  std::abort();
}

// Who waits here waits for `n` arrivals in all.
struct Barrier {
  int n = 0;
  std::atomic<int> arrived{0}, generation{0};
  char order[2];  // what orders is one use of the barrier, not the next one, which others may be at already
};

struct Warp {
  Barrier barrier;
  unsigned char slots[2][32][32];
};

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Fiber {
  ucontext_t context;
  unsigned char* stack = nullptr;
  Told<const Barrier*> at;
  Told<int> generation;
  Told<bool> done;
  int exchanges = 0, group = 0;
  std::vector<Copy> copies;
  void* sanitizer = nullptr;  // what it knows the fiber by
};

constexpr size_t kStack = 64 * 1024;

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Warp>> warps;
  Barrier block;
  ucontext_t scheduler;
  void* scheduler_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  Told<Fiber*> running;
  std::function<void()> kernel;
  void* shared = nullptr;
  char begun, ended;  // what orders a block's threads and what is before and after
  std::mt19937 shuffled{1};
};

inline Machine& machine() {
  static Machine& m = *new Machine;  // its fibers are never ended
  return m;
}

inline Fiber& self() { return *static_cast<Fiber*>(machine().running); }

inline void release(void* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(at);
#else
  (void)at;
#endif
}

inline void acquire(void* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(at);
#else
  (void)at;
#endif
}

// To a fiber, or with null back to the scheduler.
inline void change_to(Fiber* fiber) {
  Machine& m = machine();
  Fiber* from = m.running;
  m.running = fiber;
  ucontext_t* here = from ? &from->context : &m.scheduler;
  ucontext_t* there = fiber ? &fiber->context : &m.scheduler;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber ? fiber->sanitizer : m.scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
  swapcontext(here, there);
#elif defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber ? fiber->stack : m.scheduler_stack,
                                 fiber ? kStack : m.scheduler_stack_size);
  swapcontext(here, there);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  swapcontext(here, there);
#endif
}

inline void wait(Barrier& barrier) {
  const int generation = barrier.generation.load(std::memory_order_relaxed);
  char* order = barrier.order + generation % 2;
  release(order);
  if (barrier.arrived.fetch_add(1, std::memory_order_relaxed) + 1 == barrier.n) {
    barrier.arrived.store(0, std::memory_order_relaxed);
    barrier.generation.store(generation + 1, std::memory_order_relaxed);
  } else {
    Fiber& me = self();
    me.generation = generation;
    me.at = &barrier;
    change_to(nullptr);
  }
  acquire(order);
}

inline void body() {
#if defined(__SANITIZE_ADDRESS__)
  Machine& m = machine();
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_size);
#endif
  for (;;) {  // a fiber is used again by the next block
    acquire(&machine().begun);
    machine().kernel();
    Fiber& me = self();
    require(me.copies.empty(), "ends while copies are under way");
    release(&machine().ended);
    me.done = true;
    change_to(nullptr);
  }
}

inline void run_block(int threads) {
  Machine& m = machine();
  while (static_cast<int>(m.fibers.size()) < threads) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = static_cast<unsigned char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, body, 0);
#if defined(__SANITIZE_THREAD__)
    fiber->sanitizer = __tsan_create_fiber(0);
    if (m.scheduler_sanitizer == nullptr) m.scheduler_sanitizer = __tsan_get_current_fiber();
#endif
    m.fibers.push_back(std::move(fiber));
  }
  m.block.n = threads;
  m.warps.resize(static_cast<size_t>(threads / 32));
  for (auto& warp : m.warps) {
    warp = std::make_unique<Warp>();
    warp->barrier.n = 32;
  }
  std::vector<int> order(static_cast<size_t>(threads));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), m.shuffled);
  for (int i : order) {
    Fiber& fiber = *m.fibers[static_cast<size_t>(i)];
    fiber.at = nullptr;
    fiber.done = false;
    fiber.exchanges = fiber.group = 0;
  }
  release(&m.begun);
  for (size_t left = order.size(); left > 0;) {
    bool moved = false;
    for (int i : order) {
      Fiber& fiber = *m.fibers[static_cast<size_t>(i)];
      if (fiber.done) continue;
      const Barrier* at = fiber.at;
      if (at != nullptr && at->generation.load(std::memory_order_relaxed) == fiber.generation) continue;
      fiber.at = nullptr;
      threadIdx.x = static_cast<unsigned>(i);
      change_to(&fiber);
      moved = true;
      if (fiber.done) --left;
    }
    require(moved, "everybody who is left waits for somebody who does not come");
  }
  acquire(&m.ended);
}

inline void run(std::function<void()> kernel, int blocks, int blocks_y, int threads, size_t shared) {
  Machine& m = machine();
  m.kernel = std::move(kernel);
  gridDim = {static_cast<unsigned>(blocks), static_cast<unsigned>(blocks_y)};
  blockDim = {static_cast<unsigned>(threads)};
  require(threads % 32 == 0 && threads <= 1024 && shared <= 99 * 1024, "a block that no GPU takes");
  std::vector<int> order(static_cast<size_t>(blocks * blocks_y));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), m.shuffled);
  for (int i : order) {
    blockIdx = {static_cast<unsigned>(i % blocks), static_cast<unsigned>(i / blocks)};
    require(posix_memalign(&m.shared, 128, std::max<size_t>(shared, 1)) == 0, "no memory");
    std::memset(m.shared, 0xFF, shared);  // NaN, and indices far outside
    run_block(threads);
    std::free(m.shared);
  }
}

// Every lane's value, as all lanes of the warp have given it; read before the next exchange but one.
template <class V>
const unsigned char (*exchange(const V& v))[32] {
  static_assert(sizeof(V) <= 32);
  const unsigned thread = threadIdx.x;
  Warp& warp = *machine().warps[thread / 32];
  auto& slots = warp.slots[self().exchanges++ % 2];
  std::memcpy(slots[thread % 32], &v, sizeof(V));
  wait(warp.barrier);
  return slots;
}

template <class V>
V from_lane(const V& v, unsigned lane) {
  const auto slots = exchange(v);
  V other;
  std::memcpy(&other, slots[lane], sizeof(V));
  return other;
}

}  // namespace emulate

// NOLINTBEGIN(bugprone-reserved-identifier)
inline void __syncthreads() { emulate::wait(emulate::machine().block); }
inline void __threadfence() {}

template <class V>
V __shfl_xor_sync(unsigned, V v, int mask) {
  return emulate::from_lane(v, (threadIdx.x % 32) ^ static_cast<unsigned>(mask));
}
template <class V>
V __shfl_sync(unsigned, V v, int lane) {
  return emulate::from_lane(v, static_cast<unsigned>(lane) % 32);
}
template <class V>
V __shfl_up_sync(unsigned, V v, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return emulate::from_lane(v, lane >= by ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned, bool v) {
  const auto slots = emulate::exchange(static_cast<unsigned char>(v));
  unsigned all = 0;
  for (unsigned lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(slots[lane][0]) << lane;
  return all;
}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }

// NOLINTEND(bugprone-reserved-identifier)

template <class V>
V atomicAdd(V* at, V v) {
  return __atomic_fetch_add(at, v, __ATOMIC_RELAXED);
}

namespace icon2 {

template <class S>
S& shared_memory() {
  return *static_cast<S*>(emulate::machine().shared);  // NOLINT(clang-analyzer-core.uninitialized.UndefReturn)
}

inline void copy_async(void* to, const void* from, int bytes) {
  emulate::require(reinterpret_cast<uintptr_t>(to) % 16 == 0, "copies to where 16 does not divide");
  emulate::require(bytes == 0 || reinterpret_cast<uintptr_t>(from) % 16 == 0, "copies from where 16 does not divide");
  emulate::Fiber& me = emulate::self();
  me.copies.push_back({to, from, bytes, me.group});
}

inline void copy_commit() { ++emulate::self().group; }

template <int left>
void copy_wait() {
  emulate::Fiber& me = emulate::self();
  auto& copies = me.copies;
  const auto done =
      std::find_if(copies.begin(), copies.end(), [&](const auto& c) { return c.group >= me.group - left; });
  for (auto c = copies.begin(); c != done; ++c) {
    unsigned char piece[16] = {};
    std::memcpy(piece, c->from, static_cast<size_t>(c->bytes));
    std::memcpy(c->to, piece, 16);
  }
  copies.erase(copies.begin(), done);
}

// The fragments of mma.m16n8k16: lane 4g + t holds of a rows g and g + 8 at columns 2t, 2t + 1 and 2t + 8, 2t + 9; of b
// column g at the same rows; of c rows g and g + 8 at columns 2t, 2t + 1.
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  const auto slots = emulate::exchange(mine);
  const auto number = [](uint32_t word, int half) {
    return to_float(T{static_cast<uint16_t>(half ? word >> 16 : word & 0xFFFFu)});
  };
  const int g = static_cast<int>(threadIdx.x % 32) / 4, t = static_cast<int>(threadIdx.x % 32) % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      Fragments of_a, of_b;
      std::memcpy(&of_a, slots[4 * (row % 8) + k % 8 / 2], sizeof(of_a));
      std::memcpy(&of_b, slots[4 * column + k % 8 / 2], sizeof(of_b));
      c[i] += number(of_a.a[row / 8 + 2 * (k / 8)], k % 2) * number(of_b.b[k / 8], k % 2);
    }
  }
}

inline float load_fresh(const float* from) { return *from; }

inline void grid_wait() {}
inline void grid_release() {}

namespace cuda {

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int blocks, int blocks_y, int threads, size_t shared, const Stream&,
                   const Arguments&... arguments) {
  emulate::run([=] { kernel(arguments...); }, blocks, blocks_y, threads, shared);
  return nullptr;
}

}  // namespace cuda
}  // namespace icon2
