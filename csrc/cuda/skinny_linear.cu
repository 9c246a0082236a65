// y = x Wᵀ for 1 to 16 rows: as fast as the weight can be read.
//
// A block has 64 columns of y and one part of the inner dimension. Weight and x come in tiles of 128 along it, by
// 16-byte asynchronous copies through a ring of stages; each warp multiplies 16 columns by all rows on tensor cores,
// with the weight as the left operand, which fills its 16 places however few rows there are. The weight's first stages
// are asked for before the kernel waits for the one ahead, whose result x is.
//
// Where y alone has too few tiles to fill a GPU, several blocks share a tile's inner dimension (split-K). Each leaves
// its partial sums in scratch memory; the last to arrive adds them up in the order of the parts. How many parts there
// are (about two blocks for each multiprocessor) follows from (in, out) alone, and a row is a column of the tensor
// core's result, so a row's bytes depend neither on the other rows nor on who was last.
#include "cuda/block.cuh"
#include "cuda/launch.cuh"

namespace icon2 {
namespace cuda {
namespace {

// Budgets, held by tests/compile/test_cuda.py: no spills, 96 registers; 73728 bytes of shared memory up to 8 rows,
// 81920 up to 16: two blocks on a multiprocessor of sm_80, three or two on one of sm_90.
constexpr int kThreads = 128, kWarps = kThreads / 32, kColumns = 16 * kWarps, kDepth = 128;
constexpr int kStages = 4;
constexpr int kChunk = 8;               // elements of a 16-byte copy
constexpr int kSlab = 32;               // elements of a row that lie together in shared memory: 64 bytes, so that
constexpr int kSlabs = kDepth / kSlab;  // eight lanes' loads of 16 bytes, two rows, meet every bank once
constexpr int kFewestTiles = 4;         // of the inner dimension, that are worth a block
constexpr int kMostSums = kMostRows * kColumns;
static_assert(kLinearScratch == int64_t{4} * kMostParts * (1 + kMostSums), "kernels.h must know the size of a part");

struct Parts {
  int tiles, steps, parts;  // tiles of y, tiles of the inner dimension, blocks that share a tile of y
};

Parts parts_of(int64_t in, int64_t out) {
  Parts p{};
  p.tiles = static_cast<int>((out + kColumns - 1) / kColumns);
  p.steps = static_cast<int>((in + kDepth - 1) / kDepth);
  const int wanted = kMostParts / p.tiles, most = p.steps / kFewestTiles;
  p.parts = wanted < most ? wanted : most;
  if (p.parts < 1) p.parts = 1;
  return p;
}

template <class T, int kRows>
struct LinearShared {
  alignas(16) T weight[kStages][kSlabs][kColumns][kSlab];
  alignas(16) T x[kStages][kSlabs][kRows][kSlab];
};

// A tile of `n` rows and kDepth columns, zero where the matrix ends.
template <class T, int n>
__device__ inline void load_tile(T (*tile)[n][kSlab], const T* from, int64_t stride, int rows, int column, int in) {
  constexpr int kCopies = n * kDepth / kChunk;
#pragma unroll
  for (int i = 0; i < (kCopies + kThreads - 1) / kThreads; ++i) {
    const int copy = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = copy / (kDepth / kChunk), place = copy % (kDepth / kChunk) * kChunk;
    const bool there = row < rows && column + place < in;
    copy_async(&tile[place / kSlab][row][place % kSlab], there ? from + row * stride + column + place : from,
               there ? 16 : 0);
  }
}

template <class T>
struct alignas(16) Chunk {
  uint32_t pairs[4];
};

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads) linear_kernel(const SkinnyLinear l, const Parts p) {
  constexpr int kHalves = kRows / 8;  // the tensor core's result has eight columns
  LinearShared<T, kRows>& shared = shared_memory<LinearShared<T, kRows>>();
  const int tile = static_cast<int>(blockIdx.x), part = static_cast<int>(blockIdx.y);
  const int in = static_cast<int>(l.a.in), out = static_cast<int>(l.a.out), rows = static_cast<int>(l.a.rows);
  const int first = tile * kColumns, columns = out - first < kColumns ? out - first : kColumns;
  const T* weight = static_cast<const T*>(l.a.weight) + static_cast<int64_t>(first) * in;
  const T* x = static_cast<const T*>(l.a.x);
  const int begin = static_cast<int>(static_cast<int64_t>(p.steps) * part / p.parts);
  const int end = static_cast<int>(static_cast<int64_t>(p.steps) * (part + 1) / p.parts);

  const auto load_weight = [&](int step) {
    if (step < end) load_tile<T, kColumns>(shared.weight[step % kStages], weight, in, columns, step * kDepth, in);
  };
  const auto load_x = [&](int step) {
    if (step < end) load_tile<T, kRows>(shared.x[step % kStages], x, l.a.x_stride, rows, step * kDepth, in);
    copy_commit();
  };
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) load_weight(begin + ahead);
  grid_release();
  grid_wait();
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) load_x(begin + ahead);

  const int g = lane() / 4, t = lane() % 4;
  float sums[kHalves][4] = {};
  for (int step = begin; step < end; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();  // this tile is there for all, and all are done with the one before, whose place is taken next
    load_weight(step + kStages - 1);
    load_x(step + kStages - 1);
    const int stage = step % kStages;
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      // A lane's eight elements are four places of two products: which places does not matter, as long as it is the
      // same for weight and x.
      const T(*tile_of_weight)[kSlab] = shared.weight[stage][slab] + 16 * warp();
      const auto low = *reinterpret_cast<const Chunk<T>*>(tile_of_weight[g] + kChunk * t);
      const auto high = *reinterpret_cast<const Chunk<T>*>(tile_of_weight[g + 8] + kChunk * t);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const auto of_x = *reinterpret_cast<const Chunk<T>*>(shared.x[stage][slab][8 * half + g] + kChunk * t);
        mma<T>(sums[half], {low.pairs[0], high.pairs[0], low.pairs[1], high.pairs[1]}, {of_x.pairs[0], of_x.pairs[1]});
        mma<T>(sums[half], {low.pairs[2], high.pairs[2], low.pairs[3], high.pairs[3]}, {of_x.pairs[2], of_x.pairs[3]});
      }
    }
  }
  copy_wait<0>();

  // Of column i / 2 · 8 + g of this warp's 16, rows 2t and 2t + 1.
  const auto at = [&](int half, int i) { return (8 * half + 2 * t + i % 2) * kColumns + 16 * warp() + i / 2 * 8 + g; };
  if (p.parts > 1) {
    int* arrived = static_cast<int*>(l.scratch) + tile;
    float* partial = reinterpret_cast<float*>(static_cast<int*>(l.scratch) + kMostParts) +
                     static_cast<int64_t>(tile) * p.parts * kMostSums;
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) partial[part * kMostSums + at(half, i)] = sums[half][i];
    __threadfence();
    __syncthreads();
    int* is_last = reinterpret_cast<int*>(&shared);
    if (threadIdx.x == 0) *is_last = atomicAdd(arrived, 1) == p.parts - 1;
    __syncthreads();
    if (!*is_last) return;
    __threadfence();
    if (threadIdx.x == 0) *arrived = 0;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float sum = 0.0f;
        for (int other = 0; other < p.parts; ++other) sum += load_fresh(partial + other * kMostSums + at(half, i));
        sums[half][i] = sum;
      }
    }
  }
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = at(half, i) / kColumns, column = first + at(half, i) % kColumns;
      if (row >= rows || column >= out) continue;
      float sum = sums[half][i];
      const int64_t place = static_cast<int64_t>(row) * out + column;
      if (l.a.bias != nullptr) sum += to_float(static_cast<const T*>(l.a.bias)[column]);
      if (l.residual != nullptr) sum += to_float(static_cast<const T*>(l.residual)[place]);
      static_cast<T*>(l.a.y)[place] = from_float<T>(sum);
    }
  }
}

template <class T, int kRows>
const char* linear_of(const SkinnyLinear& l, const Stream& stream) {
  const Parts p = parts_of(l.a.in, l.a.out);
  return launch(linear_kernel<T, kRows>, p.tiles, p.parts, kThreads, sizeof(LinearShared<T, kRows>), stream, l, p);
}

template <class T>
const char* linear_of(const SkinnyLinear& l, const Stream& stream) {
  return l.a.rows > 8 ? linear_of<T, 16>(l, stream) : linear_of<T, 8>(l, stream);
}

}  // namespace

const char* linear(const SkinnyLinear& l, const Stream& stream) {
  if (l.a.rows == 0 || l.a.out == 0) return nullptr;
  return l.a.dtype == DType::bf16 ? linear_of<bf16>(l, stream) : linear_of<f16>(l, stream);
}

}  // namespace cuda
}  // namespace icon2
