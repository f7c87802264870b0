// The kernels for panels of one column: runs of memory, each with a statistic of its own, of which
// there may be very many and very short ones. Lanes go along a line.
#pragma once

#include "cpu/kernels.h"
#include "cpu/maps.h"
#include "cpu/vector.h"

namespace mlx_welford::cpu {
namespace {

constexpr int64_t kChunk = kLanes < 8 ? 1024 : 4096;  // elements of a line between two merges
constexpr int64_t kShortLine = 128;    // lines up to here are taken several at a time
constexpr int64_t kManyVectors = 8;    // from here on there are four accumulators, to hide latency
constexpr int64_t kAheadBytes = 2048;  // to be fetched while accumulators take up the cache

/// Number of leading elements averaged for the first origin of a line of n: enough to resist an
/// outlier, few enough to be cheap. No fewer than 8 where vectors are shorter: digits would be
/// lost.
constexpr int64_t first_elements(int64_t n) {
  constexpr int64_t few = kLanes < 8 ? 8 : kLanes;
  return n < few ? n : n <= 32 * few ? few : 8 * few;
}

/// The vector of elements [i, i + lanes) of a line. If lanes < kLanes, they are the last lanes of a
/// full load that begins before i; only if the line is too short for that, they are the first
/// lanes.
template <typename T>
Vector values(const T* line, int64_t i, int lanes) {
  if (lanes == kLanes) {
    return load<Vector>(line + i);
  }
  const int64_t end = i + lanes;
  return end >= kLanes ? load<Vector>(line + end - kLanes) : load_first(line, end);
}

/// Writes these elements, from a vector v that holds them where `values` does.
template <typename T>
void store_values(T* line, int64_t i, int lanes, Vector v) {
  if (lanes == kLanes) {
    store(line + i, v);
  } else if (i + lanes >= kLanes) {
    store_last(line + i, lanes, v);
  } else {
    store_first(line, lanes, v);
  }
}

/// Zeros in all other lanes of such a vector.
inline Vector only_values(Vector v, int64_t i, int lanes) {
  if (lanes == kLanes) {
    return v;
  }
  if (i + lanes < kLanes) {
    return first_lanes(v, lanes);
  }
  return lanes_before(kLanes - lanes) ? Vector{} : v;
}

/// Two sums over a line, spread over lanes.
struct LineSums {
  Vector first;
  Vector second;
};

/// Calls add(sums, vector index, lanes) for the vectors of [begin, end), to add them to `sums`,
/// which are returned; lanes < kLanes says that it is the incomplete last one.
template <typename Add>
inline __attribute__((always_inline)) LineSums add_vectors(int64_t begin, int64_t end,
                                                           const Add& add) {
  LineSums sums = {};
  int64_t i = begin;
  if (end - begin >= kManyVectors * kLanes) {
    // By name: an array of accumulators stayed in memory, where half types took 1.6 times as long.
    LineSums b = {};
    LineSums c = {};
    LineSums d = {};
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      add(sums, i, kLanes);
      add(b, i + kLanes, kLanes);
      add(c, i + 2 * kLanes, kLanes);
      add(d, i + 3 * kLanes, kLanes);
    }
    sums.first = (sums.first + b.first) + (c.first + d.first);
    sums.second = (sums.second + b.second) + (c.second + d.second);
  }
  for (; i + kLanes <= end; i += kLanes) {
    add(sums, i, kLanes);
  }
  if (i < end) {
    add(sums, i, static_cast<int>(end - i));
  }
  return sums;
}

/// sum (x - origin) and sum (x - origin)^2 over [begin, end).
template <typename T>
inline __attribute__((always_inline)) LineSums centred_sums(const T* x, int64_t begin, int64_t end,
                                                            float origin) {
  const Vector o = broadcast(origin);
  return add_vectors(begin, end, [&](LineSums& sums, int64_t i, int lanes) {
    const Vector d = only_values(values(x, i, lanes) - o, i, lanes);
    sums.first += d;
    sums.second = multiply_add(d, d, sums.second);
  });
}

/// sum g and sum g * (x - mean) over [begin, end) of line c, whose first element is at e.
template <Activation activation, typename T>
inline __attribute__((always_inline)) LineSums gradient_sums(const Cotangent<activation, T>& of,
                                                             int64_t c, int64_t e, int64_t begin,
                                                             int64_t end) {
  const Vector m = broadcast(of.mean[c]);
  // Not left to flatten: with an activation a call per vector took up to 5 times as long.
  auto add = [&](LineSums& sums, int64_t i, int lanes) __attribute__((always_inline)) {
    const Vector d = values(of.x + e, i, lanes) - m;
    const Vector g = of(
        d, [&](const T* p) { return values(p + e, i, lanes); },
        [&](T* p, Vector v) { store_values(p + e, i, lanes, v); },
        [&](const float* p) { return broadcast(p[c]); });
    // Both: an infinite x in a lane that does not count would make it 0 * inf
    const Vector counted = only_values(g, i, lanes);
    sums.first += counted;
    sums.second = multiply_add(counted, only_values(d, i, lanes), sums.second);
  };
  return add_vectors(begin, end, add);
}

/// As column_moments, with chunks in place of blocks, for n > kShortLine; short_line_moments has
/// the others.
template <typename T>
inline __attribute__((always_inline)) void long_line_moments(const T* x, int64_t n, double* mean,
                                                             double* m2) {
  const int64_t first = first_elements(n);
  const float start = load<float>(x);
  float centre =
      start + sum_of_lanes(centred_sums(x, 0, first, start).first) / static_cast<float>(first);
  const double origin = centre;
  double relative_mean = 0;
  double total_m2 = 0;
  for (int64_t done = 0; done < n; done += kChunk) {
    const int64_t end = n - done < kChunk ? n : done + kChunk;
    const LineSums s = centred_sums(x, done, end, centre);
    const double sum = sum_of_lanes(s.first);
    const double from_centre = sum / static_cast<double>(end - done);
    const double chunk_m2 = sum_of_lanes(s.second) - sum * from_centre;
    total_m2 += chunk_m2 < 0 ? 0 : chunk_m2;
    if (done == 0) {
      relative_mean = from_centre;
    } else {
      const double share = static_cast<double>(end - done) / static_cast<double>(end);
      const double d = (centre - origin) + from_centre - relative_mean;
      relative_mean += d * share;
      total_m2 += d * d * (static_cast<double>(done) * share);
    }
    centre = static_cast<float>(origin + relative_mean);
  }
  *mean = origin + relative_mean;
  *m2 = total_m2;
}

/// The moments of `count` lines of n <= kShortLine elements. Several lines take each step together,
/// so that the latency of one is hidden by the others.
template <typename T>
void short_line_moments(const T* x, int64_t count, int64_t n, double* mean, double* m2) {
  constexpr int64_t kAtOnce = 16;
  const int64_t first = first_elements(n);
  const float inverse_first = 1 / static_cast<float>(first);
  const double inverse = 1 / static_cast<double>(n);
  for (int64_t begin = 0; begin < count; begin += kAtOnce) {
    const int64_t lines = count - begin < kAtOnce ? count - begin : kAtOnce;
    float origin[kAtOnce];
    float sum[kAtOnce];
    float square[kAtOnce];
    for (int64_t l = 0; l < lines; ++l) {
      const T* line = x + (begin + l) * n;
      const float start = load<float>(line);
      const Vector from_start = centred_sums(line, 0, first, start).first;
      origin[l] = start + sum_of_lanes(from_start) * inverse_first;
    }
    for (int64_t l = 0; l < lines; ++l) {
      const LineSums s = centred_sums(x + (begin + l) * n, 0, n, origin[l]);
      sum[l] = sum_of_lanes(s.first);
      square[l] = sum_of_lanes(s.second);
    }
    for (int64_t l = 0; l < lines; ++l) {
      const double from_origin = sum[l] * inverse;
      const double line_m2 = square[l] - sum[l] * from_origin;
      mean[begin + l] = origin[l] + from_origin;
      m2[begin + l] = line_m2 < 0 ? 0 : line_m2;
    }
  }
}

/// Adds of_line(c, its first element) to sums[c] in every repetition but `without`.
template <typename OfLine>
inline __attribute__((always_inline)) void add_repetitions(const Panel& panel, int64_t without,
                                                           const OfLine& of_line, LineSums* sums) {
  for (int64_t c = 0; c < panel.count; ++c) {
    sums[c] = LineSums{};
  }
  for (int64_t r = 0; r < panel.repeats; ++r) {
    for (int64_t c = 0; r != without && c < panel.count; ++c) {
      const LineSums s = of_line(c, r * panel.apart + c * panel.positions);
      sums[c].first += s.first;
      sums[c].second += s.second;
    }
  }
}

/// Merges the moments of lines that come again with those in `mean` and `m2`, which are of
/// `origin_repetition` and make its mean the origin of all others.
template <typename T>
void merge_repetitions(const T* x, const Panel& panel, int64_t origin_repetition, double* mean,
                       double* m2) {
  LineSums sums[kMaxRepeatedLines];
  add_repetitions(
      panel, origin_repetition,
      [&](int64_t c, int64_t e) {
        for (int64_t i = 0; i < panel.positions; i += kLineBytes / sizeof(T)) {
          __builtin_prefetch(x + e + i + kAheadBytes / sizeof(T));
        }
        return centred_sums(x + e, 0, panel.positions, static_cast<float>(mean[c]));
      },
      sums);
  const auto count = static_cast<double>(panel.positions);
  const double more = count * static_cast<double>(panel.repeats - 1);
  const double share = more / (count + more);
  for (int64_t c = 0; c < panel.count; ++c) {
    const double origin = static_cast<float>(mean[c]);
    const double sum = sum_of_lanes(sums[c].first);
    const double from_origin = sum / more;
    const double more_m2 = sum_of_lanes(sums[c].second) - sum * from_origin;
    const double d = (origin - mean[c]) + from_origin;
    mean[c] += d * share;
    m2[c] += (more_m2 < 0 ? 0 : more_m2) + d * d * (count * share);
  }
}

template <typename T>
void line_moments(const T* x, const Panel& panel, double* mean, double* m2) {
  const int64_t n = panel.positions;
  const int64_t middle = panel.repeats / 2;  // in a sorted batch the nearest to all others
  const T* lines = x + middle * panel.apart;
  if (n <= kShortLine) {
    short_line_moments(lines, panel.count, n, mean, m2);
  } else {
    for (int64_t c = 0; c < panel.count; ++c) {
      long_line_moments(lines + c * n, n, mean + c, m2 + c);
    }
  }
  if (panel.repeats > 1) {
    merge_repetitions(x, panel, middle, mean, m2);
  }
}

/// `of` is a copy, which no store to the sums can change: its fields stay in registers.
template <Activation activation, typename T>
__attribute__((noinline, flatten)) void line_reduce(const Cotangent<activation, T> of,
                                                    const Panel& panel, double* sum_g,
                                                    double* sum_gd) {
  const int64_t n = panel.positions;
  if (panel.repeats > 1) {
    LineSums sums[kMaxRepeatedLines];
    add_repetitions(
        panel, -1, [&](int64_t c, int64_t e) { return gradient_sums(of, c, e, 0, n); }, sums);
    for (int64_t c = 0; c < panel.count; ++c) {
      sum_g[c] = sum_of_lanes(sums[c].first);
      sum_gd[c] = sum_of_lanes(sums[c].second);
    }
    return;
  }
  for (int64_t c = 0; c < panel.count; ++c) {
    double total_g = 0;
    double total_gd = 0;
    for (int64_t done = 0; done < n; done += kChunk) {
      const int64_t end = n - done < kChunk ? n : done + kChunk;
      const LineSums s = gradient_sums(of, c, c * n, done, end);
      total_g += sum_of_lanes(s.first);
      total_gd += sum_of_lanes(s.second);
    }
    sum_g[c] = total_g;
    sum_gd[c] = total_gd;
  }
}

/// Applies a map to `count` lines of n elements as one run of memory: a vector may hold the end of
/// a line and the beginning of others, so that all but the first and the last of them are whole
/// and, where they are streamed, aligned. Coefficients are arrays over lines. out may be x or
/// second.
template <template <typename> class Map, typename T>
__attribute__((flatten)) void line_apply(const T* x, const T* second, int64_t count, int64_t n,
                                         const float* const* coefficients, float negative_slope,
                                         T* out, bool past_caches) {
  const float* of[Map<float>::kCoefficients];  // a copy, which no store to out can change
  for (int k = 0; k < Map<float>::kCoefficients; ++k) {
    of[k] = coefficients[k];
  }
  auto map_of = [&](int64_t line) {
    return Map<Vector>::from([&](int k) { return broadcast(of[k][line]); }, negative_slope);
  };
  int64_t l = 0;
  Map<Vector> map = map_of(0);  // that of the next element
  auto across_lines = [&](int64_t i, int64_t lanes) {
    Map<Vector> mixed = map;
    for (int64_t end = (l + 1) * n; end < i + lanes; end += n) {
      map = map_of(++l);
      const auto here = lanes_before(end - i);
      mixed = Map<Vector>::merged(mixed, map, [&](Vector a, Vector b) { return here ? a : b; });
    }
    return mixed;
  };
  auto whole = [&](int64_t i, const Map<Vector>& f) {
    const Vector from_second = second == nullptr ? Vector{} : load<Vector>(second + i);
    const Vector v = f(load<Vector>(x + i), from_second, second != nullptr);
    if (past_caches) {
      stream(out + i, v);
    } else {
      store(out + i, v);
    }
  };
  auto part = [&](int64_t i, int64_t lanes) {
    if (lanes > 0) {
      const Map<Vector> f = across_lines(i, lanes);
      const Vector from_second = second == nullptr ? Vector{} : load_first(second + i, lanes);
      store_first(out + i, lanes, f(load_first(x + i, lanes), from_second, second != nullptr));
    }
  };

  const int64_t size = count * n;
  int64_t i = 0;
  if (past_caches) {
    i = elements_to_multiple(out, kLanes * sizeof(T), size);
    part(0, i);
  }
  while (i + kLanes <= size) {
    const Map<Vector> of_line = map;  // a copy, which stays in registers
    for (const int64_t end = (l + 1) * n; i + kLanes <= end; i += kLanes) {
      whole(i, of_line);
    }
    if (i + kLanes <= size) {
      whole(i, across_lines(i, kLanes));
      i += kLanes;
    }
  }
  part(i, size - i);
}

}  // namespace
}  // namespace mlx_welford::cpu
