// From logits to tokens, a row at a time: transformers' processors in transformers' order, thresholds by radix instead
// of a sort, and a race of exponential draws of which nearly all are dismissed unseen.

// The largest of n > 0 scores, a NaN passed over.
static inline float largest(const float* scores, int64_t n) {
  V most = vset(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + W <= n; i += W) most = vmax(vload(scores + i), most);
  float m = vhmax(most);
  for (; i < n; ++i) m = scores[i] > m ? scores[i] : m;
  return m;
}

// weights = exp(scores − most); returns their sum. In runs, so that 128k terms do not lose digits.
static double exponentials(const float* scores, int64_t n, float most, float* weights) {
  double sum = 0.0;
  for (int64_t run = 0; run < n; run += 4096) {
    const int64_t length = n - run < 4096 ? n - run : 4096;
    V part = vset(0.0f);
    float tail = 0.0f;
    chunks(length, [&](int64_t i, int m) {
      const V weight = vexp(vsub(vload(scores + run + i, m), vset(most)));
      vstore(weights + run + i, weight, m);
      if (m == W) {
        part = vadd(part, weight);
      } else {
        for (int j = 0; j < m; ++j) tail += weights[run + i + j];
      }
    });
    sum += static_cast<double>(vsum(part)) + static_cast<double>(tail);
  }
  return sum;
}

// The k-th largest score.
static float kth_largest(const float* scores, int64_t n, uint64_t k) {
  uint32_t prefix = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    uint64_t bins[kBins] = {};
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = ordered_key(bits_of(scores[i]));
      if (decided(key, prefix, pass)) ++bins[digit(key, pass)];
    }
    const Pick pick = pick_from_top(bins, k);
    prefix |= static_cast<uint32_t>(pick.bin) << (24 - 8 * pass);
    k = pick.rest;
  }
  return float_of(key_bits(prefix));
}

// The smallest score that top_p keeps.
static float last_of_mass(const float* scores, const float* weights, int64_t n, float p) {
  uint64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += fixed_mass(weights[i]);
  uint64_t rest = droppable(total, p);
  uint32_t prefix = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    uint64_t bins[kBins] = {};
    for (int64_t i = 0; i < n; ++i) {
      if (!(weights[i] > 0.0f)) continue;
      const uint32_t key = ordered_key(bits_of(scores[i]));
      if (decided(key, prefix, pass)) bins[digit(key, pass)] += fixed_mass(weights[i]);
    }
    const Pick pick = pick_from_bottom(bins, rest);
    prefix |= static_cast<uint32_t>(pick.bin) << (24 - 8 * pass);
    rest = pick.rest;
  }
  return float_of(key_bits(prefix));
}

// argmin of −log1p(−u)/weight. As −log1p(−u) ≥ u, a token whose u/weight is not below the best time so far is out of
// the race without a logarithm; the margin covers the rounding of u and of the fp32 weights.
static int64_t race(const float* scores, const float* weights, int64_t n, float most, uint32_t index, uint32_t low,
                    uint32_t high) {
  double best = std::numeric_limits<double>::infinity();
  float limit = std::numeric_limits<float>::infinity();
  int64_t winner = 0;
  for (int64_t first = 0; first < n; first += 4) {
    const int lanes = n - first < 4 ? static_cast<int>(n - first) : 4;
    bool any = false;
    for (int j = 0; j < lanes; ++j) any |= weights[first + j] > 0.0f;
    if (!any) continue;
    const Words words = token_words(static_cast<uint32_t>(first >> 2), index, low, high);
    for (int j = 0; j < lanes; ++j) {
      const float weight = weights[first + j];
      const float u = uniform_nearly(words.x[j]);
      if (!(weight > 0.0f) || u > limit * weight) continue;
      const double time = -std::log1p(-uniform(words.x[j])) /
                          std::exp(static_cast<double>(scores[first + j]) - static_cast<double>(most));
      if (time < best) {
        best = time;
        limit = static_cast<float>(time) * 1.0001f;
        winner = first + j;
      }
    }
  }
  return winner;
}

template <class T>
static void sample_row(const Sample& a, int64_t row, float* scores, float* weights) {
  const int64_t n = a.vocab;
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
  chunks(n, [&](int64_t i, int m) { vstore(scores + i, vload(logits + i, m), m); });
  float most = largest(scores, n);
  const double raw_lse = static_cast<double>(most) + std::log(exponentials(scores, n, most, weights));

  const float penalty = a.repetition_penalty == nullptr ? 1.0f : a.repetition_penalty[row];
  if (penalty != 1.0f) {
    const bool* seen = a.seen + row * n;
    for (int64_t i = 0; i < n; ++i)
      if (seen[i]) scores[i] = penalised(scores[i], penalty);
  }
  const int32_t* eos = a.eos + row * a.eos_width;
  if (a.min_tokens != nullptr && a.generated[row] < a.min_tokens[row])
    for (int64_t e = 0; e < a.eos_width; ++e)
      if (eos[e] >= 0) scores[eos[e]] = -std::numeric_limits<float>::infinity();

  int64_t token = 0;
  if (a.sampled == nullptr || !a.sampled[row]) {
    most = largest(scores, n);
    while (token < n - 1 && scores[token] != most) ++token;
  } else {
    const float temperature = a.temperature == nullptr ? 1.0f : a.temperature[row];
    if (temperature != 1.0f) {
      const V divisor = vset(temperature);
      chunks(n, [&](int64_t i, int m) { vstore(scores + i, vdiv(vload(scores + i, m), divisor), m); });
    }
    most = largest(scores, n);
    exponentials(scores, n, most, weights);
    const int64_t k = a.top_k == nullptr ? n : a.top_k[row];
    if (k < n) {
      const float kth = kth_largest(scores, n, static_cast<uint64_t>(k > 1 ? k : 1));
      for (int64_t i = 0; i < n; ++i) weights[i] = scores[i] < kth ? 0.0f : weights[i];
    }
    const float p = a.top_p == nullptr ? 1.0f : a.top_p[row];
    if (p < 1.0f) {
      const float last = last_of_mass(scores, weights, n, p);
      for (int64_t i = 0; i < n; ++i) weights[i] = scores[i] < last ? 0.0f : weights[i];
    }
    const float least = a.min_p == nullptr ? 0.0f : a.min_p[row];
    if (least > 0.0f)
      for (int64_t i = 0; i < n; ++i) weights[i] = weights[i] < least ? 0.0f : weights[i];
    token = race(scores, weights, n, most, static_cast<uint32_t>(a.generated[row]),
                 static_cast<uint32_t>(a.seeds[2 * row]), static_cast<uint32_t>(a.seeds[2 * row + 1]));
  }

  advance(a, row, token, static_cast<double>(to_float(logits[token])) - raw_lse);
}

template <class T>
static void sample_of(const Sample& a) {
  parallel_for(a.rows, a.vocab * 16, [&](int64_t begin, int64_t end) {
    Scratch<float> scores(a.vocab), weights(a.vocab);
    for (int64_t row = begin; row < end; ++row)
      if (a.running[row]) sample_row<T>(a, row, scores.p, weights.p);
  });
}

static void sample(const Sample& a) {
  a.dtype == DType::f32 ? sample_of<float>(a) : a.dtype == DType::bf16 ? sample_of<bf16>(a) : sample_of<f16>(a);
}
