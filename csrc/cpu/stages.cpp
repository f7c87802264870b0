#include "cpu/stages.h"

#include "cpu/parallel.h"

namespace mlx_welford::cpu {

namespace {

constexpr int64_t kTaskElements = 1 << 15;  // less work than this is not worth a task of its own

/// parallel_for over items of `elements` elements each, several small ones in one task.
void for_each(int64_t count, int64_t elements, const std::function<void(int64_t)>& item) {
  const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, elements));
  parallel_for(ceil_div(count, grain), [&](int64_t task) {
    for (int64_t i = task * grain; i < std::min(count, (task + 1) * grain); ++i) {
      item(i);
    }
  });
}

/// Merges the partial results of each of the slots [first, last) into its first one, in order.
/// Calls merge(into, from, n, count, more) for n neighbouring slots at a time: `count` values are
/// merged so far, `more` are added.
template <typename Merge>
void merge_partials(const Tiling& t, int64_t first, int64_t last, const Merge& merge) {
  while (first < last) {
    const int64_t end = std::min(last, t.end_of_neighbours(first));
    const int64_t into = t.partial(0, first, 0);
    int64_t count = 0;
    for (int64_t batch = 0; batch < t.batches(); ++batch) {
      for (int64_t piece = 0; piece < t.pieces(); ++piece) {
        const int64_t more = t.positions(piece) * t.repeats(batch);
        if (count > 0) {
          merge(into, t.partial(batch, first, piece), end - first, static_cast<double>(count),
                static_cast<double>(more));
        }
        count += more;
      }
    }
    first = end;
  }
}

}  // namespace

void run_stages(const Tiling& tiling, const Stages& stages) {
  const Geometry& g = tiling.geometry();
  const int64_t strips = tiling.strips();
  const int64_t pieces = tiling.pieces();
  const int threads = num_threads();

  if (tiling.strips_are_separate() && (strips >= 4 * threads || strips % threads == 0)) {
    for_each(strips, g.size() / strips, [&](int64_t i) {
      const Strip strip = tiling.strip(i);
      const int64_t first = tiling.first_slot(strip);
      Workspace workspace(tiling.first_partial(strip, 0), tiling.partials(strip), first,
                          strip.columns());
      for (int64_t piece = 0; stages.sweep && piece < pieces; ++piece) {
        stages.sweep(workspace, strip, piece);
      }
      stages.finalize(workspace, first, first + strip.columns());
      for (int64_t piece = pieces; stages.apply && piece-- > 0;) {
        stages.apply(workspace, strip, piece);
      }
    });
    return;
  }

  Workspace workspace(0, tiling.partials(), 0, g.slots());
  const int64_t tiles = strips * pieces;
  const int64_t tile_elements = g.size() / tiles;
  if (stages.sweep) {
    for_each(tiles, tile_elements, [&](int64_t tile) {
      stages.sweep(workspace, tiling.strip(tile % strips), tile / strips);
    });
  }
  const int64_t units = g.slots() / tiling.unit();
  const int64_t tasks = std::min<int64_t>(threads, units);
  for_each(tasks, tiling.batches() * pieces * ceil_div(g.slots(), tasks), [&](int64_t task) {
    stages.finalize(workspace, units * task / tasks * tiling.unit(),
                    units * (task + 1) / tasks * tiling.unit());
  });
  if (stages.apply) {
    for_each(tiles, tile_elements, [&](int64_t i) {
      const int64_t tile = tiles - 1 - i;
      stages.apply(workspace, tiling.strip(tile % strips), tile / strips);
    });
  }
}

void merge_moments(const Tiling& t, Workspace& w, int64_t first, int64_t last) {
  merge_partials(t, first, last,
                 [&](int64_t into, int64_t from, int64_t n, double count, double more) {
                   double* mean = w.first(into);
                   double* m2 = w.second(into);
                   const double* more_mean = w.first(from);
                   const double* more_m2 = w.second(from);
                   const double share = more / (count + more);
                   for (int64_t i = 0; i < n; ++i) {
                     const double d = more_mean[i] - mean[i];
                     mean[i] += d * share;
                     m2[i] += more_m2[i] + d * d * (count * share);
                   }
                 });
}

void merge_sums(const Tiling& t, Workspace& w, int64_t first, int64_t last) {
  merge_partials(t, first, last, [&](int64_t into, int64_t from, int64_t n, double, double) {
    for (int64_t i = 0; i < n; ++i) {
      w.first(into)[i] += w.first(from)[i];
      w.second(into)[i] += w.second(from)[i];
    }
  });
}

}  // namespace mlx_welford::cpu
