// The kernels for panels of one column: runs of memory, each with a statistic of its own, of which
// there may be very many and very short ones. Lanes go along a line.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace mlx_welford::cpu {
namespace {

constexpr int64_t kChunk = 4096;              // elements of a line between two merges
constexpr int64_t kFirstChunk = 8 * kLanes;   // whose mean is the first origin
constexpr int64_t kStagedLine = 32 * kLanes;  // lines up to here are streamed by way of a buffer
constexpr int64_t kStagedBytes = 8192;

/// Calls f(k, vector index, lanes) for the vectors of [begin, end): k = 0..3 says which of four
/// independent sums may take it, lanes < kLanes that it is the incomplete last one.
template <typename F>
inline __attribute__((always_inline)) void for_vectors(int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
    f(0, i, kLanes);
    f(1, i + kLanes, kLanes);
    f(2, i + 2 * kLanes, kLanes);
    f(3, i + 3 * kLanes, kLanes);
  }
  for (; i + kLanes <= end; i += kLanes) {
    f(0, i, kLanes);
  }
  if (i < end) {
    f(1, i, static_cast<int>(end - i));
  }
}

/// x - origin, zero in lanes beyond the end of the line.
template <typename T>
Vector difference(const T* x, int lanes, Vector origin) {
  return lanes == kLanes ? load<Vector>(x) - origin
                         : first_lanes(load_first(x, lanes) - origin, lanes);
}

struct LineSums {
  float first;
  float second;
};

/// sum (x - origin) and sum (x - origin)^2 over [begin, end).
template <typename T>
inline __attribute__((always_inline)) LineSums line_sums(const T* x, int64_t begin, int64_t end,
                                                         float origin) {
  const Vector o = broadcast(origin);
  Vector sum[4] = {};
  Vector square[4] = {};
  for_vectors(begin, end, [&](int k, int64_t i, int lanes) {
    const Vector d = difference(x + i, lanes, o);
    sum[k] += d;
    square[k] += d * d;
  });
  return {sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])),
          sum_of_lanes((square[0] + square[1]) + (square[2] + square[3]))};
}

/// As column_moments, with chunks in place of blocks, for n > kFirstChunk; short_line_moments has the
/// others.
template <typename T>
inline __attribute__((always_inline)) void line_moments(const T* x, int64_t n, double* mean,
                                                        double* m2) {
  const float start = load<float>(x);
  float centre = start + line_sums(x, 0, kFirstChunk, start).first / kFirstChunk;
  const double origin = centre;
  double relative_mean = 0;
  double total_m2 = 0;
  for (int64_t done = 0; done < n; done += kChunk) {
    const int64_t end = n - done < kChunk ? n : done + kChunk;
    const LineSums s = line_sums(x, done, end, centre);
    const double inverse = 1 / static_cast<double>(end - done);
    const double from_centre = s.first * inverse;
    const double chunk_m2 = s.second - s.first * from_centre;
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

/// The moments of `count` lines of n <= kFirstChunk elements. Some lines at a time take each step
/// together: what one line has to wait for in it, the others use.
template <typename T>
void short_line_moments(const T* x, int64_t count, int64_t n, double* mean, double* m2) {
  constexpr int64_t kAtOnce = 16;
  const int64_t first = n < kLanes ? n : kLanes;
  const float inverse_first = 1 / static_cast<float>(first);
  const double inverse = 1 / static_cast<double>(n);
  for (int64_t begin = 0; begin < count; begin += kAtOnce) {
    const int64_t lines = count - begin < kAtOnce ? count - begin : kAtOnce;
    float origin[kAtOnce];
    LineSums sums[kAtOnce];
    for (int64_t l = 0; l < lines; ++l) {
      const T* line = x + (begin + l) * n;
      const float start = load<float>(line);
      origin[l] = start + line_sums(line, 0, first, start).first * inverse_first;
    }
    for (int64_t l = 0; l < lines; ++l) {
      sums[l] = line_sums(x + (begin + l) * n, 0, n, origin[l]);
    }
    for (int64_t l = 0; l < lines; ++l) {
      const double from_origin = sums[l].first * inverse;
      const double line_m2 = sums[l].second - sums[l].first * from_origin;
      mean[begin + l] = origin[l] + from_origin;
      m2[begin + l] = line_m2 < 0 ? 0 : line_m2;
    }
  }
}

template <typename T>
inline __attribute__((always_inline)) void line_reduce(const T* x, const T* g, int64_t n,
                                                       float mean, double* sum_g, double* sum_gd) {
  const Vector m = broadcast(mean);
  double total_g = 0;
  double total_gd = 0;
  for (int64_t done = 0; done < n; done += kChunk) {
    Vector chunk_g[4] = {};
    Vector chunk_gd[4] = {};
    for_vectors(done, n - done < kChunk ? n : done + kChunk, [&](int k, int64_t i, int lanes) {
      const Vector gi = lanes == kLanes ? load<Vector>(g + i) : load_first(g + i, lanes);
      chunk_g[k] += gi;
      chunk_gd[k] += gi * difference(x + i, lanes, m);
    });
    total_g += sum_of_lanes((chunk_g[0] + chunk_g[1]) + (chunk_g[2] + chunk_g[3]));
    total_gd += sum_of_lanes((chunk_gd[0] + chunk_gd[1]) + (chunk_gd[2] + chunk_gd[3]));
  }
  *sum_g = total_g;
  *sum_gd = total_gd;
}

/// The coefficients of y = slope * (x - mean) + level [+ scale * g] for one line.
struct Line {
  Vector mean, slope, level, scale;

  template <bool kAdd>
  Vector operator()(Vector x, Vector g) const {
    const Vector y = slope * (x - mean) + level;
    return kAdd ? y + scale * g : y;
  }
};

/// One line of n elements. y may be x or g.
template <typename T, bool kAdd, bool kStream>
void line_affine(const T* x, const T* g, int64_t n, const Line& line, T* y) {
  auto part = [&](int64_t i, int64_t lanes) {
    if (lanes > 0) {
      store_first(y + i, lanes,
                  line.operator()<kAdd>(load_first(x + i, lanes),
                                        kAdd ? load_first(g + i, lanes) : Vector{}));
    }
  };
  int64_t i = 0;
  if constexpr (kStream) {
    i = elements_to_alignment(y) < n ? elements_to_alignment(y) : n;
    part(0, i);
  }
  for (; i + kLanes <= n; i += kLanes) {
    const Vector v =
        line.operator()<kAdd>(load<Vector>(x + i), kAdd ? load<Vector>(g + i) : Vector{});
    if constexpr (kStream) {
      stream(y + i, v);
    } else {
      store(y + i, v);
    }
  }
  part(i, n - i);
}

/// Short lines past the caches: lines end anywhere, and what is streamed must be whole vectors. So
/// some lines at a time are laid into a buffer in the first-level cache, as far from alignment as y
/// is, and go from there.
template <typename T, bool kAdd, typename LineOf>
void staged_lines(const T* x, const T* g, int64_t count, int64_t n, const LineOf& line, T* y) {
  alignas(64) T buffer[kStagedBytes / sizeof(T) + 2 * kLanes];
  const int64_t at_once = kStagedBytes / static_cast<int64_t>(sizeof(T)) / n;
  for (int64_t end = count; end > 0; end -= at_once) {
    const int64_t begin = end > at_once ? end - at_once : 0;
    const int64_t size = (end - begin) * n;
    T* out = y + begin * n;
    const int64_t head = elements_to_alignment(out);
    T* staged = buffer + (kLanes - head) % kLanes;
    for (int64_t l = begin; l < end; ++l) {
      const Line coefficients = line(l);
      for (int64_t i = 0; i < n; i += kLanes) {  // the next line overwrites what is too much
        const T* xi = x + l * n + i;
        const T* gi = kAdd ? g + l * n + i : nullptr;
        const Vector v = i + kLanes <= n
                             ? coefficients.template operator()<kAdd>(
                                   load<Vector>(xi), kAdd ? load<Vector>(gi) : Vector{})
                             : coefficients.template operator()<kAdd>(
                                   load_first(xi, n - i), kAdd ? load_first(gi, n - i) : Vector{});
        store(staged + (l - begin) * n + i, v);
      }
    }
    int64_t i = 0;
    for (; i < size && i < head; ++i) {
      out[i] = staged[i];
    }
    for (; i + kLanes <= size; i += kLanes) {
      stream_copy(out + i, staged + i);
    }
    for (; i < size; ++i) {
      out[i] = staged[i];
    }
  }
}

}  // namespace
}  // namespace mlx_welford::cpu
