// From logits to tokens in two launches, without sorting the vocabulary.
//
// 1. scan_kernel, a block per row and chunk of 4096 tokens, reads the chunk once: maximum and sum of exp of the raw
//    logits for the log-probability, the best token for a greedy row, the winner of the race for a row that draws among
//    all, and for a row that filters the mass of the chunk and the largest score of every group of 128 tokens.
// 2. choose_kernel, a block per row, merges the chunks and advances the row's state. Where the row filters it finds the
//    threshold first, by radix selection (shared/select.h), over few candidates where it can: as k groups whose largest
//    scores reach s hold k tokens that do, the k-th largest of the groups' largest scores is not above the k-th largest
//    token; for top_p the 64th largest is tried, and is low enough where what reaches it has the mass. Only the groups
//    that reach the bound are read again. Where the candidates are too many, or have too little of the mass (a flat
//    distribution), the passes run over the whole row. The race is run over the groups that reach the threshold.
//
// Masses are integers, and every other sum has an order that depends on the vocabulary alone: a row's result depends on
// the row alone. The keys are those of the scores before the temperature, which is monotone: fewer of their bits
// differ.
#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "shared/advance.h"
#include "shared/draw.h"
#include "shared/select.h"

namespace icon2 {
namespace cuda {
namespace {

// Budgets, held by tests/compile/test_cuda.py: no spills; scan_kernel 64 registers and 160 bytes of shared memory,
// choose_kernel 128 registers, 16 bytes of stack (a quad that a loop looks at) and 99 KiB, as any GPU since sm_80 has.
constexpr int kScanThreads = 256, kQuads = 4, kChunk = 4 * kQuads * kScanThreads;
constexpr int kGroup = 128;  // four tokens a lane
constexpr int kChooseThreads = 512, kMostCandidates = 4096, kMostGroups = kMostVocab / kGroup;
constexpr int kFirstTry = 64;

struct Scratch {
  int chunks, groups;  // of a row
  double* race_time;   // each of them [rows, chunks], the last [rows, groups]
  float *raw_max, *raw_sum, *top, *mass;
  int *top_token, *race_token;
  float* group_top;
};

struct RowOptions {
  bool draws, filters, early;
  float temperature, top_p, min_p, penalty;
  int top_k;
  uint32_t index, seed_low, seed_high;
  const bool* seen;
  const int32_t* eos;
  int n_eos;
};

__device__ inline RowOptions options_of(const Sample& a, int row) {
  RowOptions o{};
  const int vocab = static_cast<int>(a.vocab);
  o.draws = a.sampled != nullptr && a.sampled[row];
  o.temperature = o.draws && a.temperature != nullptr ? a.temperature[row] : 1.0f;
  o.top_k = o.draws && a.top_k != nullptr ? a.top_k[row] : vocab;
  o.top_k = o.top_k < 1 ? 1 : o.top_k > vocab ? vocab : o.top_k;
  o.top_p = o.draws && a.top_p != nullptr ? a.top_p[row] : 1.0f;
  o.min_p = o.draws && a.min_p != nullptr ? a.min_p[row] : 0.0f;
  o.filters = o.top_k < vocab || o.top_p < 1.0f || o.min_p > 0.0f;
  o.penalty = a.repetition_penalty != nullptr ? a.repetition_penalty[row] : 1.0f;
  o.seen = a.seen != nullptr ? a.seen + row * a.vocab : nullptr;
  o.eos = a.eos + row * a.eos_width;
  o.n_eos = static_cast<int>(a.eos_width);
  o.index = static_cast<uint32_t>(a.generated[row]);
  o.early = a.min_tokens != nullptr && a.generated[row] < a.min_tokens[row];
  if (o.draws) {
    o.seed_low = static_cast<uint32_t>(a.seeds[2 * row]);
    o.seed_high = static_cast<uint32_t>(a.seeds[2 * row + 1]);
  }
  return o;
}

template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T v[4];
};

// A row of logits of any dtype: one kernel for all, as what a kernel does with them is the same.
struct Row {
  const void* logits;
  DType dtype;
  bool wide;  // a quad may be read in one piece
  int vocab;
};

__device__ inline Row row_of(const Sample& a, int row) {
  const int size = a.dtype == DType::f32 ? 4 : 2;
  const char* logits = static_cast<const char*>(a.logits) + row * a.stride * size;
  return {logits, a.dtype, reinterpret_cast<uintptr_t>(logits) % (4 * size) == 0, static_cast<int>(a.vocab)};
}

template <class T, int kN>
__device__ inline void load_of(const Row& row, int token, int step, float* out) {
  const T* logits = static_cast<const T*>(row.logits);
#pragma unroll
  for (int q = 0; q < kN; ++q, token += step) {
    if (row.wide && token + 4 <= row.vocab) {
      const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(logits + token);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[4 * q + j] = to_float(quad.v[j]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[4 * q + j] = token + j < row.vocab ? to_float(logits[token + j]) : -INFINITY;
    }
  }
}

// `kN` times four raw logits from `token` (a multiple of 4), token + step, … on; −inf beyond the vocabulary.
template <int kN>
__device__ inline void load_quads(const Row& row, int token, int step, float* out) {
  if (row.dtype == DType::bf16) {
    load_of<bf16, kN>(row, token, step, out);
  } else if (row.dtype == DType::f16) {
    load_of<f16, kN>(row, token, step, out);
  } else {
    load_of<float, kN>(row, token, step, out);
  }
}

__device__ inline float at(const Row& row, int token) {
  if (row.dtype == DType::f32) return static_cast<const float*>(row.logits)[token];
  const uint16_t bits = static_cast<const uint16_t*>(row.logits)[token];
  return row.dtype == DType::bf16 ? to_float(bf16{bits}) : to_float(f16{bits});
}

// Repetition penalty, no early eos.
__device__ inline void process(float* scores, int token, int vocab, const RowOptions& o) {
  if (o.penalty != 1.0f && o.seen != nullptr) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (token + j < vocab && o.seen[token + j]) scores[j] = penalised(scores[j], o.penalty);
  }
  if (o.early) {
    for (int e = 0; e < o.n_eos; ++e) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (o.eos[e] == token + j) scores[j] = -INFINITY;
    }
  }
}

// What a maximum is subtracted as: where there is nothing but −inf, exp(−inf − 0) is 0 and not NaN.
__device__ inline float subtrahend(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// The lowest floors[4] and the ceiling of its token, of four scores; −inf scores get no floor.
__device__ inline float race_bounds(const RowOptions& o, int token, const float* scores, float* floors) {
  const Words words = token_words(static_cast<uint32_t>(token) >> 2, o.index, o.seed_low, o.seed_high);
  float lowest = INFINITY, score = 0.0f;
  uint32_t word = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    floors[j] = race_floor(words.x[j], scores[j]);
    if (floors[j] < lowest) {
      lowest = floors[j];
      word = words.x[j];
      score = scores[j];
    }
  }
  return lowest < INFINITY ? race_ceiling(word, score) : INFINITY;
}

// The exact times of those tokens, of `kN` quads, whose floor does not exceed `limit`. They are few, and a logarithm in
// double is long: one loop over them, and no copy of it for each token.
template <int kN>
__device__ inline Choice race_exact(const RowOptions& o, int first, int step, const float* scores, const float* floors,
                                    float limit, Choice best) {
  unsigned open = 0;
#pragma unroll
  for (int i = 0; i < 4 * kN; ++i)
    if (floors[i] <= limit && scores[i] > -INFINITY) open |= 1u << i;
#pragma unroll 1
  for (; open != 0; open &= open - 1) {
    const int place = __ffs(static_cast<int>(open)) - 1, token = first + place / 4 * step + place % 4;
    float score = scores[0];
#pragma unroll
    for (int i = 1; i < 4 * kN; ++i) score = i == place ? scores[i] : score;
    const Words words = token_words(static_cast<uint32_t>(token) >> 2, o.index, o.seed_low, o.seed_high);
    uint32_t word = words.x[0];
#pragma unroll
    for (int j = 1; j < 4; ++j) word = token % 4 == j ? words.x[j] : word;
    best = Sooner()(best, Choice{race_time(word, score), token});
  }
  return best;
}

struct ScanShared {
  Choice choices[kScanThreads / 32];
  float values[kScanThreads / 32];
};

__global__ void __launch_bounds__(kScanThreads) scan_kernel(const Sample a, const Scratch s) {
  ScanShared& shared = shared_memory<ScanShared>();
  grid_release();
  grid_wait();
  const int row = static_cast<int>(blockIdx.y), chunk = static_cast<int>(blockIdx.x);
  if (!a.running[row]) return;
  const RowOptions o = options_of(a, row);
  const int vocab = static_cast<int>(a.vocab);
  const Row logits = row_of(a, row);
  const int first = chunk * kChunk + 4 * static_cast<int>(threadIdx.x);
  const int step = 4 * kScanThreads;

  float scores[4 * kQuads];
  load_quads<kQuads>(logits, first, step, scores);
  float raw_max = -INFINITY;
#pragma unroll
  for (int i = 0; i < 4 * kQuads; ++i) raw_max = Larger()(raw_max, scores[i]);
  raw_max = over_block(raw_max, shared.values, Larger());
  float raw_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4 * kQuads; ++i) raw_sum += expf(scores[i] - subtrahend(raw_max));
  raw_sum = over_block(raw_sum, shared.values, Plus());

  Choice best{INFINITY, kNoToken};
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int token = first + q * step;
    process(scores + 4 * q, token, vocab, o);
#pragma unroll
    for (int j = 0; j < 4; ++j) best = Sooner()(best, Choice{-static_cast<double>(scores[4 * q + j]), token + j});
  }
  if (best.time == INFINITY) best.token = kNoToken;  // −inf beyond the vocabulary is no token
  best = over_block(best, shared.choices, Sooner());
  const float top = -static_cast<float>(best.time);

  const int at = row * s.chunks + chunk;
  Choice winner{INFINITY, kNoToken};
  float mass = 0.0f;
  if (o.draws && o.filters) {
    const float peak = subtrahend(top / o.temperature);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const float* quad = scores + 4 * q;
      float group_top = Larger()(Larger()(quad[0], quad[1]), Larger()(quad[2], quad[3]));
      group_top = over_warp(group_top, Larger());
      const int group = (chunk * kChunk + q * step) / kGroup + warp();
      if (lane() == 0 && group < s.groups) s.group_top[row * s.groups + group] = group_top;
#pragma unroll
      for (int j = 0; j < 4; ++j) mass += expf(quad[j] / o.temperature - peak);
    }
    mass = over_block(mass, shared.values, Plus());
  } else if (o.draws) {
    float floors[4 * kQuads], limit = INFINITY;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[4 * q + j] = scores[4 * q + j] / o.temperature;
      limit = Smaller()(limit, race_bounds(o, first + q * step, scores + 4 * q, floors + 4 * q));
    }
    limit = over_block(limit, shared.values, Smaller());
    winner = race_exact<kQuads>(o, first, step, scores, floors, limit, winner);
    winner = over_block(winner, shared.choices, Sooner());
  }
  if (threadIdx.x == 0) {
    s.raw_max[at] = raw_max;
    s.raw_sum[at] = raw_sum;
    s.top[at] = top;
    s.mass[at] = mass;
    s.top_token[at] = best.token;
    s.race_time[at] = winner.time;
    s.race_token[at] = winner.token;
  }
}

struct ChooseShared {
  unsigned long long histogram[kBins * 32];  // a column for every lane: no two lanes of a warp meet
  uint64_t bins[kBins];
  float candidates[kMostCandidates];
  uint16_t listed[kMostGroups];
  Choice choices[kChooseThreads / 32];
  unsigned long long sums[kChooseThreads / 32];
  double log_total;
  float peak, mass;
  Choice best, winner;
  Pick pick;
  int n_listed, n_candidates;
};

static_assert(sizeof(ChooseShared) <= 99 * 1024, "must fit a block of sm_86");

// The bin by a warp: each lane has eight of them.
template <bool kFromTop>
__device__ inline Pick pick_by_warp(const uint64_t* bins, uint64_t rest) {
  constexpr int kEach = kBins / 32;
  const int place = kFromTop ? 31 - lane() : lane();
  unsigned long long sum = 0;
  for (int i = 0; i < kEach; ++i) sum += bins[place * kEach + i];
  unsigned long long until = sum;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const unsigned long long before = __shfl_up_sync(kAllLanes, until, static_cast<unsigned>(by));
    if (lane() >= by) until += before;
  }
  const unsigned here = __ballot_sync(kAllLanes, kFromTop ? until >= rest : sum > 0 && until > rest);
  const unsigned some = __ballot_sync(kAllLanes, sum > 0);
  const int holder = here != 0 ? __ffs(static_cast<int>(here)) - 1 : some != 0 ? 31 - __clz(static_cast<int>(some)) : 0;
  const uint64_t inside = rest - (until - sum);
  const Pick mine = kFromTop ? pick_from_top(bins + place * kEach, inside, kEach)
                             : pick_from_bottom(bins + place * kEach, inside, kEach);
  const int bin = __shfl_sync(kAllLanes, place * kEach + mine.bin, holder);
  return {bin, __shfl_sync(kAllLanes, static_cast<unsigned long long>(mine.rest), holder)};
}

// The score at which what `each` visits, weighed by `amount`, has used up `rest`: from the top, or from the bottom.
template <bool kFromTop, class Each, class Amount>
__device__ inline float find(ChooseShared& s, const Each& each, const Amount& amount, uint64_t rest, int passes) {
  uint32_t prefix = 0;
  const int tid = static_cast<int>(threadIdx.x);
  for (int pass = 0; pass < passes; ++pass) {
    for (int i = tid; i < kBins * 32; i += kChooseThreads) s.histogram[i] = 0;
    __syncthreads();
    each([&](float score) {
      const uint32_t key = ordered_key(bits_of(score));
      if (!decided(key, prefix, pass)) return;
      const unsigned long long mass = amount(score);
      if (mass > 0) atomicAdd(&s.histogram[digit(key, pass) * 32 + lane()], mass);
    });
    __syncthreads();
    if (tid < kBins) {
      uint64_t sum = 0;
      for (int i = 0; i < 32; ++i) sum += s.histogram[tid * 32 + (i + tid) % 32];
      s.bins[tid] = sum;
    }
    __syncthreads();
    if (warp() == 0) {
      const Pick pick = pick_by_warp<kFromTop>(s.bins, rest);
      if (lane() == 0) s.pick = pick;
    }
    __syncthreads();
    prefix |= static_cast<uint32_t>(s.pick.bin) << (24 - 8 * pass);
    rest = s.pick.rest;
  }
  return float_of(key_bits(completed(prefix, passes)));
}

// What of an fp32 number may be set that comes from a dtype.
__device__ inline int significant_bits(DType dtype) {
  return dtype == DType::bf16 ? 16 : dtype == DType::f16 ? 19 : 32;
}

// The groups that `wanted` wants, in no order: what is done with them does not depend on it.
template <class Wanted>
__device__ inline void list_groups(ChooseShared& s, const float* group_top, int groups, const Wanted& wanted) {
  __syncthreads();
  if (threadIdx.x == 0) s.n_listed = s.n_candidates = 0;
  __syncthreads();
  for (int g = static_cast<int>(threadIdx.x); g < groups; g += kChooseThreads)
    if (wanted(group_top[g])) s.listed[atomicAdd(&s.n_listed, 1)] = static_cast<uint16_t>(g);
  __syncthreads();
}

// The winner among the tokens that top_k, top_p and min_p leave.
__device__ inline int filtered(ChooseShared& s, const Row& logits, const RowOptions& o, const float* group_top,
                               int groups) {
  const int vocab = logits.vocab;
  const int tid = static_cast<int>(threadIdx.x);
  const float t = o.temperature, top = -static_cast<float>(s.best.time), peak = top / t;
  const bool by_count = o.top_k < vocab, by_mass = o.top_p < 1.0f;
  float threshold = -INFINITY;
  if (by_mass && !(o.top_p > 0.0f)) {
    threshold = top;
  } else if (by_count || by_mass) {
    const int passes = o.penalty == 1.0f ? passes_for(significant_bits(logits.dtype)) : kPasses;
    const auto one = [](float) { return 1ull; };
    const auto mass_of = [&](float score) -> unsigned long long { return fixed_mass(expf(score / t - peak)); };
    const auto each_group = [&](const auto& visit) {
      for (int g = tid; g < groups; g += kChooseThreads) visit(group_top[g]);
    };
    const int tried = by_count ? o.top_k : kFirstTry;
    bool few = tried <= groups;
    if (few) {
      const float low = find<true>(s, each_group, one, static_cast<uint64_t>(tried), passes);
      list_groups(s, group_top, groups, [&](float group) { return group >= low; });
      for (int i = warp(); i < s.n_listed; i += kChooseThreads / 32) {
        float scores[4];
        const int token = s.listed[i] * kGroup + 4 * lane();
        load_quads<1>(logits, token, 0, scores);
        process(scores, token, vocab, o);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (token + j >= vocab || !(scores[j] >= low)) continue;
          const int place = atomicAdd(&s.n_candidates, 1);
          if (place < kMostCandidates) s.candidates[place] = scores[j];
        }
      }
      __syncthreads();
      few = s.n_candidates <= kMostCandidates;
    }
    const auto each = [&](const auto& visit) {
      if (few) {
        for (int i = tid; i < s.n_candidates; i += kChooseThreads) visit(s.candidates[i]);
        return;
      }
      for (int token = 4 * tid; token < vocab; token += 4 * kChooseThreads) {
        float scores[4];
        load_quads<1>(logits, token, 0, scores);
        process(scores, token, vocab, o);
        for (int j = 0; j < 4; ++j)
          if (token + j < vocab) visit(scores[j]);
      }
    };
    const auto mass_in_all = [&](float least) {
      unsigned long long sum = 0;
      each([&](float score) { sum += score >= least ? mass_of(score) : 0; });
      return over_block(sum, s.sums, Plus());
    };
    if (by_count) {
      threshold = find<true>(s, each, one, static_cast<uint64_t>(o.top_k), passes);
      if (by_mass) {
        const float kth = threshold;
        const uint64_t rest = droppable(mass_in_all(kth), o.top_p);
        threshold = find<false>(s, each, [&](float score) { return score >= kth ? mass_of(score) : 0; }, rest, passes);
      }
    } else {
      // The candidates do where all that top_p keeps is among them; what lies below them is dropped already.
      const uint64_t total = static_cast<uint64_t>(static_cast<double>(s.mass) * 1099511627776.0);
      uint64_t rest = droppable(total, o.top_p);
      if (few) {
        const uint64_t held = mass_in_all(-INFINITY), kept = total - rest;
        few = held >= kept;
        if (few) rest = held - kept;
      }
      threshold = find<false>(s, each, mass_of, rest, passes);
    }
  }

  const float least = threshold / t;
  const auto stays = [&](float score) { return score >= least && expf(score - peak) >= o.min_p; };
  list_groups(s, group_top, groups, [&](float group) { return stays(group / t); });
  Choice best{INFINITY, kNoToken};
  float limit = INFINITY;
  for (int i = warp(); i < s.n_listed; i += kChooseThreads / 32) {
    float scores[4], floors[4];
    const int token = s.listed[i] * kGroup + 4 * lane();
    load_quads<1>(logits, token, 0, scores);
    process(scores, token, vocab, o);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float score = scores[j] / t;
      scores[j] = stays(score) ? score : -INFINITY;
    }
    limit = Smaller()(limit, over_warp(race_bounds(o, token, scores, floors), Smaller()));
    best = race_exact<1>(o, token, 0, scores, floors, limit, best);
  }
  return over_block(best, s.choices, Sooner()).token;
}

__global__ void __launch_bounds__(kChooseThreads, 1) choose_kernel(const Sample a, const Scratch s) {
  ChooseShared& shared = shared_memory<ChooseShared>();
  grid_release();
  grid_wait();
  const int row = static_cast<int>(blockIdx.x), vocab = static_cast<int>(a.vocab);
  if (!a.running[row]) return;
  const RowOptions o = options_of(a, row);
  const Row logits = row_of(a, row);
  if (warp() == 0) {
    const int at = row * s.chunks;
    float raw_max = -INFINITY;
    Choice best{INFINITY, kNoToken}, winner{INFINITY, kNoToken};
    for (int c = lane(); c < s.chunks; c += 32) {
      raw_max = Larger()(raw_max, s.raw_max[at + c]);
      best = Sooner()(best, Choice{-static_cast<double>(s.top[at + c]), s.top_token[at + c]});
      winner = Sooner()(winner, Choice{s.race_time[at + c], s.race_token[at + c]});
    }
    raw_max = over_warp(raw_max, Larger());
    best = over_warp(best, Sooner());
    winner = over_warp(winner, Sooner());
    const float peak = subtrahend(-static_cast<float>(best.time) / o.temperature);
    double sum = 0.0, mass = 0.0;
    for (int c = lane(); c < s.chunks; c += 32) {
      sum += static_cast<double>(s.raw_sum[at + c] * expf(s.raw_max[at + c] - subtrahend(raw_max)));
      mass += static_cast<double>(s.mass[at + c] * expf(s.top[at + c] / o.temperature - peak));
    }
    sum = over_warp(sum, Plus());
    mass = over_warp(mass, Plus());
    if (lane() == 0) {
      shared.log_total = static_cast<double>(subtrahend(raw_max)) + std::log(sum);
      shared.mass = static_cast<float>(mass);
      shared.best = best;
      shared.winner = winner;
    }
  }
  __syncthreads();
  int token = o.draws ? shared.winner.token : shared.best.token;
  if (o.draws && o.filters) {
    // Nothing can be weighed in a row that is not finite: it keeps its highest token, and its NaN says so.
    const bool finite = std::fabs(shared.log_total) < INFINITY && std::fabs(shared.best.time) < INFINITY;
    token = finite ? filtered(shared, logits, o, s.group_top + row * s.groups, s.groups) : shared.best.token;
  }
  if (token < 0 || token >= vocab) token = vocab - 1;
  if (threadIdx.x != 0) return;
  advance(a, row, token, static_cast<double>(at(logits, token)) - shared.log_total);
}

int chunks_of(int64_t vocab) { return static_cast<int>((vocab + kChunk - 1) / kChunk); }
int groups_of(int64_t vocab) { return static_cast<int>((vocab + kGroup - 1) / kGroup); }

Scratch carve(const Sample& a, void* memory) {
  Scratch s{};
  s.chunks = chunks_of(a.vocab);
  s.groups = groups_of(a.vocab);
  const int64_t n = a.rows * s.chunks;
  s.race_time = static_cast<double*>(memory);
  s.raw_max = reinterpret_cast<float*>(s.race_time + n);
  s.raw_sum = s.raw_max + n;
  s.top = s.raw_sum + n;
  s.mass = s.top + n;
  s.top_token = reinterpret_cast<int*>(s.mass + n);
  s.race_token = s.top_token + n;
  s.group_top = reinterpret_cast<float*>(s.race_token + n);
  return s;
}

}  // namespace

int64_t sample_scratch(int64_t rows, int64_t vocab) {
  return rows * (int64_t{chunks_of(vocab)} * (8 + 6 * 4) + int64_t{groups_of(vocab)} * 4);
}

const char* sample(const Sample& a, void* scratch, const Stream& stream) {
  if (a.rows == 0) return nullptr;
  const Scratch s = carve(a, scratch);
  const int rows = static_cast<int>(a.rows);
  const char* error = launch(scan_kernel, s.chunks, rows, kScanThreads, sizeof(ScanShared), stream, a, s);
  if (error != nullptr) return error;
  return launch(choose_kernel, rows, 1, kChooseThreads, sizeof(ChooseShared), stream, a, s);
}

#ifdef __CUDACC__
const char* why_not(int device) {
  if (const char* wrong = not_current(device)) return wrong;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, scan_kernel);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}
#endif

}  // namespace cuda
}  // namespace icon2
