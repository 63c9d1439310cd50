// Attention of packed pairs on a CPU, with float32 sums: scores are computed, turned into weights and
// used while they are in cache, and never stored; backward recomputes them.
//
// A task is one pair and one head of keys with all queries that share it, so a task owns its part
// of every gradient: nothing is shared, and any number of threads gives the same bits.
#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <numeric>

#include "attention_tiles.h"
#include "operators.h"

namespace sepo {
namespace {

struct Shape {
  int64_t N, heads, groups, d, pairs;  // groups: heads of keys and values
  int64_t window;
  float scale;
  int64_t heads_per_group() const { return heads / groups; }
};

// Calls work(pair, group) for all of them, the longest pairs first, each by whichever thread is free
template <typename Work>
void for_each_task(const Shape& shape, const int64_t* spans, const Work& work) {
  std::vector<int64_t> order(shape.pairs);
  std::iota(order.begin(), order.end(), 0);
  const auto length = [&](int64_t p) { return spans[4 * p + 3] - spans[4 * p]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return length(a) > length(b); });
  const int64_t tasks = shape.pairs * shape.groups;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next++) < tasks;)
      work(order[task / shape.groups], task % shape.groups);
    at::native::cpublas::brgemm_release();
  });
}

float reduce_max(const Vec& x) {
  return at::vec::vec_reduce_all<float>(
      [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, x);
}

float reduce_sum(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

template <typename In, typename T>
class Forward {
 public:
  Forward(const Shape& shape, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
          const at::Tensor& out, const at::Tensor& lse)
      : shape_(shape), q_(q), k_(k), v_(v), out_(out), lse_(lse) {}

  void run(const Sequence& s, int64_t group) {
    if (s.length == s.first_query) return;
    keys_.transposed(s, HeadOf<In>(k_, group), shape_.d);
    values_.as_it_is(s, HeadOf<In>(v_, group), shape_.d);
    scores_.resize(s.tiles() * TILE * TILE);
    query_.resize(TILE * shape_.d);
    sum_.resize(TILE * shape_.d);
    const int64_t first = group * shape_.heads_per_group();
    for (int64_t h = first; h < first + shape_.heads_per_group(); ++h)
      for (int64_t i = s.first_query; i < s.length; i += TILE) block(s, h, i);
  }

 private:
  void block(const Sequence& s, int64_t head, int64_t first) {
    const QueryBlock queries(s, first, shape_.window);
    const int64_t d = shape_.d;
    queries.copy(s, HeadOf<In>(q_, head), d, query_.data());
    Vec largest[TILE], total[TILE];
    std::fill_n(largest, TILE, Vec(-std::numeric_limits<float>::infinity()));
    std::fill_n(total, TILE, Vec(0.f));
    for (int64_t t = queries.tile_begin; t < queries.tile_end; ++t) {
      float* z = scores_.data() + t * TILE * TILE;
      const Part part = queries.part<T>(t);
      make_scores(part, d, query_.data(), keys_.tile(t), z);
      queries.mask(t, part, z);
      part.for_blocks([&](int64_t first, int64_t rows, int64_t keys) {
        for (int64_t i = first; i < first + rows; ++i)
          for (int64_t j = 0; j < keys; j += LANES)
            largest[i] = at::vec::maximum(largest[i], Vec::loadu(z + i * TILE + j));
      });
    }
    float top[TILE] = {};  // every query sees itself, so it is finite
    for (int64_t i = 0; i < queries.count(); ++i) top[i] = reduce_max(largest[i]) * shape_.scale;
    for (int64_t t = queries.tile_begin; t < queries.tile_end; ++t) {
      const float* z = scores_.data() + t * TILE * TILE;
      alignas(64) TileOf<T> weights;
      const Vec scale(shape_.scale);
      const Part part = queries.part<T>(t);
      part.for_blocks([&](int64_t first, int64_t rows, int64_t keys) {
        for (int64_t i = first; i < first + rows; ++i) {
          const Vec shift(-top[i]);
          for (int64_t j = 0; j < keys; j += PANEL) {
            const float* at = z + i * TILE + j;
            const Vec a = exponential<T>(at::vec::fmadd(Vec::loadu(at), scale, shift));
            const Vec b = exponential<T>(at::vec::fmadd(Vec::loadu(at + LANES), scale, shift));
            total[i] = total[i] + (a + b);
            store(a, b, weights + i * TILE + j);
          }
        }
      });
      sum_over_keys(part, d, weights, values_.tile(t), sum_.data(), t > queries.tile_begin);
    }
    In* out = out_.mutable_data_ptr<In>();
    float* lse = lse_.mutable_data_ptr<float>();
    for (int64_t i = 0; i < queries.count(); ++i) {
      const float sum = reduce_sum(total[i]);
      const int64_t at = s.row(first + i) * shape_.heads + head;
      store_row(sum_.data() + i * d, 1.f / sum, d, out + at * d);
      lse[at] = top[i] + std::log(sum);
    }
  }

  const Shape& shape_;
  const at::Tensor &q_, &k_, &v_, &out_, &lse_;
  Operand<T> keys_, values_;
  std::vector<float> scores_, sum_;
  std::vector<T> query_;
};

// Two rows as brgemm wants its right operand: the bfloat16 of `low` and `high` side by side
void store_interleaved(const Vec& low, const Vec& high, at::BFloat16* to) {
  using Int = at::vec::Vectorized<int32_t>;
  const auto rounded = [](const Vec& x) {  // to nearest even, in the upper half
    const Int bits = at::vec::cast<int32_t>(x);
    return bits + Int(0x7fff) + ((bits >> Int(16)) & Int(1));
  };
  const Int lower = (rounded(low) >> Int(16)) & Int(0xffff);
  const Int upper = rounded(high) & Int(static_cast<int32_t>(0xffff0000));
  (lower | upper).store(to);
}

// (64, d) to (d, 64)
template <typename T>
void transpose(const T* from, int64_t d, T* to) {
  for (int64_t i = 0; i < TILE; ++i)
    for (int64_t j = 0; j < d; ++j) to[j * TILE + i] = from[i * d + j];
}

struct Inputs {
  const at::Tensor &grad_out, &q, &k, &v, &out, &lse;
};
struct Gradients {
  const at::Tensor &q, &k, &v;
};

template <typename In, typename T>
class Backward {
 public:
  Backward(const Shape& shape, const Inputs& in, const Gradients& grad)
      : shape_(shape), in_(in), grad_(grad) {}

  // Both sequences of a pair: the prompt's keys and values get a share from each
  void run(const int64_t* span, int64_t group) {
    const Sequence chosen = chosen_sequence(span), rejected = rejected_sequence(span);
    sequence(chosen, group, sums_[0]);
    sequence(rejected, group, sums_[1]);
    for (int64_t i = 0; i < chosen.length; ++i)
      store(chosen.row(i), group, i, true, i < chosen.prompt);
    for (int64_t i = rejected.prompt; i < rejected.length; ++i)
      store(rejected.row(i), group, i, false, true);
  }

 private:
  struct Sums {  // gradients of a sequence's keys and values, transposed: tiles of (d, 64)
    std::vector<float> k, v;
  };

  void sequence(const Sequence& s, int64_t group, Sums& sums) {
    const int64_t d = shape_.d;
    sums.k.assign(s.tiles() * TILE * d, 0.f);
    sums.v.assign(s.tiles() * TILE * d, 0.f);
    if (s.length == s.first_query) return;
    keys_transposed_.transposed(s, HeadOf<In>(in_.k, group), d);
    values_transposed_.transposed(s, HeadOf<In>(in_.v, group), d);
    keys_.as_it_is(s, HeadOf<In>(in_.k, group), d);
    for (auto* x : {&query_, &query_transposed_, &grad_out_, &grad_out_transposed_})
      x->resize(TILE * d);
    grad_query_.resize(TILE * d);
    const int64_t first = group * shape_.heads_per_group();
    for (int64_t h = first; h < first + shape_.heads_per_group(); ++h)
      for (int64_t i = s.first_query; i < s.length; i += TILE) block(s, h, i, sums);
  }

  void block(const Sequence& s, int64_t head, int64_t first, Sums& sums) {
    const QueryBlock queries(s, first, shape_.window);
    const int64_t d = shape_.d;
    queries.copy(s, HeadOf<In>(in_.q, head), d, query_.data());
    queries.copy(s, HeadOf<In>(in_.grad_out, head), d, grad_out_.data());
    transpose(query_.data(), d, query_transposed_.data());
    transpose(grad_out_.data(), d, grad_out_transposed_.data());
    // rows after the last query: exp(0 - inf) is zero, so they give nothing
    float lse[TILE], delta[TILE] = {};
    std::fill_n(lse, TILE, std::numeric_limits<float>::infinity());
    const HeadOf<In> out(in_.out, head);
    for (int64_t i = 0; i < queries.count(); ++i) {
      const int64_t row = s.row(first + i);
      lse[i] = in_.lse.const_data_ptr<float>()[row * shape_.heads + head];
      double sum = 0;  // what it is taken from agrees with it to the last digits, where keys are few
      for (int64_t j = 0; j < d; ++j)
        sum += static_cast<double>(out.row(row)[j]) * static_cast<double>(grad_out_[i * d + j]);
      delta[i] = sum;
    }
    for (int64_t t = queries.tile_begin; t < queries.tile_end; ++t) {
      alignas(64) TileOf<float> z, grad_weight;
      alignas(64) TileOf<T> grad_score, weight, right_grad_score;
      const Part part = queries.part<T>(t);
      make_scores(part, d, query_.data(), keys_transposed_.tile(t), z);
      queries.mask(t, part, z);
      make_scores(part, d, grad_out_.data(), values_transposed_.tile(t), grad_weight);
      differentiate(part, z, grad_weight, lse, delta, grad_score, weight, right_grad_score);
      sum_over_keys(part, d, grad_score, keys_.tile(t), grad_query_.data(), t > queries.tile_begin);
      float *to_k = sums.k.data() + t * TILE * d, *to_v = sums.v.data() + t * TILE * d;
      add_over_queries(part, d, query_transposed_.data(), PAIRED ? right_grad_score : grad_score,
                       to_k);
      add_over_queries(part, d, grad_out_transposed_.data(), weight, to_v);
    }
    In* grad_q = grad_.q.mutable_data_ptr<In>();
    for (int64_t i = 0; i < queries.count(); ++i)
      store_row(grad_query_.data() + i * d, 1.f, d,
                grad_q + (s.row(first + i) * shape_.heads + head) * d);
  }

  // weight = exp(score - lse), and the gradient of the score, weight (grad_weight - delta) scale;
  // as right operands brgemm wants them paired, the gradient once more beside the left operand
  void differentiate(const Part& part, const float* z, const float* grad_weight, const float* lse,
                     const float* delta, T* grad_score, T* weights,
                     [[maybe_unused]] T* right_grad_score) const {
    const Vec scale(shape_.scale);
    part.for_blocks([&](int64_t first, int64_t rows, int64_t keys) {
      for (int64_t i = first; i < first + rows; i += 2) {
        for (int64_t j = 0; j < keys; j += LANES) {
          Vec weight[2], grad[2];
          for (int64_t r = 0; r < 2; ++r) {
            const int64_t at = (i + r) * TILE + j;
            weight[r] = exponential<T>(at::vec::fmadd(Vec::loadu(z + at), scale, Vec(-lse[i + r])));
            grad[r] = weight[r] * (Vec::loadu(grad_weight + at) - Vec(delta[i + r])) * scale;
          }
          if constexpr (PAIRED) {
            store_interleaved(weight[0], weight[1], weights + i * TILE + 2 * j);
            store_interleaved(grad[0], grad[1], right_grad_score + i * TILE + 2 * j);
          }
          for (int64_t r = 0; r < 2; ++r) {
            const int64_t at = (i + r) * TILE + j;
            if constexpr (PAIRED) {
              at::vec::convert_float_bfloat16(grad[r], grad[r]).store(grad_score + at, LANES);
            } else {
              weight[r].store(weights + at);
              grad[r].store(grad_score + at);
            }
          }
        }
      }
    });
  }

  void store(int64_t row, int64_t group, int64_t position, bool from_chosen, bool from_rejected) {
    const int64_t d = shape_.d, at = position / TILE * TILE * d + position % TILE;
    const int64_t to = (row * shape_.groups + group) * d;
    const auto write = [&](const at::Tensor& grad, const float* a, const float* b) {
      In* out = grad.mutable_data_ptr<In>() + to;
      for (int64_t j = 0; j < d; ++j)
        out[j] = (from_chosen ? a[j * TILE] : 0.f) + (from_rejected ? b[j * TILE] : 0.f);
    };
    write(grad_.k, sums_[0].k.data() + at, sums_[1].k.data() + at);
    write(grad_.v, sums_[0].v.data() + at, sums_[1].v.data() + at);
  }

  const Shape& shape_;
  const Inputs& in_;
  const Gradients& grad_;
  static constexpr bool PAIRED = Operand<T>::PAIRED;
  Sums sums_[2];
  Operand<T> keys_, keys_transposed_, values_transposed_;
  std::vector<T> query_, query_transposed_, grad_out_, grad_out_transposed_;
  std::vector<float> grad_query_;
};

Shape shape_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& spans, double scale,
               int64_t window) {
  return {q.size(0), q.size(1), k.size(1), q.size(2), spans.size(0), window,
          static_cast<float>(scale)};
}

at::Tensor last_contiguous(const at::Tensor& x) { return x.stride(2) == 1 ? x : x.contiguous(); }

// work(In(), T()): the tensors' type, and that of the tiles
template <typename Work>
void with_types(const at::Tensor& x, bool bfloat16_tiles, const Work& work) {
  if (x.scalar_type() == at::kFloat)
    work(float(), float());
  else if (bfloat16_tiles)
    work(at::BFloat16(), at::BFloat16());
  else
    work(at::BFloat16(), float());
}

}  // namespace

std::tuple<Tensor, Tensor> packed_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& spans, double scale,
    int64_t window, bool bfloat16_tiles) {
  const auto q = last_contiguous(query), k = last_contiguous(key), v = last_contiguous(value);
  const Shape shape = shape_of(q, k, spans, scale, window);
  const at::Tensor out = q.new_empty({shape.N, shape.heads, shape.d});
  const at::Tensor lse = q.new_empty({shape.N, shape.heads}, at::kFloat);
  const int64_t* span = spans.const_data_ptr<int64_t>();
  with_types(q, bfloat16_tiles, [&](auto in, auto tile) {
    for_each_task(shape, span, [&](int64_t pair, int64_t group) {
      Forward<decltype(in), decltype(tile)> task(shape, q, k, v, out, lse);
      task.run(chosen_sequence(span + 4 * pair), group);
      task.run(rejected_sequence(span + 4 * pair), group);
    });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const Tensor& spans, double scale, int64_t window,
    bool bfloat16_tiles) {
  const auto q = last_contiguous(query), k = last_contiguous(key), v = last_contiguous(value);
  const auto grad = last_contiguous(grad_out);
  const Shape shape = shape_of(q, k, spans, scale, window);
  const at::Tensor grad_q = q.new_empty({shape.N, shape.heads, shape.d});
  const at::Tensor grad_k = q.new_empty({shape.N, shape.groups, shape.d});
  const at::Tensor grad_v = q.new_empty({shape.N, shape.groups, shape.d});
  const Inputs inputs{grad, q, k, v, out, lse};
  const Gradients gradients{grad_q, grad_k, grad_v};
  const int64_t* span = spans.const_data_ptr<int64_t>();
  with_types(q, bfloat16_tiles, [&](auto in, auto tile) {
    for_each_task(shape, span, [&](int64_t pair, int64_t group) {
      Backward<decltype(in), decltype(tile)>(shape, inputs, gradients).run(span + 4 * pair, group);
    });
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace sepo
