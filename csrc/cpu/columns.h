// The kernels for panels of several columns: lanes go across columns, so no sum is reassociated.
//
// Columns are taken in bundles of a few vectors, whose sums or coefficients stay in registers on
// the way down some rows. For sums narrow panels are folded: with fewer columns than a bundle,
// `fold` positions are taken as one wider row, and its columns are merged at the end.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/maps.h"
#include "cpu/vector.h"

namespace mlx_welford::cpu {
namespace {

constexpr int64_t kBlockRows = 128;  // between two merges
constexpr int64_t kGroupRows = 8;    // summed in registers, then added to the sum of a block
constexpr int64_t kFirstRows = 16;   // averaged for the first origin
constexpr int64_t kMappedRows = 4;   // for which coefficients are loaded once
constexpr int64_t kNarrow = 1024;    // columns whose coefficients fit the first-level cache

// Of a row, from which on moments take the rows of a group side by side. Down a bundle, rows of 2
// or 4 KB would all fall into the same few sets of the caches: 512 columns took 1.4 times as long.
constexpr int64_t kManyBytes = 2048;

constexpr int64_t kBundleColumns = 4 * kLanes;

/// Neighbouring columns: `count` vectors, or a single one with V = float.
template <typename V, int count>
struct Bundle {
  using Value = V;
  static constexpr int kCount = count;
  static constexpr int64_t columns() { return count * sizeof(V) / sizeof(float); }

  template <typename T>
  static V load(const T* p) {
    return mlx_welford::cpu::load<V>(p);
  }
  template <typename T>
  static void store(T* p, V v, bool streamed = false) {
    if constexpr (sizeof(V) > sizeof(float)) {
      if (streamed) {
        return stream(p, v);
      }
    }
    mlx_welford::cpu::store(p, v);
  }
};

/// n < kLanes columns at once, where the instruction set has masks.
struct Part {
  using Value = Vector;
  static constexpr int kCount = 1;
  int64_t n;

  int64_t columns() const { return n; }

  template <typename T>
  Vector load(const T* p) const {
    return load_first(p, n);
  }
  template <typename T>
  void store(T* p, Vector v, bool = false) const {
    store_first(p, n, v);
  }
};

/// Calls f(Bundle or Part, j) for the columns [begin, end), vector by vector.
template <typename F>
inline __attribute__((always_inline)) void by_vector(int64_t begin, int64_t end, const F& f) {
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) {
    f(Bundle<Vector, 1>{}, j);
  }
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if (j < end) {
    f(Part{end - j}, j);
  }
#else
  for (; j < end; ++j) {
    f(Bundle<float, 1>{}, j);
  }
#endif
}

/// The same with bundles of several vectors as far as they go.
template <int vectors, typename F>
inline __attribute__((always_inline)) void by_bundle(int64_t begin, int64_t end, const F& f) {
  int64_t j = begin;
  if constexpr (vectors > 1) {
    for (; j + vectors * kLanes <= end; j += vectors * kLanes) {
      f(Bundle<Vector, vectors>{}, j);
    }
  }
  by_vector(j, end, f);
}

/// Smallest repeat count whose width reaches `unit`; a larger one whose width is an exact multiple,
/// if it fits in kNarrow.
inline int64_t times_to_whole(int64_t width, int64_t unit) {
  const int64_t least = (unit + width - 1) / width;
  for (int64_t times = least; times * width <= kNarrow; ++times) {
    if (times * width % unit == 0) {
      return times;
    }
  }
  return least;
}

/// A panel as wide rows: `rows` full ones, then one with `rest` columns.
struct Fold {
  int64_t fold = 1;
  int64_t width;
  int64_t stride;
  int64_t rows;
  int64_t rest;
  int64_t used;  // columns that hold anything

  explicit Fold(const Panel& p) {
    if (p.stride == p.width && p.width < kBundleColumns) {
      fold = times_to_whole(p.width, kBundleColumns);
    }
    width = fold * p.width;
    stride = fold * p.stride;
    rows = p.positions / fold;
    rest = (p.positions - rows * fold) * p.width;
    used = rows > 0 ? width : rest;
  }

  /// Per-column values for the folded row.
  const float* repeat(const float* values, int64_t panel_width, float* __restrict buffer) const {
    if (fold == 1) {
      return values;
    }
    for (int64_t j = 0, c = 0; j < width; ++j) {
      buffer[j] = values[c];
      c = c + 1 == panel_width ? 0 : c + 1;
    }
    return buffer;
  }

  /// total[c] = lanes[c] + lanes[c + panel_width] + ...
  void gather(const float* lanes, int64_t panel_width, double* total) const {
    for (int64_t c = 0; c < panel_width; ++c) {
      total[c] = lanes[c];
    }
    for (int64_t j = panel_width; j < used; j += panel_width) {
      for (int64_t c = 0; c < panel_width; ++c) {
        total[c] += lanes[j + c];
      }
    }
  }
};

/// Prefetches rows into the second-level cache in the order of memory, a part at each step of the
/// work on the rows before: the processor's own prefetcher does not predict accesses that go down
/// bundles of columns.
template <typename T>
class Ahead {
 public:
  Ahead(const T* row, int64_t stride, int64_t width) : row_(row), stride_(stride), width_(width) {}

  inline __attribute__((always_inline)) void fetch(int64_t elements) {
    if (width_ <= kBundleColumns) {
      return;  // these are read in the order of memory
    }
    for (int64_t i = 0; i < elements; i += kLineBytes / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(row_ + column_ + i, 0, 2);
    }
    column_ += elements;
    if (column_ >= width_) {
      column_ -= width_;
      row_ += stride_;
    }
  }

 private:
  const T* row_;
  int64_t stride_;
  int64_t width_;
  int64_t column_ = 0;
};

/// The same for two arrays, in turns, since longer runs of memory are faster. The second may be
/// null.
template <typename T>
class AheadOfTwo {
 public:
  AheadOfTwo(const T* first, const T* second, int64_t stride, int64_t width)
      : first_(first, stride, width),
        second_(second, stride, width),
        arrays_(second == nullptr ? 1 : 2) {}

  inline __attribute__((always_inline)) void fetch(int64_t elements) {
    (turn_ ? first_ : second_).fetch(arrays_ * elements);
    turn_ = arrays_ == 1 || !turn_;
  }

 private:
  Ahead<T> first_;
  Ahead<T> second_;
  int64_t arrays_;
  bool turn_ = true;
};

/// Calls f(row) for `rows` rows, at most `most`. In versions each has instructions of its own: by
/// them the processor's prefetcher tells streams of memory apart. A loop took 1.3 times as long.
template <bool versions, int64_t most, typename F>
inline __attribute__((always_inline)) void for_rows(int64_t rows, const F& f) {
  if constexpr (!versions) {
    for (int64_t r = 0; r < rows; ++r) {
      f(r);
    }
  } else {
    [&]<int64_t... r>(std::integer_sequence<int64_t, r...>) __attribute__((always_inline)) {
      static_cast<void>(((r < rows && (f(r), true)) && ...));
    }(std::make_integer_sequence<int64_t, most>{});
  }
}

/// first[j] += sum of f and second[j] += sum of s over rows, where term(bundle, r, j, f, s) adds to
/// f and s what row r holds in the columns from j on. Sums of sums: a long plain sum would lose
/// digits. ahead(r) is the Ahead from row r on. From `streams` columns on, if that is not 0, the
/// rows of a group advance side by side, each with instructions of its own (see for_rows).
template <int vectors, int64_t streams = 0, typename AheadOf, typename Term>
inline __attribute__((always_inline)) void sum_rows(int64_t rows, int64_t width,
                                                    float* __restrict first,
                                                    float* __restrict second, const AheadOf& ahead,
                                                    const Term& term) {
  for (int64_t done = 0; done < rows; done += kGroupRows) {
    const int64_t end = rows - done < kGroupRows ? rows : done + kGroupRows;
    auto next = ahead(end);
    auto down = [&](auto bundle, int64_t begin, auto whole) __attribute__((always_inline)) {
      using V = typename decltype(bundle)::Value;
      V f[bundle.kCount]{};
      V s[bundle.kCount]{};
      auto add_row = [&](int64_t r) __attribute__((always_inline)) {
        for (int i = 0; i < bundle.kCount; ++i) {
          term(bundle, r, begin + i * kLanes, f[i], s[i]);
        }
      };
      if constexpr (whole) {
        next.fetch(kGroupRows * bundle.columns());
        for_rows<true, kGroupRows>(
            kGroupRows, [&](int64_t r) __attribute__((always_inline)) { add_row(done + r); });
      } else {
        for (int64_t r = done; r < end; ++r) {
          next.fetch(bundle.columns());
          add_row(r);
        }
      }
      for (int i = 0; i < bundle.kCount; ++i) {
        const int64_t j = begin + i * kLanes;
        bundle.store(first + j, bundle.load(first + j) + f[i]);
        bundle.store(second + j, bundle.load(second + j) + s[i]);
      }
    };
    if (streams != 0 && width >= streams && end - done == kGroupRows) {
      by_vector(0, width, [&](auto bundle, int64_t begin) __attribute__((always_inline)) {
        down(bundle, begin, std::true_type{});
      });
    } else {
      by_bundle<vectors>(0, width, [&](auto bundle, int64_t begin) __attribute__((always_inline)) {
        down(bundle, begin, std::false_type{});
      });
    }
  }
}

/// sum[j] += sum of (x - origin) and square[j] += sum of (x - origin)^2, over rows.
template <typename T>
void centred_sums(const T* x, int64_t rows, int64_t stride, int64_t width, const float* origin,
                  float* sum, float* square) {
  sum_rows<4, kManyBytes / sizeof(T)>(
      rows, width, sum, square, [&](int64_t r) { return Ahead<T>(x + r * stride, stride, width); },
      [&](auto bundle, int64_t r, int64_t j, auto& s, auto& q) {
        const auto d = bundle.load(x + r * stride + j) - bundle.load(origin + j);
        s += d;
        q = multiply_add(d, d, q);
      });
}

/// The moments of columns so far, and what is needed to add to them.
struct ColumnMoments {
  alignas(64) float origin[kMaxPanelWidth];
  alignas(64) float centre[kMaxPanelWidth];  // the mean, rounded: what the next sums are about
  alignas(64) float relative_mean[kMaxPanelWidth];  // to origin: float32 resolves that far better
  alignas(64) float m2[kMaxPanelWidth];
  alignas(64) float sum[kMaxPanelWidth];
  alignas(64) float square[kMaxPanelWidth];

  void clear_sums(int64_t columns) {
    for (int64_t j = 0; j < columns; ++j) {
      sum[j] = 0;
      square[j] = 0;
    }
  }
};

/// Begins with no values, about the mean of the first rows.
template <typename T>
void find_origin(const T* x, const Panel& panel, const Fold& f, ColumnMoments& c, double* mean) {
  for (int64_t j = 0; j < panel.width; ++j) {
    c.relative_mean[j] = load<float>(x + j);
  }
  const float* first_row = f.repeat(c.relative_mean, panel.width, c.centre);
  const int64_t rows = f.rows == 0 ? 1 : (f.rows < kFirstRows ? f.rows : kFirstRows);
  c.clear_sums(f.used);
  centred_sums(x, rows, f.stride, f.used, first_row, c.sum, c.square);
  f.gather(c.sum, panel.width, mean);
  const double inverse = 1 / static_cast<double>(rows * (f.used / panel.width));
  for (int64_t j = 0; j < panel.width; ++j) {
    c.square[j] = static_cast<float>(c.relative_mean[j] + mean[j] * inverse);
  }
  const float* first_mean = f.repeat(c.square, panel.width, c.origin);
  for (int64_t j = 0; j < f.used; ++j) {
    c.origin[j] = c.centre[j] = first_mean[j];
    c.relative_mean[j] = 0;
    c.m2[j] = 0;
  }
}

/// Adds a block of `rows` full rows to `done` ones by Chan's formula.
template <typename T>
void add_block(const T* x, int64_t rows, int64_t done, const Fold& f, ColumnMoments& c) {
  c.clear_sums(f.used);
  centred_sums(x, rows, f.stride, f.width, c.centre, c.sum, c.square);
  const float n = static_cast<float>(rows);
  const float inverse = 1 / n;
  const float share = n / static_cast<float>(done + rows);  // b.n / (a.n + b.n)
  const float between = static_cast<float>(done) * share;   // a.n * b.n / (a.n + b.n)
  for (int64_t j = 0; j < f.width; ++j) {
    const float from_centre = c.sum[j] * inverse;
    const float block_m2 = c.square[j] - c.sum[j] * from_centre;
    const float d = ((c.centre[j] - c.origin[j]) + from_centre) - c.relative_mean[j];
    c.relative_mean[j] += d * share;
    c.m2[j] += (block_m2 < 0 ? 0 : block_m2) + d * d * between;
    c.centre[j] = c.origin[j] + c.relative_mean[j];
  }
}

/// Adds the incomplete last row by Welford's formula.
template <typename T>
void add_rest(const T* last, const Fold& f, ColumnMoments& c) {
  const float n = static_cast<float>(f.rows + 1);
  for (int64_t j = 0; j < f.rest; ++j) {
    const float d = (load<float>(last + j) - c.origin[j]) - c.relative_mean[j];
    c.relative_mean[j] += d / n;
    c.m2[j] += d * d * (static_cast<float>(f.rows) / n);
  }
}

/// Merges the folded columns, by Chan's formula for many sets at once:
/// mean = sum n_j mean_j / n,  m2 = sum m2_j + n_j (mean_j - mean)^2
inline void merge_folded(const Panel& panel, const Fold& f, ColumnMoments& c, double* mean) {
  for (int64_t j = 0; j < f.used; ++j) {
    c.sum[j] = c.relative_mean[j] * static_cast<float>(f.rows + (j < f.rest));
  }
  f.gather(c.sum, panel.width, mean);
  for (int64_t j = 0; j < panel.width; ++j) {
    mean[j] /= static_cast<double>(panel.positions);
    c.square[j] = static_cast<float>(mean[j]);
  }
  const float* __restrict merged_mean = f.repeat(c.square, panel.width, c.sum);
  for (int64_t j = 0; j < f.used; ++j) {
    const float d = c.relative_mean[j] - merged_mean[j];
    c.m2[j] += d * d * static_cast<float>(f.rows + (j < f.rest));
  }
}

/// The moments of one panel of several columns.
///
/// Blocks of rows are summed about the mean c of the rows before, and merged by Chan's formula:
///   block: mean = c + s/n,  m2 = q - s^2/n  with  s = sum (x - c),  q = sum (x - c)^2
/// If c is far from the block's mean, the difference loses digits. But then the merge adds that
/// distance to m2 again, times at least half as many values, so the error stays a few units in the
/// last place of the whole. The first c is the mean of the first rows, for which the same holds.
template <typename T>
void column_moments(const T* x, const Panel& panel, double* mean, double* m2) {
  const Fold f(panel);
  ColumnMoments c;
  find_origin(x, panel, f, c, mean);
  for (int64_t done = 0; done < f.rows; done += kBlockRows) {
    const int64_t rows = f.rows - done < kBlockRows ? f.rows - done : kBlockRows;
    add_block(x + done * f.stride, rows, done, f, c);
  }
  if (f.rest > 0) {
    add_rest(x + f.rows * f.stride, f, c);
  }
  if (f.fold > 1) {
    merge_folded(panel, f, c, mean);
  } else {
    f.gather(c.relative_mean, panel.width, mean);
  }
  f.gather(c.m2, panel.width, m2);
  for (int64_t j = 0; j < panel.width; ++j) {
    mean[j] += c.origin[j];
  }
}

/// Adds the sums of g and of g * (x - mean) over `rows` rows of `width` columns, from element e on.
template <Activation activation, typename T>
__attribute__((noinline, flatten)) void gradient_sums(const Cotangent<activation, T>& of, int64_t e,
                                                      int64_t rows, int64_t stride, int64_t width,
                                                      float* sum_g, float* sum_gd) {
  sum_rows<bundle_vectors(activation)>(
      rows, width, sum_g, sum_gd,
      [&](int64_t r) {
        const int64_t next = e + r * stride;
        return AheadOfTwo<T>(of.x + next, of.h + next, stride, width);
      },
      [&](auto bundle, int64_t r, int64_t j, auto& sum, auto& product) {
        const int64_t i = e + r * stride + j;
        const auto d = bundle.load(of.x + i) - bundle.load(of.mean + j);
        const auto g = of(
            d, [&](const T* p) { return bundle.load(p + i); },
            [&](T* p, auto v) { bundle.store(p + i, v); },
            [&](const float* p) { return bundle.load(p + j); });
        sum += g;
        product = multiply_add(g, d, product);
      });
}

template <Activation activation, typename T>
void column_reduce(Cotangent<activation, T> of, const Panel& panel, double* sum_g, double* sum_gd) {
  const Fold f(panel);
  alignas(64) float repeated[3][kMaxPanelWidth];
  alignas(64) float block_g[kMaxPanelWidth];
  alignas(64) float block_gd[kMaxPanelWidth];
  alignas(64) float total_g[kMaxPanelWidth];
  alignas(64) float total_gd[kMaxPanelWidth];
  of.mean = f.repeat(of.mean, panel.width, repeated[0]);
  if (of.slope != nullptr) {
    of.slope = f.repeat(of.slope, panel.width, repeated[1]);
    of.shift = f.repeat(of.shift, panel.width, repeated[2]);
  }
  for (int64_t j = 0; j < f.used; ++j) {
    total_g[j] = 0;
    total_gd[j] = 0;
  }
  for (int64_t done = 0; done < f.rows; done += kBlockRows) {
    for (int64_t j = 0; j < f.width; ++j) {
      block_g[j] = 0;
      block_gd[j] = 0;
    }
    const int64_t rows = f.rows - done < kBlockRows ? f.rows - done : kBlockRows;
    gradient_sums(of, done * f.stride, rows, f.stride, f.width, block_g, block_gd);
    for (int64_t j = 0; j < f.width; ++j) {
      total_g[j] += block_g[j];
      total_gd[j] += block_gd[j];
    }
  }
  if (f.rest > 0) {
    gradient_sums(of, f.rows * f.stride, 1, f.stride, f.rest, total_g, total_gd);
  }
  f.gather(total_g, panel.width, sum_g);
  f.gather(total_gd, panel.width, sum_gd);
}

/// Calls f(begin, end, streamed) for what lies in [0, size) before the first cache line that begins
/// at or behind p, and for the rest. Only whole lines are streamed.
template <typename T, typename F>
inline __attribute__((always_inline)) void in_parts(const T* p, int64_t size, bool past_caches,
                                                    const F& f) {
  const int64_t ends[] = {past_caches ? elements_to_multiple(p, kLineBytes, size) : 0, size};
  int64_t begin = 0;
  for (int part = 0; part < 2; ++part) {
    f(begin, ends[part], past_caches && part == 1);
    begin = ends[part];
  }
}

/// Calls f with a condition that holds for all rows as a constant: no loop has a branch for it.
template <typename F>
inline __attribute__((always_inline)) void with_condition(bool condition, const F& f) {
  condition ? f(std::true_type{}) : f(std::false_type{});
}

/// What a map is applied to, and its coefficients, an array over columns each.
template <template <typename> class Map, typename T>
struct Mapped {
  static constexpr bool kVersions = has_versions<T>(Map<float>::kActivation);

  const T* x;
  const T* second;  // may be null
  T* out;
  float negative_slope;
  const float* coefficients[Map<float>::kCoefficients];

  template <typename B>
  Map<typename B::Value> map(const B& bundle, int64_t column) const {
    return Map<typename B::Value>::from(
        [&](int k) { return bundle.load(coefficients[k] + column); }, negative_slope);
  }
  template <typename B, typename V>
  inline __attribute__((always_inline)) void apply(const B& bundle, const Map<V>& map, int64_t e,
                                                   bool has_second, bool streamed) const {
    const V from_x = bundle.load(x + e);
    V from_second{};
    if (has_second) {
      from_second = bundle.load(second + e);
    }
    bundle.store(out + e, map(from_x, from_second, has_second), streamed);
  }
};

/// Applies a map to the columns [begin, end) of some rows.
template <template <typename> class Map, typename T, typename Second, typename Streamed>
inline __attribute__((always_inline)) void map_columns(const Mapped<Map, T>& a, int64_t rows,
                                                       int64_t stride, int64_t begin, int64_t end,
                                                       AheadOfTwo<T>& ahead, Second has_second,
                                                       Streamed streamed) {
  auto down = [&](auto bundle, int64_t first) __attribute__((always_inline)) {
    Map<typename decltype(bundle)::Value> maps[bundle.kCount];
    for (int i = 0; i < bundle.kCount; ++i) {
      maps[i] = a.map(bundle, first + i * kLanes);
    }
    for_rows<(bundle.kCount > 1 && Mapped<Map, T>::kVersions), kMappedRows>(
        rows, [&](int64_t r) __attribute__((always_inline)) {
          ahead.fetch(bundle.columns());
          for (int i = 0; i < bundle.kCount; ++i) {
            a.apply(bundle, maps[i], r * stride + first + i * kLanes, has_second, streamed);
          }
        });
  };
  by_bundle<Map<float>::kVectors>(begin, end, down);
}

/// Applies a map to some rows. If there are several and out is streamed, all are aligned alike.
template <template <typename> class Map, typename T>
__attribute__((noinline, flatten)) void map_rows(const Mapped<Map, T> a, int64_t rows,
                                                 int64_t stride, int64_t width, bool past_caches) {
  auto with_second = [&](auto has_second) __attribute__((always_inline)) {
    const int64_t next = rows * stride;
    AheadOfTwo<T> ahead(a.x + next, has_second ? a.second + next : nullptr, stride, width);
    auto part = [&](int64_t begin, int64_t end, bool past) __attribute__((always_inline)) {
      auto columns = [&](auto streamed) __attribute__((always_inline)) {
        map_columns(a, rows, stride, begin, end, ahead, has_second, streamed);
      };
      if constexpr (Mapped<Map, T>::kVersions) {
        with_condition(past, columns);
      } else {
        columns(past);
      }
    };
    in_parts(a.out, width, past_caches, part);
  };
  with_condition(a.second != nullptr || Map<float>::kNeedsSecond, with_second);
}

/// Applies a map to one run of memory. Vectors cross the ends of rows: the columns repeat after
/// `period`, and arrays over columns are kLanes longer than that.
template <template <typename> class Map, typename T>
__attribute__((noinline, flatten)) void map_run(const Mapped<Map, T> a, int64_t size,
                                                int64_t period, bool past_caches) {
  int64_t column = 0;
  in_parts(a.out, size, past_caches, [&](int64_t begin, int64_t end, bool streamed) {
    by_vector(begin, end, [&](auto bundle, int64_t e) {
      a.apply(bundle, a.map(bundle, column), e, a.second != nullptr, streamed);
      column += bundle.columns();
      column -= column < period ? 0 : period;
    });
  });
}

/// out may be x or second: each element is read before it is written.
template <template <typename> class Map, typename T>
void column_apply(Mapped<Map, T> a, const Panel& panel, bool past_caches) {
  // Several rows at a time: if streamed, each in whole cache lines, and more than one at a time.
  const bool together = !past_caches || (panel.stride * sizeof(T) % kLineBytes == 0 &&
                                         Map<float>::kVectors * kLanes * sizeof(T) > kLineBytes);
  if (panel.stride == panel.width && (panel.width <= kNarrow || !together)) {
    const int64_t period = times_to_whole(panel.width, kLanes) * panel.width;
    float repeated[Map<float>::kCoefficients][kMaxPanelWidth + kLanes];
    for (int k = 0; k < Map<float>::kCoefficients; ++k) {
      __builtin_memcpy(repeated[k], a.coefficients[k], panel.width * sizeof(float));
      for (int64_t j = panel.width; j < period + kLanes; ++j) {
        repeated[k][j] = repeated[k][j - panel.width];
      }
      a.coefficients[k] = repeated[k];
    }
    return map_run(a, panel.positions * panel.width, period, past_caches);
  }
  const int64_t at_once = together ? kMappedRows : 1;
  for (int64_t r = 0; r < panel.positions; r += at_once) {
    const int64_t rows = panel.positions - r < at_once ? panel.positions - r : at_once;
    map_rows(a, rows, panel.stride, panel.width, past_caches);
    a.x += at_once * panel.stride;
    a.second += a.second == nullptr ? 0 : at_once * panel.stride;
    a.out += at_once * panel.stride;
  }
}

}  // namespace
}  // namespace mlx_welford::cpu
