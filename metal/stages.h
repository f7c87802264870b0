// What a thread does with the elements that it walks over: find moments, find sums, apply.
#pragma once

#include "access.h"
#include "maps.h"

/// Moments of the values that went through one lane of a thread's vectors; how many they are, the
/// thread knows. The mean is origin + offset, and the origin is the first value.
struct Chain {
  float origin;
  float offset;
  float m2;
};

/// Chan's merge of four values into a chain of n, with share = 4 / (n + 4).
inline Chain add_block(Chain a, float n, float share, float v0, float v1, float v2, float v3) {
  const float origin = n == 0.0f ? v0 : a.origin;
  const float e0 = v0 - origin;
  const float e1 = v1 - origin;
  const float e2 = v2 - origin;
  const float e3 = v3 - origin;
  const float block_offset = 0.25f * ((e0 + e1) + (e2 + e3));
  const float d0 = e0 - block_offset;
  const float d1 = e1 - block_offset;
  const float d2 = e2 - block_offset;
  const float d3 = e3 - block_offset;
  const float block_m2 = (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
  const float d = block_offset - a.offset;
  // In this order, so that an empty chain stays without a nan where d * d overflows
  return Chain{origin, a.offset + d * share, a.m2 + (block_m2 + d * (d * (n * share)))};
}

/// The same with a single value, and share = 1 / (n + 1).
inline Chain add_value(Chain a, float n, float share, float v) {
  const float origin = n == 0.0f ? v : a.origin;
  const float d = (v - origin) - a.offset;
  return Chain{origin, a.offset + d * share, a.m2 + d * (d * (n * share))};
}

/// The chains of a thread as the moments of its S statistics: a chain each, or all of them of one,
/// to which `rest` belongs then.
template <int chains, int S>
inline void merge_chains(const thread Chain* chain, float n, Moments rest, thread Moments* found) {
  Moments all[chains];
  WELFORD_UNROLL
  for (int c = 0; c < chains; ++c) {
    all[c] = moments_about(n, chain[c].origin, chain[c].offset, chain[c].m2);
  }
  if (S == 1) {
    // In pairs, since equal sets need no division
    WELFORD_UNROLL
    for (int distance = 1; distance < chains; distance *= 2) {
      WELFORD_UNROLL
      for (int c = 0; c < chains; c += 2 * distance) {
        all[c] = merge(all[c], all[c + distance]);
      }
    }
    all[0] = merge(all[0], rest);
  }
  WELFORD_UNROLL
  for (int i = 0; i < S; ++i) {
    found[i] = all[i];
  }
}

/// Moments of a thread's elements, of each of its S statistics.
///
/// Each lane of the vectors is a chain. Four vectors at a time become mean and m2 of a block, which
/// is merged into its chain: one division for 4 V elements, and loads in flight while the sums
/// before are finished. Single elements make four chains of what would be one.
template <typename T, int V, int S>
inline void find_moments(const device T* x, Walk w, thread Moments* found) {
  typedef Elements<T, V> E;
  enum { chains = V == 1 ? 4 : V, loads = V == 1 ? 4 : 1, block = 4 * loads };
  Chain chain[chains];
  WELFORD_UNROLL
  for (int c = 0; c < chains; ++c) {
    chain[c] = Chain{0.0f, 0.0f, 0.0f};
  }
  float n = 0.0f;  // values of each chain
  Moments rest = no_moments();

  // Merge blocks of four
  uint i = 0;
  for (; i + block <= w.vectors; i += block) {
    float v[4][chains];
    WELFORD_UNROLL
    for (int r = 0; r < 4; ++r) {
      WELFORD_UNROLL
      for (int k = 0; k < loads; ++k) {
        E::unpack(E::load(x, (i + r * loads + k) * w.step), &v[r][k]);
      }
    }
    const float share = 4.0f / (n + 4.0f);
    WELFORD_UNROLL
    for (int c = 0; c < chains; ++c) {
      chain[c] = add_block(chain[c], n, share, v[0][c], v[1][c], v[2][c], v[3][c]);
    }
    n += 4.0f;
  }

  // Add what is left
  for (; i < w.vectors; ++i) {
    float v[V];
    E::unpack(E::load(x, i * w.step), v);
    if (V == 1) {
      rest = push(rest, v[0]);
    } else {
      const float share = 1.0f / (n + 1.0f);
      WELFORD_UNROLL
      for (int c = 0; c < V; ++c) {
        chain[c] = add_value(chain[c], n, share, v[c]);
      }
      n += 1.0f;
    }
  }
  if (w.has_edge) {
    rest = push(rest, float(x[w.edge]));
  }
  merge_chains<chains, S>(chain, n, rest, found);
}

/// Arrays that a gradient reads and writes, from the first element of a thread's walk on.
template <typename T>
struct GradientArrays {
  const device T* x;
  const device T* h;          // cotangent of z, or of y where there is no activation
  const device T* auxiliary;  // the residual or z, if it is needed
  device T* grad_residual;    // g, if it is stored
  device T* grad_x;           // if it is written
  float negative_slope;
};

/// Makes h, in vg, the cotangent g of y. If it is stored, it is what it is once rounded: the
/// gradient is then that of the stored array, in every kernel.
template <typename T, int V, int S>
inline void make_cotangent(GradientArrays<T> a, const thread MapX* y, const thread float* vx,
                           const thread float* auxiliary, thread float* vg, int at) {
  typedef Elements<T, V> E;
  WELFORD_UNROLL
  for (int c = 0; c < V; ++c) {
    vg[c] = cotangent_of(vg[c], needs_y() ? MapX::of(y[S == 1 ? 0 : c], vx[c], 0.0f) : 0.0f,
                         stores_g() ? auxiliary[c] : 0.0f, a.negative_slope);
  }
  if (stores_g()) {
    const typename E::Raw stored = E::pack(vg);
    E::store(a.grad_residual, at, stored);
    E::unpack(stored, vg);
  }
}

/// grad x where the statistics are given.
template <typename T, int V, int S>
inline void store_given_gradient(GradientArrays<T> a, const thread MapX* y, const thread float* vg,
                                 int at) {
  typedef Elements<T, V> E;
  float v[V];
  WELFORD_UNROLL
  for (int c = 0; c < V; ++c) {
    v[c] = y[S == 1 ? 0 : c].slope * vg[c];
  }
  E::store(a.grad_x, at, E::pack(v));
}

/// What the function constants ask of a vector besides its sums: g of h, and grad x.
template <typename T, int V, int S>
inline void finish_vector(GradientArrays<T> a, const thread MapX* y, const thread float* vx,
                          const thread float* auxiliary, thread float* vg, int at) {
  if (active()) {
    make_cotangent<T, V, S>(a, y, vx, auxiliary, vg, at);
  }
  if (writes_gradient) {
    store_given_gradient<T, V, S>(a, y, vg, at);
  }
}

/// Sums of a thread's elements, of each of its S statistics, about their means; and what else the
/// function constants ask for: g, and the gradient with given statistics. `sums` false: that alone.
template <typename T, int V, int S, bool sums>
inline void find_sums(GradientArrays<T> a, Walk w, const thread MapX* y, thread Sums* found) {
  typedef Elements<T, V> E;
  enum { chains = V == 1 ? 4 : V, loads = V == 1 ? 4 : 1 };
  float sum_g[chains];
  float sum_gd[chains];
  WELFORD_UNROLL
  for (int c = 0; c < chains; ++c) {
    sum_g[c] = 0.0f;
    sum_gd[c] = 0.0f;
  }
  const bool needs_x = sums || needs_y();

  // Two vectors of each at a time, so that their loads overlap
  uint i = 0;
  for (; i + 2 * loads <= w.vectors; i += 2 * loads) {
    float vx[2][chains];
    float vg[2][chains];
    float auxiliary[2][chains];
    WELFORD_UNROLL
    for (int r = 0; r < 2; ++r) {
      WELFORD_UNROLL
      for (int k = 0; k < loads; ++k) {
        const uint at = (i + r * loads + k) * w.step;
        if (needs_x) {
          E::unpack(E::load(a.x, at), &vx[r][k]);
        }
        E::unpack(E::load(a.h, at), &vg[r][k]);
        if (stores_g()) {
          E::unpack(E::load(a.auxiliary, at), &auxiliary[r][k]);
        }
      }
    }
    WELFORD_UNROLL
    for (int r = 0; r < 2; ++r) {
      WELFORD_UNROLL
      for (int k = 0; k < loads; ++k) {
        finish_vector<T, V, S>(a, y, &vx[r][k], &auxiliary[r][k], &vg[r][k],
                               (i + r * loads + k) * w.step);
      }
    }
    WELFORD_UNROLL
    for (int c = 0; sums && c < chains; ++c) {
      const float m = y[S == 1 ? 0 : c].mean;
      sum_g[c] += vg[0][c] + vg[1][c];
      sum_gd[c] += vg[0][c] * (vx[0][c] - m) + vg[1][c] * (vx[1][c] - m);
    }
  }
  for (; i < w.vectors; ++i) {
    const uint at = i * w.step;
    float vx[V];
    float vg[V];
    float auxiliary[V];
    if (needs_x) {
      E::unpack(E::load(a.x, at), vx);
    }
    E::unpack(E::load(a.h, at), vg);
    if (stores_g()) {
      E::unpack(E::load(a.auxiliary, at), auxiliary);
    }
    finish_vector<T, V, S>(a, y, vx, auxiliary, vg, at);
    WELFORD_UNROLL
    for (int c = 0; sums && c < V; ++c) {
      sum_g[c] += vg[c];
      sum_gd[c] += vg[c] * (vx[c] - y[S == 1 ? 0 : c].mean);
    }
  }
  if (w.has_edge) {
    float edge_x = needs_x ? float(a.x[w.edge]) : 0.0f;
    float edge_g = float(a.h[w.edge]);
    float auxiliary = stores_g() ? float(a.auxiliary[w.edge]) : 0.0f;
    finish_vector<T, 1, 1>(a, y, &edge_x, &auxiliary, &edge_g, w.edge);
    sum_g[0] += edge_g;
    sum_gd[0] += edge_g * (edge_x - y[0].mean);
  }

  WELFORD_UNROLL
  for (int i = 0; i < S; ++i) {
    found[i] = Sums{sum_g[i], sum_gd[i]};
  }
  if (S == 1) {
    WELFORD_UNROLL
    for (int c = 1; c < chains; ++c) {
      found[0] = merge(found[0], Sums{sum_g[c], sum_gd[c]});
    }
  }
}

/// Maps one vector of x, and one of the second input if F takes it, to a vector of out.
template <typename T, int V, int S, typename F>
inline void map_vector(typename Elements<T, V>::Raw x, typename Elements<T, V>::Raw second,
                       const thread F* f, device T* out, uint i) {
  typedef Elements<T, V> E;
  float v[V];
  float v_second[V];
  E::unpack(x, v);
  E::unpack(second, v_second);
  WELFORD_UNROLL
  for (int c = 0; c < V; ++c) {
    v[c] = F::of(f[S == 1 ? 0 : c], v[c], v_second[c]);
  }
  E::store(out, i, E::pack(v));
}

/// Maps a thread's elements by f, of which it has one for each of its S slots. A second input that
/// F does not take is not read. All elements are read before they are written, so out may be an
/// input.
template <typename T, int V, int S, typename F>
inline void apply(const device T* x, const device T* second, Walk w, const thread F* f,
                  device T* out) {
  typedef Elements<T, V> E;
  uint i = 0;
  for (; i + F::loads <= w.vectors; i += F::loads) {
    typename E::Raw raw_x[F::loads];
    typename E::Raw raw_second[F::loads];
    WELFORD_UNROLL
    for (int r = 0; r < F::loads; ++r) {
      raw_x[r] = E::load(x, (i + r) * w.step);
      raw_second[r] = raw_x[r];
      if (F::takes_second()) {
        raw_second[r] = E::load(second, (i + r) * w.step);
      }
    }
    WELFORD_UNROLL
    for (int r = 0; r < F::loads; ++r) {
      map_vector<T, V, S>(raw_x[r], raw_second[r], f, out, (i + r) * w.step);
    }
  }
  for (; i < w.vectors; ++i) {
    const typename E::Raw raw_x = E::load(x, i * w.step);
    typename E::Raw raw_second = raw_x;
    if (F::takes_second()) {
      raw_second = E::load(second, i * w.step);
    }
    map_vector<T, V, S>(raw_x, raw_second, f, out, i * w.step);
  }
  if (w.has_edge) {
    const float edge = float(x[w.edge]);
    out[w.edge] = T(F::of(f[0], edge, F::takes_second() ? float(second[w.edge]) : edge));
  }
}

// ---- The same for elements kept in registers ---------------------------------------------------

/// All that a thread of a fused kernel reads. Loops over it are unrolled, or it could not stay in
/// registers.
template <typename T, int V>
struct Kept {
  typename Elements<T, V>::Raw vectors[kKept];
  float edge;
};

template <typename T, int V>
inline Kept<T, V> keep(const device T* x, Walk w) {
  Kept<T, V> kept;
  WELFORD_UNROLL
  for (int k = 0; k < kKept; ++k) {
    if (k < w.vectors) {
      kept.vectors[k] = Elements<T, V>::load(x, k * w.step);
    }
  }
  kept.edge = w.has_edge ? float(x[w.edge]) : 0.0f;
  return kept;
}

template <typename T, int V, int S>
inline void find_moments(Kept<T, V> kept, Walk w, thread Moments* found) {
  float v[kKept][V];
  WELFORD_UNROLL
  for (int k = 0; k < kKept; ++k) {
    if (k < w.vectors) {
      Elements<T, V>::unpack(kept.vectors[k], v[k]);
    }
  }

  // Twice through the registers: about the first value, then about the mean
  const float n = float(w.vectors);
  const float per_vector = w.vectors > 0 ? 1.0f / n : 0.0f;
  Chain chain[V];
  WELFORD_UNROLL
  for (int c = 0; c < V; ++c) {
    const float origin = w.vectors > 0 ? v[0][c] : 0.0f;
    float sum = 0.0f;
    WELFORD_UNROLL
    for (int k = 1; k < kKept; ++k) {
      sum += k < w.vectors ? v[k][c] - origin : 0.0f;
    }
    const float offset = sum * per_vector;
    float m2 = 0.0f;
    WELFORD_UNROLL
    for (int k = 0; k < kKept; ++k) {
      const float d = k < w.vectors ? (v[k][c] - origin) - offset : 0.0f;
      m2 += d * d;
    }
    chain[c] = Chain{origin, offset, m2};
  }

  Moments rest = no_moments();
  if (w.has_edge) {
    rest = push(rest, kept.edge);
  }
  merge_chains<V, S>(chain, n, rest, found);
}

/// Makes the kept h the cotangent g and stores it, if it is to be stored.
template <typename T, int V, int S>
inline void store_cotangents(GradientArrays<T> a, Kept<T, V> x, Walk w, const thread MapX* y,
                             thread Kept<T, V>* g) {
  const Kept<T, V> auxiliary = keep<T, V>(a.auxiliary, w);
  WELFORD_UNROLL
  for (int k = 0; k < kKept; ++k) {
    if (k < w.vectors) {
      float vx[V];
      float vg[V];
      float v[V];
      Elements<T, V>::unpack(x.vectors[k], vx);
      Elements<T, V>::unpack(g->vectors[k], vg);
      Elements<T, V>::unpack(auxiliary.vectors[k], v);
      make_cotangent<T, V, S>(a, y, vx, v, vg, k * w.step);
      g->vectors[k] = Elements<T, V>::pack(vg);
    }
  }
  if (w.has_edge) {
    float edge = auxiliary.edge;
    make_cotangent<T, 1, 1>(a, y, &x.edge, &edge, &g->edge, w.edge);
  }
}

template <typename T, int V, int S>
inline void find_sums(GradientArrays<T> a, Kept<T, V> x, Kept<T, V> g, Walk w, const thread MapX* y,
                      thread Sums* found) {
  const bool makes_g = active() && !stores_g();
  WELFORD_UNROLL
  for (int i = 0; i < S; ++i) {
    found[i] = Sums{0.0f, 0.0f};
  }
  WELFORD_UNROLL
  for (int k = 0; k < kKept; ++k) {
    if (k < w.vectors) {
      float vx[V];
      float vg[V];
      Elements<T, V>::unpack(x.vectors[k], vx);
      Elements<T, V>::unpack(g.vectors[k], vg);
      if (makes_g) {
        make_cotangent<T, V, S>(a, y, vx, vx, vg, k * w.step);
      }
      WELFORD_UNROLL
      for (int c = 0; c < V; ++c) {
        const int i = S == 1 ? 0 : c;
        found[i] = merge(found[i], Sums{vg[c], vg[c] * (vx[c] - y[i].mean)});
      }
    }
  }
  if (w.has_edge) {
    float edge = g.edge;
    if (makes_g) {
      make_cotangent<T, 1, 1>(a, y, &x.edge, &x.edge, &edge, w.edge);
    }
    found[0] = merge(found[0], Sums{edge, edge * (x.edge - y[0].mean)});
  }
}

template <typename T, int V, int S, typename F>
inline void apply(Kept<T, V> x, Kept<T, V> second, Walk w, const thread F* f, device T* out) {
  WELFORD_UNROLL
  for (int k = 0; k < kKept; ++k) {
    if (k < w.vectors) {
      map_vector<T, V, S>(x.vectors[k], second.vectors[k], f, out, k * w.step);
    }
  }
  if (w.has_edge) {
    out[w.edge] = T(F::of(f[0], x.edge, second.edge));
  }
}
