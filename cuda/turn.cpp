// Turns matrices of numbers of four bytes, for products of frameworks that want them turned: what these have for it
// takes several times as long as the memory does.
#include "port.h"

namespace {

typedef void (*ParallelFor)(void (*task)(void *, int), void *argument, int n);
typedef uint32_t Number;

constexpr index_t tile = 16;  // rows and columns that are turned at once
constexpr index_t few = 4;    // gates: matrices with so few rows or columns are turned as a whole

// (rows, columns), of which rows begin `stride` numbers apart, to (columns, rows), whose rows are `to_stride` apart.
void turn_plainly(const Number *from, index_t stride, Number *to, index_t to_stride, index_t rows, index_t columns) {
  for (index_t j = 0; j < columns; j++)
    for (index_t i = 0; i < rows; i++) to[j * to_stride + i] = from[i * stride + j];
}

#if defined(__AVX512F__)
// The same of 16 rows and columns: in pairs of rows, in fours, and then by the quarters of a vector.
void turn_tile(const Number *from, index_t stride, Number *to, index_t to_stride) {
  __m512 a[tile], b[tile];
  for (int i = 0; i < tile; i++) a[i] = _mm512_loadu_ps(from + i * stride);
  for (int i = 0; i < tile; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < tile; i += 4)
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i + j]), _mm512_castps_pd(b[i + j + 2])));
      a[i + 2 * j + 1] =
          _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i + j]), _mm512_castps_pd(b[i + j + 2])));
    }
  // Quarter q of a[i + j] now holds column 4q + j of rows i .. i + 3. 0x88 takes quarters 0 and 2, 0xdd 1 and 3.
  for (int j = 0; j < 4; j++) {
    const __m512 even = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 even_below = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88),
                 odd_below = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(even, even_below, 0x88));
    _mm512_storeu_ps(to + (4 + j) * to_stride, _mm512_shuffle_f32x4(odd, odd_below, 0x88));
    _mm512_storeu_ps(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(even, even_below, 0xdd));
    _mm512_storeu_ps(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(odd, odd_below, 0xdd));
  }
}
#else
void turn_tile(const Number *from, index_t stride, Number *to, index_t to_stride) {
  turn_plainly(from, stride, to, to_stride, tile, tile);
}
#endif

// Matrices with few rows, or few columns, known to the compiler.
template <int rows>
void turn_rows(const Number *__restrict from, Number *__restrict to, index_t columns) {
  for (index_t j = 0; j < columns; j++)
    for (int i = 0; i < rows; i++) to[j * rows + i] = from[i * columns + j];
}
template <int columns>
void turn_columns(const Number *__restrict from, Number *__restrict to, index_t rows) {
  for (index_t i = 0; i < rows; i++)
    for (int j = 0; j < columns; j++) to[j * rows + i] = from[i * columns + j];
}

struct Job {
  const Number *from;
  Number *to;
  index_t n, rows, columns;
  int tasks;

  // Of one matrix, columns [first, last).
  void turn_part(const Number *from, Number *to, index_t first, index_t last) const {
    for (index_t j = first; j < last; j += tile) {
      const index_t width = last - j < tile ? last - j : tile;
      for (index_t i = 0; i < rows; i += tile) {
        const index_t height = rows - i < tile ? rows - i : tile;
        if (width == tile && height == tile)
          turn_tile(from + i * columns + j, columns, to + j * rows + i, rows);
        else
          turn_plainly(from + i * columns + j, columns, to + j * rows + i, rows, height, width);
      }
    }
  }

  void turn_whole(const Number *from, Number *to) const {
    if (rows == 2) return turn_rows<2>(from, to, columns);
    if (rows == 3) return turn_rows<3>(from, to, columns);
    if (rows == 4) return turn_rows<4>(from, to, columns);
    if (columns == 2) return turn_columns<2>(from, to, rows);
    if (columns == 3) return turn_columns<3>(from, to, rows);
    if (columns == 4) return turn_columns<4>(from, to, rows);
    turn_part(from, to, 0, columns);
  }

  // A task turns some of the matrices, or of each some of the columns.
  static void run(void *self, int i) {
    const Job &job = *(const Job *)self;
    const index_t size = job.rows * job.columns;
    const bool by_columns = job.n < job.tasks && job.rows > few && job.columns > few;
    if (!by_columns) {
      for (index_t m = job.n * i / job.tasks; m < job.n * (i + 1) / job.tasks; m++)
        job.turn_whole(job.from + m * size, job.to + m * size);
      return;
    }
    const index_t packs = (job.columns + tile - 1) / tile, last = packs * (i + 1) / job.tasks * tile;
    for (index_t m = 0; m < job.n; m++)
      job.turn_part(job.from + m * size, job.to + m * size, packs * i / job.tasks * tile,
                    last < job.columns ? last : job.columns);
  }
};

}  // namespace

// n matrices (rows, columns), one after the other, to as many (columns, rows) elsewhere.
SRU_EXPORT void turn(const void *from, void *to, index_t n, index_t rows, index_t columns, ParallelFor parallel_for,
                     int tasks) {
  Job job = {(const Number *)from, (Number *)to, n, rows, columns, tasks};
  if (parallel_for && tasks > 1) {
    parallel_for(Job::run, &job, tasks);
  } else {
    job.tasks = 1;
    Job::run(&job, 0);
  }
}
