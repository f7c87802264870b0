// What a thread does with the elements that it walks over: find moments, find sums, apply.
#pragma once

#include "access.h"

/// Moments of a thread's elements, of each of its S statistics.
///
/// Each lane of the vectors is a chain of its own. Four vectors at a time become mean and m2 of a
/// block, which is merged into its chain: one division for 4 V elements, and loads in flight while
/// the sums before are finished. Single elements make four chains of what would be one.
template <typename T, int V, int S>
inline void find_moments(const device T* x, Walk w, thread Moments* found) {
  typedef Elements<T, V> E;
  enum { chains = V == 1 ? 4 : V, loads = V == 1 ? 4 : 1, block = 4 * loads };
  float origin[chains];
  float offset[chains];
  float m2[chains];
  for (int c = 0; c < chains; ++c) {
    origin[c] = 0.0f;
    offset[c] = 0.0f;
    m2[c] = 0.0f;
  }
  float n = 0.0f;
  Moments rest = no_moments();

  // Merge blocks of four
  long i = 0;
  for (; i + block <= w.vectors; i += block) {
    float v[4][chains];
    for (int r = 0; r < 4; ++r) {
      for (int k = 0; k < loads; ++k) {
        E::unpack(E::load(x, w.first + (i + r * loads + k) * w.step), &v[r][k]);
      }
    }
    const float share = 4.0f / (n + 4.0f);
    const float between = n * share;
    for (int c = 0; c < chains; ++c) {
      origin[c] = n == 0.0f ? v[0][c] : origin[c];
      const float e0 = v[0][c] - origin[c];
      const float e1 = v[1][c] - origin[c];
      const float e2 = v[2][c] - origin[c];
      const float e3 = v[3][c] - origin[c];
      const float block_offset = 0.25f * ((e0 + e1) + (e2 + e3));
      const float d0 = e0 - block_offset;
      const float d1 = e1 - block_offset;
      const float d2 = e2 - block_offset;
      const float d3 = e3 - block_offset;
      const float d = block_offset - offset[c];
      offset[c] += d * share;
      m2[c] += ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)) + d * d * between;
    }
    n += 4.0f;
  }

  // Push what is left
  for (; i < w.vectors; ++i) {
    float v[V];
    E::unpack(E::load(x, w.first + i * w.step), v);
    if (V == 1) {
      rest = push(rest, v[0]);
    } else {
      const float share = 1.0f / (n + 1.0f);
      const float between = n * share;
      for (int c = 0; c < V; ++c) {
        origin[c] = n == 0.0f ? v[c] : origin[c];
        const float d = (v[c] - origin[c]) - offset[c];
        offset[c] += d * share;
        m2[c] += d * d * between;
      }
      n += 1.0f;
    }
  }
  if (w.edge >= 0) {
    rest = push(rest, float(x[w.edge]));
  }

  // Merge the chains of one statistic
  for (int s = 0; s < S; ++s) {
    found[s] = moments_about(n, origin[s], offset[s], m2[s]);
  }
  if (S == 1) {
    found[0] = rest;
    for (int c = 0; c < chains; ++c) {
      found[0] = merge(found[0], moments_about(n, origin[c], offset[c], m2[c]));
    }
  }
}

/// Sums of a thread's elements, of each of its S statistics, about their means.
template <typename T, int V, int S>
inline void find_sums(const device T* x, const device T* g, Walk w, const thread float* mean,
                      thread Sums* found) {
  typedef Elements<T, V> E;
  enum { chains = V == 1 ? 4 : V, loads = V == 1 ? 4 : 1 };
  float sum_g[chains];
  float sum_gd[chains];
  for (int c = 0; c < chains; ++c) {
    sum_g[c] = 0.0f;
    sum_gd[c] = 0.0f;
  }

  // Two vectors of each at a time, so that their loads overlap
  long i = 0;
  for (; i + 2 * loads <= w.vectors; i += 2 * loads) {
    float vx[2][chains];
    float vg[2][chains];
    for (int r = 0; r < 2; ++r) {
      for (int k = 0; k < loads; ++k) {
        const long at = w.first + (i + r * loads + k) * w.step;
        E::unpack(E::load(x, at), &vx[r][k]);
        E::unpack(E::load(g, at), &vg[r][k]);
      }
    }
    for (int c = 0; c < chains; ++c) {
      const float m = mean[S == 1 ? 0 : c];
      sum_g[c] += vg[0][c] + vg[1][c];
      sum_gd[c] += vg[0][c] * (vx[0][c] - m) + vg[1][c] * (vx[1][c] - m);
    }
  }
  for (; i < w.vectors; ++i) {
    float vx[V];
    float vg[V];
    E::unpack(E::load(x, w.first + i * w.step), vx);
    E::unpack(E::load(g, w.first + i * w.step), vg);
    for (int c = 0; c < V; ++c) {
      sum_g[c] += vg[c];
      sum_gd[c] += vg[c] * (vx[c] - mean[S == 1 ? 0 : c]);
    }
  }
  if (w.edge >= 0) {
    const float edge_g = float(g[w.edge]);
    sum_g[0] += edge_g;
    sum_gd[0] += edge_g * (float(x[w.edge]) - mean[0]);
  }

  for (int s = 0; s < S; ++s) {
    found[s] = Sums{sum_g[s], sum_gd[s]};
  }
  if (S == 1) {
    for (int c = 1; c < chains; ++c) {
      found[0] = merge(found[0], Sums{sum_g[c], sum_gd[c]});
    }
  }
}

/// out = slope * (x - mean) + level + scale * g: normalisation and both kinds of gradient, one
/// statistic's worth. Centred, since x * A + B cancels for large means.
struct Affine {
  float mean;
  float slope;
  float level;
  float scale;

  static float of_x(Affine f, float x) { return f.slope * (x - f.mean) + f.level; }
  static float of_both(Affine f, float x, float g) { return of_x(f, x) + f.scale * g; }
};

/// Applies f to a thread's elements. Each is read before it is written, so out may be x.
template <typename T, int V, int S>
inline void apply(const device T* x, Walk w, const thread Affine* f, device T* out) {
  typedef Elements<T, V> E;
  long i = 0;
  for (; i + 4 <= w.vectors; i += 4) {
    typename E::Raw raw[4];
    for (int r = 0; r < 4; ++r) {
      raw[r] = E::load(x, w.first + (i + r) * w.step);
    }
    for (int r = 0; r < 4; ++r) {
      float v[V];
      E::unpack(raw[r], v);
      for (int c = 0; c < V; ++c) {
        v[c] = Affine::of_x(f[S == 1 ? 0 : c], v[c]);
      }
      E::store(out, w.first + (i + r) * w.step, E::pack(v));
    }
  }
  for (; i < w.vectors; ++i) {
    float v[V];
    E::unpack(E::load(x, w.first + i * w.step), v);
    for (int c = 0; c < V; ++c) {
      v[c] = Affine::of_x(f[S == 1 ? 0 : c], v[c]);
    }
    E::store(out, w.first + i * w.step, E::pack(v));
  }
  if (w.edge >= 0) {
    out[w.edge] = T(Affine::of_x(f[0], float(x[w.edge])));
  }
}

/// Applies f to a thread's elements of x and g. out may be either.
template <typename T, int V, int S>
inline void apply(const device T* x, const device T* g, Walk w, const thread Affine* f,
                  device T* out) {
  typedef Elements<T, V> E;
  long i = 0;
  for (; i + 2 <= w.vectors; i += 2) {
    typename E::Raw raw_x[2];
    typename E::Raw raw_g[2];
    for (int r = 0; r < 2; ++r) {
      raw_x[r] = E::load(x, w.first + (i + r) * w.step);
      raw_g[r] = E::load(g, w.first + (i + r) * w.step);
    }
    for (int r = 0; r < 2; ++r) {
      float vx[V];
      float vg[V];
      E::unpack(raw_x[r], vx);
      E::unpack(raw_g[r], vg);
      for (int c = 0; c < V; ++c) {
        vx[c] = Affine::of_both(f[S == 1 ? 0 : c], vx[c], vg[c]);
      }
      E::store(out, w.first + (i + r) * w.step, E::pack(vx));
    }
  }
  for (; i < w.vectors; ++i) {
    float vx[V];
    float vg[V];
    E::unpack(E::load(x, w.first + i * w.step), vx);
    E::unpack(E::load(g, w.first + i * w.step), vg);
    for (int c = 0; c < V; ++c) {
      vx[c] = Affine::of_both(f[S == 1 ? 0 : c], vx[c], vg[c]);
    }
    E::store(out, w.first + i * w.step, E::pack(vx));
  }
  if (w.edge >= 0) {
    out[w.edge] = T(Affine::of_both(f[0], float(x[w.edge]), float(g[w.edge])));
  }
}

// ---- The same for elements kept in registers ---------------------------------------------------

/// All that a thread of a fused kernel reads. Loops over it have constant bounds, so that it can
/// stay in registers.
template <typename T, int V>
struct Kept {
  typename Elements<T, V>::Raw vectors[kKept];
  float edge;
};

template <typename T, int V>
inline Kept<T, V> keep(const device T* x, Walk w) {
  Kept<T, V> kept;
  for (int k = 0; k < kKept; ++k) {
    if (k < w.vectors) {
      kept.vectors[k] = Elements<T, V>::load(x, w.first + k * w.step);
    }
  }
  kept.edge = w.edge >= 0 ? float(x[w.edge]) : 0.0f;
  return kept;
}

template <typename T, int V, int S>
inline void find_moments(Kept<T, V> kept, Walk w, thread Moments* found) {
  float v[kKept][V];
  float origin[V];
  float offset[V];
  float m2[V];
  const float n = float(w.vectors);
  for (int k = 0; k < kKept; ++k) {
    if (k < w.vectors) {
      Elements<T, V>::unpack(kept.vectors[k], v[k]);
    }
  }

  // Twice through the registers: about the first value, then about the mean
  for (int c = 0; c < V; ++c) {
    origin[c] = w.vectors > 0 ? v[0][c] : 0.0f;
    float sum = 0.0f;
    for (int k = 1; k < kKept; ++k) {
      sum += k < w.vectors ? v[k][c] - origin[c] : 0.0f;
    }
    offset[c] = w.vectors > 0 ? sum / n : 0.0f;
    m2[c] = 0.0f;
    for (int k = 0; k < kKept; ++k) {
      const float d = k < w.vectors ? (v[k][c] - origin[c]) - offset[c] : 0.0f;
      m2[c] += d * d;
    }
  }

  Moments edge = no_moments();
  if (w.edge >= 0) {
    edge = push(edge, kept.edge);
  }
  for (int s = 0; s < S; ++s) {
    found[s] = moments_about(n, origin[s], offset[s], m2[s]);
  }
  if (S == 1) {
    found[0] = edge;
    for (int c = 0; c < V; ++c) {
      found[0] = merge(found[0], moments_about(n, origin[c], offset[c], m2[c]));
    }
  }
}

template <typename T, int V, int S>
inline void find_sums(Kept<T, V> x, Kept<T, V> g, Walk w, const thread float* mean,
                      thread Sums* found) {
  for (int s = 0; s < S; ++s) {
    found[s] = Sums{0.0f, 0.0f};
  }
  for (int k = 0; k < kKept; ++k) {
    if (k < w.vectors) {
      float vx[V];
      float vg[V];
      Elements<T, V>::unpack(x.vectors[k], vx);
      Elements<T, V>::unpack(g.vectors[k], vg);
      for (int c = 0; c < V; ++c) {
        const int s = S == 1 ? 0 : c;
        found[s] = merge(found[s], Sums{vg[c], vg[c] * (vx[c] - mean[s])});
      }
    }
  }
  if (w.edge >= 0) {
    found[0] = merge(found[0], Sums{g.edge, g.edge * (x.edge - mean[0])});
  }
}

template <typename T, int V, int S>
inline void apply(Kept<T, V> x, Walk w, const thread Affine* f, device T* out) {
  for (int k = 0; k < kKept; ++k) {
    if (k < w.vectors) {
      float v[V];
      Elements<T, V>::unpack(x.vectors[k], v);
      for (int c = 0; c < V; ++c) {
        v[c] = Affine::of_x(f[S == 1 ? 0 : c], v[c]);
      }
      Elements<T, V>::store(out, w.first + k * w.step, Elements<T, V>::pack(v));
    }
  }
  if (w.edge >= 0) {
    out[w.edge] = T(Affine::of_x(f[0], x.edge));
  }
}

template <typename T, int V, int S>
inline void apply(Kept<T, V> x, Kept<T, V> g, Walk w, const thread Affine* f, device T* out) {
  for (int k = 0; k < kKept; ++k) {
    if (k < w.vectors) {
      float vx[V];
      float vg[V];
      Elements<T, V>::unpack(x.vectors[k], vx);
      Elements<T, V>::unpack(g.vectors[k], vg);
      for (int c = 0; c < V; ++c) {
        vx[c] = Affine::of_both(f[S == 1 ? 0 : c], vx[c], vg[c]);
      }
      Elements<T, V>::store(out, w.first + k * w.step, Elements<T, V>::pack(vx));
    }
  }
  if (w.edge >= 0) {
    out[w.edge] = T(Affine::of_both(f[0], x.edge, g.edge));
  }
}
