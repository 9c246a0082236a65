// What the programs under the sanitizers share: a check that ends them, and random numbers.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/scalar.h"

#define CHECK(condition)                                                 \
  if (!(condition)) {                                                    \
    std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                        \
  }

namespace icon2 {

inline std::mt19937& rng() {
  static std::mt19937 generator(0);
  return generator;
}

inline float normal() { return std::normal_distribution<float>()(rng()); }

template <class T>
std::vector<T> normals(int64_t n, float scale = 1.0f) {
  std::vector<T> v(static_cast<size_t>(n));
  for (T& x : v) x = from_float<T>(scale * normal());
  v.shrink_to_fit();
  return v;
}

}  // namespace icon2
